//! A validated header, and the one that Virta writes.

use zerocopy::{FromBytes, IntoBytes, big_endian::U32, big_endian::U64};

use super::{
    Qcow2Error,
    format::{
        INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, L1_BYTES_MAX, MAGIC,
        REFCOUNT_TABLE_BYTES_MAX, RawHeader, V2_HEADER_BYTES, V3_HEADER_BYTES,
    },
};
use crate::units::{ClusterBits, HostOffset, to_usize};

/// What a reader needs of a header, checked against QEMU's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Virtual size, bytes; QEMU ignores what passes the last multiple of 512.
    pub virtual_bytes: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Place of the L1 table.
    pub l1_table: HostOffset,
    /// Place of the refcount table.
    pub refcount_table: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Width of a refcount, bits.
    pub refcount_bits: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Incompatible feature bits; 0 in version 2.
    pub incompatible_features: u64,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
}

impl Header {
    /// Bytes that [`Header::parse`] wants to see; fewer are accepted if the file is shorter.
    pub const PARSE_BYTES: usize = V3_HEADER_BYTES as usize;

    /// Parses the first bytes of a file.
    ///
    /// # Errors
    /// [`Qcow2Error::Magic`] for another format, [`Qcow2Error::Header`] for values QEMU refuses,
    /// [`Qcow2Error::Unsupported`] for images whose guest data lies elsewhere, is encrypted or has subclusters.
    pub fn parse(bytes: &[u8]) -> Result<Self, Qcow2Error> {
        let mut padded = [0_u8; V3_HEADER_BYTES as usize];
        let available = bytes.len().min(padded.len());
        padded[..available].copy_from_slice(&bytes[..available]);
        let raw = RawHeader::read_from_bytes(&padded).expect("the buffer has the header's size");
        if raw.magic.get() != MAGIC {
            return Err(Qcow2Error::Magic { found: raw.magic.get() });
        }
        let bad = |field, value: u64, rule| Qcow2Error::Header { field, value, rule };
        let unsupported = |feature| Qcow2Error::Unsupported { feature };

        let version = raw.version.get();
        if version != 2 && version != 3 {
            return Err(bad("version", version.into(), "has to be 2 or 3"));
        }
        let header_bytes = if version == 2 { V2_HEADER_BYTES } else { raw.header_length.get() };
        if version == 3 && (header_bytes < 104 || header_bytes % 8 != 0) {
            return Err(bad("header_length", header_bytes.into(), "has to be a multiple of 8 and at least 104"));
        }
        if available < to_usize(u64::from(header_bytes)).min(padded.len()) {
            return Err(bad("header_length", header_bytes.into(), "passes the end of the file"));
        }
        let cluster_bits = ClusterBits::from_bits(raw.cluster_bits.get())
            .ok_or_else(|| bad("cluster_bits", raw.cluster_bits.get().into(), "has to be 9 to 21"))?;
        let cluster_bytes = cluster_bits.cluster_bytes();
        if u64::from(header_bytes) > cluster_bytes {
            return Err(bad("header_length", header_bytes.into(), "passes the first cluster"));
        }
        if raw.backing_file_offset.get() != 0 {
            return Err(unsupported("a backing file"));
        }
        if raw.crypt_method.get() != 0 {
            return Err(unsupported("encryption"));
        }

        let (incompatible_features, refcount_order, compression_type) = if version == 2 {
            (0, 4, 0)
        } else {
            let compression_type = if header_bytes > 104 { raw.compression_type } else { 0 };
            (raw.incompatible_features.get(), raw.refcount_order.get(), compression_type)
        };
        if incompatible_features & INCOMPATIBLE_DATA_FILE != 0 {
            return Err(unsupported("an external data file"));
        }
        if incompatible_features & INCOMPATIBLE_EXTENDED_L2 != 0 {
            return Err(unsupported("extended L2 entries (subclusters)"));
        }
        if incompatible_features & INCOMPATIBLE_CORRUPT != 0 {
            return Err(unsupported("the corrupt bit: QEMU found it damaged"));
        }
        if incompatible_features & !0xf != 0 {
            return Err(bad("incompatible_features", incompatible_features, "has bits nobody here knows"));
        }
        // block/qcow2.c, validate_compression_type: the bit and a type other than deflate come together
        if (compression_type != 0) != (incompatible_features & INCOMPATIBLE_COMPRESSION != 0) || compression_type > 1 {
            return Err(bad("compression_type", compression_type.into(), "contradicts the feature bits"));
        }
        if refcount_order > 6 {
            return Err(bad("refcount_order", refcount_order.into(), "has to be at most 6"));
        }

        let virtual_bytes = raw.size.get();
        let l1_entries = raw.l1_size.get();
        let aligned = |field, value: u64| {
            if value.is_multiple_of(cluster_bytes) {
                Ok(HostOffset(value))
            } else {
                Err(bad(field, value, "is not cluster aligned"))
            }
        };
        let l1_table = aligned("l1_table_offset", raw.l1_table_offset.get())?;
        let refcount_table = aligned("refcount_table_offset", raw.refcount_table_offset.get())?;
        if u64::from(l1_entries) * 8 > L1_BYTES_MAX {
            return Err(bad("l1_size", l1_entries.into(), "is over 4194304 entries"));
        }
        let entries_needed = virtual_bytes.div_ceil(cluster_bytes * cluster_bits.entries_per_cluster());
        if u64::from(l1_entries) < entries_needed {
            return Err(bad("l1_size", l1_entries.into(), "is too small for the virtual size"));
        }
        let refcount_table_clusters = raw.refcount_table_clusters.get();
        if refcount_table_clusters == 0 {
            return Err(bad("refcount_table_clusters", 0, "has to be at least 1"));
        }
        if u64::from(refcount_table_clusters) * cluster_bytes > REFCOUNT_TABLE_BYTES_MAX.max(cluster_bytes) {
            return Err(bad("refcount_table_clusters", refcount_table_clusters.into(), "is over 8 MiB"));
        }
        Ok(Self {
            version,
            cluster_bits,
            virtual_bytes,
            l1_entries,
            l1_table,
            refcount_table,
            refcount_table_clusters,
            refcount_bits: 1 << refcount_order,
            snapshots: raw.nb_snapshots.get(),
            incompatible_features,
            compression_type,
        })
    }

