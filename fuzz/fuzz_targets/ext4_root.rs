//! A system's root on ext4 with some bytes changed: looking into it ends, in bounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::inspect::{inspect, looking::Limits};

/// The blocks of a small root file system that are not zero, each behind its index (`mkfs.ext4 -b 1024 -J size=1 -d ROOT`, 6 MiB).
const SEED: &[u8] = include_bytes!("../seeds/ext4-root.bin");

fuzz_target!(|changes: Vec<(u16, u16, u8)>| {
    let mut disk = vec![0; 6 << 20];
    let blocks: Vec<(usize, &[u8])> = SEED
        .chunks_exact(1028)
        .map(|block| (u32::from_le_bytes([block[0], block[1], block[2], block[3]]) as usize, &block[4..]))
        .collect();
    for (index, bytes) in &blocks {
        disk[index * 1024..(index + 1) * 1024].copy_from_slice(bytes);
    }
    for (block, at, byte) in changes {
        let index = blocks[usize::from(block) % blocks.len()].0;
        disk[index * 1024 + usize::from(at) % 1024] = byte;
    }
    let limits = Limits { block_bytes: 4096, bytes: 8 << 20, reads: 50_000, kept_bytes: 8 << 20 };
    let found = inspect(disk, limits, None, "disk").expect("there is a disk");
    assert!(found.read_bytes <= limits.bytes);
});
