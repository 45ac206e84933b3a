//! Partition tables: MBR with its chain of logical partitions, and GPT with its copy at the disk's end; and what is wrong with them.
//!
//! A parser of our own, against the usual rule that a well-kept crate goes first: 2026-11-24, gptman 3.1.1 reserves memory for as many entries as the
//! header claims (up to 2^32 of more than 100 bytes), gpt 4.1.0 asserts that an entry has 128 bytes, and what is looked at here was written by anybody. Sources: UEFI
//! specification 2.10, section 5; Linux, `block/partitions/msdos.c` and `efi.c`.

use super::{format::is_boot_sector, looking::le};
use crate::{
    read_at::ReadAt,
    text::printable,
    units::{to_u64, to_usize},
};

const SECTOR: u64 = 512;
/// Entries of a GPT that are read: Linux takes as many, and no tool makes more than 128.
const GPT_ENTRIES_MAX: u64 = 256;
/// Logical partitions that are followed.
const LOGICAL_MAX: usize = 128;

/// What a disk begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// Nothing, or a file system over the whole disk.
    None,
    /// DOS partitions.
    Mbr,
    /// GUID partitions.
    Gpt,
}

/// What a partition is for, as its type says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Data of some kind.
    Data,
    /// The EFI system partition.
    Esp,
    /// Where GRUB keeps itself on a GPT disk.
    BiosBoot,
    /// Swap.
    Swap,
    /// An LVM physical volume.
    Lvm,
    /// The container of logical partitions.
    Extended,
    /// PowerPC's boot partition.
    PrepBoot,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Partition {
    /// Its number, as Linux counts.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    /// What it is for.
    pub role: Role,
    /// Its type, as the table has it.
    pub type_id: String,
    /// Its name, on a GPT disk.
    pub name: Option<String>,
}

/// A disk's partitions.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Table {
    /// Which kind.
    pub kind: TableKind,
    /// In the order of the table.
    pub partitions: Vec<Partition>,
    /// What is wrong with it.
    pub faults: Vec<String>,
}

/// Reads the tables of a disk. What cannot be read is a fault; nothing is an error.
#[must_use]
pub fn read(disk: &dyn ReadAt) -> Table {
    let none = |faults| Table { kind: TableKind::None, partitions: Vec::new(), faults };
    let Ok(disk_bytes) = disk.len_bytes() else { return none(vec!["the disk's length cannot be told".to_owned()]) };
    let mut sector = [0; 512];
    if disk_bytes < SECTOR {
        return none(vec!["it is shorter than a sector: that is no disk".to_owned()]);
    }
    if disk.read_exact_at(0, &mut sector).is_err() {
        return none(vec!["the first sector cannot be read".to_owned()]);
    }
    // file systems that begin with a boot sector of their own
    let is_volume = &sector[3..7] == b"NTFS" || &sector[3..11] == b"EXFAT   " || &sector[3..11] == b"-FVE-FS-";
    if !is_boot_sector(&sector) || is_volume {
        return none(Vec::new());
    }
    let mut table = match (0..4).any(|number| sector[446 + 16 * number + 4] == 0xee) {
        true => gpt(disk, disk_bytes, &sector),
        false => mbr(disk, &sector),
    };
    check(&mut table, disk_bytes);
    table
}

/// What every table has to keep to.
fn check(table: &mut Table, disk_bytes: u64) {
    for partition in &table.partitions {
        if partition.start.saturating_add(partition.bytes) > disk_bytes {
            table.faults.push(format!(
                "partition {} passes the end of the disk: the image was cut off, or copied onto a smaller one",
                partition.number
            ));
        }
    }
    let mut plain: Vec<&Partition> = table.partitions.iter().filter(|partition| partition.role != Role::Extended).collect();
    plain.sort_by_key(|partition| partition.start);
    for pair in plain.windows(2) {
        if pair[0].start.saturating_add(pair[0].bytes) > pair[1].start {
            table.faults.push(format!("partitions {} and {} overlap", pair[0].number, pair[1].number));
        }
    }
    if table.kind == TableKind::Mbr && table.partitions.is_empty() {
        table.faults.push("there is a boot sector, but no partition in it".to_owned());
    }
}

fn mbr_role(kind: u8) -> Role {
    match kind {
        0x05 | 0x0f | 0x85 => Role::Extended,
        0x82 => Role::Swap,
        0x8e => Role::Lvm,
        0xef => Role::Esp,
        0x41 => Role::PrepBoot,
        _ => Role::Data,
    }
}

fn mbr(disk: &dyn ReadAt, sector: &[u8; 512]) -> Table {
    let mut table = Table { kind: TableKind::Mbr, partitions: Vec::new(), faults: Vec::new() };
    for (number, entry) in (1..).zip(sector[446..510].chunks_exact(16)) {
        let (boot, kind) = (entry[0], entry[4]);
        if !matches!(boot, 0 | 0x80) {
            table.faults.push(format!("partition entry {number} has boot flag {boot:#04x}, which is neither 0x00 nor 0x80"));
        }
        let (start, bytes) = (le(entry, 8, 4) * SECTOR, le(entry, 12, 4) * SECTOR);
        if kind == 0 || bytes == 0 {
            continue;
        }
        let role = mbr_role(kind);
        table.partitions.push(Partition { number, start, bytes, role, type_id: format!("{kind:#04x}"), name: None });
        if role == Role::Extended {
            logical(disk, start, &mut table);
        }
    }
    table
}

