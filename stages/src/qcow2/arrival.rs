//! A qcow2 file in one pass over its source: clusters go where the file ends as they arrive, tables follow, the
//! header comes last. Before the header is there, the file is no qcow2 image to anybody.
//!
//! Memory: 24 bytes for each run of clusters that is consecutive on both sides; at worst 24 bytes for each data
//! cluster, nothing for zeros.

use super::{
    Geometry, Qcow2Error,
    layout::Placement,
    tables::{self, L2Tables, MappedRun},
};
use crate::units::{HostOffset, to_u64};

/// Memory of one run, bytes.
pub const RUN_BYTES: u64 = 24;

/// Where each cluster went so far.
#[derive(Debug)]
pub struct Arrival {
    geometry: Geometry,
    runs: Vec<MappedRun>,
    data_clusters: u64,
}

impl Arrival {
    /// Nothing has arrived yet.
    #[must_use]
    pub const fn new(geometry: Geometry) -> Self {
        Self { geometry, runs: Vec::new(), data_clusters: 0 }
    }

    /// Gives `count` clusters from guest cluster `first` on their place: the returned host offset, contiguous.
    /// Each guest cluster may be placed once; [`Arrival::seal`] checks it.
    pub fn place(&mut self, first: u64, count: u64) -> HostOffset {
        let host_first = 1 + self.data_clusters;
        self.data_clusters += count;
        match self.runs.last_mut() {
            Some(last) if last.guest_first + last.count == first && last.host_first + last.count == host_first => {
                last.count += count;
            }
            _ => self.runs.push(MappedRun { guest_first: first, host_first, count }),
        }
        HostOffset(host_first * self.geometry.cluster_bits().cluster_bytes())
    }

    /// Disk and cluster size.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Data clusters placed so far.
    #[must_use]
    pub const fn data_clusters(&self) -> u64 {
        self.data_clusters
    }

    /// Memory that the record takes now, bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        to_u64(self.runs.capacity()) * RUN_BYTES
    }

    /// All has arrived: the rest of the file.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if QEMU could not open it, [`Qcow2Error::Corrupt`] if a guest cluster was placed
    /// twice or past the disk's end.
    pub fn seal(mut self) -> Result<Sealed, Qcow2Error> {
        self.runs.sort_unstable_by_key(|run| run.guest_first);
        let per_table = self.geometry.cluster_bits().entries_per_cluster();
        let mut populated: Vec<u32> = Vec::new();
        let mut guest_next = 0;
        for run in &self.runs {
            if run.guest_first < guest_next || run.guest_first + run.count > self.geometry.guest_clusters() {
                return Err(Qcow2Error::Corrupt {
                    host_cluster: run.host_first,
                    what: format!("guest cluster {:#x} was placed twice or lies past the disk's end", run.guest_first),
                });
            }
            guest_next = run.guest_first + run.count;
            for index in run.guest_first / per_table..=(guest_next - 1) / per_table {
                let index = u32::try_from(index).expect("an L1 index is below 4 Mi");
                if populated.last() != Some(&index) {
                    populated.push(index);
                }
            }
        }
        let placement = Placement::data_first(self.geometry, to_u64(populated.len()), self.data_clusters)?;
        Ok(Sealed { placement, populated, runs: self.runs })
    }
}

/// A file of which all data is in place.
#[derive(Debug)]
pub struct Sealed {
    placement: Placement,
    populated: Vec<u32>,
    runs: Vec<MappedRun>,
}

impl Sealed {
    /// Where the parts lie.
    #[must_use]
    pub const fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Tables, each piece with its host offset, in file order from the end of the data to the end of the file.
    pub fn tables(&self) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + '_ {
        let mut host_next = self.placement.host_offset(self.placement.l2.first);
        L2Tables::new(&self.placement, self.runs.iter().copied())
            .chain(tables::refcount_blocks(&self.placement))
            .chain(tables::refcount_table(&self.placement))
            .chain(tables::l1_table(&self.placement, &self.populated))
            .map(move |piece| {
                let host = host_next;
                host_next = host.plus(to_u64(piece.len()));
                (host, piece)
            })
    }

    /// The header's cluster, for host offset 0. Written after everything else is on disk.
    #[must_use]
    pub fn header_cluster(&self) -> Vec<u8> {
        tables::header_cluster(&self.placement)
    }
}
