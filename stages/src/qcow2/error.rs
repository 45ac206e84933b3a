//! What can be wrong with a qcow2 image, or with the wish to make one.

use std::io;

/// A qcow2 image that cannot be read, or a disk that cannot become one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// The first four bytes are not `QFI\xfb`.
    #[error("no qcow2 image: magic is {found:#010x}, expected 0x514649fb")]
    Magic {
        /// What stands there.
        found: u32,
    },
    /// A header field holds what the format does not allow or QEMU does not accept.
    #[error("qcow2 header: {field} is {value:#x}, {rule}")]
    Header {
        /// The field's name in qcow2.rst.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be.
        rule: &'static str,
    },
    /// A feature that this reader does not know how to read.
    #[error("qcow2 image uses {feature}, which is not supported here")]
    Unsupported {
        /// The feature.
        feature: &'static str,
    },
    /// A table entry that is not allowed.
    #[error("{table} entry {index} is {entry:#018x}: {rule}")]
    Entry {
        /// `L1`, `L2` or `refcount table`.
        table: &'static str,
        /// Index into the table, or the guest cluster for an L2 entry.
        index: u64,
        /// The entry.
        entry: u64,
        /// What it has to be.
        rule: &'static str,
    },
    /// The disk is larger than the cluster size can describe.
    #[error(
        "virtual size {virtual_bytes} is too large for {cluster_bytes}-byte clusters: at most {limit_bytes}; a larger --cluster-size allows more"
    )]
    TooLarge {
        /// Virtual size, bytes.
        virtual_bytes: u64,
        /// Cluster size, bytes.
        cluster_bytes: u64,
        /// The largest virtual size of that cluster size, bytes.
        limit_bytes: u64,
    },
    /// Refcount on disk and references in the tables differ, or the like; see [`super::verify`].
    #[error("host cluster {host_cluster:#x}: {what}")]
    Corrupt {
        /// The cluster's index in the file.
        host_cluster: u64,
        /// What is wrong.
        what: String,
    },
    /// A read past the disk's end was asked for.
    #[error("read at guest offset {guest_offset:#x} of {bytes} bytes passes the virtual size {virtual_bytes:#x}")]
    PastEnd {
        /// Start of the read.
        guest_offset: u64,
        /// Its length.
        bytes: u64,
        /// The disk's size.
        virtual_bytes: u64,
    },
    /// A compressed cluster that is none.
    #[error("compressed cluster of guest offset {guest_offset:#x} at host offset {host_offset:#x}")]
    Stream {
        /// Which guest bytes were asked for.
        guest_offset: u64,
        /// Where it lies.
        host_offset: u64,
        /// What is wrong with it.
        #[source]
        source: crate::compress::codec::BadStream,
    },
    /// The storage below failed, or is shorter than the tables say.
    #[error("read at host offset {host_offset:#x}")]
    Io {
        /// Where.
        host_offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}
