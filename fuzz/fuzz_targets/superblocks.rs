//! File systems' superblocks: the fuzzer fills what follows a right signature.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::inspect::{filesystem::detect, looking::Part};

fuzz_target!(|input: (u8, u32, Vec<u8>)| {
    let (kind, bytes, fill) = input;
    let signatures: [(usize, &[u8], usize); 9] = [
        (1024 + 0x38, b"\x53\xef", 1024),
        (0, b"XFSB", 0),
        ((64 << 10) + 0x40, b"_BHRfS_M", 64 << 10),
        (4086, b"SWAPSPACE2", 1024),
        (512, b"LABELONE", 512),
        (3, b"NTFS", 0),
        (3, b"EXFAT   ", 0),
        (510, b"\x55\xaa", 0),
        (0, b"LUKS\xba\xbe", 0),
    ];
    let (at, magic, from) = signatures[usize::from(kind) % signatures.len()];
    let mut disk = vec![0; 70_000];
    let room = disk.len() - from;
    let fill = &fill[..fill.len().min(room)];
    disk[from..from + fill.len()].copy_from_slice(fill);
    disk[at..at + magic.len()].copy_from_slice(magic);
    disk.truncate(bytes as usize % 70_001);
    let part = Part::new(&disk, 0, disk.len() as u64).expect("memory has a length");
    let found = detect(&part);
    assert!(found.bytes.is_none_or(|bytes| bytes <= disk.len() as u64));
    assert!(found.free_bytes <= found.bytes);
});
