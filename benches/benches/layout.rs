//! The layout of an 80 GiB disk: nearly all zeros, dense, and alternating (the worst case for tables).
#![allow(missing_docs)] // criterion's macros make undocumented items

use criterion::{Criterion, criterion_group, criterion_main};
use stages::{
    extent::Record,
    qcow2::{ClusterIndex, Geometry, Layout, StreamWriter},
    units::ClusterBits,
};

fn layout(criterion: &mut Criterion) {
    let geometry = Geometry::new(80 << 30, ClusterBits::DEFAULT).expect("80 GiB fit");
    let clusters = geometry.guest_clusters();
    let map = |period: u64, count: u64| {
        let mut index = ClusterIndex::new();
        let record = Record { stored_bytes: 65536, digest: [0; 4] };
        (0..clusters).filter(|cluster| cluster % period < count).for_each(|cluster| index.push(cluster, record, true));
        index.complete();
        index
    };
    let cases = [("nearly all zeros", map(20_000, 16)), ("dense", map(1 << 12, 1 << 12)), ("alternating", map(2, 1))];
    let mut group = criterion.benchmark_group("layout");
    group.sample_size(10);
    for (name, map) in &cases {
        group.bench_function(format!("plan, {name}"), |bencher| {
            bencher.iter(|| Layout::plan(geometry, map, None).expect("it fits"))
        });
        let layout = Layout::plan(geometry, map, None).expect("it fits");
        group.bench_function(format!("metadata, {name}"), |bencher| {
            bencher.iter(|| StreamWriter::new(&layout, map).metadata().map(|piece| piece.len()).sum::<usize>());
        });
    }
    group.finish();
}

criterion_group!(benches, layout);
criterion_main!(benches);
