//! SHA-512 that takes zeros as a length.
//!
//! Hashing is what a checked conversion waits for: it is one chain, which no second core can help with, and most of a disk is zeros. A block
//! of zeros needs no message schedule: every word that is expanded out of zeros is zero, because the schedule's functions are
//! XORs of shifts, and sums. What is left are the 80 rounds with their constants, 1.4 times as fast as hashing zero bytes in assembly
//! (AMD EPYC, 0.50 against 0.36 GB/s, `benches/benches/sha512.rs` in the workspace). The digest is the same: FIPS 180-4, section 6.4.
//!
//! Data goes to AWS-LC's assembly. Its context's words are public (`openssl/sha.h`: `h`, the count of bits, the bytes of an unfinished block),
//! so that all work on one state.
//!
//! On x86 AWS-LC has fast code for Intel's processors alone: any other gets the one of 2005. There, whole blocks of data are compressed here: the message
//! schedule two words at a time in vectors, between the rounds, as Intel's paper has it (*Fast SHA-512 Implementations on Intel Architecture
//! Processors*, 2012) and OpenSSL does. 1.23 times as fast (AMD EPYC of the first generation, 0.45 against 0.36 GB/s, OpenSSL 3.0 0.45). Vectors of
//! 128 bits are enough: twice as wide ones, two blocks at once, were slower, for all the work falls between the rounds of one block.
#![allow(unsafe_code)] // three C functions over a plain struct, and vectors; see each SAFETY line

use std::fmt;

use aws_lc_sys::{SHA512_CTX, SHA512_Final, SHA512_Init, SHA512_Update};

use crate::units::{to_u64, to_usize};

/// Bytes of one block.
const BLOCK_BYTES: u64 = 128;
/// Bytes of the digest.
pub const DIGEST_BYTES: usize = 64;

/// A digest under way.
#[derive(Clone)]
pub struct Sha512(SHA512_CTX);

impl fmt::Debug for Sha512 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sha512")
    }
}

impl Default for Sha512 {
    fn default() -> Self {
        Self::new()
    }
}

impl Sha512 {
    /// Of no bytes yet.
    #[must_use]
    pub fn new() -> Self {
        let mut context = SHA512_CTX { h: [0; 8], Nl: 0, Nh: 0, p: [0; 128], num: 0, md_len: 0 };
        // SAFETY: `context` is a valid, exclusive pointer; the function only writes its fields.
        let done = unsafe { SHA512_Init(&raw mut context) };
        debug_assert_eq!(done, 1, "documented to return 1");
        Self(context)
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        if !compresses_itself() {
            return self.pass_on(bytes);
        }
        let (first, rest) = bytes.split_at(to_usize(self.missing()).min(bytes.len()));
        self.pass_on(first);
        let (blocks, rest) = rest.as_chunks::<{ to_usize(BLOCK_BYTES) }>();
        if !blocks.is_empty() {
            debug_assert_eq!(self.0.num, 0, "on a block's boundary");
            compress(&mut self.0.h, blocks);
            self.count_blocks(to_u64(blocks.len()));
        }
        self.pass_on(rest);
    }

    /// Bytes that a block which was begun lacks.
    fn missing(&self) -> u64 {
        let begun = u64::from(self.0.num);
        if begun == 0 { 0 } else { BLOCK_BYTES - begun }
    }

    /// So many blocks were compressed behind the context's back.
    fn count_blocks(&mut self, blocks: u64) {
        let bits = u128::from(blocks) * u128::from(BLOCK_BYTES) * 8;
        let counted = (u128::from(self.0.Nh) << 64 | u128::from(self.0.Nl)).wrapping_add(bits);
        (self.0.Nh, self.0.Nl) = (high(counted), low(counted));
    }

    /// To AWS-LC.
    fn pass_on(&mut self, bytes: &[u8]) {
        // SAFETY: the context was initialised in `new` and is borrowed exclusively; `bytes` is valid for its length and only read.
        let done = unsafe { SHA512_Update(&raw mut self.0, bytes.as_ptr().cast(), bytes.len()) };
        debug_assert_eq!(done, 1, "documented to return 1");
    }

