//! A qcow2 file in one pass over its source: clusters go where the file ends as they arrive, tables follow, the
//! header comes last. Before the header is there, the file is no qcow2 image to anybody.
//!
//! Memory: 24 bytes for each run of clusters that is consecutive on both sides; at worst 24 bytes for each data
//! cluster, nothing for zeros. While it is sealed, two bytes more for each host cluster of the file.

use super::{
    Geometry, Qcow2Error,
    entry::L2Entry,
    layout::Sections,
    packing::{Look, Packing, count_references},
    tables::{self, L2Tables},
};
use crate::{
    compress::Codec,
    units::{ClusterBits, HostOffset, to_u64, to_usize},
};

/// Memory of one run, bytes.
pub const RUN_BYTES: u64 = 24;

/// Consecutive guest clusters on consecutive host clusters, or one compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MappedRun {
    guest_first: u64,
    host: u64,
    count: u32,
    /// 0 for clusters that are stored as they are.
    compressed_bytes: u32,
}

const _: () = assert!(size_of::<MappedRun>() as u64 == RUN_BYTES);

/// Where each cluster went so far.
#[derive(Debug)]
pub struct Arrival {
    cluster_bits: ClusterBits,
    codec: Option<Codec>,
    packing: Packing,
    runs: Vec<MappedRun>,
    data_clusters: u64,
    stored_bytes: u64,
}

impl Arrival {
    /// Nothing has arrived yet. Compressed clusters, if any, are compressed by `codec`.
    #[must_use]
    pub const fn new(cluster_bits: ClusterBits, codec: Option<Codec>) -> Self {
        let packing = Packing::new(cluster_bits, 1, Look::anywhere());
        Self { cluster_bits, codec, packing, runs: Vec::new(), data_clusters: 0, stored_bytes: 0 }
    }

    /// Gives `count` clusters from guest cluster `first` on, which are stored as they are, their place: the returned host offset,
    /// contiguous. Each guest cluster may be placed once; [`Arrival::seal`] checks it.
    pub fn place(&mut self, first: u64, count: u64) -> HostOffset {
        let host = self.packing.place_plain(count);
        self.data_clusters += count;
        self.stored_bytes += count * self.cluster_bits.cluster_bytes();
        let (mut guest_first, mut at, mut left) = (first, host, count);
        if let Some(last) = self.runs.last_mut()
            && last.compressed_bytes == 0
            && last.guest_first + u64::from(last.count) == first
            && last.host + u64::from(last.count) * self.cluster_bits.cluster_bytes() == host
        {
            let room = u64::from(u32::MAX - last.count).min(left);
            last.count += u32::try_from(room).expect("at most what is left of 32 bits");
            guest_first += room;
            at += room * self.cluster_bits.cluster_bytes();
            left -= room;
        }
        while left > 0 {
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            self.runs.push(MappedRun { guest_first, host: at, count, compressed_bytes: 0 });
            guest_first += u64::from(count);
            at += u64::from(count) * self.cluster_bits.cluster_bytes();
            left -= u64::from(count);
        }
        HostOffset(host)
    }

    /// Gives a compressed cluster of `bytes` bytes its place: any byte, in one host cluster or in two consecutive ones.
    ///
    /// # Panics
    /// If there is no codec: the caller's bug.
    pub fn place_compressed(&mut self, cluster: u64, bytes: u32) -> HostOffset {
        assert!(self.codec.is_some(), "compressed clusters without a codec");
        let host = self.packing.place_compressed(u64::from(bytes));
        self.data_clusters += 1;
        self.stored_bytes += u64::from(bytes);
        self.runs.push(MappedRun { guest_first: cluster, host, count: 1, compressed_bytes: bytes });
        HostOffset(host)
    }

    /// Cluster size.
    #[must_use]
    pub const fn cluster_bits(&self) -> ClusterBits {
        self.cluster_bits
    }

