//! The executor of a ring thread.

use std::pin::Pin;

use crate::error::{ErrorKind, StageError};

/// Runs one future to its end on the calling thread. Made on one thread, used on another: whatever it builds
/// (a ring, its files) it builds in [`LocalExecutor::block_on`].
pub trait LocalExecutor: Send + 'static {
    /// Runs `work` to its end.
    ///
    /// # Errors
    /// If the executor cannot be built; `work` was not polled then.
    fn block_on(self, work: Pin<Box<dyn Future<Output = ()> + '_>>) -> Result<(), StageError>;
}

/// A current-thread tokio runtime: for local stages that need no ring.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokioLocal;

impl LocalExecutor for TokioLocal {
    fn block_on(self, work: Pin<Box<dyn Future<Output = ()> + '_>>) -> Result<(), StageError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|error| StageError::new(ErrorKind::Io, error))?;
        tokio::task::LocalSet::new().block_on(&runtime, work);
        Ok(())
    }
}