    /// So many zero bytes.
    pub fn update_zeros(&mut self, bytes: u64) {
        let zeros = [0_u8; 128];
        // up to the end of the block that was begun
        let first = self.missing().min(bytes);
        self.update(&zeros[..to_usize(first)]);
        let blocks = (bytes - first) / BLOCK_BYTES;
        if has_instructions() {
            let many = [0_u8; 128 * 32];
            (0..blocks / 32).for_each(|_| self.update(&many));
            self.update(&many[..to_usize(blocks % 32 * BLOCK_BYTES)]);
        } else if blocks > 0 {
            debug_assert_eq!(self.0.num, 0, "on a block's boundary");
            compress_zeros(&mut self.0.h, blocks);
            self.count_blocks(blocks);
        }
        self.update(&zeros[..to_usize((bytes - first) % BLOCK_BYTES)]);
    }

    /// The digest.
    #[must_use]
    pub fn finish(mut self) -> [u8; DIGEST_BYTES] {
        let mut digest = [0; DIGEST_BYTES];
        // SAFETY: the context was initialised in `new`, and `digest` has room for the 64 bytes that SHA-512 writes.
        let done = unsafe { SHA512_Final(digest.as_mut_ptr(), &raw mut self.0) };
        debug_assert_eq!(done, 1, "1 for a context that was initialised");
        digest
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
const fn low(bits: u128) -> u64 {
    bits as u64
}

const fn high(bits: u128) -> u64 {
    low(bits >> 64)
}

/// Does the processor have instructions for SHA-512, which AWS-LC uses? They are faster than anything said in others.
fn has_instructions() -> bool {
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("sha3"); // FEAT_SHA512 comes with it
    #[cfg(not(target_arch = "aarch64"))]
    false
}

/// Is data compressed here, and not in AWS-LC?
#[cfg(target_arch = "x86_64")]
fn compresses_itself() -> bool {
    use std::{arch::x86_64::__cpuid, sync::LazyLock};
    static ITSELF: LazyLock<bool> = LazyLock::new(|| {
        let vendor = __cpuid(0);
        // "GenuineIntel" (Intel's manual, volume 2, CPUID)
        let intel = (vendor.ebx, vendor.edx, vendor.ecx) == (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
        !intel && has_vectors()
    });
    *ITSELF
}

#[cfg(not(target_arch = "x86_64"))]
const fn compresses_itself() -> bool {
    false
}

/// What [`vectors::compress`] is made of.
#[cfg(target_arch = "x86_64")]
fn has_vectors() -> bool {
    use std::arch::is_x86_feature_detected;
    is_x86_feature_detected!("avx") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2")
}

/// The compression function over blocks of data.
#[cfg(target_arch = "x86_64")]
fn compress(state: &mut [u64; 8], blocks: &[[u8; to_usize(BLOCK_BYTES)]]) {
    assert!(has_vectors(), "asked for by compresses_itself");
    // SAFETY: the processor has what the function is made of, asked in the line above.
    unsafe { vectors::compress(state, blocks) }
}

#[cfg(not(target_arch = "x86_64"))]
fn compress(_: &mut [u64; 8], _: &[[u8; to_usize(BLOCK_BYTES)]]) {
    unreachable!("compresses_itself says no");
}

/// The compression function over `blocks` blocks of zeros.
fn compress_zeros(state: &mut [u64; 8], blocks: u64) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("bmi2") && std::arch::is_x86_feature_detected!("bmi1") {
        // SAFETY: the processor has both, asked in the line above.
        return unsafe { compress_zeros_bmi(state, blocks) };
    }
    compress_zeros_plain(state, blocks);
}

/// Rotations into another register, and AND with a complement, in one instruction each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,bmi2")]
fn compress_zeros_bmi(state: &mut [u64; 8], blocks: u64) {
    compress_zeros_plain(state, blocks);
}

/// One round; the names turn instead of the values.
macro_rules! round {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr) => {
        let chosen = $g ^ ($e & ($f ^ $g));
        let sum_1 = $e.rotate_right(14) ^ $e.rotate_right(18) ^ $e.rotate_right(41);
        let first = $h.wrapping_add($k).wrapping_add(chosen).wrapping_add(sum_1);
        let majority = ($a & $b) | ($c & ($a | $b));
        let sum_0 = $a.rotate_right(28) ^ $a.rotate_right(34) ^ $a.rotate_right(39);
        $d = $d.wrapping_add(first);
        $h = first.wrapping_add(majority).wrapping_add(sum_0);
    };
}

/// The compression function over data, for x86 with AVX and BMI.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi64, _mm_alignr_epi8, _mm_loadu_si128, _mm_or_si128, _mm_set_epi8, _mm_setzero_si128,
        _mm_shuffle_epi8, _mm_slli_epi64, _mm_srli_epi64, _mm_storeu_si128, _mm_xor_si128,
    };

    use super::{BLOCK_BYTES, ROUND_CONSTANTS, to_usize};

    /// Two words, rotated to the right by `RIGHT`; `LEFT` is 64 less that.
    #[inline]
    #[target_feature(enable = "avx")]
    fn rotated<const RIGHT: i32, const LEFT: i32>(words: __m128i) -> __m128i {
        const { assert!(RIGHT + LEFT == 64) };
        _mm_or_si128(_mm_srli_epi64::<RIGHT>(words), _mm_slli_epi64::<LEFT>(words))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn load(words: &[u64; 2]) -> __m128i {
        // SAFETY: 16 bytes that are there; no alignment is asked for.
        unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn store(words: &mut [u64; 2], value: __m128i) {
        // SAFETY: as above, borrowed exclusively.
        unsafe { _mm_storeu_si128(words.as_mut_ptr().cast(), value) }
    }

    #[target_feature(enable = "avx,bmi1,bmi2")]
    #[expect(clippy::many_single_char_names, reason = "as FIPS 180-4 names them")]
    pub(super) fn compress(state: &mut [u64; 8], blocks: &[[u8; to_usize(BLOCK_BYTES)]]) {
        let big_endian = _mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        let (constants, _) = ROUND_CONSTANTS.as_chunks::<2>();
        for block in blocks {
            // the last 16 words of the schedule, in pairs; and the next 16 with their constants, for the rounds
            let mut w = [_mm_setzero_si128(); 8];
            let mut ready = [[0_u64; 2]; 8];
            let (pairs, _) = block.as_chunks::<16>();
            for (at, pair) in pairs.iter().enumerate() {
                // SAFETY: 16 bytes that are there; no alignment is asked for.
                let bytes = unsafe { _mm_loadu_si128(pair.as_ptr().cast()) };
                w[at] = _mm_shuffle_epi8(bytes, big_endian);
                store(&mut ready[at], _mm_add_epi64(w[at], load(&constants[at])));
            }
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
            // two rounds, and between them the two words that are due 16 rounds later
            macro_rules! two_rounds {
                ($at:expr, $constants:expr, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
                    let from_15 = _mm_alignr_epi8::<8>(w[($at + 1) % 8], w[$at]);
                    let from_7 = _mm_alignr_epi8::<8>(w[($at + 5) % 8], w[($at + 4) % 8]);
                    let from_2 = w[($at + 7) % 8];
                    let sigma_0 = _mm_xor_si128(
                        _mm_xor_si128(rotated::<1, 63>(from_15), rotated::<8, 56>(from_15)),
                        _mm_srli_epi64::<7>(from_15),
                    );
                    round!($a $b $c $d $e $f $g $h, ready[$at][0]);
                    let sigma_1 = _mm_xor_si128(
                        _mm_xor_si128(rotated::<19, 45>(from_2), rotated::<61, 3>(from_2)),
                        _mm_srli_epi64::<6>(from_2),
                    );
                    w[$at] = _mm_add_epi64(_mm_add_epi64(w[$at], from_7), _mm_add_epi64(sigma_0, sigma_1));
                    round!($h $a $b $c $d $e $f $g, ready[$at][1]);
                    store(&mut ready[$at], _mm_add_epi64(w[$at], load(&$constants[$at])));
                };
            }
            let (_, later) = constants.split_at(8);
            let (eights, _) = later.as_chunks::<8>();
            for constants in eights {
                two_rounds!(0, constants, a b c d e f g h);
                two_rounds!(1, constants, g h a b c d e f);
                two_rounds!(2, constants, e f g h a b c d);
                two_rounds!(3, constants, c d e f g h a b);
                two_rounds!(4, constants, a b c d e f g h);
                two_rounds!(5, constants, g h a b c d e f);
                two_rounds!(6, constants, e f g h a b c d);
                two_rounds!(7, constants, c d e f g h a b);
            }
            let (fours, _) = ready.as_chunks::<4>();
            for four in fours {
                round!(a b c d e f g h, four[0][0]);
                round!(h a b c d e f g, four[0][1]);
                round!(g h a b c d e f, four[1][0]);
                round!(f g h a b c d e, four[1][1]);
                round!(e f g h a b c d, four[2][0]);
                round!(d e f g h a b c, four[2][1]);
                round!(c d e f g h a b, four[3][0]);
                round!(b c d e f g h a, four[3][1]);
            }
            for (word, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                *word = word.wrapping_add(value);
            }
        }
    }
}

#[inline(always)] // so that the caller's target features apply to the loop
#[expect(clippy::many_single_char_names, reason = "as FIPS 180-4 names them")]
fn compress_zeros_plain(state: &mut [u64; 8], blocks: u64) {
    for _ in 0..blocks {
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
        let (eights, _) = ROUND_CONSTANTS.as_chunks::<8>();
        for k in eights {
            round!(a b c d e f g h, k[0]);
            round!(h a b c d e f g, k[1]);
            round!(g h a b c d e f, k[2]);
            round!(f g h a b c d e, k[3]);
            round!(e f g h a b c d, k[4]);
            round!(d e f g h a b c, k[5]);
            round!(c d e f g h a b, k[6]);
            round!(b c d e f g h a, k[7]);
        }
        for (word, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *word = word.wrapping_add(value);
        }
    }
}

/// FIPS 180-4, section 4.2.3.
const ROUND_CONSTANTS: [u64; 80] = [
    0x428a_2f98_d728_ae22,
    0x7137_4491_23ef_65cd,
    0xb5c0_fbcf_ec4d_3b2f,
    0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538,
    0x59f1_11f1_b605_d019,
    0x923f_82a4_af19_4f9b,
    0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242,
    0x1283_5b01_4570_6fbe,
    0x2431_85be_4ee4_b28c,
    0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f,
    0x80de_b1fe_3b16_96b1,
    0x9bdc_06a7_25c7_1235,
    0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2,
    0xefbe_4786_384f_25e3,
    0x0fc1_9dc6_8b8c_d5b5,
    0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275,
    0x4a74_84aa_6ea6_e483,
    0x5cb0_a9dc_bd41_fbd4,
    0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab,
    0xa831_c66d_2db4_3210,
    0xb003_27c8_98fb_213f,
    0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2,
    0xd5a7_9147_930a_a725,
    0x06ca_6351_e003_826f,
    0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc,
    0x2e1b_2138_5c26_c926,
    0x4d2c_6dfc_5ac4_2aed,
    0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de,
    0x766a_0abb_3c77_b2a8,
    0x81c2_c92e_47ed_aee6,
    0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364,
    0xa81a_664b_bc42_3001,
    0xc24b_8b70_d0f8_9791,
    0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218,
    0xd699_0624_5565_a910,
    0xf40e_3585_5771_202a,
    0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8,
    0x1e37_6c08_5141_ab53,
    0x2748_774c_df8e_eb99,
    0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63,
    0x4ed8_aa4a_e341_8acb,
    0x5b9c_ca4f_7763_e373,
    0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc,
    0x78a5_636f_4317_2f60,
    0x84c8_7814_a1f0_ab72,
    0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28,
    0xa450_6ceb_de82_bde9,
    0xbef9_a3f7_b2c6_7915,
    0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c,
    0xd186_b8c7_21c0_c207,
    0xeada_7dd6_cde0_eb1e,
    0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba,
    0x0a63_7dc5_a2c8_98a6,
    0x113f_9804_bef9_0dae,
    0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84,
    0x32ca_ab7b_40c7_2493,
    0x3c9e_be0a_15c9_bebc,
    0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6,
    0x597f_299c_fc65_7e2a,
    0x5fcb_6fab_3ad6_faec,
    0x6c44_198c_4a47_5817,
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What AWS-LC makes of all the bytes.
    fn reference(bytes: &[u8]) -> Vec<u8> {
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA512, bytes).as_ref().to_vec()
    }

    proptest! {
        #[test]
        fn zeros_as_a_length_give_the_digest_of_zero_bytes(
            parts in prop::collection::vec((prop::bool::ANY, 0_usize..1000), 0..12)
        ) {
            let (mut state, mut all) = (Sha512::new(), Vec::new());
            for (zeros, bytes) in parts {
                let fill = if zeros { 0 } else { 0xa5 };
                all.resize(all.len() + bytes, fill);
                if zeros { state.update_zeros(to_u64(bytes)) } else { state.update(&vec![fill; bytes]) }
            }
            prop_assert_eq!(state.finish().to_vec(), reference(&all));
        }
    }

    #[test]
    fn every_remainder_of_a_block_before_zeros_and_after_them() {
        for before in 0..=130 {
            for zeros in [0, 1, 127, 128, 129, 255, 256, 257, 4096] {
                let mut state = Sha512::new();
                state.update(&vec![7; before]);
                state.update_zeros(zeros);
                state.update(b"end");
                let mut all = vec![7; before];
                all.resize(before + to_usize(zeros), 0);
                all.extend_from_slice(b"end");
                assert_eq!(state.finish().to_vec(), reference(&all), "{before} bytes, {zeros} zeros");
            }
        }
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_give_the_digest_of_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..3000), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            let (mut state, mut at) = (Sha512::new(), 0);
            for cut in cuts {
                state.update(&bytes[at..cut]);
                at = cut;
            }
            state.update(&bytes[at..]);
            prop_assert_eq!(state.finish().to_vec(), reference(&bytes));
        }
    }

    /// Whatever this processor would choose.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_compression_in_vectors_is_that_of_aws_lc() {
        if !has_vectors() {
            return eprintln!("skipped: no AVX or no BMI");
        }
        let bytes: Vec<u8> = (0..128 * 9_u32).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let (mut passed, mut here) = (Sha512::new(), Sha512::new());
        passed.pass_on(&bytes);
        compress(&mut here.0.h, bytes.as_chunks().0);
        assert_eq!(passed.0.h, here.0.h);
    }

    #[test]
    fn both_ways_through_the_rounds_agree() {
        let mut plain = [1, 2, 3, 4, 5, 6, 7, u64::MAX];
        let mut chosen = plain;
        compress_zeros_plain(&mut plain, 3);
        compress_zeros(&mut chosen, 3);
        assert_eq!(plain, chosen);
    }

    #[test]
    fn the_count_of_bits_carries_into_its_upper_half() {
        let mut state = Sha512::new();
        state.0.Nl = u64::MAX - 7; // one byte below 2^61 bytes
        state.update_zeros(128);
        assert_eq!((state.0.Nh, state.0.Nl), (1, 128 * 8 - 8));
    }
}
