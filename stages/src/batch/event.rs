//! What a batch tells while it runs.

use std::sync::Arc;

use super::{Outcome, shares::Grant};
use crate::progress::Progress;

/// What happens, as it happens. Indices are those of the plan's entries.
#[derive(Debug)]
pub enum Event<'a> {
    /// A conversion begins.
    Started {
        /// Which.
        index: usize,
        /// Its part of the budgets.
        grant: Grant,
        /// Its counters, live.
        progress: &'a Progress,
        /// The first try is 1.
        tries: u32,
    },
    /// It has something to say.
    Note {
        /// Which.
        index: usize,
        /// A line.
        line: &'a str,
        /// It goes into its report's warnings.
        warning: bool,
    },
    /// It failed, or is held, and comes again later.
    Later {
        /// Which.
        index: usize,
        /// Why.
        error: &'a str,
    },
    /// It is over.
    Ended {
        /// Which.
        index: usize,
        /// What became of it.
        outcome: &'a Outcome,
        /// Seconds.
        elapsed_s: f64,
    },
    /// Something about all of it.
    Told {
        /// A line.
        line: &'a str,
    },
}

/// What is told of events.
pub type Listener = Arc<dyn Fn(&Event<'_>) + Send + Sync>;
