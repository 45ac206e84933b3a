//! From cluster fates to the place of every byte: pure, and complete before byte 0 exists.
//!
//! # Invariants
//! - L1: sections tile the file: every host cluster belongs to exactly one of header, refcount table, refcount
//!   blocks, L1, L2 tables, data.
//! - L2: `file_bytes` is the sum of the sections; data clusters lie in the data section in guest order, as
//!   [`super::packing`] places them: without compression the k-th lies at `data + k`.
//! - L3: the refcount blocks cover every cluster of the file, themselves included.
//!
//! The refcount blocks count themselves, so their number is a fixed point: with `m` other clusters, `r`
//! refcounts a block and `p` pointers a table cluster, start at `t = 1`, take `b = ceil((m + t) / (r - 1))`,
//! `t' = ceil(b / p)`, until `t' = t`. It grows monotonically and settles in two or three rounds.

use super::{
    ClusterIndex, Qcow2Error,
    format::{INCOMPATIBLE_COMPRESSION, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX},
    header::Header,
    packing::{Look, Packing},
};
use crate::{
    compress::Codec,
    units::{ClusterBits, HostOffset, round_up},
};

/// Sector that QEMU counts disk sizes in; a virtual size that is not a multiple would be cut down by it.
const SECTOR_BYTES: u64 = 512;

/// Virtual size and cluster size, checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    virtual_bytes: u64,
    cluster_bits: ClusterBits,
}

impl Geometry {
    /// For a raw disk of `raw_bytes` bytes; rounded up to 512 as qemu-img does.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if the L1 table would pass QEMU's 32 MiB.
    pub const fn new(raw_bytes: u64, cluster_bits: ClusterBits) -> Result<Self, Qcow2Error> {
        // 4 Mi L1 entries x entries of an L2 table x cluster size
        let limit_bytes =
            (L1_BYTES_MAX / 8).saturating_mul(cluster_bits.entries_per_cluster()).saturating_mul(cluster_bits.cluster_bytes());
        // QEMU keeps sizes in a signed 64-bit number
        let limit_bytes = if limit_bytes > 1 << 62 { 1 << 62 } else { limit_bytes };
        if raw_bytes > limit_bytes {
            return Err(Qcow2Error::TooLarge {
                virtual_bytes: raw_bytes,
                cluster_bytes: cluster_bits.cluster_bytes(),
                limit_bytes,
            });
        }
        Ok(Self { virtual_bytes: round_up(raw_bytes, SECTOR_BYTES), cluster_bits })
    }

    /// Size of the virtual disk, bytes; a multiple of 512.
    #[must_use]
    pub const fn virtual_bytes(self) -> u64 {
        self.virtual_bytes
    }

    /// Cluster size.
    #[must_use]
    pub const fn cluster_bits(self) -> ClusterBits {
        self.cluster_bits
    }

    /// Number of guest clusters; the last one may be partly past the disk's end.
    #[must_use]
    pub const fn guest_clusters(self) -> u64 {
        self.cluster_bits.clusters_for(self.virtual_bytes)
    }

    /// Entries of the L1 table.
    #[must_use]
    pub const fn l1_entries(self) -> u64 {
        self.guest_clusters().div_ceil(self.cluster_bits.entries_per_cluster())
    }

    /// Clusters of the L1 table; one even where it has no entry.
    #[must_use]
    pub const fn l1_clusters(self) -> u64 {
        let clusters = self.cluster_bits.clusters_for(self.l1_entries() * 8);
        if clusters == 0 { 1 } else { clusters }
    }
}

/// A run of host clusters that belong together, `[first, first + clusters)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Index of the first host cluster.
    pub first: u64,
    /// Length in clusters.
    pub clusters: u64,
}

impl Section {
    /// One past the last cluster.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first + self.clusters
    }
}

/// Where each part of a qcow2 file lies. Both writers use it, each with its own order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    /// Disk and cluster size.
    pub geometry: Geometry,
    /// The refcount table.
    pub refcount_table: Section,
    /// The refcount blocks.
    pub refcount_blocks: Section,
    /// The L1 table.
    pub l1: Section,
    /// The L2 tables that are needed, in order of their L1 index.
    pub l2: Section,
    /// The data clusters.
    pub data: Section,
    /// How its compressed clusters are compressed; `None` if it has none.
    pub codec: Option<Codec>,
}

