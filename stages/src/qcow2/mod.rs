//! qcow2: the format, two writers and a reader.
//!
//! Nothing here does I/O of its own: the reader speaks to [`crate::read_at::ReadAt`], the writers produce
//! pieces of the file with their host offsets. The authority on bytes is QEMU: `docs/interop/qcow2.rst` for
//! the format, `block/qcow2.h` for limits, `block/qcow2-refcount.c` for what `qemu-img check` finds.
//!
//! | module | noun |
//! |---|---|
//! | [`mod@format`] | the header as it lies on disk, field by field with offsets asserted |
//! | [`entry`] | words of the L1, L2 and refcount tables |
//! | [`header`] | a validated header |
//! | [`cluster_map`] | which guest clusters hold data, sparse |
//! | [`index`] | what the survey remembers of each data cluster |
//! | [`packing`] | where stored clusters go: plain ones aligned, compressed ones byte after byte |
//! | [`layout`] | from that map to the place of every byte: a pure function |
//! | [`tables`] | the bytes of L1, L2 and refcount tables, for either writer |
//! | [`stream_writer`] | the file strictly forward, metadata first, length known before byte 0 |
//! | [`arrival`] | the file in one pass, clusters in order of arrival, tables last, header at the very end |
//! | [`reader`] | guest bytes and mappings back out |
//! | [`verify`] | refcounts against reachability, the counterpart of `qemu-img check` |
//! | [`whole`] | is everything there that the tables point to? |
//!
//! What is emitted: version 3, header length 112, 16-bit refcounts, no feature bit but the one of zstd where it is used, no
//! backing file, no snapshot; every entry COPIED but those of compressed clusters, and every refcount 1 but theirs. OpenStack's format inspector refuses images with features
//! that it does not know (oslo.utils, `format_inspector.py`), and this set passes it.
//!
//! # Layout of the two files
//! ```text
//! stream: | header | refcount table | refcount blocks | L1 | L2 tables | data, in guest order |
//! file:   | header | data, in order of arrival | L2 tables | refcount blocks | refcount table | L1 |
//! ```

pub mod arrival;
pub mod cluster_map;
pub mod entry;
pub mod error;
pub mod format;
pub mod header;
pub mod index;
pub mod layout;
pub mod packing;
pub mod reader;
pub mod stream_writer;
pub mod tables;
pub mod verify;
pub mod whole;

pub use arrival::Arrival;
pub use cluster_map::ClusterMap;
pub use error::Qcow2Error;
pub use header::Header;
pub use index::ClusterIndex;
pub use layout::{Geometry, Layout};
pub use reader::{Mapping, Qcow2};
pub use stream_writer::StreamWriter;
