//! An outsider's own stage between two others: at most 40 lines, counted below.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{marker::PhantomData, sync::Arc};

use engine::{
    BufferPool, CancelToken, Emitter, Pipeline, StageError, Transform,
    testing::{Block, CountingSink, CountingSource, assert_conserves},
};

// begin: the outsider's stage
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

async fn histogram_of(source: CountingSource, cancel: &CancelToken) -> u64 {
    let (pipeline, histograms) =
        Pipeline::new(cancel).network("source", source).cpu_reporting("histogram", 2, || Histogram([0; 256]));
    let sink = pipeline.threads("sink", 1, || CountingSink::<Block> { received: Arc::default(), item: PhantomData });
    sink.start(&tokio::runtime::Handle::current()).join().await.unwrap();
    histograms.all().await.unwrap().iter().map(|histogram| histogram[0]).sum()
}
// end

#[tokio::test(flavor = "multi_thread")]
async fn a_block_histogram_fits_between_two_stages_in_forty_lines() {
    let cancel = CancelToken::new();
    let pool = BufferPool::new(8, 4096, 4096, &cancel);
    let source = CountingSource { blocks: 100, pool: Some(pool.clone()), emitted: Arc::default() };
    assert_eq!(histogram_of(source, &cancel).await, 100 * 4096);
    assert_conserves(&pool);
    let text = include_str!("embedding.rs");
    let stage = text.split("// begin").nth(1).unwrap().split("// end").next().unwrap();
    assert!(stage.lines().count() <= 40, "{} lines", stage.lines().count());
}
