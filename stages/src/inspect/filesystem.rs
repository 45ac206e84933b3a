//! File systems and what else fills a partition: told by their superblocks, with what those say of size, room and cleanliness.
//!
//! Sources: Linux, `Documentation/filesystems/ext4/super.rst` and `fs/xfs/libxfs/xfs_format.h`; xfsprogs, `libxlog`; btrfs-progs,
//! `Documentation/dev/On-disk-format.rst`; util-linux, `libblkid/src/superblocks`. A superblock is believed only as far as it fits into its partition.

use serde::Serialize;

use super::looking::{Part, be, label, le};
use crate::{read_at::ReadAt, units::to_usize};

/// What is in a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// `ext4`, `xfs`, `swap`, `lvm2`, …; `unknown` for what nobody here knows, `empty` for zeros, `unreadable`.
    pub kind: &'static str,
    /// Its label.
    pub label: Option<String>,
    /// Its size, bytes, as it says itself.
    pub bytes: Option<u64>,
    /// Of those, unused; `None` where that cannot be told by a superblock.
    pub free_bytes: Option<u64>,
    /// Was it unmounted cleanly? `None` where that is not known.
    pub clean: Option<bool>,
    /// What is wrong or worth a word.
    pub notes: Vec<String>,
}

impl Filesystem {
    fn of(kind: &'static str) -> Self {
        Self { kind, label: None, bytes: None, free_bytes: None, clean: None, notes: Vec::new() }
    }

    /// Bytes in use; `None` where that is not known.
    #[must_use]
    pub fn used_bytes(&self) -> Option<u64> {
        self.bytes?.checked_sub(self.free_bytes?)
    }
}

/// What a partition holds.
#[must_use]
pub fn detect(part: &Part<'_>) -> Filesystem {
    let part_bytes = part.len_bytes().unwrap_or(0);
    let found = [ext, xfs, btrfs, swap, lvm, luks, ntfs, exfat, fat, others].into_iter().find_map(|look| look(part));
    let mut found = found.unwrap_or_else(|| {
        let head_bytes = part_bytes.min(64 << 10);
        match part.get(0, to_usize(head_bytes)) {
            Some(head) if !crate::zero::is_zero(&head) => Filesystem::of("unknown"),
            Some(_) if head_bytes == part_bytes => Filesystem::of("empty"),
            Some(_) => {
                let note = "its first 64 KiB are zeros; what comes behind was not looked at".to_owned();
                Filesystem { notes: vec![note], ..Filesystem::of("unknown") }
            }
            None => Filesystem::of("unreadable"),
        }
    });
    if let Some(bytes) = found.bytes.filter(|bytes| *bytes > part_bytes) {
        found.notes.push(format!(
            "it says that it has {bytes} bytes, but its partition has {part_bytes}: nothing else that it says is believed"
        ));
        (found.bytes, found.free_bytes, found.clean) = (None, None, Some(false));
    }
    if found.free_bytes > found.bytes {
        found.notes.push("it says that more is free than there is".to_owned());
        (found.free_bytes, found.clean) = (None, Some(false));
    }
    found
}

/// An ext2, ext3 or ext4 superblock.
pub(super) struct ExtSuper {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) needs_recovery: bool,
    raw: Vec<u8>,
}

pub(super) fn ext_super(part: &Part<'_>) -> Option<ExtSuper> {
    let raw = part.get(1024, 1024)?;
    if raw[0x38..0x3a] != [0x53, 0xef] || le(&raw, 0x18, 4) > 6 {
        return None;
    }
    let block_bytes = 1024_u64 << le(&raw, 0x18, 4);
    let wide = le(&raw, 0x60, 4) & 0x80 != 0;
    let blocks = le(&raw, 4, 4) | if wide { le(&raw, 0x150, 4) << 32 } else { 0 };
    let groups = blocks.div_ceil(le(&raw, 0x20, 4).max(1));
    Some(ExtSuper { block_bytes, blocks, groups, needs_recovery: le(&raw, 0x60, 4) & 4 != 0, raw })
}

