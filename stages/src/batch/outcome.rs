//! What became of each image, and of all.

use serde::Serialize;

use super::Request;
use crate::{convert::Report, error::FailureKind};

/// What became of one.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Converted now.
    Done {
        /// Its report.
        report: Box<Report>,
    },
    /// An earlier run, or another one, had converted it; what was left to do is done.
    Earlier {
        /// The image.
        image: String,
    },
    /// Not a thing to convert.
    Skipped {
        /// Why.
        reason: String,
    },
    /// It failed, as often as it was tried.
    Failed {
        /// Why, with causes.
        error: String,
        /// Tries.
        tries: u32,
        /// Another command may go better.
        transient: bool,
        /// The exit code that it would have had alone.
        exit_code: u8,
    },
    /// Another run converts it.
    Held {
        /// Which, and until when.
        error: String,
    },
    /// Somebody stopped it on its way.
    Interrupted {
        /// What is left of it.
        reason: String,
    },
    /// Its turn never came.
    NotTried {
        /// Why.
        reason: String,
    },
}

impl Outcome {
    /// Is everything about it as it was asked for?
    #[must_use]
    pub const fn is_good(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Earlier { .. } | Self::Skipped { .. })
    }

    /// Its word in tables, logs and the journal.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Done { .. } => "done",
            Self::Earlier { .. } => "done earlier",
            Self::Skipped { .. } => "skipped",
            Self::Failed { .. } => "failed",
            Self::Held { .. } => "held by another run",
            Self::Interrupted { .. } => "interrupted",
            Self::NotTried { .. } => "not tried",
        }
    }

    /// Why it is as it is, where that is a question.
    #[must_use]
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Done { .. } | Self::Earlier { .. } => None,
            Self::Skipped { reason } | Self::Interrupted { reason } | Self::NotTried { reason } => Some(reason),
            Self::Failed { error, .. } | Self::Held { error } => Some(error),
        }
    }
}

/// One line of the summary.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// What was typed, or the id that a filter chose.
    pub word: String,
    /// The request, with what is different for this one.
    #[serde(skip)]
    pub request: Request,
    /// The source's id; null where there is none.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its size, bytes.
    pub bytes: Option<u64>,
    /// The new image's name.
    pub new_name: Option<String>,
    /// Its source was to go, and is gone.
    pub source_deleted: bool,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of all.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The run's name, which is in the images it made.
    pub run: String,
    /// One for each image, in the order of the plan.
    pub items: Vec<Line>,
    /// Why it ended before its time, if it did.
    pub stopped: Option<String>,
    /// Somebody interrupted it.
    pub interrupted: bool,
    /// Wall time, seconds.
    pub elapsed_s: f64,
    /// Guest bytes of what was converted now.
    pub converted_bytes: u64,
    /// Length of what was made now, bytes.
    pub made_bytes: u64,
    /// Received, bytes.
    pub fetched_bytes: u64,
    /// Sent, bytes.
    pub uploaded_bytes: u64,
    /// Resident memory at its largest, bytes.
    pub rss_peak_bytes: u64,
}

impl Summary {
    /// How many came to what is asked for.
    pub fn count(&self, wanted: impl Fn(&Outcome) -> bool) -> usize {
        self.items.iter().filter(|line| wanted(&line.outcome)).count()
    }

    /// Those that are not as they were asked for.
    pub fn left(&self) -> impl Iterator<Item = &Line> {
        self.items.iter().filter(|line| !line.outcome.is_good())
    }

    /// 0, 4 if some are not as they were asked for, 130 if it was interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.interrupted {
            return 130;
        }
        if self.left().next().is_some() { 4 } else { 0 }
    }
}

/// The exit code of one task of an engine: 0 done or already done, 75 try again, 64 what was asked for makes no sense, 65 never.
#[must_use]
pub fn task_exit_code(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Done { .. } | Outcome::Earlier { .. } | Outcome::Skipped { .. } => 0,
        Outcome::Failed { transient: true, .. }
        | Outcome::Held { .. }
        | Outcome::Interrupted { .. }
        | Outcome::NotTried { .. } => 75,
        Outcome::Failed { exit_code: 2, .. } => 64,
        Outcome::Failed { .. } => 65,
    }
}

/// Would another command go better?
pub(super) const fn is_transient(failure_kind: FailureKind) -> bool {
    matches!(failure_kind, FailureKind::Transient | FailureKind::Quota | FailureKind::Held)
}
