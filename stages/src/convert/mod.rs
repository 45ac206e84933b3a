//! The main job: how the stages are joined into a conversion, what it costs, what it reports.
//!
//! ```text
//! to a file:  plan ── read x N (classify) ──> write (ring) ──> collect ──> hash
//!             fetch ── classify x N ────────>
//! to Glance:  fetch ── classify x N ──> keep x N ──> collect ──> hash            survey
//!                                                       └─ survey ─> layout ─> emit ──> upload
//! ```
//! The hash lane reads what the store keeps or what was written, lags as it has to, and ends while the upload runs. A
//! conversion counts as done only after it agreed.
//!
//! | module | noun |
//! |---|---|
//! | [`budget`] | how `--memory` is split, and what the machine has |
//! | [`options`] | what can be asked for |
//! | [`report`] | what is told afterwards: a contract |
//! | [`error`] | why it failed, and the exit code that goes with it |
//! | [`source`] | what is converted, checked before anything is made |
//! | [`to_file`] | a source becomes a local file |
//! | [`to_glance`] | a source becomes a new image in Glance |

pub mod budget;
pub mod error;
pub mod options;
pub mod report;
pub mod source;
pub mod to_file;
pub mod to_glance;

pub use budget::Budget;
pub use error::JobError;
pub use options::{Notices, Options};
pub use report::Report;
pub use source::Source;
