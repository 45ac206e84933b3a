//! Digests that Glance keeps of an image, and the lane that computes one over guest bytes in order.

use std::{fmt, fs::File};

use engine::{BlockingStage, ErrorKind, Inlet, NoOutput, Outlet, StageContext, StageError};
use md5::Digest as _;

use crate::{
    compress::{Codec, Decoder},
    extent::{Home, Place, Placed},
    progress::Progress,
    read_at::ReadAt,
    units::{ClusterBits, to_u64, to_usize},
    watermark::Watermark,
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

    /// What Glance computes unless its operator chose otherwise.
    #[must_use]
    pub fn sha512() -> Self {
        Self::Sha512(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA512))
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

/// Bytes read back at once from the image under construction: no compressed cluster is longer.
const READ_BYTES: usize = 2 << 20;
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Sink: takes extents in guest order, wherever their bytes are now, and checks the source's hash over them.
///
/// The lane holds no lease. It reads what the store keeps or what was written to the file, decompresses it where it is compressed, and
/// may lag behind the fetch as far as its port is long: what it proves is not only that the right bytes arrived but that
/// they are the ones in the store or in the file. What nothing keeps passes it before it is let go.
pub struct HashLane {
    /// What the digest has to be; `None` where there is nothing to check: then it only drains its port.
    pub expected: Option<ExpectedHash>,
    /// The file that [`Home::File`] or [`Home::Scratch`] speaks of.
    pub file: Option<File>,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// How compressed clusters are compressed.
    pub codec: Option<Codec>,
    /// Told how far it is.
    pub progress: Progress,
    /// Told what it has passed.
    pub watermark: Option<Watermark>,
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
        let mut decoder = self.codec.map(Decoder::new);
        let (mut buffer, mut cluster) = (Vec::new(), Vec::new());
        let mut passing = false;
        while let Some(placed) = inlet.recv_blocking()? {
            passing |= matches!(placed.home, Home::Passing(_));
            let end = placed.guest.end.0;
            if let Some(hasher) = hasher.as_mut() {
                for run in &placed.runs {
                    let bytes = run.guest.bytes();
                    match run.place {
                        Place::Zeros => hash_zeros(hasher, bytes),
                        Place::Plain(at) => self.each_part(&placed.home, at, bytes, &mut buffer, |part| hasher.update(part))?,
                        Place::Compressed(at, stored) => {
                            cluster.resize(to_usize(self.cluster_bits.cluster_bytes()), 0);
                            let decoder = decoder.as_mut().ok_or_else(|| StageError::bug("compressed bytes, but no codec"))?;
                            let mut decoded = Ok(());
                            self.each_part(&placed.home, at, u64::from(stored), &mut buffer, |part| {
                                decoded = decoder.decode(part, &mut cluster);
                            })?;
                            decoded.map_err(|error| StageError::new(ErrorKind::InvalidData, error))?;
                            hasher.update(&cluster[..to_usize(bytes)]);
                        }
                    }
                    self.progress.add_hashed(bytes);
                }
            }
            drop(placed);
            if let Some(watermark) = self.watermark.as_ref().filter(|_| passing) {
                watermark.advance(end);
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

impl HashLane {
    /// Lets `take` have bytes `[at, at + bytes)` of `home`; in one part if they are at most [`READ_BYTES`].
    fn each_part(
        &self,
        home: &Home,
        at: u64,
        bytes: u64,
        buffer: &mut Vec<u8>,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), StageError> {
        let first = match home {
            Home::Memory(stored) | Home::Passing(stored) => {
                let part = stored.get(to_usize(at)..to_usize(at + bytes));
                take(part.ok_or_else(|| StageError::bug("bytes were let go before the hash lane"))?);
                return Ok(());
            }
            Home::Scratch(first) => first + at,
            Home::File => at,
            Home::Nowhere => return Err(StageError::bug("data clusters that are nowhere")),
        };
        let file = self.file.as_ref().ok_or_else(|| StageError::bug("bytes in a file, but no file"))?;
        buffer.resize(READ_BYTES, 0);
        let mut done = 0;
        while done < bytes {
            let part = &mut buffer[..to_usize(bytes - done).min(READ_BYTES)];
            file.read_exact_at(first + done, part).map_err(|error| StageError::new(ErrorKind::Io, error))?;
            take(part);
            done += to_u64(part.len());
        }
        Ok(())
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
