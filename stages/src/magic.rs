//! Which disk image format these bytes are.
//!
//! What is converted is raw, and raw is what nothing else claims. The signatures are those of the formats' own
//! specifications; OpenStack's format inspector (oslo.utils, `format_inspector.py`) looks at the same places.

use std::fmt;

/// Bytes of a file's beginning that [`DiskFormat::detect`] wants to see; fewer are accepted.
pub const HEAD_BYTES: u64 = 64 << 10;

/// A disk image format, or a compressed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // names of formats
pub enum DiskFormat {
    Raw,
    Qcow2,
    Qcow1,
    Qed,
    Vmdk,
    Vdi,
    Vhd,
    Vhdx,
    Iso,
    Gzip,
    Xz,
    Bzip2,
    Zstd,
    Lz4,
    Zip,
    SevenZip,
    Tar,
    Luks,
}

impl DiskFormat {
    /// Tells by the first [`HEAD_BYTES`] and the last 512 bytes. What carries a CD file system is an installation medium, even where it can be
    /// booted from a disk, too: so Glance sees it. Where several signatures are there, the first of [`DiskFormat::claims`].
    #[must_use]
    pub fn detect(head: &[u8], tail: &[u8]) -> Self {
        Self::claims(head, tail).first().copied().unwrap_or(Self::Raw)
    }

    /// All formats whose signatures are there; none for raw. More than one is no image that anybody should trust: whoever reads it as the
    /// other one sees other bytes.
    #[must_use]
    pub fn claims(head: &[u8], tail: &[u8]) -> Vec<Self> {
        let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
        let mut claims = Vec::new();
        if at(0, b"QFI\xfb") {
            claims.push(if at(4, &[0, 0, 0, 1]) { Self::Qcow1 } else { Self::Qcow2 });
        }
        let signatures: [(usize, &[u8], Self); 20] = [
            (0, b"QED\0", Self::Qed),
            (0, b"KDMV", Self::Vmdk),
            (0, b"COWD", Self::Vmdk),
            (0, b"# Disk DescriptorFile", Self::Vmdk),
            (0x40, b"\x7f\x10\xda\xbe", Self::Vdi),
            (0, b"conectix", Self::Vhd),
            (0, b"vhdxfile", Self::Vhdx),
            (0, b"LUKS\xba\xbe", Self::Luks),
            (0, b"\x1f\x8b\x08", Self::Gzip),
            (0, b"\xfd7zXZ\0", Self::Xz),
            (0, b"BZh", Self::Bzip2),
            (0, b"\x28\xb5\x2f\xfd", Self::Zstd),
            (0, b"\x04\x22\x4d\x18", Self::Lz4),
            (0, b"PK\x03\x04", Self::Zip),
            (0, b"7z\xbc\xaf\x27\x1c", Self::SevenZip),
            (257, b"ustar", Self::Tar), // an OVA is one
            (0x8001, b"CD001", Self::Iso),
            (0x8001, b"BEA01", Self::Iso), // UDF
            (0x8001, b"NSR02", Self::Iso),
            (0x8001, b"NSR03", Self::Iso),
        ];
        claims.extend(signatures.iter().filter(|(offset, magic, _)| at(*offset, magic)).map(|(_, _, format)| *format));
        if is_partitioned_beside_an_iso(head) {
            claims.retain(|format| *format != Self::Iso);
        }
        claims.dedup();
        // a fixed VHD is a raw disk with a footer, a dynamic one has a copy of it in front
        if tail.starts_with(b"conectix") && !claims.contains(&Self::Vhd) {
            claims.push(Self::Vhd);
        }
        claims
    }