/// Follows the chain of logical partitions: each link lies behind the one before, or it is none.
fn logical(disk: &dyn ReadAt, extended: u64, table: &mut Table) {
    let mut at = extended;
    let mut number = 5;
    for _ in 0..LOGICAL_MAX {
        let mut sector = [0; 512];
        if disk.read_exact_at(at, &mut sector).is_err() || sector[510..] != [0x55, 0xaa] {
            table.faults.push(format!("the chain of logical partitions is broken at byte {at}"));
            return;
        }
        let (first, second) = (&sector[446..462], &sector[462..478]);
        let (kind, bytes) = (first[4], le(first, 12, 4) * SECTOR);
        if kind != 0 && bytes > 0 {
            let start = at + le(first, 8, 4) * SECTOR;
            table.partitions.push(Partition {
                number,
                start,
                bytes,
                role: mbr_role(kind),
                type_id: format!("{kind:#04x}"),
                name: None,
            });
            number += 1;
        }
        if second[4] == 0 || le(second, 8, 4) == 0 {
            return;
        }
        let next = extended + le(second, 8, 4) * SECTOR;
        if next <= at {
            table.faults.push("the chain of logical partitions leads back to where it was".to_owned());
            return;
        }
        at = next;
    }
    table.faults.push(format!("there are more than {LOGICAL_MAX} logical partitions"));
}

/// A GPT header that can be believed.
struct GptHeader {
    entries_at: u64,
    entries: u64,
    entry_bytes: u64,
    entries_crc: u32,
}

/// Why a header cannot be believed that could not be read.
const OUT_OF_REACH: &str = "cannot be read";

/// `Err`: why it cannot.
fn gpt_header(disk: &dyn ReadAt, at: u64) -> Result<GptHeader, &'static str> {
    let mut sector = [0; 512];
    disk.read_exact_at(at, &mut sector).map_err(|_| OUT_OF_REACH)?;
    if &sector[..8] != b"EFI PART" {
        return Err("is not there");
    }
    let header_bytes = to_usize(le(&sector, 12, 4));
    if !(92..=512).contains(&header_bytes) {
        return Err("has an impossible length");
    }
    let crc = le(&sector, 16, 4);
    let mut without = sector;
    without[16..20].fill(0);
    if u64::from(crc32(&without[..header_bytes])) != crc {
        return Err("has a wrong checksum");
    }
    let (entries_lba, entries, entry_bytes) = (le(&sector, 72, 8), le(&sector, 80, 4), le(&sector, 84, 4));
    if !entry_bytes.is_power_of_two() || !(128..=4096).contains(&entry_bytes) {
        return Err("has entries of an impossible length");
    }
    let entries_at = entries_lba.checked_mul(SECTOR).ok_or("has its entries at an impossible place")?;
    let entries_crc = u32::try_from(le(&sector, 88, 4)).unwrap_or(0);
    Ok(GptHeader { entries_at, entries, entry_bytes, entries_crc })
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = libdeflater::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn gpt(disk: &dyn ReadAt, disk_bytes: u64, sector: &[u8; 512]) -> Table {
    let mut table = Table { kind: TableKind::Gpt, partitions: Vec::new(), faults: Vec::new() };
    let used = (0..4).filter(|number| sector[446 + 16 * number + 4] != 0).count();
    if used > 1 {
        table
            .faults
            .push("the protective MBR has other partitions, too (a hybrid table): Glance refuses the disk as raw".to_owned());
    }
    let backup_at = (disk_bytes / SECTOR).saturating_sub(1) * SECTOR;
    let primary = gpt_header(disk, SECTOR);
    let backup = gpt_header(disk, backup_at);
    // what is out of reach is no fault of the table's
    if let Err(why) = &backup
        && *why != OUT_OF_REACH
    {
        let most_likely = if *why == "is not there" { ": the disk was enlarged or cut after it was made" } else { "" };
        table.faults.push(format!("the copy of the GPT at the disk's end {why}{most_likely}"));
    }
    let header = match (primary, backup) {
        (Ok(header), _) => header,
        (Err(why), Ok(header)) => {
            table.faults.push(format!("the GPT at the disk's beginning {why}; its copy at the end is read instead"));
            header
        }
        (Err(why), Err(_)) => {
            table.faults.push(format!("the GPT at the disk's beginning {why}"));
            return table;
        }
    };
    let count = header.entries.min(GPT_ENTRIES_MAX);
    let mut entries = vec![0; to_usize(count * header.entry_bytes)];
    if disk.read_exact_at(header.entries_at, &mut entries).is_err() {
        table.faults.push("the GPT's entries cannot be read".to_owned());
        return table;
    }
    if header.entries > GPT_ENTRIES_MAX {
        table.faults.push(format!("the GPT claims {} entries: only {GPT_ENTRIES_MAX} are looked at", header.entries));
    } else if crc32(&entries) != header.entries_crc {
        table.faults.push("the GPT's entries have a wrong checksum".to_owned());
    }
    for (number, entry) in (1..).zip(entries.chunks_exact(to_usize(header.entry_bytes))) {
        if entry[..16].iter().all(|byte| *byte == 0) {
            continue;
        }
        let type_id = guid(&entry[..16]);
        let (first, last) = (le(entry, 32, 8), le(entry, 40, 8));
        let length =
            last.checked_sub(first).and_then(|sectors| sectors.checked_add(1)).and_then(|sectors| sectors.checked_mul(SECTOR));
        let (Some(bytes), Some(start)) = (length, first.checked_mul(SECTOR)) else {
            table.faults.push(format!("partition {number} ends before it begins, or lies beyond all disks"));
            continue;
        };
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
            .take_while(|unit| *unit != 0)
            .collect();
        let name = Some(printable(&String::from_utf16_lossy(&name))).filter(|name| !name.is_empty());
        let role = match type_id.as_str() {
            "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => Role::Esp,
            "21686148-6449-6e6f-744e-656564454649" => Role::BiosBoot,
            "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => Role::Swap,
            "e6d6d379-f507-44c2-a23c-238f2a3df928" => Role::Lvm,
            "9e1a2d38-c612-4316-aa26-8b49521e5a8b" => Role::PrepBoot,
            _ => Role::Data,
        };
        table.partitions.push(Partition { number, start, bytes, role, type_id, name });
    }
    debug_assert!(to_u64(table.partitions.len()) <= GPT_ENTRIES_MAX);
    table
}

