//! The main job: how the stages are joined into a conversion, what it costs, what it reports.
//!
//! ```text
//! to a file:   plan ── read x N (classify) ──> (encode x N) ──> write (ring) ──> collect ──> hash
//!              fetch ── classify x N ────────>
//! to a stream: fetch ── classify x N ──> keep x N ──> (scratch) ──> collect ──> hash           survey
//!                                                                      └─ survey ─> layout
//!              (again ── recheck x N) ──> emit ──> (trickle) ──> upload, pipe                     emission
//! ```
//! The hash lane reads what the store keeps or what was written, lags as it has to, and ends while the upload runs. A
//! conversion counts as done only after it agreed. An emission that fails is made again from the store: its token is a child of the
//! run's.
//!
//! | module | noun |
//! |---|---|
//! | [`as_is`] | a local file becomes a new image, byte by byte |
//! | [`budget`] | how `--memory` is split, and what the machine has |
//! | [`options`] | what can be asked for |
//! | [`report`] | what is told afterwards: a contract |
//! | [`error`] | why it failed, and the exit code that goes with it |
//! | [`source`] | what is converted, checked before anything is made |
//! | [`names`] | names of new images: who has them already |
//! | [`job`] | a conversion under way: survey and emission |
//! | [`to_file`] | a source becomes a local file |
//! | [`to_glance`] | a source becomes a new image in Glance |
//! | `drive` | a conversion from its first look to its end |
//! | `maker` | what ownership's rules say, carried out |
//! | `sending` | an image's way into Glance, with its retries |
//! | [`to_stream`] | a source becomes bytes on a pipe |
//! | [`readback`] | what was made is read, decoded and compared |
//! | [`retire`] | the source goes |

pub mod as_is;
pub mod budget;
mod drive;
pub mod error;
pub mod job;
mod maker;
pub mod names;
pub mod options;
pub mod readback;
pub mod report;
pub mod retire;
mod sending;
pub mod source;
pub mod to_file;
pub mod to_glance;
pub mod to_stream;

pub use budget::Budget;
pub use error::JobError;
pub use job::Job;
pub use maker::{ThisRun, run_of};
pub use options::{After, FoundServer, Notices, Options, Verify};
pub use report::Report;
pub use source::Source;
pub use to_glance::Conversion;
