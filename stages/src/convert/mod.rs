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
//! | [`options`] | what can be asked for |
//! | [`report`] | what is told afterwards: a contract |
//! | [`source`] | what is converted, checked before anything is made |
//! | [`names`] | names of new images: who has them already |
//! | [`job`] | a conversion under way |
//! | `reading` | the first part of every pipeline |
//! | `survey` | the source read once, and the image emitted out of that |
//! | [`to_file`] | a source becomes a local file |
//! | [`to_glance`] | a source becomes a new image in Glance |
//! | `drive` | a conversion from its first look to its end |
//! | `maker` | what ownership's rules say, carried out |
//! | `sending` | an image's way into Glance, with its retries |
//! | [`to_stream`] | a source becomes bytes on a pipe |
//! | [`readback`] | what was made is read, decoded and compared |
//! | [`retire`] | the source goes |

pub mod as_is;
mod drive;
pub mod job;
mod maker;
pub mod names;
pub mod options;
pub mod readback;
mod reading;
pub mod report;
pub mod retire;
pub mod source;
mod survey;
pub mod to_file;
pub mod to_glance;
pub mod to_stream;
mod transfer;

pub use job::Job;
pub use options::{After, Options, Verify};
pub use report::Report;
pub use source::Source;
pub use to_glance::Conversion;
