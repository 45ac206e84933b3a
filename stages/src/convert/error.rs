//! Why a conversion failed, and the exit code that goes with it.

use engine::{ErrorKind, RunError, StageError};

use super::budget::MemoryTooSmall;
use crate::{
    disk::{OutputError, SourceError, UringDenied},
    hash::HashMismatch,
    qcow2::Qcow2Error,
};

/// A conversion that did not happen. Nothing half-made is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The local source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The local destination.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Disk and cluster size do not go together.
    #[error(transparent)]
    Format(#[from] Qcow2Error),
    /// io_uring was insisted on.
    #[error(transparent)]
    Uring(#[from] UringDenied),
    /// The budget.
    #[error(transparent)]
    Memory(#[from] MemoryTooSmall),
    /// A stage failed.
    #[error("conversion stopped: {stage} failed", stage = .0.stage)]
    Stage(#[source] StageError),
    /// Somebody stopped it.
    #[error("{0}")]
    Interrupted(String),
    /// Source and destination do not go together, or the request makes no sense.
    #[error("{0}")]
    Usage(String),
    /// It cannot be done as things are; the text says what to do.
    #[error("{0}")]
    Refused(String),
}

impl From<RunError> for JobError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Failed { error, .. } => Self::Stage(error),
            RunError::Cancelled(why) => Self::Interrupted(why),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl JobError {
    /// Exit code: 1 failed, 2 usage, 3 verification failed, 130 interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Memory(_) | Self::Uring(_) => 2,
            Self::Output(OutputError::Exists { .. } | OutputError::Extension { .. } | OutputError::Device { .. }) => 2,
            Self::Output(OutputError::Kind { .. }) => 2,
            Self::Interrupted(_) => 130,
            Self::Stage(error) if Self::is_verification(error) => 3,
            _ => 1,
        }
    }

    fn is_verification(error: &StageError) -> bool {
        error.kind == ErrorKind::InvalidData && error.source.as_ref().is_some_and(|source| source.is::<HashMismatch>())
    }
}