impl Sections {
    /// Data last, as the stream writer needs it.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if the refcount table would pass QEMU's 8 MiB.
    pub fn metadata_first(geometry: Geometry, l2_tables: u64, data_clusters: u64) -> Result<Self, Qcow2Error> {
        let (table, blocks) = refcount_clusters(geometry, l2_tables, data_clusters)?;
        let refcount_table = Section { first: 1, clusters: table };
        let refcount_blocks = Section { first: refcount_table.end(), clusters: blocks };
        let l1 = Section { first: refcount_blocks.end(), clusters: geometry.l1_clusters() };
        let l2 = Section { first: l1.end(), clusters: l2_tables };
        let data = Section { first: l2.end(), clusters: data_clusters };
        Ok(Self { geometry, refcount_table, refcount_blocks, l1, l2, data, codec: None })
    }

    /// Data right behind the header, as the single-pass file writer needs it.
    ///
    /// # Errors
    /// As [`Sections::metadata_first`].
    pub fn data_first(geometry: Geometry, l2_tables: u64, data_clusters: u64) -> Result<Self, Qcow2Error> {
        let (table, blocks) = refcount_clusters(geometry, l2_tables, data_clusters)?;
        let data = Section { first: 1, clusters: data_clusters };
        let l2 = Section { first: data.end(), clusters: l2_tables };
        let refcount_blocks = Section { first: l2.end(), clusters: blocks };
        let refcount_table = Section { first: refcount_blocks.end(), clusters: table };
        let l1 = Section { first: refcount_table.end(), clusters: geometry.l1_clusters() };
        Ok(Self { geometry, refcount_table, refcount_blocks, l1, l2, data, codec: None })
    }

    /// Host clusters of the file.
    #[must_use]
    pub const fn total_clusters(&self) -> u64 {
        1 + self.refcount_table.clusters
            + self.refcount_blocks.clusters
            + self.l1.clusters
            + self.l2.clusters
            + self.data.clusters
    }

    /// Length of the file, bytes.
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        self.total_clusters() * self.geometry.cluster_bits.cluster_bytes()
    }

    /// An entry of a compressed cluster has fewer bits for the host offset than another.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if this file could need more.
    pub const fn check_compressed(&self) -> Result<(), Qcow2Error> {
        let bits = self.geometry.cluster_bits;
        let limit_bytes = 1 << (62 - (bits.bits() - 8));
        if self.codec.is_some() && self.file_bytes() > limit_bytes {
            let cluster_bytes = bits.cluster_bytes();
            return Err(Qcow2Error::TooLarge { virtual_bytes: self.geometry.virtual_bytes, cluster_bytes, limit_bytes });
        }
        Ok(())
    }

    /// Byte at which host cluster `index` begins.
    #[must_use]
    pub const fn host_offset(&self, index: u64) -> HostOffset {
        HostOffset(index * self.geometry.cluster_bits.cluster_bytes())
    }

    /// The header that describes this file.
    #[must_use]
    pub fn header(&self) -> Header {
        let narrow = |value: u64| u32::try_from(value).expect("QEMU's limits, checked by Geometry, are below 2^32");
        Header {
            version: 3,
            cluster_bits: self.geometry.cluster_bits,
            virtual_bytes: self.geometry.virtual_bytes,
            l1_entries: narrow(self.geometry.l1_entries()),
            l1_table: self.host_offset(self.l1.first),
            refcount_table: self.host_offset(self.refcount_table.first),
            refcount_table_clusters: narrow(self.refcount_table.clusters),
            refcount_bits: 16,
            snapshots: 0,
            // block/qcow2.c, validate_compression_type: the bit and a type other than deflate come together
            incompatible_features: if self.codec == Some(Codec::Zstd) { INCOMPATIBLE_COMPRESSION } else { 0 },
            compression_type: self.codec.map_or(0, Codec::qcow2_type),
        }
    }
}

/// Clusters of refcount table and refcount blocks for a file with these other parts.
fn refcount_clusters(geometry: Geometry, l2_tables: u64, data_clusters: u64) -> Result<(u64, u64), Qcow2Error> {
    let bits = geometry.cluster_bits;
    let others = 1 + geometry.l1_clusters() + l2_tables + data_clusters;
    let mut table = 1;
    let blocks = loop {
        let blocks = (others + table).div_ceil(bits.refcounts_per_block() - 1);
        let needed = blocks.div_ceil(bits.entries_per_cluster());
        if needed <= table {
            break blocks;
        }
        table = needed;
    };
    if table * bits.cluster_bytes() > REFCOUNT_TABLE_BYTES_MAX.max(bits.cluster_bytes()) {
        return Err(Qcow2Error::TooLarge {
            virtual_bytes: geometry.virtual_bytes,
            cluster_bytes: bits.cluster_bytes(),
            // what 8 MiB of refcount table can count, less a 64th for tables
            limit_bytes: (REFCOUNT_TABLE_BYTES_MAX / 8) * bits.refcounts_per_block() * bits.cluster_bytes() / 64 * 63,
        });
    }
    Ok((table, blocks))
}