fn ext(part: &Part<'_>) -> Option<Filesystem> {
    let ExtSuper { block_bytes, blocks, needs_recovery, raw, .. } = ext_super(part)?;
    let (compat, incompat, ro_compat, state) = (le(&raw, 0x5c, 4), le(&raw, 0x60, 4), le(&raw, 0x64, 4), le(&raw, 0x3a, 2));
    if incompat & 8 != 0 {
        return Some(Filesystem::of("ext-journal"));
    }
    let has_journal = compat & 4 != 0;
    // extents, flexible groups, huge files and checksums are ext4's
    let kind = match (incompat & !0x16 != 0 || ro_compat & !7 != 0, has_journal) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    let wide = incompat & 0x80 != 0;
    let free = le(&raw, 0xc, 4) | if wide { le(&raw, 0x158, 4) << 32 } else { 0 };
    let mut found = Filesystem::of(kind);
    found.label = label(&raw[0x78..0x88]);
    found.bytes = blocks.checked_mul(block_bytes);
    found.free_bytes = free.checked_mul(block_bytes);
    found.clean = Some(!needs_recovery && state & 2 == 0 && (has_journal || state & 1 != 0));
    if needs_recovery {
        found.notes.push("its journal holds changes that are not in place yet: it was in use when the image was made".to_owned());
    }
    if state & 2 != 0 {
        found.notes.push("it has errors: run e2fsck in the guest".to_owned());
    }
    Some(found)
}

fn xfs(part: &Part<'_>) -> Option<Filesystem> {
    let raw = part.get(0, 512)?;
    if &raw[..4] != b"XFSB" {
        return None;
    }
    let mut found = Filesystem::of("xfs");
    let block_bytes = be(&raw, 4, 4);
    if !block_bytes.is_power_of_two() || !(512..=65536).contains(&block_bytes) {
        found.notes.push("its superblock is damaged".to_owned());
        found.clean = Some(false);
        return Some(found);
    }
    found.label = label(&raw[108..120]);
    found.bytes = be(&raw, 8, 8).checked_mul(block_bytes);
    found.free_bytes = be(&raw, 144, 8).checked_mul(block_bytes);
    found.clean = xfs_clean(part, &raw, block_bytes);
    match found.clean {
        Some(false) => {
            found.notes.push("its log holds changes that are not in place yet: it was in use when the image was made".to_owned())
        }
        None => found.notes.push("whether it was unmounted cleanly cannot be told".to_owned()),
        Some(true) => {}
    }
    if raw[126] != 0 {
        found.notes.push("it is only half made (mkfs or xfs_growfs was interrupted)".to_owned());
        found.clean = Some(false);
    }
    Some(found)
}

/// Does the log end in an unmount record? Its head is where the cycle number steps down, found by halving.
fn xfs_clean(part: &Part<'_>, raw: &[u8], block_bytes: u64) -> Option<bool> {
    const BASIC: u64 = 512;
    const RECORD: [u8; 4] = [0xfe, 0xed, 0xba, 0xbe];
    /// How far back the last record is looked for: a record holds at most 256 KiB.
    const BACK: u64 = 520;
    let (log_start, ag_blocks, log_blocks, ag_bits) = (be(raw, 48, 8), be(raw, 84, 4), be(raw, 96, 4), be(raw, 124, 1));
    if log_start == 0 || ag_bits >= 32 {
        return None; // on another device
    }
    let (ag, block) = (log_start >> ag_bits, log_start & ((1 << ag_bits) - 1));
    let log_at = ag.checked_mul(ag_blocks)?.checked_add(block)?.checked_mul(block_bytes)?;
    let sectors = log_blocks.checked_mul(block_bytes)? / BASIC;
    if sectors < 4 || log_at.checked_add(sectors.checked_mul(BASIC)?)? > part.len_bytes().ok()? {
        return None;
    }
    let cycle = |sector: u64| {
        let head = part.get(log_at + sector * BASIC, 8)?;
        Some(if head[..4] == RECORD { be(&head, 4, 4) } else { be(&head, 0, 4) })
    };
    let first = cycle(0)?;
    let head = if cycle(sectors - 1)? == first {
        sectors // the log is written exactly once around
    } else {
        let (mut low, mut high) = (0, sectors - 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if cycle(middle)? == first { low = middle } else { high = middle }
        }
        high
    };
    // the record before the head; one that wrapped around the log's end is not looked for
    let from = head.saturating_sub(BACK);
    for sector in (from..head).rev() {
        let header = part.get(log_at + sector * BASIC, 512)?;
        if header[..4] != RECORD {
            continue;
        }
        let (version, length, operations) = (be(&header, 8, 4), be(&header, 12, 4), be(&header, 40, 4));
        let size = be(&header, 320, 4);
        let header_sectors = if version & 2 != 0 { size.div_ceil(32 << 10).max(1) } else { 1 };
        let operation = part.get(log_at + (sector + header_sectors) * BASIC, 16)?;
        let ends_here = sector + header_sectors + length.div_ceil(BASIC) >= head;
        return Some(ends_here && operations == 1 && operation[9] & 0x20 != 0);
    }
    None
}

