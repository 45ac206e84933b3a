//! A started run: its threads, its reports, its outcome.

use std::{any::Any, sync::Arc, thread::JoinHandle};

use crate::{
    cancel::{CancelToken, Cause},
    error::StageError,
    metrics::{MetricsSnapshot, Registry, StageMetrics},
};

/// Why a run did not finish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A stage failed; it is the first that did.
    #[error("{error}")]
    Failed {
        /// The first failure.
        #[source]
        error: StageError,
        /// Failures that came after it, mostly its consequences.
        later: Vec<StageError>,
    },
    /// Somebody asked for it.
    #[error("{0}")]
    Cancelled(String),
}

/// A stage's report, there once the stage has finished.
pub struct ReportHandle<R>(pub(crate) async_channel::Receiver<R>, pub(crate) usize);

impl<R> ReportHandle<R> {
    /// Waits for the reports of all workers of the stage; `None` if one of them did not finish.
    pub async fn all(self) -> Option<Vec<R>> {
        let mut reports = Vec::with_capacity(self.1);
        for _ in 0..self.1 {
            reports.push(self.0.recv().await.ok()?);
        }
        Some(reports)
    }

    /// Waits for the report of a stage with one worker; `None` if it did not finish.
    pub async fn one(self) -> Option<R> {
        self.all().await?.pop()
    }
}

/// What a worker says when it is over.
pub(crate) struct Over;

/// A run in progress. Dropping it cancels the run but does not wait: use [`Running::join`].
pub struct Running {
    pub(crate) cancel: CancelToken,
    pub(crate) registry: Registry,
    pub(crate) over: async_channel::Receiver<Over>,
    pub(crate) workers: usize,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) joined: bool,
}

impl Running {
    /// Counters of all stages, live.
    #[must_use]
    pub fn metrics(&self) -> Vec<Arc<StageMetrics>> {
        self.registry.all()
    }

    /// Waits until every stage has returned and every thread is joined.
    ///
    /// # Errors
    /// [`RunError`] with the first cause, whoever was told of the cancellation first.
    pub async fn join(mut self) -> Result<Vec<MetricsSnapshot>, RunError> {
        for _ in 0..self.workers {
            if self.over.recv().await.is_err() {
                break;
            }
        }
        for thread in self.threads.drain(..) {
            // Its last act was to report; panics were caught before.
            let _ = thread.join();
        }
        self.joined = true;
        if !self.cancel.is_cancelled() {
            return Ok(self.registry.all().iter().map(|metrics| metrics.snapshot()).collect());
        }
        Err(match self.cancel.take_cause() {
            (Some(Cause::Failed(error)), later) => RunError::Failed { error, later },
            (Some(Cause::Requested(why)), _) => RunError::Cancelled(why),
            (Some(abandoned @ Cause::Abandoned { .. }), later) => {
                RunError::Failed { error: StageError::bug(abandoned.to_string()), later }
            }
            // A run that shares its token with another one, which has told the cause: its own failure, if it has one, may be what
            // the other only felt.
            (None, mut later) if !later.is_empty() => RunError::Failed { error: later.remove(0), later },
            (None, _) => RunError::Cancelled("cancelled with another part of the job".to_owned()),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.joined {
            self.cancel.cancel(Cause::Requested("the run was dropped".to_owned()));
        }
    }
}

/// A caught panic as an error.
pub(crate) fn panic_error(payload: &(dyn Any + Send)) -> StageError {
    let text = payload.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    StageError::bug(format!("panic: {}", text.unwrap_or_else(|| "of unknown kind".to_owned())))
}
