//! Inputs that the benches share: deterministic, made from a seed.

/// Bytes that no compressor and no zero test makes anything of.
#[must_use]
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

/// A disk of `mib` MiB of which every `period`-th MiB holds data.
#[must_use]
pub fn sparse_disk(mib: usize, period: usize) -> Vec<u8> {
    let mut disk = vec![0; mib << 20];
    let block = noise(1 << 20, 7);
    for start in (0..mib).step_by(period) {
        disk[start << 20..(start + 1) << 20].copy_from_slice(&block);
    }
    disk
}
