//! What the benches share: inputs that are made from a seed, and the comparison of [`instructions`].

pub mod instructions;

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

/// Bytes that compress about as a system's files do: words out of a small dictionary, with numbers between them.
#[must_use]
pub fn text(bytes: usize, seed: u64) -> Vec<u8> {
    let (words, choices) = (noise(4096, seed), noise(bytes, seed + 1));
    let mut text = Vec::with_capacity(bytes + 16);
    for choice in choices.as_chunks::<4>().0 {
        let word = usize::from(choice[0]) * 16;
        text.extend_from_slice(&words[word..word + 2 + usize::from(choice[1] % 12)]);
        text.extend_from_slice(&choice[2..3]);
        if text.len() >= bytes {
            break;
        }
    }
    text.truncate(bytes);
    text
}
