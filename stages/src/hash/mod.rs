//! Digests that Glance keeps of an image, and the lane that computes one over guest bytes in order.
//!
//! | module | noun |
//! |---|---|
//! | [`sha512`] | SHA-512 that takes runs of zeros as a length |
//! | [`lane`] | the stage that hashes guest bytes, wherever they are now |

pub mod lane;
pub mod sha512;

use std::fmt;

use md5::Digest as _;

pub use lane::{HashLane, HashMismatch};

use crate::units::{to_u64, to_usize};
use sha512::Sha512;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// A digest under way.
#[derive(Clone)]
pub enum Hasher {
    /// SHA-512: 0.35 to 0.85 GB/s on a core, zeros faster, and no way to split it.
    Sha512(Sha512),
    /// SHA-384.
    Sha384(aws_lc_rs::digest::Context),
    /// SHA-256.
    Sha256(aws_lc_rs::digest::Context),
    /// MD5: Glance's `checksum`, for images that have no `os_hash_value`.
    Md5(md5::Md5),
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.algorithm())
    }
}

impl Hasher {
    /// For the algorithm as Glance names it (`os_hash_algo`); `None` for one that is not known here.
    #[must_use]
    pub fn new(algorithm: &str) -> Option<Self> {
        use aws_lc_rs::digest::{Context, SHA256, SHA384};
        Some(match algorithm.to_ascii_lowercase().as_str() {
            "sha512" => Self::sha512(),
            "sha384" => Self::Sha384(Context::new(&SHA384)),
            "sha256" => Self::Sha256(Context::new(&SHA256)),
            "md5" => Self::Md5(md5::Md5::new()),
            _ => return None,
        })
    }

    /// What Glance computes unless its operator chose otherwise.
    #[must_use]
    pub fn sha512() -> Self {
        Self::Sha512(Sha512::new())
    }

    /// The algorithm as Glance names it.
    #[must_use]
    pub const fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha512(_) => "sha512",
            Self::Sha384(_) => "sha384",
            Self::Sha256(_) => "sha256",
            Self::Md5(_) => "md5",
        }
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha512(state) => state.update(bytes),
            Self::Sha384(context) | Self::Sha256(context) => context.update(bytes),
            Self::Md5(context) => context.update(bytes),
        }
    }

    /// So many zero bytes.
    pub fn update_zeros(&mut self, bytes: u64) {
        if let Self::Sha512(state) = self {
            return state.update_zeros(bytes);
        }
        let mut left = bytes;
        while left > 0 {
            let part = to_usize(left.min(to_u64(ZEROS.len())));
            self.update(&ZEROS[..part]);
            left -= to_u64(part);
        }
    }

    /// The digest in lower-case hexadecimal.
    #[must_use]
    pub fn finish(self) -> String {
        use fmt::Write as _;
        let hex = |bytes: &[u8]| {
            bytes.iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            })
        };
        match self {
            Self::Sha512(state) => hex(&state.finish()),
            Self::Sha384(context) | Self::Sha256(context) => hex(context.finish().as_ref()),
            Self::Md5(context) => hex(&context.finalize()),
        }
    }
}

/// A digest that is known beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedHash {
    /// `sha512`, `md5`, …
    pub algorithm: String,
    /// Lower-case hexadecimal.
    pub value: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_glances() {
        let digest = |algorithm| {
            let mut hasher = Hasher::new(algorithm).unwrap();
            hasher.update_zeros(3);
            hasher.update(b"abc");
            hasher.finish()
        };
        // printf '\0\0\0abc' | md5sum, sha256sum
        assert_eq!(digest("md5"), "7fff64a5c74c54941fac7699be9f1564");
        assert_eq!(digest("SHA256"), "657c2a8e1b967d3ee74e97870c2fd06e85029f55f508837a5afc836b11f74c04");
        assert!(digest("sha512").starts_with("bac734d3c9fa5f6561043ac2c001fff5739598b18bcde81720a3cef5d5fe074b"));
        assert!(Hasher::new("blake3").is_none());
    }
}