    /// The header as bytes on disk, always version 3 of 112 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; V3_HEADER_BYTES as usize] {
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(3),
            backing_file_offset: U64::new(0),
            backing_file_size: U32::new(0),
            cluster_bits: U32::new(self.cluster_bits.bits()),
            size: U64::new(self.virtual_bytes),
            crypt_method: U32::new(0),
            l1_size: U32::new(self.l1_entries),
            l1_table_offset: U64::new(self.l1_table.0),
            refcount_table_offset: U64::new(self.refcount_table.0),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            nb_snapshots: U32::new(self.snapshots),
            snapshots_offset: U64::new(0),
            incompatible_features: U64::new(self.incompatible_features),
            compatible_features: U64::new(0),
            autoclear_features: U64::new(0),
            refcount_order: U32::new(self.refcount_bits.trailing_zeros()),
            header_length: U32::new(V3_HEADER_BYTES),
            compression_type: self.compression_type,
            padding: [0; 7],
        };
        let mut bytes = [0_u8; V3_HEADER_BYTES as usize];
        bytes.copy_from_slice(raw.as_bytes());
        debug_assert_eq!(Self::parse(&bytes).as_ref().ok(), Some(self), "what is written parses back");
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            version: 3,
            cluster_bits: ClusterBits::DEFAULT,
            virtual_bytes: 1 << 30,
            l1_entries: 2,
            l1_table: HostOffset(0x3_0000),
            refcount_table: HostOffset(0x1_0000),
            refcount_table_clusters: 1,
            refcount_bits: 16,
            snapshots: 0,
            incompatible_features: 0,
            compression_type: 0,
        }
    }

    fn refused(change: impl Fn(&mut [u8; 112])) -> String {
        let mut bytes = sample().to_bytes();
        change(&mut bytes);
        Header::parse(&bytes).expect_err("has to be refused").to_string()
    }

    #[test]
    fn what_qemu_refuses_is_refused_with_the_field_named() {
        assert!(refused(|b| b[0] = 0).starts_with("no qcow2 image"));
        assert!(refused(|b| b[7] = 4).contains("version is 0x4"));
        assert!(refused(|b| b[23] = 8).contains("cluster_bits is 0x8"));
        assert!(refused(|b| b[23] = 22).contains("cluster_bits"));
        assert!(refused(|b| b[15] = 1).contains("backing file"));
        assert!(refused(|b| b[35] = 2).contains("encryption"));
        assert!(refused(|b| b[39] = 1).contains("too small for the virtual size"));
        assert!(refused(|b| b[47] = 1).contains("l1_table_offset"));
        assert!(refused(|b| b[59] = 0).contains("refcount_table_clusters"));
        assert!(refused(|b| b[79] = 4).contains("external data file"));
        assert!(refused(|b| b[79] = 16).contains("extended L2"));
        assert!(refused(|b| b[79] = 32).contains("nobody here knows"));
        assert!(refused(|b| b[79] = 8).contains("compression_type"));
        assert!(refused(|b| b[99] = 7).contains("refcount_order"));
        assert!(refused(|b| b[103] = 100).contains("header_length"));
        assert!(refused(|b| b[101] = 1).contains("header_length"));
    }

    #[test]
    fn a_file_shorter_than_its_header_is_refused() {
        let bytes = sample().to_bytes();
        assert!(Header::parse(&bytes[..111]).unwrap_err().to_string().contains("passes the end of the file"));
        assert!(matches!(Header::parse(&[]), Err(Qcow2Error::Magic { found: 0 })));
    }
}
