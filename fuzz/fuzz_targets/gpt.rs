//! A GPT whose checksum is right, whatever it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::inspect::partition::{TableKind, read};

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fuzz_target!(|input: (u16, [u8; 84], Vec<u8>)| {
    let (sectors, fields, entries) = input;
    let mut disk = vec![0; 512 * (4 + usize::from(sectors) % 2000)];
    disk[446 + 4] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let header = &mut disk[512..1024];
    header[8..92].copy_from_slice(&fields);
    header[..8].copy_from_slice(b"EFI PART");
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    header[16..20].fill(0);
    let crc = crc32(&header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    let fits = entries.len().min(disk.len() - 1024);
    disk[1024..1024 + fits].copy_from_slice(&entries[..fits]);
    let table = read(&disk);
    assert_eq!(table.kind, TableKind::Gpt);
    assert!(table.partitions.len() <= 256);
});
