//! The stages of Virta.
//!
//! Each is a plain core that works without the engine, and a thin adapter that makes it a stage.
//!
//! | stage | in | out | placement | limits |
//! |---|---|---|---|---|
//! | [`disk::read::PlanReads`] | – | parts of a raw file | one thread | the watermark's window |
//! | [`disk::read::ReadExtents`] | parts | [`extent::Classified`] | threads | a lease each |
//! | [`disk::pipe::ReadPipe`] | – | [`extent::Extent`] | one thread | a lease before each read |
//! | [`glance::Fetch`] | – | [`extent::Extent`] | network | a lease before each read, a window of ranges |
//! | [`zero::classify::Classify`] | [`extent::Extent`] | [`extent::Classified`] | cpu | none |
//! | [`compress::EncodeClusters`] | [`extent::Classified`] | the same, with records, packed | cpu | a cluster of scratch, the codec's context |
//! | [`store::Keep`] | [`extent::Classified`] | [`extent::StoredExtent`] | cpu | the store's memory |
//! | [`store::ScratchWrite`] | [`extent::StoredExtent`] | the same, in the scratch file | ring | its limit, writes in flight |
//! | [`disk::write::WriteImage`] | [`extent::Classified`] | [`extent::StoredExtent`] | ring | writes in flight, index |
//! | [`store::Collect`] | [`extent::StoredExtent`] | the same, in guest order | one thread | index, extents held |
//! | [`hash::HashLane`] | [`extent::StoredExtent`], in order | – | one thread | lags by its port |
//! | [`store::ReadAgain`] | – | [`extent::Extent`] | threads | a lease before each read |
//! | [`store::Recheck`] | [`extent::Extent`] | [`store::Rebuilt`] | cpu | the leases it keeps |
//! | [`store::Emit`] | [`store::Rebuilt`] | [`extent::Chunk`] | one thread | the layout's look-ahead |
//! | [`glance::Trickle`] | [`extent::Chunk`] | the same, never silent | network | its reserve |
//! | [`glance::Upload`] | [`extent::Chunk`] | – | network | – |
//! | [`compare::Compare`] | – | – | threads | two buffers a worker |
//!
//! Beside them: [`inspect`], which looks into images, [`batch`], which converts many, [`convert`], which joins the stages into the main job, [`download`], and [`snapshot`], which makes an image of a server.
//!
//! Formats and protocols have their sources where they are written down: [`qcow2`], [`glance`], [`openstack`].

pub mod access;
pub mod batch;
pub mod budget;
pub mod compare;
pub mod compress;
pub mod convert;
pub mod disk;
pub mod download;
pub mod error;
pub mod extent;
pub mod glance;
pub mod hash;
pub mod inspect;
pub mod magic;
pub mod openstack;
pub mod ownership;
pub mod progress;
pub mod qcow2;
pub mod read_at;
pub mod reporter;
pub mod retry;
pub mod run;
pub mod snapshot;
pub mod store;
pub mod text;
pub mod units;
pub mod watermark;
pub mod whole_file;
pub mod zero;
