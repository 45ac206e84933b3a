//! Digests that Glance keeps of an image, and the lane that computes one over guest bytes in order.

use std::{fmt, fs::File};

use engine::{BlockingStage, ErrorKind, Inlet, NoOutput, Outlet, StageContext, StageError};
use md5::Digest as _;

use crate::{
    extent::{Place, Placed},
    progress::Progress,
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// A digest under way.
#[derive(Clone)]
pub enum Hasher {
    /// SHA-512 in assembly: 0.65 to 0.85 GB/s on a core, and no way to split it.
    Sha512(aws_lc_rs::digest::Context),
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
        use aws_lc_rs::digest::{Context, SHA256, SHA384, SHA512};
        Some(match algorithm.to_ascii_lowercase().as_str() {
            "sha512" => Self::Sha512(Context::new(&SHA512)),
            "sha384" => Self::Sha384(Context::new(&SHA384)),
            "sha256" => Self::Sha256(Context::new(&SHA256)),
            "md5" => Self::Md5(md5::Md5::new()),
            _ => return None,
        })
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
            Self::Sha512(context) | Self::Sha384(context) | Self::Sha256(context) => context.update(bytes),
            Self::Md5(context) => context.update(bytes),
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
            Self::Sha512(context) | Self::Sha384(context) | Self::Sha256(context) => hex(context.finish().as_ref()),
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

/// The source's bytes are not those its hash was made of.
#[derive(Debug, thiserror::Error)]
#[error("the source's {algorithm} is {actual}, but Glance recorded {expected}: what was read is not what was stored")]
pub struct HashMismatch {
    /// Which digest.
    pub algorithm: String,
    /// What Glance recorded.
    pub expected: String,
    /// What was computed.
    pub actual: String,
}

/// Bytes read back at once from the image under construction.
const READ_BYTES: usize = 1 << 20;
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Sink: takes extents in guest order, wherever their bytes are now, and checks the source's hash over them.
///
/// The lane holds no lease. It reads what the store keeps or what was written to the file, so it may lag behind the
/// fetch as far as its port is long, and what it proves is not only that the right bytes arrived but that they
/// are the ones in the store or in the file.
pub struct HashLane {
    /// What the digest has to be; `None` where there is nothing to check: then it only drains its port.
    pub expected: Option<ExpectedHash>,
    /// The file that [`Place::Host`] speaks of.
    pub file: Option<File>,
    /// Told how far it is.
    pub progress: Progress,
}

impl BlockingStage for HashLane {
    type In = Placed;
    type Out = NoOutput;
    type Report = Option<ExpectedHash>;

    fn run(self, inlet: Inlet<Placed>, outlet: Outlet<NoOutput>, _: StageContext) -> Result<Self::Report, StageError> {
        let mut hasher = match &self.expected {
            Some(expected) => Some(Hasher::new(&expected.algorithm).ok_or_else(|| {
                StageError::new(ErrorKind::Unsupported, format!("hash algorithm {} is not known", expected.algorithm))
            })?),
            None => None,
        };
        let mut buffer = Vec::new();
        while let Some(placed) = inlet.recv_blocking()? {
            let Some(hasher) = hasher.as_mut() else { continue };
            for run in placed.runs {
                let bytes = run.guest.bytes();
                match run.place {
                    Place::Zeros => hash_zeros(hasher, bytes),
                    Place::Memory(stored) => hasher.update(&stored[..to_usize(bytes)]),
                    Place::Host(host) => {
                        let file = self.file.as_ref().ok_or_else(|| StageError::bug("bytes in a file, but no file"))?;
                        buffer.resize(READ_BYTES, 0);
                        let mut done = 0;
                        while done < bytes {
                            let part = &mut buffer[..to_usize(bytes - done).min(READ_BYTES)];
                            file.read_exact_at(host.0 + done, part).map_err(|error| StageError::new(ErrorKind::Io, error))?;
                            hasher.update(part);
                            done += to_u64(part.len());
                        }
                    }
                }
                self.progress.add_hashed(bytes);
            }
        }
        let actual = hasher.map(Hasher::finish);
        if let (Some(expected), Some(actual)) = (&self.expected, actual)
            && actual != expected.value.to_ascii_lowercase()
        {
            let (algorithm, expected) = (expected.algorithm.clone(), expected.value.clone());
            return Err(StageError::new(ErrorKind::InvalidData, HashMismatch { algorithm, expected, actual }));
        }
        outlet.finish();
        Ok(self.expected)
    }
}

fn hash_zeros(hasher: &mut Hasher, bytes: u64) {
    let mut left = bytes;
    while left > 0 {
        let part = to_usize(left).min(ZEROS.len());
        hasher.update(&ZEROS[..part]);
        left -= to_u64(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_glances() {
        let digest = |algorithm| {
            let mut hasher = Hasher::new(algorithm).unwrap();
            hash_zeros(&mut hasher, 3);
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
