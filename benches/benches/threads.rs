//! What a write costs that is handed to the threads that call `pwrite`: OS threads that meet without an async end.
//!
//! Both ways, so that the reason for the one that is used stays measured: `cargo bench -p virta-benches --bench threads`.
#![allow(missing_docs)] // criterion's macros make undocumented items

use std::thread;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use crossbeam::channel;

const ITEMS: u64 = 200_000;
/// As `disk::PwriteQueue` has it.
const DEPTH: usize = 16;
const THREADS: usize = 2;

fn handed_over(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a write handed to two threads");
    group.throughput(Throughput::Elements(ITEMS)).sample_size(20);
    group.bench_function("crossbeam", |bencher| {
        bencher.iter(|| {
            let (sender, receiver) = channel::bounded::<u64>(DEPTH);
            thread::scope(|scope| {
                for receiver in vec![receiver; THREADS] {
                    scope.spawn(move || receiver.iter().fold(0, u64::wrapping_add));
                }
                (0..ITEMS).for_each(|item| sender.send(item).expect("somebody listens"));
                drop(sender);
            });
        });
    });
    group.bench_function("async-channel", |bencher| {
        bencher.iter(|| {
            let (sender, receiver) = async_channel::bounded::<u64>(DEPTH);
            thread::scope(|scope| {
                for receiver in vec![receiver; THREADS] {
                    scope.spawn(move || {
                        let mut sum = 0_u64;
                        while let Ok(item) = receiver.recv_blocking() {
                            sum = sum.wrapping_add(item);
                        }
                        sum
                    });
                }
                (0..ITEMS).for_each(|item| sender.send_blocking(item).expect("somebody listens"));
                drop(sender);
            });
        });
    });
    group.finish();
}

criterion_group!(benches, handed_over);
criterion_main!(benches);
