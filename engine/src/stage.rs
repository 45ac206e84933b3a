//! The traits that other people implement.
//!
//! Two shapes were chosen out of three. A pure function that the engine calls ([`Transform`]) for work that
//! computes: it can be tested without a runtime and the engine runs it on as many threads as it likes. A loop that
//! owns its ports ([`Stage`], [`BlockingStage`], [`LocalStage`]) for work that waits: it can batch, keep many
//! things in flight and decide how to shut down. Rejected: a chain of `Stream`s that pull. Its boxes are
//! `Send`, which a ring's futures are not, one poller is one core, and dropping a future in the middle is no way
//! to stop a kernel that writes into its buffer.

use std::sync::Arc;

use crate::{
    cancel::CancelToken,
    cpu::Emitter,
    error::StageError,
    metrics::StageMetrics,
    port::{Inlet, Item, Outlet},
};

/// What the engine gives a stage beside its ports.
#[derive(Clone)]
pub struct StageContext {
    /// Cancels the run, or tells that it is cancelled. Ports and pools see it by themselves; a stage looks at it
    /// in waits that are neither.
    pub cancel: CancelToken,
    /// This stage's counters.
    pub metrics: Arc<StageMetrics>,
}

/// A pure function from one item to any number of items. Never blocks. One instance a worker.
pub trait Transform: Send + 'static {
    /// What it takes.
    type In: Item;
    /// What it gives.
    type Out: Item;
    /// What it knows at the end.
    type Report: Send + 'static;

    /// Handles one item. Workers take items as they come: delivery is unordered.
    ///
    /// # Errors
    /// Ends the run.
    fn apply(&mut self, item: Self::In, out: &mut Emitter<'_, Self::Out>) -> Result<(), StageError>;

    /// Called once on each worker after a true end of input; never after a cancellation.
    ///
    /// # Errors
    /// Ends the run.
    fn finish(self, out: &mut Emitter<'_, Self::Out>) -> Result<Self::Report, StageError>;
}

/// An async loop that may run on any tokio worker.
///
/// A stage receives until `Ok(None)`, then calls [`Outlet::finish`] and returns. A stage that returns `Ok` without
/// having done both cancels the run: that is a bug, not an end.
pub trait Stage: Send + 'static {
    /// What it takes; [`crate::NoInput`] for a source.
    type In: Item;
    /// What it gives; [`crate::NoOutput`] for a sink.
    type Out: Item;
    /// What it knows at the end.
    type Report: Send + 'static;

    /// Runs to the end of input.
    ///
    /// # Errors
    /// Ends the run. [`crate::Cancelled`] converts and is not counted as a failure.
    fn run(
        self,
        inlet: Inlet<Self::In>,
        outlet: Outlet<Self::Out>,
        cx: StageContext,
    ) -> impl Future<Output = Result<Self::Report, StageError>> + Send;
}

/// [`Stage`] whose future need not be `Send`: it lives and dies on one thread.
pub trait LocalStage: 'static {
    /// What it takes.
    type In: Item;
    /// What it gives.
    type Out: Item;
    /// What it knows at the end.
    type Report: Send + 'static;

    /// Runs to the end of input. Returns only when no operation is in flight any more (I4).
    ///
    /// # Errors
    /// As [`Stage::run`].
    fn run(
        self,
        inlet: Inlet<Self::In>,
        outlet: Outlet<Self::Out>,
        cx: StageContext,
    ) -> impl Future<Output = Result<Self::Report, StageError>>;
}

/// A loop that may block its thread.
pub trait BlockingStage: Send + 'static {
    /// What it takes.
    type In: Item;
    /// What it gives.
    type Out: Item;
    /// What it knows at the end.
    type Report: Send + 'static;

    /// Runs to the end of input, with the ports' `_blocking` calls.
    ///
    /// # Errors
    /// As [`Stage::run`].
    fn run(self, inlet: Inlet<Self::In>, outlet: Outlet<Self::Out>, cx: StageContext) -> Result<Self::Report, StageError>;
}
