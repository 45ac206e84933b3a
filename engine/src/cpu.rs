//! Runs a [`Transform`] as a blocking loop.

use crate::{
    error::StageError,
    port::{Inlet, Item, Outlet},
    stage::{BlockingStage, StageContext, Transform},
};

/// Where a transform puts its results; waits for room.
pub struct Emitter<'a, T: Item>(&'a Outlet<T>);

impl<T: Item> Emitter<'_, T> {
    /// Passes an item on.
    ///
    /// # Errors
    /// If the run is cancelled.
    pub fn emit(&mut self, item: T) -> Result<(), StageError> {
        Ok(self.0.send_blocking(item)?)
    }
}

/// A transform with the loop around it.
pub(crate) struct Worker<T>(pub(crate) T);

impl<T: Transform> BlockingStage for Worker<T> {
    type In = T::In;
    type Out = T::Out;
    type Report = T::Report;

    fn run(mut self, inlet: Inlet<T::In>, outlet: Outlet<T::Out>, _: StageContext) -> Result<T::Report, StageError> {
        let mut emitter = Emitter(&outlet);
        while let Some(item) = inlet.recv_blocking()? {
            self.0.apply(item, &mut emitter)?;
        }
        let report = self.0.finish(&mut emitter)?;
        outlet.finish();
        Ok(report)
    }
}
