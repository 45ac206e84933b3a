//! SHA-512 over data, as AWS-LC alone hashes it and as this processor does it best, over zero bytes, and over zeros that are given as a length.
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
    let run =
        |group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>, name: &str, work: &dyn Fn(&mut Sha512)| {
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let mut state = Sha512::new();
                    work(&mut state);
                    black_box(state.finish())
                });
            });
        };
    group.bench_function("2 MiB of data, AWS-LC alone", |bencher| {
        bencher.iter(|| black_box(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA512, &data)));
    });
    run(&mut group, "2 MiB of data", &|state| state.update(&data));
    run(&mut group, "2 MiB of zero bytes", &|state| state.update(&zeros));
    run(&mut group, "2 MiB of zeros as a length", &|state| state.update_zeros(BYTES as u64));
    group.finish();
}

criterion_group!(benches, sha512);
criterion_main!(benches);