    /// The word that Glance's `disk_format` has for it; `None` for what Glance does not know.
    #[must_use]
    pub const fn glance_name(self) -> Option<&'static str> {
        match self {
            Self::Raw | Self::Luks => Some("raw"),
            Self::Qcow2 => Some("qcow2"),
            Self::Vmdk => Some("vmdk"),
            Self::Vdi => Some("vdi"),
            Self::Vhd => Some("vhd"),
            Self::Vhdx => Some("vhdx"),
            Self::Iso => Some("iso"),
            _ => None,
        }
    }

    /// The format that Glance calls so.
    #[must_use]
    pub fn from_glance(name: &str) -> Option<Self> {
        let all = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vdi, Self::Vhd, Self::Vhdx, Self::Iso];
        all.into_iter().find(|format| format.glance_name() == Some(name))
    }

    /// Are its bytes a disk's, as they are? An encrypted one is a disk, too, of which nothing gets smaller.
    #[must_use]
    pub const fn is_disk(self) -> bool {
        matches!(self, Self::Raw | Self::Luks)
    }

    /// Is it a compressed file or an archive?
    #[must_use]
    pub const fn is_packed(self) -> bool {
        matches!(self, Self::Gzip | Self::Xz | Self::Bzip2 | Self::Zstd | Self::Lz4 | Self::Zip | Self::SevenZip | Self::Tar)
    }

    /// The word that `qemu-img` and Glance use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow1 => "qcow",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Iso => "iso",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Zip => "zip",
            Self::SevenZip => "7z",
            Self::Tar => "tar",
            Self::Luks => "luks",
        }
    }

    /// What to do with a file of this format instead of converting it here, with the command.
    #[must_use]
    pub fn advice(self, file: &str) -> String {
        let file = crate::text::shell_word(file);
        match self {
            Self::Raw | Self::Luks => "it can be converted as it is".to_owned(),
            Self::Qcow2 => format!(
                "it needs no conversion; to put it into Glance: virta upload {file} NAME; to compact it: qemu-img convert -O qcow2 {file} compact.qcow2"
            ),
            Self::Iso => {
                format!("an installation medium stays as it is: virta upload {file} NAME")
            }
            Self::Gzip => format!("unpack it first: gunzip -k {file}"),
            Self::Xz => format!("unpack it first: xz -dk {file}"),
            Self::Bzip2 => format!("unpack it first: bunzip2 -k {file}"),
            Self::Zstd => format!("unpack it first: zstd -dk {file}"),
            Self::Lz4 => format!("unpack it first: lz4 -dk {file}"),
            Self::Zip => format!("unpack it first: unzip {file}"),
            Self::SevenZip => format!("unpack it first: 7z x {file}"),
            Self::Tar => format!("unpack it first (an OVA has a VMDK in it): tar -xf {file}"),
            other => format!("convert it with: qemu-img convert -f {} -O qcow2 {file} disk.qcow2", other.name()),
        }
    }
}

/// Is it a disk with partitions of which none covers the place of a CD file system's descriptor? Then that is what is left of something older: a hybrid
/// medium's own entries cover it.
fn is_partitioned_beside_an_iso(head: &[u8]) -> bool {
    const DESCRIPTOR_SECTOR: u64 = 64;
    let Some(sector) = head.get(..512).filter(|sector| sector[510..] == [0x55, 0xaa]) else { return false };
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let entries = sector[446..510].chunks_exact(16).map(|entry| (number(&entry[8..12]), number(&entry[12..16])));
    let used: Vec<(u64, u64)> = entries.filter(|(_, sectors)| *sectors > 0).collect();
    !used.is_empty() && used.iter().all(|(start, sectors)| !(*start..start + sectors).contains(&DESCRIPTOR_SECTOR))
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn formats_are_told_by_their_bytes() {
        assert_eq!(DiskFormat::detect(&[0; 512], &[0; 512]), DiskFormat::Raw);
        assert_eq!(DiskFormat::detect(&[], &[]), DiskFormat::Raw);
        assert_eq!(DiskFormat::detect(&head(510, &[0x55, 0xaa]), &[0; 512]), DiskFormat::Raw, "a boot sector");
        for (offset, magic, format) in [
            (0, b"QFI\xfb\0\0\0\x03".as_slice(), DiskFormat::Qcow2),
            (0, b"QFI\xfb\0\0\0\x01", DiskFormat::Qcow1),
            (0, b"KDMV", DiskFormat::Vmdk),
            (0x40, b"\x7f\x10\xda\xbe", DiskFormat::Vdi),
            (0x8001, b"CD001", DiskFormat::Iso),
            (0, b"\x1f\x8b\x08\0", DiskFormat::Gzip),
            (0, b"\xfd7zXZ\0", DiskFormat::Xz),
        ] {
            assert_eq!(DiskFormat::detect(&head(offset, magic), &[0; 512]), format);
        }
        let mut stale = head(0x8001, b"CD001");
        stale[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(DiskFormat::detect(&stale, &[]), DiskFormat::Iso);
        stale[446..462].copy_from_slice(&[0x80, 0x20, 0x21, 0, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0x38, 6, 0]);
        assert_eq!(DiskFormat::detect(&stale, &[]), DiskFormat::Raw, "a disk that was an installation medium once");
        assert_eq!(DiskFormat::detect(&[0; 512], &head(0, b"conectix")), DiskFormat::Vhd, "a fixed VHD");
        assert!(
            DiskFormat::detect(&head(0, b"LUKS\xba\xbe\0\x02"), &[]).is_disk(),
            "an encrypted disk is converted like any other"
        );
    }

    #[test]
    fn advice_is_a_command_that_can_be_pasted() {
        assert!(DiskFormat::Xz.advice("a b.xz").ends_with("xz -dk 'a b.xz'"));
    }
}