fn btrfs(part: &Part<'_>) -> Option<Filesystem> {
    let raw = part.get(64 << 10, 4096)?;
    if &raw[0x40..0x48] != b"_BHRfS_M" {
        return None;
    }
    let mut found = Filesystem::of("btrfs");
    found.label = label(&raw[0x12b..0x22b]);
    found.bytes = Some(le(&raw, 0x70, 8));
    found.free_bytes = le(&raw, 0x70, 8).checked_sub(le(&raw, 0x78, 8));
    found.clean = Some(le(&raw, 0x60, 8) == 0);
    if le(&raw, 0x88, 8) != 1 {
        found.notes.push("it is one of several devices of a file system: the others are not in this image".to_owned());
        (found.bytes, found.free_bytes) = (None, None);
    }
    Some(found)
}

fn swap(part: &Part<'_>) -> Option<Filesystem> {
    for page in [4096_u64, 8192, 16384, 65536] {
        let Some(signature) = part.get(page - 10, 10) else { continue };
        let hibernated = matches!(&signature[..9], b"S1SUSPEND" | b"ULSUSPEND" | b"LINHIB000");
        if &signature != b"SWAPSPACE2" && !hibernated {
            continue;
        }
        let mut found = Filesystem::of("swap");
        let header = part.get(1024, 76)?;
        found.bytes = (le(&header, 4, 4) + 1).checked_mul(page);
        found.label = label(&header[28..44]);
        found.free_bytes = found.bytes.filter(|_| !hibernated);
        found.clean = Some(!hibernated);
        if hibernated {
            found.notes.push("a hibernated system is in it".to_owned());
        }
        return Some(found);
    }
    None
}

fn lvm(part: &Part<'_>) -> Option<Filesystem> {
    let head = part.get(0, 2048)?;
    let is_label = |sector: &[u8]| &sector[..8] == b"LABELONE" && &sector[24..32] == b"LVM2 001";
    head.chunks_exact(512).any(is_label).then(|| Filesystem::of("lvm2"))
}

fn luks(part: &Part<'_>) -> Option<Filesystem> {
    let head = part.get(0, 64)?;
    if &head[..6] != b"LUKS\xba\xbe" {
        return None;
    }
    let mut found = Filesystem::of("luks");
    found.label = if be(&head, 6, 2) == 2 { label(&head[24..64]) } else { None };
    found.notes.push("encrypted: nothing of it can be told, and it does not get smaller".to_owned());
    Some(found)
}

fn ntfs(part: &Part<'_>) -> Option<Filesystem> {
    let head = part.get(0, 512)?;
    if &head[3..7] == b"NTFS" {
        let mut found = Filesystem::of("ntfs");
        found.bytes = le(&head, 0x28, 8).checked_mul(le(&head, 0xb, 2));
        return Some(found);
    }
    if &head[3..11] == b"-FVE-FS-" {
        let mut found = Filesystem::of("bitlocker");
        found.notes.push("encrypted: nothing of it can be told, and it does not get smaller".to_owned());
        return Some(found);
    }
    None
}