/// The complete plan of a metadata-first file.
#[derive(Clone, Debug)]
pub struct Layout {
    sections: Sections,
    /// L1 indices that have an L2 table, ascending.
    populated: Vec<u32>,
}

impl Layout {
    /// Plans the file for `geometry` with the clusters of `index` stored, the compressed ones by `codec`.
    ///
    /// # Errors
    /// [`Qcow2Error::TooLarge`] if QEMU could not open the result.
    ///
    /// # Panics
    /// If `index` holds a cluster past the disk's end, or compressed clusters where there is no codec: the caller's bug.
    pub fn plan(geometry: Geometry, index: &ClusterIndex, codec: Option<Codec>) -> Result<Self, Qcow2Error> {
        let per_table = geometry.cluster_bits.entries_per_cluster();
        let mut populated: Vec<u32> = Vec::new();
        for run in index.map().runs() {
            assert!(run.first + run.count <= geometry.guest_clusters(), "data cluster past the disk's end");
            let first = run.first / per_table;
            let last = (run.first + run.count - 1) / per_table;
            for index in first..=last {
                let index = u32::try_from(index).expect("an L1 index is below 4 Mi");
                if populated.last() != Some(&index) {
                    populated.push(index);
                }
            }
        }
        let mut packing = Packing::new(geometry.cluster_bits, 0, Look::ahead(geometry.cluster_bits));
        if index.compressed_clusters() == 0 {
            packing.place_plain(index.count());
        } else {
            assert!(codec.is_some(), "compressed clusters without a codec");
            for record in index.records() {
                packing.place(u64::from(record.stored_bytes));
            }
        }
        let mut sections = Sections::metadata_first(geometry, populated.len() as u64, packing.end())?;
        sections.codec = codec.filter(|_| index.compressed_clusters() > 0);
        sections.check_compressed()?;
        Ok(Self { sections, populated })
    }

    /// Where the parts lie.
    #[must_use]
    pub const fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Exact length of the file, bytes.
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        self.sections.file_bytes()
    }

    /// Bytes before the first data cluster.
    #[must_use]
    pub const fn metadata_bytes(&self) -> u64 {
        self.sections.host_offset(self.sections.data.first).0
    }

    /// L1 indices that have an L2 table, ascending.
    #[must_use]
    pub fn populated(&self) -> &[u32] {
        &self.populated
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(sections: &Sections) -> Vec<Section> {
        let mut all = vec![
            Section { first: 0, clusters: 1 },
            sections.refcount_table,
            sections.refcount_blocks,
            sections.l1,
            sections.l2,
            sections.data,
        ];
        all.sort_by_key(|section| (section.first, section.clusters));
        all
    }

    proptest! {
        #[test]
        fn sections_tile_the_file_and_refcounts_cover_it(
            bits in 9_u32..=21, l2_tables in 0_u64..5000, data in 0_u64..3_000_000, gib in 1_u64..128,
        ) {
            let geometry = Geometry::new(gib << 30, ClusterBits::from_bits(bits).unwrap()).unwrap();
            for sections in [
                Sections::metadata_first(geometry, l2_tables, data).unwrap(),
                Sections::data_first(geometry, l2_tables, data).unwrap(),
            ] {
                let mut next = 0;
                for section in sorted(&sections) {
                    prop_assert_eq!(section.first, next);
                    next = section.end();
                }
                prop_assert_eq!(next, sections.total_clusters());
                let bits = geometry.cluster_bits();
                prop_assert!(sections.refcount_blocks.clusters * bits.refcounts_per_block() >= next);
                prop_assert!(sections.refcount_table.clusters * bits.entries_per_cluster() >= sections.refcount_blocks.clusters);
            }
        }
    }

    #[test]
    fn an_all_zero_disk_takes_four_clusters() {
        let geometry = Geometry::new(80 << 30, ClusterBits::DEFAULT).unwrap();
        assert_eq!(Layout::plan(geometry, &ClusterIndex::new(), None).unwrap().file_bytes(), 262_144);
    }

    #[test]
    fn qemus_largest_disks_fit_and_one_sector_more_does_not() {
        // [qemu-img create] 512 B: 128 GiB; 64 KiB: 2 PiB
        for (bits, limit) in [(9, 128_u64 << 30), (12, 8 << 40), (16, 2 << 50)] {
            let bits = ClusterBits::from_bits(bits).unwrap();
            assert!(Geometry::new(limit, bits).is_ok());
            assert!(
                matches!(Geometry::new(limit + 1, bits), Err(Qcow2Error::TooLarge { limit_bytes, .. }) if limit_bytes == limit)
            );
        }
    }
}
