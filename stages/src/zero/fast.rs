//! The fast zero test. Equal to [`super::scan`] on every input; the property test below holds it to that.
#![allow(unsafe_code)] // one call of a function compiled for AVX2, behind its feature test

/// Bytes that are ORed before the next look: half a kilobyte keeps the early exit close to the data, and the
/// branch is 1 in 16 AVX2 loads.
const BLOCK_BYTES: usize = 512;

/// Are all bytes zero? True for an empty buffer. Never blocks, allocates nothing.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Data mostly shows itself at one of three places (QEMU's util/bufferiszero.c looks there first, too).
    let Some((first, middle, last)) = sample(bytes) else {
        return super::scan::is_zero(bytes);
    };
    if first | middle | last != 0 {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, asked in the line above.
        return unsafe { blocks_are_zero_avx2(bytes) };
    }
    blocks_are_zero(bytes)
}

/// First, middle and last word; `None` for buffers too short to have them.
fn sample(bytes: &[u8]) -> Option<(u64, u64, u64)> {
    let word = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Some((word(0)?, word((bytes.len() / 2).min(bytes.len().checked_sub(8)?))?, word(bytes.len() - 8)?))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn blocks_are_zero_avx2(bytes: &[u8]) -> bool {
    blocks_are_zero(bytes)
}

#[inline(always)] // so that the caller's target features apply to the loop
fn blocks_are_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |seen, word| seen | u64::from_ne_bytes(*word)) == 0
    }) && super::scan::is_zero(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fast_equals_scan(bytes in 0_usize..4000, start in 0_usize..64, dirty in prop::option::of((0_usize..4000, 1_u8..))) {
            let mut buffer = vec![0; start + bytes];
            if let Some((at, value)) = dirty
                && let Some(byte) = buffer.get_mut(start + at)
            {
                *byte = value;
            }
            let buffer = &buffer[start..];
            prop_assert_eq!(is_zero(buffer), super::super::scan::is_zero(buffer));
            prop_assert_eq!(blocks_are_zero(buffer), super::super::scan::is_zero(buffer));
        }
    }

    #[test]
    fn one_bit_anywhere_in_a_cluster_is_found() {
        let mut cluster = vec![0_u8; 65536];
        assert!(is_zero(&cluster));
        for at in 0..cluster.len() {
            cluster[at] = 0x80;
            assert!(!is_zero(&cluster), "byte {at}");
            cluster[at] = 0;
        }
    }
}
