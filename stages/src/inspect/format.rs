//! Which format a file is in, and whether Glance will take it: all of it said before a byte is sent. Glance itself says so after the last.
//!
//! Source: oslo.utils, `imageutils/format_inspector.py`, and glance, `location.py`. All of their inspectors look at the same stream, and more than
//! one match is a refusal; the one exception is an ISO with a boot sector.

use std::io;

use crate::{
    magic::{DiskFormat, HEAD_BYTES},
    qcow2::{Header, Qcow2, Qcow2Error, whole},
    read_at::ReadAt,
    units::to_usize,
};

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identified {
    /// Its format.
    pub format: DiskFormat,
    /// Its length, bytes.
    pub file_bytes: u64,
    /// The first sector ends in 55 AA, and is no FAT file system's: a boot sector with a partition table, as Glance sees it.
    pub boot_sector: bool,
    /// What Glance's check of that partition table finds; it refuses the bytes as `raw`.
    pub boot_fault: Option<String>,
}

/// Why a file is no single thing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// It cannot be read.
    #[error("reading the image's first bytes")]
    Io(#[from] io::Error),
    /// There is nothing in it.
    #[error("the file is empty: there is no image in it")]
    Empty,
    /// It carries several signatures.
    #[error("the file is {} at once: whoever reads it as the other one sees other bytes, so Glance refuses it, and so it goes no further here", .0.join(" and "))]
    Ambiguous(Vec<String>),
}

/// Looks at the first 64 KiB and the last 512 bytes.
///
/// # Errors
/// [`FormatError`].
pub fn identify(file: &impl ReadAt) -> Result<Identified, FormatError> {
    let file_bytes = file.len_bytes()?;
    if file_bytes == 0 {
        return Err(FormatError::Empty);
    }
    let mut head = vec![0; to_usize(file_bytes.min(HEAD_BYTES))];
    file.read_exact_at(0, &mut head)?;
    let mut tail = vec![0; to_usize(file_bytes.min(512))];
    // its end may be out of reach: then only the footer of a fixed VHD is missed
    if file.read_exact_at(file_bytes - file_bytes.min(512), &mut tail).is_err() {
        tail.clear();
    }
    let claims = DiskFormat::claims(&head, &tail);
    let boot_sector = head.get(..512).is_some_and(is_boot_sector);
    let boot_fault = head.get(..512).filter(|_| boot_sector).and_then(partition_fault);
    let format = match claims.as_slice() {
        [] => DiskFormat::Raw,
        // signatures of packed files are short, and 55 AA is as good as any two bytes of them; a VHD's own are at its end
        [one @ (DiskFormat::Iso | DiskFormat::Vhd)] => *one,
        [one] if !boot_sector || one.is_packed() => *one,
        several => {
            let mut names: Vec<String> = several.iter().map(|format| format.name().to_owned()).collect();
            if boot_sector {
                names.push("a disk with a partition table".to_owned());
            }
            return Err(FormatError::Ambiguous(names));
        }
    };
    Ok(Identified { format, file_bytes, boot_sector, boot_fault })
}

/// Does a first sector look like a partition table's? A FAT file system ends its own in the same two bytes.
pub(super) fn is_boot_sector(sector: &[u8]) -> bool {
    let is_fat = sector[0x10] == 2 && sector[0x15] == 0xf8;
    sector[510..512] == [0x55, 0xaa] && !is_fat
}

/// What Glance's inspector minds about a partition table (`check_mbr_partitions`).
fn partition_fault(sector: &[u8]) -> Option<String> {
    let entries: Vec<&[u8]> = sector[446..510].chunks_exact(16).collect();
    let mut used = Vec::new();
    let mut gpt = false;
    for (number, entry) in entries.iter().enumerate() {
        if !matches!(entry[0], 0 | 0x80) {
            return Some(format!(
                "partition entry {} has boot flag {:#04x}, which is neither 0x00 nor 0x80",
                number + 1,
                entry[0]
            ));
        }
        if entry[4] != 0 {
            used.push(number);
        }
        if entry[4] == 0xee {
            gpt = true;
            if entry[1..4] != [0, 2, 0] {
                return Some("the GPT's protective entry starts at another place than CHS 0/0/2".to_owned());
            }
            if entry[8..12] != [1, 0, 0, 0] {
                return Some("the GPT's protective entry does not start at sector 1".to_owned());
            }
        }
    }
    if gpt && used != [0] {
        return Some("beside the GPT's protective entry there are others (a hybrid partition table)".to_owned());
    }
    used.is_empty().then(|| "the boot sector has no partition in it".to_owned())
}

/// What is known of a qcow2 image that Glance would take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Facts {
    /// Its header.
    pub header: Header,
    /// What its tables say.
    pub contents: whole::Contents,
}

/// Why a qcow2 image should not be sent.
#[derive(Debug, thiserror::Error)]
#[error("this qcow2 image {why}")]
pub struct Qcow2Refused {
    /// Why, with what to do.
    pub why: String,
    /// What was found.
    #[source]
    pub source: Option<Qcow2Error>,
}

