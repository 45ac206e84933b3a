//! Whatever an image holds, looking into it ends, takes bounded memory, and says something or that it cannot.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::{
    inspect::{inspect, looking::Limits},
    read_at::ReadAt,
};

/// A disk whose first bytes, and those at a few places where formats have theirs, come from the fuzzer; the rest are zeros.
struct Disk {
    parts: Vec<(u64, Vec<u8>)>,
    bytes: u64,
}

impl ReadAt for Disk {
    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(0);
        let end = file_offset + buf.len() as u64;
        for (start, part) in &self.parts {
            let (from, to) = (file_offset.max(*start), end.min(start + part.len() as u64));
            if from < to {
                buf[(from - file_offset) as usize..(to - file_offset) as usize]
                    .copy_from_slice(&part[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }
}

fuzz_target!(|input: (u8, Vec<u8>, Vec<u8>)| {
    let (kind, first, second) = input;
    let bytes = match kind % 4 {
        0 => first.len() as u64,
        1 => 1 << 20,
        2 => 80 << 30,
        _ => 1 << 62,
    };
    // a superblock, a GPT, a volume label, the tables behind them
    let place = [512, 1024, 4096, 65536, 1 << 20, (1 << 20) + 1024][usize::from(kind / 4) % 6];
    let disk = Disk { parts: vec![(0, first), (place, second)], bytes };
    let limits = Limits { block_bytes: 4096, bytes: 4 << 20, reads: 20_000, kept_bytes: 4 << 20 };
    if let Ok(found) = inspect(disk, limits, None, "disk") {
        assert!(found.read_bytes <= limits.bytes);
        let _ = serde_json::to_string(&found);
    }
});
