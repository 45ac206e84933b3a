//! Clusters made smaller, and back.
//!
//! | module | noun |
//! |---|---|
//! | [`codec`] | deflate and zstd over one cluster, contexts reused |
//! | [`policy`] | is it worth a try? From the cluster's own bytes alone |
//! | [`encode`] | an extent's data clusters: digest, compression, packing |
//!
//! # Rules
//! - A cluster's stored form is a function of its bytes, the codec and the level: a re-read produces it again, byte for byte.
//! - A cluster that does not save a sector of 512 bytes is stored as it is.
//! - Deflate is raw RFC 1951 without a zlib header, as QEMU reads it (`block/qcow2-threads.c`, `qcow2_zlib_decompress`). QEMU writes
//!   with a window of 4 KiB and asks for the same on reading, but decodes a cluster in one call into a buffer of the whole
//!   cluster, where zlib looks for matches in the output itself; the 32 KiB window that is used here is read by QEMU 7.2, by QEMU 10
//!   and with zlib-ng (`tests/foreign_readers.rs` shows it).
//! - Zstd is one frame a cluster, with magic, without checksum (qcow2.rst, "Compressed Clusters Descriptor").

pub mod codec;
pub mod encode;
pub mod policy;

pub use codec::{Codec, Compression, Decoder, Encoder};
pub use encode::{EncodeClusters, append_stored};
