//! The lane that checks the source's hash: a sink for extents in guest order, wherever their bytes are now.

use std::fs::File;

use engine::{BlockingStage, ErrorKind, Inlet, NoOutput, Outlet, StageContext, StageError};

use super::{ExpectedHash, Hasher};
use crate::{
    compress::{Codec, Decoder},
    extent::{Holder, Position, StoredExtent},
    progress::Progress,
    read_at::ReadAt,
    units::{ClusterBits, to_u64, to_usize},
    watermark::Watermark,
};

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

/// Sink: takes extents in guest order, wherever their bytes are now, and checks the source's hash over them.
///
/// The lane holds no lease. It reads what the store keeps or what was written to the file, decompresses it where it is compressed, and
/// may lag behind the fetch as far as its port is long: what it proves is not only that the right bytes arrived but that
/// they are the ones in the store or in the file. What nothing keeps passes it before it is let go.
pub struct HashLane {
    /// What the digest has to be; `None` where there is nothing to check: then it only drains its port.
    pub expected: Option<ExpectedHash>,
    /// The file that [`Holder::File`] or [`Holder::Scratch`] speaks of.
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
    type In = StoredExtent;
    type Out = NoOutput;
    type Report = Option<ExpectedHash>;

    fn run(self, inlet: Inlet<StoredExtent>, outlet: Outlet<NoOutput>, _: StageContext) -> Result<Self::Report, StageError> {
        let mut hasher = match &self.expected {
            Some(expected) => Some(Hasher::new(&expected.algorithm).ok_or_else(|| {
                StageError::new(ErrorKind::Unsupported, format!("hash algorithm {} is not known", expected.algorithm))
            })?),
            None => None,
        };
        let mut decoder = self.codec.map(Decoder::new);
        let (mut buffer, mut cluster) = (Vec::new(), Vec::new());
        let mut passing = false;
        while let Some(stored_extent) = inlet.recv_blocking()? {
            passing |= matches!(stored_extent.holder, Holder::Passing(_));
            let end = stored_extent.guest.end.0;
            if let Some(hasher) = hasher.as_mut() {
                for run in &stored_extent.runs {
                    let bytes = run.guest.bytes();
                    match run.position {
                        Position::Zeros => hasher.update_zeros(bytes),
                        Position::Plain(at) => {
                            self.each_part(&stored_extent.holder, at, bytes, &mut buffer, |part| hasher.update(part))?
                        }
                        Position::Compressed(at, stored) => {
                            cluster.resize(to_usize(self.cluster_bits.cluster_bytes()), 0);
                            let decoder = decoder.as_mut().ok_or_else(|| StageError::bug("compressed bytes, but no codec"))?;
                            let mut decoded = Ok(());
                            self.each_part(&stored_extent.holder, at, u64::from(stored), &mut buffer, |part| {
                                decoded = decoder.decode(part, &mut cluster);
                            })?;
                            decoded.map_err(|error| StageError::new(ErrorKind::InvalidData, error))?;
                            hasher.update(&cluster[..to_usize(bytes)]);
                        }
                    }
                    self.progress.add_hashed(bytes);
                }
            }
            drop(stored_extent);
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
    /// Lets `take` have bytes `[at, at + bytes)` of `holder`; in one part if they are at most [`READ_BYTES`].
    fn each_part(
        &self,
        holder: &Holder,
        at: u64,
        bytes: u64,
        buffer: &mut Vec<u8>,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), StageError> {
        let first = match holder {
            Holder::Memory(stored) | Holder::Passing(stored) => {
                let part = stored.get(to_usize(at)..to_usize(at + bytes));
                take(part.ok_or_else(|| StageError::bug("bytes were let go before the hash lane"))?);
                return Ok(());
            }
            Holder::Scratch(first) => first + at,
            Holder::File => at,
            Holder::Nowhere => return Err(StageError::bug("data clusters that are nowhere")),
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