    /// Bytes of all stored forms so far.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Memory that the record takes now, bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        to_u64(self.runs.capacity()) * RUN_BYTES
    }

    /// All has arrived, and the disk is this large: the rest of the file.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if QEMU could not open it, [`Qcow2Error::Corrupt`] if a guest cluster was placed
    /// twice or past the disk's end.
    pub fn seal(mut self, geometry: Geometry) -> Result<Sealed, Qcow2Error> {
        self.runs.sort_unstable_by_key(|run| run.guest_first);
        let per_table = self.cluster_bits.entries_per_cluster();
        let mut populated: Vec<u32> = Vec::new();
        let mut guest_next = 0;
        for run in &self.runs {
            let guest_end = run.guest_first + u64::from(run.count);
            if run.guest_first < guest_next || guest_end > geometry.guest_clusters() {
                return Err(Qcow2Error::Corrupt {
                    host_cluster: run.host / self.cluster_bits.cluster_bytes(),
                    what: format!("guest cluster {:#x} was placed twice or lies past the disk's end", run.guest_first),
                });
            }
            guest_next = guest_end;
            for index in run.guest_first / per_table..=(guest_next - 1) / per_table {
                let index = u32::try_from(index).expect("an L1 index is below 4 Mi");
                if populated.last() != Some(&index) {
                    populated.push(index);
                }
            }
        }
        let data_clusters = self.packing.end() - 1;
        let mut sections = Sections::data_first(geometry, to_u64(populated.len()), data_clusters)?;
        let any_compressed = self.runs.iter().any(|run| run.compressed_bytes > 0);
        sections.codec = self.codec.filter(|_| any_compressed);
        sections.check_compressed()?;
        // one for each table and each cluster that is stored as it is; only compressed ones share
        let mut refcounts = Vec::new();
        if any_compressed {
            let bits = self.cluster_bits;
            let places = self.runs.iter().flat_map(|run| {
                let plain =
                    (0..u64::from(run.count)).map(move |step| (run.host + step * bits.cluster_bytes(), bits.cluster_bytes()));
                let compressed = (run.compressed_bytes > 0).then_some((run.host, u64::from(run.compressed_bytes)));
                plain.take(if compressed.is_some() { 0 } else { usize::MAX }).chain(compressed)
            });
            refcounts = count_references(bits, self.packing.end(), places);
            refcounts[0] = 1;
        }
        Ok(Sealed { sections, populated, runs: self.runs, refcounts })
    }
}

/// A file of which all data is in place.
#[derive(Debug)]
pub struct Sealed {
    sections: Sections,
    populated: Vec<u32>,
    runs: Vec<MappedRun>,
    /// Of header and data; empty where all are 1.
    refcounts: Vec<u16>,
}

impl Sealed {
    /// Where the parts lie.
    #[must_use]
    pub const fn sections(&self) -> &Sections {
        &self.sections
    }

    fn entries(&self) -> impl Iterator<Item = (u64, L2Entry)> + '_ {
        let bits = self.sections.geometry.cluster_bits();
        self.runs.iter().flat_map(move |run| {
            (0..u64::from(run.count)).map(move |step| {
                let host = HostOffset(run.host + step * bits.cluster_bytes());
                let entry = match run.compressed_bytes {
                    0 => L2Entry::data(host),
                    bytes => L2Entry::compressed(host, u64::from(bytes), bits),
                };
                (run.guest_first + step, entry)
            })
        })
    }

    /// Tables, each piece with its host offset, in file order from the end of the data to the end of the file.
    pub fn tables(&self) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + '_ {
        let mut host_next = self.sections.host_offset(self.sections.l2.first);
        let ones = self.sections.total_clusters() - to_u64(self.refcounts.len());
        let refcounts = self.refcounts.iter().copied().chain(std::iter::repeat_n(1, to_usize(ones)));
        L2Tables::new(&self.sections, self.entries())
            .chain(tables::refcount_blocks(&self.sections, refcounts))
            .chain(tables::refcount_table(&self.sections))
            .chain(tables::l1_table(&self.sections, &self.populated))
            .map(move |piece| {
                let host = host_next;
                host_next = host.plus(to_u64(piece.len()));
                (host, piece)
            })
    }

    /// The header's cluster, for host offset 0. Written after everything else is on disk.
    #[must_use]
    pub fn header_cluster(&self) -> Vec<u8> {
        tables::header_cluster(&self.sections)
    }
}