/// Reads a qcow2 image's header and all its tables.
///
/// # Errors
/// [`Qcow2Refused`] for one that Glance would refuse after its last byte, and for one that is shorter than its tables say, which Glance would take.
pub fn check_qcow2<R: ReadAt>(file: R, shown: &str) -> Result<Qcow2Facts, Qcow2Refused> {
    let flatten = format!("qemu-img convert -O qcow2 {shown} whole.qcow2");
    let image = Qcow2::open(file).map_err(|error| {
        let why = match &error {
            Qcow2Error::Unsupported { feature } if feature.starts_with("the corrupt") => {
                format!("is marked as corrupt; look at a copy of it: qemu-img check -r all {shown}")
            }
            Qcow2Error::Unsupported { feature } if feature.starts_with("encryption") => {
                "is encrypted: no server could boot from it. Decrypt it with qemu-img convert and its key".to_owned()
            }
            Qcow2Error::Unsupported { feature } => {
                format!("uses {feature}, and Glance would refuse it after its last byte. An image without: {flatten}")
            }
            Qcow2Error::Header { field: "l1_table_offset", rule: "the table passes the end of the file", .. } => cut_short(),
            _ => "has a header that QEMU does not accept, either".to_owned(),
        };
        // what is not supported is said already
        let source = Some(error).filter(|error| !matches!(error, Qcow2Error::Unsupported { .. }));
        Qcow2Refused { why, source }
    })?;
    let contents = whole::contents(&image).map_err(|error| {
        let why = match &error {
            Qcow2Error::Entry { rule: "points past the end of the file", .. } => cut_short(),
            Qcow2Error::Header { rule: "the table passes the end of the file", .. } => cut_short(),
            _ => format!("is damaged; look at a copy of it: qemu-img check -r all {shown}"),
        };
        Qcow2Refused { why, source: Some(error) }
    })?;
    Ok(Qcow2Facts { header: image.header().clone(), contents })
}

fn cut_short() -> String {
    "is shorter than its own tables say: it was cut off when it was copied or downloaded. Glance would take it, and no server would boot from it. Get it \
     again, and compare its checksum"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(changes: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        for (at, part) in changes {
            bytes[*at..*at + part.len()].copy_from_slice(part);
        }
        bytes
    }

    const BOOT: (usize, &[u8]) = (510, &[0x55, 0xaa]);
    const LINUX: (usize, &[u8]) = (446, &[0x80, 0x20, 0x21, 0, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0x38, 6, 0]);
    const PROTECTIVE: (usize, &[u8]) = (446, &[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);

    #[test]
    fn a_raw_disk_is_told_with_what_glance_minds_about_its_partition_table() {
        let fault = |changes: &[(usize, &[u8])]| identify(&file(changes)).unwrap().boot_fault;
        assert_eq!(fault(&[]), None);
        assert_eq!(fault(&[BOOT, LINUX]), None);
        assert_eq!(fault(&[BOOT, PROTECTIVE]), None);
        assert!(fault(&[BOOT]).unwrap().contains("no partition"));
        assert!(fault(&[BOOT, LINUX, (446, &[0x90])]).unwrap().contains("boot flag 0x90"));
        assert!(fault(&[BOOT, PROTECTIVE, (447, &[1])]).unwrap().contains("CHS"));
        assert!(fault(&[BOOT, PROTECTIVE, (454, &[2])]).unwrap().contains("sector 1"));
        assert!(fault(&[BOOT, PROTECTIVE, (462 + 4, &[0x83])]).unwrap().contains("hybrid"));
        let fat = identify(&file(&[BOOT, (0x10, &[2]), (0x15, &[0xf8])])).unwrap();
        assert!(!fat.boot_sector && fat.format == DiskFormat::Raw, "a FAT file system's own first sector");
    }

    #[test]
    fn more_than_one_format_is_none_but_a_bootable_iso_is_one() {
        let iso: (usize, &[u8]) = (0x8001, b"CD001");
        assert_eq!(identify(&file(&[iso])).unwrap().format, DiskFormat::Iso);
        assert_eq!(
            identify(&file(&[iso, BOOT, LINUX])).unwrap().format,
            DiskFormat::Raw,
            "its partition begins behind the ISO's descriptor"
        );
        assert_eq!(identify(&file(&[iso, BOOT, PROTECTIVE])).unwrap().format, DiskFormat::Iso);
        let qcow2: (usize, &[u8]) = (0, b"QFI\xfb\0\0\0\x03");
        assert_eq!(identify(&file(&[qcow2])).unwrap().format, DiskFormat::Qcow2);
        let refused = |changes: &[(usize, &[u8])]| identify(&file(changes)).unwrap_err().to_string();
        assert!(refused(&[qcow2, iso]).contains("qcow2 and iso"));
        assert!(refused(&[qcow2, BOOT]).contains("qcow2 and a disk with a partition table"));
        assert!(refused(&[iso, (0x40, b"\x7f\x10\xda\xbe")]).contains("vdi and iso"));
        assert_eq!(identify(&file(&[(0, b"\x1f\x8b\x08"), BOOT])).unwrap().format, DiskFormat::Gzip);
        assert!(matches!(identify(&Vec::new()), Err(FormatError::Empty)));
    }
}
