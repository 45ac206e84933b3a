//! A stage of an outsider, a block histogram, between two of the engine's.
//!
//! `cargo run -p virta-engine --example histogram --features testing`

use std::{marker::PhantomData, sync::Arc};

use engine::{
    BufferPool, CancelToken, Emitter, Pipeline, StageError, Transform,
    testing::{Block, CountingSink, CountingSource},
};

/// Counts how often each byte value occurs in the blocks that pass.
struct Histogram([u64; 256]);

impl Transform for Histogram {
    type In = Block;
    type Out = Block;
    type Report = [u64; 256];

    fn apply(&mut self, block: Block, out: &mut Emitter<'_, Block>) -> Result<(), StageError> {
        for &byte in block.lease.iter().flat_map(|lease| lease.iter()) {
            self.0[usize::from(byte)] += 1;
        }
        out.emit(block)
    }

    fn finish(self, _: &mut Emitter<'_, Block>) -> Result<[u64; 256], StageError> {
        Ok(self.0)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cancel = CancelToken::new();
    let pool = BufferPool::new(8, 65536, 4096, &cancel);
    let source = CountingSource { blocks: 100, pool: Some(pool), emitted: Arc::default() };
    let (pipeline, histograms) =
        Pipeline::new(&cancel).network("source", source).cpu_reporting("histogram", 2, || Histogram([0; 256]));
    let sink = pipeline.threads("sink", 1, || CountingSink::<Block> { received: Arc::default(), item: PhantomData });
    for stage in sink.start(&tokio::runtime::Handle::current()).join().await? {
        println!("{stage:?}");
    }
    let zeros: u64 = histograms.all().await.expect("the run finished").iter().map(|histogram| histogram[0]).sum();
    println!("{zeros} zero bytes");
    Ok(())
}
