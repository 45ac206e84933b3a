//! SHA-512 over data, over zero bytes as AWS-LC hashes them, and over zeros that are given as a length.
#![allow(missing_docs)] // criterion's macros make undocumented items

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stages::hash::sha512::Sha512;
use virta_benches::noise;

const BYTES: usize = 2 << 20;

fn sha512(criterion: &mut Criterion) {
    let (data, zeros) = (noise(BYTES, 5), vec![0_u8; BYTES]);
    let mut group = criterion.benchmark_group("sha512");
    group.throughput(Throughput::Bytes(BYTES as u64)).sample_size(20);
    let mut run = |name: &str, work: &dyn Fn(&mut Sha512)| {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut state = Sha512::new();
                work(&mut state);
                black_box(state.finish())
            });
        });
    };
    run("2 MiB of data", &|state| state.update(&data));
    run("2 MiB of zero bytes", &|state| state.update(&zeros));
    run("2 MiB of zeros as a length", &|state| state.update_zeros(BYTES as u64));
    group.finish();
}

criterion_group!(benches, sha512);
criterion_main!(benches);
