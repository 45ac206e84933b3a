//! What flows between stages: runs of guest bytes, and what became of them.

use bytes::Bytes;
use engine::{Item, Lease, Slice};

use crate::units::{GuestRange, HostOffset};

/// Largest run of guest bytes that travels with data, and the size of a lease: 2 MiB, one cluster of the largest
/// size. Smaller items would drown in channel cost, larger ones hold memory without speeding anything up; see
/// `benches/benches/file_writer.rs`.
pub const EXTENT_BYTES: u64 = 2 << 20;

/// A run of guest bytes out of a source: cluster aligned, ending at a cluster boundary or at the disk's end.
#[derive(Debug)]
pub struct Extent {
    /// Which bytes. At most [`EXTENT_BYTES`] with a lease, any length without.
    pub guest: GuestRange,
    /// The bytes.
    pub payload: Payload,
}

/// The bytes of an [`Extent`].
#[derive(Debug)]
pub enum Payload {
    /// All zeros: travels as a length and holds no lease.
    Zeros,
    /// The lease's first bytes, as many as the range has.
    Bytes(Lease),
}

impl Item for Extent {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

/// What becomes of a cluster. A function of its bytes alone, never of scheduling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Reads as zeros; takes no space.
    Zero,
    /// Is stored.
    Data,
}

/// Consecutive clusters of one fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FateRun {
    /// Number of clusters, at least 1.
    pub clusters: u64,
    /// What becomes of them.
    pub fate: Fate,
}

/// An extent whose clusters have their fate.
#[derive(Debug)]
pub struct Classified {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// The fates of its clusters, from the first to the last; together they cover `guest`.
    pub runs: Vec<FateRun>,
    /// All of the extent's bytes, padded with zeros to whole clusters; `None` where every cluster is zero.
    pub payload: Option<Slice>,
}

impl Item for Classified {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

/// Where the bytes of a run are now.
#[derive(Clone, Debug)]
pub enum Place {
    /// Nowhere: they are zeros.
    Zeros,
    /// In the qcow2 file, contiguous.
    Host(HostOffset),
    /// In the cluster store: whole clusters.
    Memory(Bytes),
}

/// A part of an extent that is in one place.
#[derive(Clone, Debug)]
pub struct PlacedRun {
    /// Which guest bytes; not padded, so the disk's last run may end inside a cluster.
    pub guest: GuestRange,
    /// Where they are.
    pub place: Place,
}

/// An extent whose bytes are safe: written, stored, or known to be zero.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// Its parts in guest order; together they cover `guest`.
    pub runs: Vec<PlacedRun>,
}

impl Item for Placed {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}
