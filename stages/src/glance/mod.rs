//! Image data in and out of Glance.
//!
//! | module | noun |
//! |---|---|
//! | [`range`] | Content-Range, and the window of ranges in flight |
//! | [`scaler`] | how many connections fetch at once |
//! | [`body`] | a response's body, read with a watch for silence |
//! | [`connection`] | an image's bytes from any offset on, over connections that break |
//! | [`probe`] | does this image store serve ranges, really? |
//! | [`fetch`] | the source stage: N ranges in parallel, or one GET |
//! | [`trickle`] | never lets an upload fall silent |
//! | [`upload`] | the sink stage: one PUT with the exact length |
//! | [`peek`] | an image looked at here and there |
//! | [`mod@file`] | an image as [`crate::read_at::ReadAt`], for reading it back |
//!
//! What a real Glance answers, and what other stores and proxies do, is in the module docs with its source. Two
//! rules: probe, never assume (glance_store serves ranges from file and Cinder stores alone; on Ceph, Swift and S3 the
//! answer is 400, and some services answer 206 with the image's first bytes); and count every byte (a Glance worker
//! that dies in the middle leaves a status 200 and a short body).

pub mod body;
pub mod connection;
pub mod fetch;
pub mod file;
pub mod peek;
pub mod probe;
pub mod range;
pub mod scaler;
pub mod trickle;
pub mod upload;

pub use connection::Remote;
pub use fetch::Fetch;
pub use file::ImageFile;
pub use peek::Peek;
pub use trickle::Trickle;
pub use upload::{Upload, UploadReport};
