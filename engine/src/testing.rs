//! Stages for tests of stages: sources that count, sinks that stall, links that fail, and asserts on what must
//! balance afterwards.

use std::{
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use crate::{
    BlockingStage, BufferPool, ErrorKind, Inlet, Item, Lease, LocalStage, NoInput, NoOutput, Outlet, Stage, StageContext,
    StageError, Transform, cpu::Emitter,
};

/// A numbered block, with or without a lease.
#[derive(Debug)]
pub struct Block {
    /// 0, 1, 2, …
    pub number: u64,
    /// Its buffer.
    pub lease: Option<Lease>,
}

impl Item for Block {
    fn bytes(&self) -> u64 {
        self.lease.as_ref().map_or(0, |lease| lease.len() as u64)
    }
}

/// Emits numbered blocks and counts them in a shared place.
pub struct CountingSource {
    /// How many to emit.
    pub blocks: u64,
    /// Where leases come from; `None` for blocks without.
    pub pool: Option<BufferPool>,
    /// Blocks that left this source (the send has returned).
    pub emitted: Arc<AtomicU64>,
}

impl Stage for CountingSource {
    type In = NoInput;
    type Out = Block;
    type Report = u64;

    async fn run(self, _: Inlet<NoInput>, outlet: Outlet<Block>, cx: StageContext) -> Result<u64, StageError> {
        for number in 0..self.blocks {
            let lease = match &self.pool {
                Some(pool) => Some(pool.acquire_for(&cx.metrics).await?),
                None => None,
            };
            outlet.send(Block { number, lease }).await?;
            self.emitted.fetch_add(1, SeqCst);
        }
        outlet.finish();
        Ok(self.blocks)
    }
}

/// Passes blocks through and fails when one of a given number comes by.
pub struct FailAt {
    /// The block that it fails at; `None` for never.
    pub number: Option<u64>,
    /// The text of the error.
    pub text: &'static str,
    /// Panics instead of returning an error.
    pub panics: bool,
}

impl Transform for FailAt {
    type In = Block;
    type Out = Block;
    type Report = ();

    fn apply(&mut self, block: Block, out: &mut Emitter<'_, Block>) -> Result<(), StageError> {
        if Some(block.number) == self.number {
            assert!(!self.panics, "{}", self.text);
            return Err(StageError::new(ErrorKind::InvalidData, self.text));
        }
        out.emit(block)
    }

    fn finish(self, _: &mut Emitter<'_, Block>) -> Result<(), StageError> {
        Ok(())
    }
}

/// Receives nothing until it is told to, then everything. Holds no item while it stalls.
pub struct StallingSink {
    /// Receiving starts when this says so, or when the run is cancelled.
    pub gate: tokio::sync::oneshot::Receiver<()>,
    /// Blocks received.
    pub received: Arc<AtomicU64>,
}

impl LocalStage for StallingSink {
    type In = Block;
    type Out = NoOutput;
    type Report = u64;

    async fn run(self, inlet: Inlet<Block>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<u64, StageError> {
        let _ = cx.cancel.guard(self.gate).await?;
        while inlet.recv().await?.is_some() {
            self.received.fetch_add(1, SeqCst);
        }
        outlet.finish();
        Ok(self.received.load(SeqCst))
    }
}

/// Receives everything and drops it.
pub struct CountingSink<T> {
    /// Items received.
    pub received: Arc<AtomicU64>,
    /// What it takes.
    pub item: PhantomData<fn() -> T>,
}

impl<T: Item> BlockingStage for CountingSink<T> {
    type In = T;
    type Out = NoOutput;
    type Report = u64;

    fn run(self, inlet: Inlet<T>, outlet: Outlet<NoOutput>, _: StageContext) -> Result<u64, StageError> {
        while inlet.recv_blocking()?.is_some() {
            self.received.fetch_add(1, SeqCst);
        }
        outlet.finish();
        Ok(self.received.load(SeqCst))
    }
}

/// All leases of a finished run are back (I3).
///
/// # Panics
/// If one is not.
pub fn assert_conserves(pool: &BufferPool) {
    assert_eq!(pool.available(), pool.count(), "leases lost (I3)");
}
