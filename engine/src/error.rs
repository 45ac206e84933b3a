//! The error at a stage's edge: which stage, what kind, and the stage's own error as its source.

use std::fmt;

use crate::cancel::Cancelled;

/// Any error a stage carries inside.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// For control flow, not for reading: what the caller may do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The run was cancelled; the cause is elsewhere.
    Cancelled,
    /// The connection, not the peer's answer.
    Network,
    /// The peer answered, and not with what was asked for.
    Remote,
    /// Input that is not what it has to be.
    InvalidData,
    /// Input that is right, but not supported.
    Unsupported,
    /// A file or device.
    Io,
    /// A budget that was set by the user or by the machine.
    Limit,
    /// Ours: an invariant is broken.
    Bug,
}

/// Why a stage ended without finishing.
#[derive(Debug)]
pub struct StageError {
    /// Name of the stage; empty until the engine fills it in.
    pub stage: String,
    /// What kind.
    pub kind: ErrorKind,
    /// The stage's own error. `Display` of this type does not print it: walk the chain.
    pub source: Option<BoxError>,
}

impl StageError {
    /// An error of `kind` with its facts in `source`.
    pub fn new(kind: ErrorKind, source: impl Into<BoxError>) -> Self {
        Self { stage: String::new(), kind, source: Some(source.into()) }
    }

    /// Shorthand for [`ErrorKind::Bug`]: an invariant that does not hold.
    pub fn bug(what: impl Into<BoxError>) -> Self {
        Self::new(ErrorKind::Bug, what)
    }
}

impl fmt::Display for StageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            ErrorKind::Cancelled => write!(f, "stage {} was cancelled", self.stage),
            _ => write!(f, "stage {}", self.stage),
        }
    }
}

impl std::error::Error for StageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<Cancelled> for StageError {
    fn from(_: Cancelled) -> Self {
        Self { stage: String::new(), kind: ErrorKind::Cancelled, source: None }
    }
}