fn exfat(part: &Part<'_>) -> Option<Filesystem> {
    let head = part.get(0, 512)?;
    if &head[3..11] != b"EXFAT   " || head[108] > 12 {
        return None;
    }
    let mut found = Filesystem::of("exfat");
    found.bytes = le(&head, 72, 8).checked_mul(1 << head[108]);
    found.clean = Some(le(&head, 106, 2) & 2 == 0);
    Some(found)
}

fn fat(part: &Part<'_>) -> Option<Filesystem> {
    let head = part.get(0, 512)?;
    let (sector_bytes, sectors_per_cluster) = (le(&head, 11, 2), u64::from(head[13]));
    let plausible = head[510..] == [0x55, 0xaa]
        && matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
        && sectors_per_cluster.is_power_of_two()
        && matches!(head[16], 1 | 2)
        && matches!(head[21], 0xf0 | 0xf8..);
    if !plausible {
        return None;
    }
    let is_32 = le(&head, 22, 2) == 0;
    let small = le(&head, 19, 2);
    let sectors = if small != 0 { small } else { le(&head, 32, 4) };
    let mut found = Filesystem::of("vfat");
    found.bytes = Some(sectors * sector_bytes);
    found.label = label(if is_32 { &head[71..82] } else { &head[43..54] }).filter(|name| name != "NO NAME");
    if is_32
        && let Some(info) = part.get(le(&head, 48, 2) * sector_bytes, 512)
        && &info[..4] == b"RRaA"
        && le(&info, 488, 4) != u64::from(u32::MAX)
    {
        found.free_bytes = Some(le(&info, 488, 4) * sectors_per_cluster * sector_bytes);
    }
    Some(found)
}

/// What is only named.
fn others(part: &Part<'_>) -> Option<Filesystem> {
    let signatures: [(u64, &[u8], &'static str); 7] = [
        (0, b"hsqs", "squashfs"),
        (0x8001, b"CD001", "iso9660"),
        (1024, b"\x10\x20\xf5\xf2", "f2fs"),
        (4096, b"\xfc\x4e\x2b\xa9", "raid"), // md 1.2
        (0, b"\xfc\x4e\x2b\xa9", "raid"),    // md 1.1
        (24, b"\xc6\x85\x73\xf6", "bcachefs"),
        (0x40, b"bcache", "bcache"),
    ];
    let is = |at: u64, magic: &[u8]| part.get(at, magic.len()).is_some_and(|found| found == magic);
    signatures.into_iter().find(|(at, magic, _)| is(*at, magic)).map(|(_, _, kind)| Filesystem::of(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_that_lies_is_not_believed() {
        let mut disk = vec![0_u8; 1 << 20];
        disk[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        disk[1024 + 4..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        disk[1024 + 0x20..][..4].copy_from_slice(&1_u32.to_le_bytes());
        let found = detect(&Part::new(&disk, 0, 1 << 20).unwrap());
        assert_eq!((found.kind, found.bytes, found.clean), ("ext2", None, Some(false)));
        assert!(found.notes[0].contains("believed"));
        let mut free = vec![0_u8; 1 << 20];
        free[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        free[1024 + 4..][..4].copy_from_slice(&100_u32.to_le_bytes());
        free[1024 + 0xc..][..4].copy_from_slice(&101_u32.to_le_bytes());
        let found = detect(&Part::new(&free, 0, 1 << 20).unwrap());
        assert_eq!((found.bytes, found.free_bytes), (Some(102_400), None));
    }

    #[test]
    fn nothing_and_noise_are_told_apart() {
        assert_eq!(detect(&Part::new(&vec![0; 50_000], 0, 50_000).unwrap()).kind, "empty");
        let zeros_first = detect(&Part::new(&vec![0; 100_000], 0, 100_000).unwrap());
        assert_eq!((zeros_first.kind, zeros_first.notes.len()), ("unknown", 1), "nobody looked behind its first clusters");
        assert_eq!(detect(&Part::new(&vec![9; 100_000], 0, 100_000).unwrap()).kind, "unknown");
        assert_eq!(detect(&Part::new(&vec![9; 10], 0, 10).unwrap()).kind, "unknown");
    }
}
