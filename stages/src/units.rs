//! Offsets, sizes and counts that cannot be mistaken for one another.
//!
//! A *guest offset* is a byte of the virtual disk, a *host offset* a byte of the qcow2 file. The two are never
//! added, compared or passed for each other: they are different types.

use std::fmt;

// Tables and buffers are indexed with `usize`; a 32-bit build would truncate guest offsets.
const _: () = assert!(usize::BITS == 64, "virta needs a 64-bit target");

/// `u64` to `usize`; lossless, since 32-bit targets are refused at compile time.
#[inline]
#[must_use]
#[allow(clippy::cast_possible_truncation)] // see the assertion above
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// `usize` to `u64`; lossless on every target.
#[inline]
#[must_use]
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The plain number of bytes.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// This offset moved `bytes` forward.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

offset_type! {
    /// A byte of the virtual disk.
    GuestOffset
}
offset_type! {
    /// A byte of the qcow2 file.
    HostOffset
}

/// A half-open run of guest bytes `[start, end)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestOffset,
    /// One past the last byte; never below `start`.
    pub end: GuestOffset,
}

impl GuestRange {
    /// The `bytes` guest bytes from `start` on.
    #[must_use]
    pub const fn new(start: u64, bytes: u64) -> Self {
        Self { start: GuestOffset(start), end: GuestOffset(start + bytes) }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.end.0 - self.start.0
    }
}

impl fmt::Debug for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self)
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.bytes())
    }
}

/// log2 of the cluster size: 9 (512 B) to 21 (2 MiB), QEMU's limits (`block/qcow2.h`, MIN/MAX_CLUSTER_BITS).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClusterBits(u32);

/// A cluster size that is no power of two from 512 B to 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cluster size {bytes} is not a power of two from 512 bytes to 2 MiB")]
pub struct BadClusterSize {
    /// What was asked for, in bytes.
    pub bytes: u64,
}

impl ClusterBits {
    /// 512-byte clusters.
    pub const MIN: Self = Self(9);
    /// 2 MiB clusters.
    pub const MAX: Self = Self(21);
    /// 64 KiB clusters: qemu-img's default and ours.
    pub const DEFAULT: Self = Self(16);

    /// From a header's `cluster_bits`; `None` outside 9..=21.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits >= 9 && bits <= 21 { Some(Self(bits)) } else { None }
    }

    /// From a size in bytes.
    ///
    /// # Errors
    /// [`BadClusterSize`] for anything but a power of two from 512 to 2097152.
    pub const fn from_cluster_bytes(bytes: u64) -> Result<Self, BadClusterSize> {
        if bytes.is_power_of_two()
            && let Some(bits) = Self::from_bits(bytes.trailing_zeros())
        {
            return Ok(bits);
        }
        Err(BadClusterSize { bytes })
    }

    /// The exponent.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Cluster size in bytes.
    #[must_use]
    pub const fn cluster_bytes(self) -> u64 {
        1 << self.0
    }

    /// 8-byte entries in one cluster: L2 entries of a table, refcount table entries of a cluster.
    #[must_use]
    pub const fn entries_per_cluster(self) -> u64 {
        1 << (self.0 - 3)
    }

    /// 16-bit refcounts in one refcount block.
    #[must_use]
    pub const fn refcounts_per_block(self) -> u64 {
        1 << (self.0 - 1)
    }

    /// Clusters needed for `bytes` bytes.
    #[must_use]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }
}

impl Default for ClusterBits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Rounds `value` up to a multiple of `to`, which is a power of two.
#[must_use]
pub const fn round_up(value: u64, to: u64) -> u64 {
    debug_assert!(to.is_power_of_two());
    (value + to - 1) & !(to - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_sizes_outside_qemus_limits_are_refused() {
        for bytes in [0, 1, 256, 511, 513, 65537, 4 << 20] {
            assert_eq!(ClusterBits::from_cluster_bytes(bytes), Err(BadClusterSize { bytes }));
        }
        for bits in 9..=21 {
            assert_eq!(ClusterBits::from_cluster_bytes(1 << bits).unwrap().bits(), bits);
        }
    }
}
