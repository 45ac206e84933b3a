//! The header as it lies on disk. All integers are big-endian (qcow2.rst, "Header").

use std::mem::{offset_of, size_of};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

/// `QFI\xfb`, the first four bytes (qcow2.rst, "Header").
pub const MAGIC: u32 = 0x5146_49fb;
/// Largest L1 table in bytes (block/qcow2.h, `QCOW_MAX_L1_SIZE`): 32 MiB = 4 Mi entries.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table in bytes (block/qcow2.h, `QCOW_MAX_REFTABLE_SIZE`): 8 MiB = 1 Mi blocks.
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Header length of a version 2 image, which has none of the fields from 72 on.
pub const V2_HEADER_BYTES: u32 = 72;
/// Header length that QEMU and Virta write: 104 and the compression type, padded to 8.
pub const V3_HEADER_BYTES: u32 = 112;
/// Incompatible feature bit 1: image is corrupt.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature bit 2: guest data lies in another file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature bit 3: compression type is not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature bit 4: 16-byte L2 entries with subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// The whole header of version 3 with `header_length` 112.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`MAGIC`].
    pub magic: U32,
    /// 2 or 3.
    pub version: U32,
    /// Host offset of the backing file's name; 0 for none.
    pub backing_file_offset: U64,
    /// Length of that name, bytes.
    pub backing_file_size: U32,
    /// log2 of the cluster size.
    pub cluster_bits: U32,
    /// Virtual size, bytes.
    pub size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: U32,
    /// Entries of the active L1 table.
    pub l1_size: U32,
    /// Host offset of the active L1 table.
    pub l1_table_offset: U64,
    /// Host offset of the refcount table.
    pub refcount_table_offset: U64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: U32,
    /// Number of internal snapshots.
    pub nb_snapshots: U32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: U64,
    /// Feature bits whose unknown members forbid opening. From here on version 3 only.
    pub incompatible_features: U64,
    /// Feature bits that may be ignored.
    pub compatible_features: U64,
    /// Feature bits to clear when unknown.
    pub autoclear_features: U64,
    /// log2 of a refcount's width in bits.
    pub refcount_order: U32,
    /// Length of the header, bytes; extensions follow.
    pub header_length: U32,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
    /// Zero, up to a multiple of 8.
    pub padding: [u8; 7],
}

const _: () = assert!(offset_of!(RawHeader, magic) == 0);
const _: () = assert!(offset_of!(RawHeader, version) == 4);
const _: () = assert!(offset_of!(RawHeader, backing_file_offset) == 8);
const _: () = assert!(offset_of!(RawHeader, backing_file_size) == 16);
const _: () = assert!(offset_of!(RawHeader, cluster_bits) == 20);
const _: () = assert!(offset_of!(RawHeader, size) == 24);
const _: () = assert!(offset_of!(RawHeader, crypt_method) == 32);
const _: () = assert!(offset_of!(RawHeader, l1_size) == 36);
const _: () = assert!(offset_of!(RawHeader, l1_table_offset) == 40);
const _: () = assert!(offset_of!(RawHeader, refcount_table_offset) == 48);
const _: () = assert!(offset_of!(RawHeader, refcount_table_clusters) == 56);
const _: () = assert!(offset_of!(RawHeader, nb_snapshots) == 60);
const _: () = assert!(offset_of!(RawHeader, snapshots_offset) == 64);
const _: () = assert!(offset_of!(RawHeader, incompatible_features) == 72);
const _: () = assert!(offset_of!(RawHeader, compatible_features) == 80);
const _: () = assert!(offset_of!(RawHeader, autoclear_features) == 88);
const _: () = assert!(offset_of!(RawHeader, refcount_order) == 96);
const _: () = assert!(offset_of!(RawHeader, header_length) == 100);
const _: () = assert!(offset_of!(RawHeader, compression_type) == 104);
const _: () = assert!(size_of::<RawHeader>() == V3_HEADER_BYTES as usize);
