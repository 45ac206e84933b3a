//! The zero test: a cluster of zeros in cache (has to run at 40 GB/s or more), a cluster that is data (has to end at
//! once), and the scalar reference beside it.
#![allow(missing_docs)] // criterion's macros make undocumented items

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stages::zero;

fn zero_scan(criterion: &mut Criterion) {
    let zeros = vec![0_u8; 64 << 10];
    let mut early = zeros.clone();
    early[0] = 1;
    let mut late = zeros.clone();
    late[40_000] = 1;
    let mut group = criterion.benchmark_group("zero_scan");
    group.throughput(Throughput::Bytes(64 << 10));
    group.bench_function("64 KiB of zeros", |bencher| bencher.iter(|| zero::is_zero(black_box(&zeros))));
    group.bench_function("data in the first byte", |bencher| bencher.iter(|| zero::is_zero(black_box(&early))));
    group.bench_function("data in the middle", |bencher| bencher.iter(|| zero::is_zero(black_box(&late))));
    group.bench_function("64 KiB of zeros, scalar", |bencher| bencher.iter(|| zero::scan::is_zero(black_box(&zeros))));
    group.finish();
}

criterion_group!(benches, zero_scan);
criterion_main!(benches);
