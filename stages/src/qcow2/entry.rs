//! Words of the tables: no bare mask stands outside this file (qcow2.rst, "Cluster mapping", "Host cluster
//! management").

use crate::units::{ClusterBits, HostOffset};

/// Bits 9..=55 of L1 and standard L2 entries: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what is pointed at is exactly 1.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry of version 3: reads as zeros.
const ZERO: u64 = 1;
/// Bits 9..=63 of a refcount table entry: a host offset.
const REFBLOCK_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// An entry of the L1 table: where an L2 table lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L1Entry(u64);

impl L1Entry {
    /// The L2 table is at `host`, a cluster boundary, with refcount 1.
    #[must_use]
    pub const fn table(host: HostOffset) -> Self {
        debug_assert!(host.0 & !OFFSET_MASK == 0 && host.0 != 0);
        Self(host.0 | COPIED)
    }

    /// From the word on disk.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word on disk.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The L2 table's place; `None` if the whole range is unallocated.
    #[must_use]
    pub const fn host_offset(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            host => Some(HostOffset(host)),
        }
    }

    /// Is bit 63 set?
    #[must_use]
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that have to be zero and are not.
    #[must_use]
    pub const fn reserved_bits(self) -> u64 {
        self.0 & !(OFFSET_MASK | COPIED)
    }
}

/// What an L2 entry says of its guest cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Kind {
    /// Not in this file; reads as zeros where there is no backing file.
    Unallocated,
    /// Reads as zeros; a cluster may be allocated for it.
    Zero {
        /// The preallocated cluster, if any.
        host: Option<HostOffset>,
    },
    /// Stored as it is.
    Data {
        /// Where its first byte lies.
        host: HostOffset,
    },
    /// Stored compressed.
    Compressed {
        /// Where its first byte lies; any byte.
        host: HostOffset,
        /// Bytes up to the end of its last 512-byte sector.
        sector_rounded_bytes: u64,
    },
}

/// An entry of an L2 table, without subclusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L2Entry(u64);

impl L2Entry {
    /// The cluster is stored as it is at `host`, a cluster boundary, with refcount 1.
    #[must_use]
    pub const fn data(host: HostOffset) -> Self {
        debug_assert!(host.0 & !OFFSET_MASK == 0 && host.0 != 0);
        Self(host.0 | COPIED)
    }

    /// The cluster is stored compressed in `bytes` bytes from `host` on, any byte. Never COPIED (qcow2.rst, "Compressed Clusters
    /// Descriptor").
    #[must_use]
    pub const fn compressed(host: HostOffset, bytes: u64, cluster_bits: ClusterBits) -> Self {
        let x = 62 - (cluster_bits.bits() - 8);
        debug_assert!(host.0 < 1 << x && bytes > 0 && bytes < cluster_bits.cluster_bytes());
        let additional_sectors = (host.0 + bytes - 1) / 512 - host.0 / 512;
        Self(COMPRESSED | additional_sectors << x | host.0)
    }

    /// From the word on disk.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word on disk.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// Is bit 63 set?
    #[must_use]
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// What the entry means. `cluster_bits` decides where a compressed entry's sector count begins.
    #[must_use]
    pub const fn kind(self, cluster_bits: ClusterBits) -> L2Kind {
        if self.0 & COMPRESSED != 0 {
            // qcow2.rst, "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8)
            let x = 62 - (cluster_bits.bits() - 8);
            let host = self.0 & ((1 << x) - 1);
            let additional_sectors = (self.0 & !(COMPRESSED | COPIED)) >> x;
            return L2Kind::Compressed {
                host: HostOffset(host),
                sector_rounded_bytes: (additional_sectors + 1) * 512 - (host & 511),
            };
        }
        let host = match self.0 & OFFSET_MASK {
            0 => None,
            host => Some(HostOffset(host)),
        };
        match (self.0 & ZERO != 0, host) {
            (true, host) => L2Kind::Zero { host },
            (false, None) => L2Kind::Unallocated,
            (false, Some(host)) => L2Kind::Data { host },
        }
    }

    /// Bits of a standard entry that have to be zero and are not. Version 2 has no zero flag.
    #[must_use]
    pub const fn reserved_bits(self, version: u32) -> u64 {
        let zero_flag = if version >= 3 { ZERO } else { 0 };
        self.0 & !(OFFSET_MASK | COPIED | zero_flag)
    }
}

/// An entry of the refcount table: where a refcount block lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RefcountTableEntry(u64);

impl RefcountTableEntry {
    /// The block is at `host`, a cluster boundary.
    #[must_use]
    pub const fn block(host: HostOffset) -> Self {
        debug_assert!(host.0 & !REFBLOCK_MASK == 0 && host.0 != 0);
        Self(host.0)
    }

    /// From the word on disk.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word on disk.
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The block's place; `None` if all its refcounts are 0.
    #[must_use]
    pub const fn host_offset(self) -> Option<HostOffset> {
        match self.0 & REFBLOCK_MASK {
            0 => None,
            host => Some(HostOffset(host)),
        }
    }

    /// Bits that have to be zero and are not.
    #[must_use]
    pub const fn reserved_bits(self) -> u64 {
        self.0 & !REFBLOCK_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_decode_as_in_the_specification() {
        // cluster_bits 16: x = 54, eight bits of additional sectors
        let entry = L2Entry::from_word(1 << 62 | 3 << 54 | 0x1_2345);
        let expected = L2Kind::Compressed { host: HostOffset(0x1_2345), sector_rounded_bytes: 4 * 512 - 0x145 };
        assert_eq!(entry.kind(ClusterBits::DEFAULT), expected);
        assert_eq!(L2Entry::compressed(HostOffset(0x1_2345), 3 * 512, ClusterBits::DEFAULT), entry);
    }

    #[test]
    fn compressed_entries_cover_their_bytes_and_no_sector_more() {
        for bits in 9..=21 {
            let bits = ClusterBits::from_bits(bits).unwrap();
            for host in [1 << 20, (1 << 20) + 1, (1 << 20) + 511, (1 << 40) + 300] {
                for bytes in
                    [1, 212, 213, 511, bits.cluster_bytes() - 1].into_iter().filter(|bytes| *bytes < bits.cluster_bytes())
                {
                    let L2Kind::Compressed { host: found, sector_rounded_bytes } =
                        L2Entry::compressed(HostOffset(host), bytes, bits).kind(bits)
                    else {
                        panic!("not compressed")
                    };
                    assert_eq!(found.0, host);
                    assert!(sector_rounded_bytes >= bytes && sector_rounded_bytes < bytes + 512);
                }
            }
        }
    }

    #[test]
    fn a_zero_flag_is_reserved_in_version_2() {
        assert_eq!(L2Entry::from_word(1).reserved_bits(3), 0);
        assert_eq!(L2Entry::from_word(1).reserved_bits(2), 1);
    }
}
