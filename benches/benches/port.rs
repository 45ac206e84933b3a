//! What an item costs in a port, async to blocking as between fetch and classify. Items are extents of up to 2 MiB, so
//! microseconds an item are a thousandth of what hashing one takes.
#![allow(missing_docs)] // criterion's macros make undocumented items

use std::{marker::PhantomData, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::{
    CancelToken, Pipeline,
    testing::{Block, CountingSink, CountingSource, FailAt},
};

const ITEMS: u64 = 20_000;

fn port(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("port");
    group.throughput(Throughput::Elements(ITEMS)).sample_size(10);
    for workers in [0_usize, 1, 2] {
        group.bench_function(format!("source, {workers} workers, sink"), |bencher| {
            bencher.iter(|| {
                let cancel = CancelToken::new();
                let source = CountingSource { blocks: ITEMS, pool: None, emitted: Arc::default() };
                let pipeline = Pipeline::new(&cancel).network("source", source);
                let pipeline = if workers == 0 {
                    pipeline
                } else {
                    pipeline.port(16).cpu("pass", workers, || FailAt { number: None, text: "", panics: false })
                };
                let sink = || CountingSink::<Block> { received: Arc::default(), item: PhantomData };
                let running = pipeline.port(16).threads("sink", 1, sink).start(runtime.handle());
                runtime.block_on(running.join()).expect("nothing fails")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, port);
criterion_main!(benches);
