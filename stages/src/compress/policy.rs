//! Is a cluster worth a try? Encrypted and packed data (media files, archives, LUKS) is told by its own bytes at a small
//! part of what a compressor would spend to find out.
//!
//! Two things would make a cluster smaller: bytes that are not equally frequent, and repetitions. A sample of it is looked
//! at for the first, all of it for the second, in aligned words: what filesystems and archives repeat, they repeat aligned.
//! The answer is a function of the bytes alone, so that a re-read comes to the same one.

use std::cell::RefCell;

/// Clusters below this are always tried: a look costs as much as the try.
const CLUSTER_BYTES_MIN: usize = 4096;
/// Blocks of this size are taken from the cluster for the histogram, evenly spread.
const BLOCK_BYTES: usize = 1024;
/// So many of them.
const BLOCKS: usize = 16;
/// Entries of the table of words seen.
const TABLE: usize = 1 << 12;

/// Would a compressor most likely save less than a sector? For random bytes it always says so, for text never.
#[must_use]
pub fn looks_incompressible(cluster: &[u8]) -> bool {
    cluster.len() >= CLUSTER_BYTES_MIN && is_flat(cluster) && !repeats(cluster)
}

/// Are all byte values about equally frequent? Random bytes: the sum of squared counts is `n^2/256 + n` on the average;
/// a quarter of `n^2/256` above it is far outside of what chance does, and is where deflate begins to gain.
fn is_flat(cluster: &[u8]) -> bool {
    // four tables, so that equal neighbours do not wait for each other
    let mut counts = [[0_u32; 256]; 4];
    let step = cluster.len() / BLOCKS;
    let block_bytes = BLOCK_BYTES.min(step);
    for block in cluster.chunks_exact(step) {
        for four in block[..block_bytes].chunks_exact(4) {
            for (table, &byte) in counts.iter_mut().zip(four) {
                table[usize::from(byte)] += 1;
            }
        }
    }
    let mut total = 0_u64;
    let mut squares = 0_u64;
    for value in 0..256 {
        let count: u64 = counts.iter().map(|table| u64::from(table[value])).sum();
        total += count;
        squares += count * count;
    }
    let even = total * total / 256;
    squares <= even + total + even / 16
}

/// Do aligned words come back?
fn repeats(cluster: &[u8]) -> bool {
    thread_local! {
        static SEEN: RefCell<Box<[u64; TABLE]>> = RefCell::new(Box::new([0; TABLE]));
    }
    let (words, _) = cluster.as_chunks::<8>();
    // a compressor gains about 6 bytes a repeated word: what makes up a sector is worth a try
    let enough = 512 / 6;
    SEEN.with_borrow_mut(|seen| {
        seen.fill(0);
        let mut repeated = 0;
        for word in words {
            let word = u64::from_le_bytes(*word);
            let slot = &mut seen[usize::try_from(word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52).unwrap_or(0)];
            repeated += usize::from(*slot == word);
            *slot = word;
        }
        repeated >= enough
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::{Codec, Compression, Encoder};

    fn random(bytes: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        std::iter::repeat_with(&mut next).take(bytes).collect()
    }

    #[test]
    fn random_bytes_are_told_and_what_shrinks_is_not_lost() {
        for seed in 1..50 {
            assert!(looks_incompressible(&random(65536, seed)), "seed {seed}");
        }
        // half random, half zeros; a random block that comes back; hexadecimal digits
        let mut half = random(65536, 7);
        half[32768..].fill(0);
        assert!(!looks_incompressible(&half));
        let block = random(8192, 9);
        assert!(!looks_incompressible(&block.repeat(8)));
        let hex: Vec<u8> = random(65536, 11).iter().map(|byte| b"0123456789abcdef"[usize::from(byte & 15)]).collect();
        assert!(!looks_incompressible(&hex));
    }

    #[test]
    fn what_is_called_incompressible_saves_hardly_anything() {
        // mostly random, with a growing part of text: where the look gives up, deflate has little to gain
        let text = b"the quick brown fox jumps over the lazy dog; ".repeat(100);
        let mut encoder = Encoder::new(Compression::new(Codec::Deflate));
        let mut worst = 0;
        for part in (0..65536).step_by(1024) {
            let mut cluster = random(65536, 21);
            for piece in cluster[..part].chunks_mut(text.len()) {
                piece.copy_from_slice(&text[..piece.len()]);
            }
            let mut into = vec![0; 70_000];
            let stored = encoder.encode(&cluster, &mut into).unwrap();
            if looks_incompressible(&cluster) {
                worst = worst.max(65536_usize.saturating_sub(stored));
            }
        }
        assert!(worst <= 65536 / 50, "{worst} bytes were given away");
    }
}
