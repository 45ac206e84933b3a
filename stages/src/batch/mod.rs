//! Many images at once: a plan, one set of budgets for all, a journal, and an answer for each at the end.
//!
//! ```text
//! requests ─┐                        ┌─ conversion ─┐
//! filters ┴> plan ──> queue ──> shares: memory, connections, workers, scratch
//!             ▲                    └─ conversion ─┘ ──> outcome ──> journal, events, summary
//!     one list of images, journal            │ again at the end · held by another run · stop
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`request`] | one thing that is asked for: an image, its new name, its own flags |
//! | [`list`] | requests out of lines, CSV or JSON |
//! | [`select`] | requests out of what the project has |
//! | [`listing`] | what the project has |
//! | [`plan`] | what becomes of each request, told before anything is done |
//! | [`shares`] | the budgets, and each conversion's part of them |
//! | [`journal`] | what happened, line by line, for the run that comes after a kill |
//! | [`run`] | the runner: a plain type, with a callback for events |
//! | [`outcome`] | what became of each, and of all |
//!
//! # Words
//! - *Request*: what the user typed. *Entry*: a request with its image and a verdict. *Outcome*: what became of it.
//! - *Held*: another run, here or elsewhere, has claimed the source ([`crate::ownership`]).
//!
//! # Invariants
//! - B1 The grants of all that run are never more than the budgets, and each has at least what a conversion needs.
//! - B2 A failure of one entry changes nothing for another, but for those that would meet the same: a full quota, refused credentials.
//! - B3 The truth is in Glance. The journal only saves work and keeps names; without it the same command ends the same.
//! - B4 A source goes only by the rules of [`crate::convert::retire`]. The batch adds none of its own and takes none away.
//!
//! # Decisions
//! - 2026-11-24 Budgets are divided when a conversion begins, not lent while it runs. A common pool of leases was looked at: two
//!   conversions that both hold leases in their windows and wait for the one that carries the oldest extent would wait for ever, and a
//!   common count of connections has the same fault where two images are compared. Parts that are fixed cannot deadlock; what a small
//!   image does not need stays for the next, and the last ones to run get larger parts.
//! - 2026-11-24 Half of the slots begin with the largest image, half with the smallest: the largest ones decide when the whole ends
//!   (Graham's longest-first rule), and small ones do not wait behind them. Where sources are deleted and the quota is near, the smallest go first: each frees room for the next.
//!
//! `stages/examples/batch.rs` embeds it.

mod attempt;
pub mod event;
pub mod journal;
pub mod list;
pub mod listing;
pub mod outcome;
pub mod plan;
pub mod request;
pub mod run;
pub mod select;
pub mod shares;

pub use event::Event;
pub use journal::Journal;
pub use listing::Listing;
pub use outcome::{Outcome, Summary};
pub use plan::{Entry, Plan, Verdict};
pub use request::Request;
pub use run::Batch;