/// A GUID as it is written: its first three parts are little-endian on disk.
fn guid(bytes: &[u8]) -> String {
    let array: [u8; 16] = bytes.try_into().unwrap_or_default();
    uuid::Uuid::from_bytes_le(array).hyphenated().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u8, start: u32, sectors: u32) -> [u8; 16] {
        let mut entry = [0; 16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
        entry
    }

    fn disk(sectors: usize, entries: &[[u8; 16]]) -> Vec<u8> {
        let mut disk = vec![0; sectors * 512];
        put(&mut disk, 0, entries);
        disk
    }

    fn put(disk: &mut [u8], sector: usize, entries: &[[u8; 16]]) {
        for (number, entry) in entries.iter().enumerate() {
            disk[sector * 512 + 446 + 16 * number..][..16].copy_from_slice(entry);
        }
        disk[sector * 512 + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn logical_partitions_are_followed_and_a_chain_in_circles_is_not() {
        let mut chained = disk(1000, &[entry(0x83, 10, 90), entry(5, 100, 800)]);
        put(&mut chained, 100, &[entry(0x83, 2, 50), entry(5, 200, 100)]);
        put(&mut chained, 300, &[entry(0x82, 2, 50)]);
        let table = read(&chained);
        let found: Vec<(u32, u64, Role)> =
            table.partitions.iter().map(|part| (part.number, part.start / 512, part.role)).collect();
        assert_eq!(found, [(1, 10, Role::Data), (2, 100, Role::Extended), (5, 102, Role::Data), (6, 302, Role::Swap)]);
        assert_eq!(table.faults, Vec::<String>::new());
        put(&mut chained, 300, &[entry(0x82, 2, 50), entry(5, 200, 100)]);
        assert!(read(&chained).faults[0].contains("leads back"));
    }

    #[test]
    fn faults_are_told_and_a_file_system_over_the_whole_disk_is_none() {
        assert_eq!(read(&vec![0; 4096]).kind, TableKind::None);
        assert!(read(&disk(10, &[])).faults[0].contains("no partition in it"));
        let table = read(&disk(100, &[entry(0x83, 10, 50), entry(0x83, 50, 100)]));
        assert!(table.faults.iter().any(|fault| fault.contains("passes the end")), "{:?}", table.faults);
        assert!(table.faults.iter().any(|fault| fault.contains("overlap")), "{:?}", table.faults);
        let mut fat = disk(10, &[]);
        (fat[0x10], fat[0x15]) = (2, 0xf8);
        assert_eq!(read(&fat).kind, TableKind::None);
        assert!(read(&vec![0; 100]).faults[0].contains("no disk"));
    }

    #[test]
    fn a_gpt_that_lies_costs_nothing() {
        let mut lying = disk(100, &[entry(0xee, 1, 99)]);
        assert!(read(&lying).faults.iter().any(|fault| fault.contains("beginning is not there")));
        let header = &mut lying[512..1024];
        header[..8].copy_from_slice(b"EFI PART");
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        header[72..80].copy_from_slice(&u64::MAX.to_le_bytes());
        header[80..84].copy_from_slice(&u32::MAX.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        assert!(read(&lying).faults.iter().any(|fault| fault.contains("impossible place")), "{:?}", read(&lying).faults);
    }
}
