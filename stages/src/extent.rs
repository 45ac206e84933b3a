//! What flows between stages: runs of guest bytes, and what became of them.

use bytes::Bytes;
use engine::{Item, Lease, Slice};

use crate::units::{ClusterBits, GuestRange, to_u64, to_usize};

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

/// What is remembered of a data cluster: how many bytes its stored form has, and a digest of its guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The cluster size for one that is stored as it is, less for a compressed one.
    pub stored_bytes: u32,
    /// 128 bits over the guest bytes, padded to the whole cluster; see [`crate::compress::encode::digest`].
    pub digest: [u32; 4],
}

/// The bytes of an extent's data clusters.
#[derive(Debug)]
pub enum Stored {
    /// There are none: every cluster is zero.
    Nothing,
    /// All of the extent's bytes, padded with zeros to whole clusters.
    Whole(Slice),
    /// The data clusters alone, one after the other, each in the form that its record tells.
    Packed(Bytes),
}

/// An extent whose clusters have their fate.
#[derive(Debug)]
pub struct Classified {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// The fates of its clusters, from the first to the last; together they cover `guest`.
    pub runs: Vec<FateRun>,
    /// One for each data cluster, in order; empty before they were made, for who needs none.
    pub records: Vec<Record>,
    /// The data clusters' bytes.
    pub stored: Stored,
}

impl Classified {
    /// An extent of zeros.
    #[must_use]
    pub fn zeros(guest: GuestRange, cluster_bits: ClusterBits) -> Self {
        let runs = vec![FateRun { clusters: cluster_bits.clusters_for(guest.bytes()), fate: Fate::Zero }];
        Self { guest, runs, records: Vec::new(), stored: Stored::Nothing }
    }

    /// The runs with their guest ranges; the last range ends with the disk, not with its cluster.
    pub fn ranges(&self, cluster_bits: ClusterBits) -> impl Iterator<Item = (GuestRange, FateRun)> + '_ {
        let mut at = 0;
        self.runs.iter().map(move |run| {
            let padded = run.clusters * cluster_bits.cluster_bytes();
            let range = GuestRange::new(self.guest.start.0 + at, padded.min(self.guest.bytes() - at));
            at += padded;
            (range, *run)
        })
    }

    /// Indices of the data clusters within the extent.
    pub fn data_clusters(&self) -> impl Iterator<Item = usize> + '_ {
        let mut first = 0;
        self.runs.iter().flat_map(move |run| {
            let clusters = first..first + to_usize(run.clusters);
            first = clusters.end;
            if run.fate == Fate::Data { clusters } else { 0..0 }
        })
    }

    /// Guest bytes of the data runs, not counting what pads the last cluster.
    #[must_use]
    pub fn data_bytes(&self, cluster_bits: ClusterBits) -> u64 {
        self.ranges(cluster_bits).filter(|(_, run)| run.fate == Fate::Data).map(|(range, _)| range.bytes()).sum()
    }
}

impl Item for Classified {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

/// Where in its holder a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Nowhere: they are zeros.
    Zeros,
    /// As they are, contiguous, from this byte of the holder on.
    Plain(u64),
    /// One cluster, compressed into so many bytes from this byte of the holder on.
    Compressed(u64, u32),
}

/// What holds an extent's data clusters now.
#[derive(Clone, Debug)]
pub enum Holder {
    /// Nothing: it has none.
    Nowhere,
    /// The qcow2 file; places are host offsets.
    File,
    /// The cluster store's memory, packed.
    Memory(Bytes),
    /// The scratch file, packed; places are file offsets, the first of them is given here.
    Scratch(u64),
    /// Nothing will keep them: they are here until the hash lane has passed, and are read again later.
    Passing(Bytes),
}

/// A part of an extent that is in one position.
#[derive(Clone, Copy, Debug)]
pub struct StoredRun {
    /// Which guest bytes; not padded, so the disk's last run may end inside a cluster.
    pub guest: GuestRange,
    /// Where they are.
    pub position: Position,
}

/// An extent whose bytes are safe: written, stored, known to be zero, or known to be readable again.
#[derive(Clone, Debug)]
pub struct StoredExtent {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// Its parts in guest order; together they cover `guest`.
    pub runs: Vec<StoredRun>,
    /// One for each data cluster, in order, where somebody needs them.
    pub records: Vec<Record>,
    /// Where its data is.
    pub holder: Holder,
}

impl Item for StoredExtent {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

impl StoredExtent {
    /// The runs of an extent whose data clusters are packed from byte `first` of their holder on.
    #[must_use]
    pub fn packed_runs(classified: &Classified, cluster_bits: ClusterBits, first: u64) -> Vec<StoredRun> {
        let cluster_bytes = cluster_bits.cluster_bytes();
        let mut runs: Vec<StoredRun> = Vec::with_capacity(classified.runs.len());
        let mut records = classified.records.iter();
        let mut at = first;
        for (range, run) in classified.ranges(cluster_bits) {
            if run.fate == Fate::Zero {
                runs.push(StoredRun { guest: range, position: Position::Zeros });
                continue;
            }
            let mut plain_from = None; // of a run of clusters that are stored as they are
            let mut guest_at = range.start.0;
            while guest_at < range.end.0 {
                let guest = GuestRange::new(guest_at, cluster_bytes.min(range.end.0 - guest_at));
                let stored = records.next().map_or(cluster_bytes, |record| u64::from(record.stored_bytes));
                if stored == cluster_bytes {
                    match (plain_from, runs.last_mut()) {
                        (Some(()), Some(last)) => last.guest.end = guest.end,
                        _ => runs.push(StoredRun { guest, position: Position::Plain(at) }),
                    }
                    plain_from = Some(());
                } else {
                    runs.push(StoredRun { guest, position: Position::Compressed(at, u32::try_from(stored).unwrap_or(u32::MAX)) });
                    plain_from = None;
                }
                at += stored;
                guest_at = guest.end.0;
            }
        }
        runs
    }
}
/// The next bytes of an image's file.
#[derive(Debug)]
pub struct Chunk(pub Bytes);

impl Item for Chunk {
    fn bytes(&self) -> u64 {
        to_u64(self.0.len())
    }
}
