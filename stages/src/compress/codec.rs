//! Deflate and zstd over one cluster.

use std::{fmt, num::NonZeroU8};

use crate::units::to_u64;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate: every QEMU reads it.
    Deflate,
    /// Zstandard: QEMU 5.1 or later, built with it.
    Zstd,
}

impl Codec {
    /// The header's `compression_type`.
    #[must_use]
    pub const fn qcow2_type(self) -> u8 {
        match self {
            Self::Deflate => 0,
            Self::Zstd => 1,
        }
    }

    /// From the header's `compression_type`.
    #[must_use]
    pub const fn from_qcow2_type(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Deflate),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The highest level: libdeflate's 12, zstd's 19 (above it the window needs more memory than a small machine has).
    #[must_use]
    pub const fn level_max(self) -> u8 {
        match self {
            Self::Deflate => 12,
            Self::Zstd => 19,
        }
    }

    /// The level unless asked otherwise: what beats `qemu-img convert -c` in size while being several times as fast (see
    /// `benches/runs`).
    #[must_use]
    pub const fn level_default(self) -> NonZeroU8 {
        let level = match self {
            Self::Deflate => 2,
            Self::Zstd => 3,
        };
        NonZeroU8::new(level).expect("not zero")
    }

    /// The name on the command line and in qemu-img: `zlib`, `zstd`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// A codec and its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    codec: Codec,
    level: NonZeroU8,
}

/// A level that the codec does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{} has levels 1 to {}, not {level}", .codec.name(), .codec.level_max())]
pub struct BadLevel {
    /// The codec.
    pub codec: Codec,
    /// What was asked for.
    pub level: u8,
}

impl Compression {
    /// With the codec's default level.
    #[must_use]
    pub const fn new(codec: Codec) -> Self {
        Self { codec, level: codec.level_default() }
    }

    /// With this level.
    ///
    /// # Errors
    /// [`BadLevel`].
    pub fn with_level(codec: Codec, level: u8) -> Result<Self, BadLevel> {
        match NonZeroU8::new(level) {
            Some(level) if level.get() <= codec.level_max() => Ok(Self { codec, level }),
            _ => Err(BadLevel { codec, level }),
        }
    }

    /// The codec.
    #[must_use]
    pub const fn codec(self) -> Codec {
        self.codec
    }

    /// Its level.
    #[must_use]
    pub const fn level(self) -> u8 {
        self.level.get()
    }
}

enum Context {
    Deflate(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

/// Compresses clusters, one at a time, with a context that is used again. One a thread.
pub struct Encoder(Context);

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoder")
    }
}

impl Encoder {
    /// An encoder.
    ///
    /// # Panics
    /// If there is no memory for its context (up to a few MiB at the highest levels).
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        Self(match compression.codec {
            Codec::Deflate => {
                let level = libdeflater::CompressionLvl::new(compression.level().into()).expect("levels are checked");
                Context::Deflate(libdeflater::Compressor::new(level))
            }
            Codec::Zstd => {
                let mut context = zstd::bulk::Compressor::new(compression.level().into()).expect("memory for a zstd context");
                // a re-read has its own digest, and QEMU checks none
                context.include_checksum(false).expect("zstd knows this parameter");
                Context::Zstd(context)
            }
        })
    }

    /// Appends the compressed form of `cluster` to `into` if it has at most `limit` bytes; returns its length.
    pub fn append(&mut self, cluster: &[u8], limit: usize, into: &mut Vec<u8>) -> Option<usize> {
        let at = into.len();
        // zstd gives up on a buffer in which its result would fit if it has no room to work; libdeflate needs none, and stops early
        let room = match self.0 {
            Context::Deflate(_) => limit,
            Context::Zstd(_) => zstd::zstd_safe::compress_bound(cluster.len()),
        };
        into.resize(at + room, 0);
        let bytes = self.encode(cluster, &mut into[at..]).filter(|bytes| *bytes <= limit);
        into.truncate(at + bytes.unwrap_or(0));
        bytes
    }

    /// Compresses `cluster` into the start of `into`; returns the length, or `None` if it does not fit.
    pub fn encode(&mut self, cluster: &[u8], into: &mut [u8]) -> Option<usize> {
        match &mut self.0 {
            Context::Deflate(context) => context.deflate_compress(cluster, into).ok(),
            Context::Zstd(context) => context.compress_to_buffer(cluster, into).ok(),
        }
    }
}

/// Stored bytes that do not decode to a cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of {} do not decode to a cluster of {cluster_bytes} bytes: {what}", .codec.name())]
pub struct BadStream {
    /// The codec.
    pub codec: Codec,
    /// Length of the stored form, up to the end of its last sector.
    pub bytes: u64,
    /// What should come out.
    pub cluster_bytes: u64,
    /// What happened.
    pub what: String,
}

enum DecodeContext {
    Deflate(libdeflater::Decompressor),
    Zstd(zstd::bulk::Decompressor<'static>),
}

/// Decompresses clusters, one at a time, with a context that is used again. One a thread.
pub struct Decoder {
    codec: Codec,
    context: DecodeContext,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    /// A decoder.
    ///
    /// # Panics
    /// If there is no memory for its context.
    #[must_use]
    pub fn new(codec: Codec) -> Self {
        let context = match codec {
            Codec::Deflate => DecodeContext::Deflate(libdeflater::Decompressor::new()),
            Codec::Zstd => DecodeContext::Zstd(zstd::bulk::Decompressor::new().expect("memory for a zstd context")),
        };
        Self { codec, context }
    }

    /// Decodes `stored` into `cluster`, which it has to fill. What follows the stream (the rest of its last sector) is ignored, as
    /// QEMU ignores it.
    ///
    /// # Errors
    /// [`BadStream`]; `cluster` then holds anything.
    pub fn decode(&mut self, stored: &[u8], cluster: &mut [u8]) -> Result<(), BadStream> {
        let decoded = match &mut self.context {
            DecodeContext::Deflate(context) => context.deflate_decompress(stored, cluster).map_err(|error| error.to_string()),
            DecodeContext::Zstd(context) => zstd_frames(context, stored, cluster),
        };
        let what = match decoded {
            Ok(bytes) if bytes == cluster.len() => return Ok(()),
            Ok(bytes) => format!("{bytes} bytes came out"),
            Err(error) => error,
        };
        Err(BadStream { codec: self.codec, bytes: to_u64(stored.len()), cluster_bytes: to_u64(cluster.len()), what })
    }
}

/// One or more frames until the cluster is full (qcow2.rst allows more than one).
fn zstd_frames(context: &mut zstd::bulk::Decompressor<'_>, mut stored: &[u8], cluster: &mut [u8]) -> Result<usize, String> {
    let mut filled = 0;
    while filled < cluster.len() {
        let frame = zstd::zstd_safe::find_frame_compressed_size(stored)
            .map_err(|code| zstd::zstd_safe::get_error_name(code).to_owned())?;
        let (frame, rest) = stored.split_at_checked(frame).ok_or("a frame passes the end")?;
        let bytes = context.decompress_to_buffer(frame, &mut cluster[filled..]).map_err(|error| error.to_string())?;
        filled += bytes;
        if frame.is_empty() || rest.len() == stored.len() {
            return Err("a frame is empty".to_owned());
        }
        stored = rest;
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn compressions() -> Vec<Compression> {
        vec![
            Compression::with_level(Codec::Deflate, 1).unwrap(),
            Compression::new(Codec::Deflate),
            Compression::with_level(Codec::Deflate, 9).unwrap(),
            Compression::with_level(Codec::Zstd, 1).unwrap(),
            Compression::new(Codec::Zstd),
            Compression::with_level(Codec::Zstd, 12).unwrap(),
        ]
    }

    fn clusters() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let piece = (any::<u8>(), 1_usize..700, any::<bool>()).prop_map(|(byte, bytes, plain)| {
            (0..bytes)
                .map(|at| if plain { byte } else { byte.wrapping_mul(at.to_le_bytes()[0]) ^ at.to_le_bytes()[1] })
                .collect::<Vec<u8>>()
        });
        let cluster = prop::collection::vec(piece, 1..40).prop_map(|pieces| {
            let mut cluster = pieces.concat();
            cluster.resize(16384, 7);
            cluster
        });
        prop::collection::vec(cluster, 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_encoded_decodes_and_a_used_context_encodes_as_a_fresh_one(clusters in clusters()) {
            for compression in compressions() {
                let mut used = Encoder::new(compression);
                let mut decoder = Decoder::new(compression.codec());
                for cluster in &clusters {
                    let (mut once, mut again) = (vec![0; cluster.len() + 1000], vec![0; cluster.len() + 1000]);
                    let bytes = used.encode(cluster, &mut once).unwrap();
                    let fresh = Encoder::new(compression).encode(cluster, &mut again).unwrap();
                    prop_assert_eq!(&once[..bytes], &again[..fresh], "the stored form is a function of the bytes");
                    let mut decoded = vec![0xee; cluster.len()];
                    // the rest of the last sector follows, whatever it is
                    once[bytes..].fill(0x5a);
                    prop_assert_eq!(decoder.decode(&once[..bytes.next_multiple_of(512).min(once.len())], &mut decoded), Ok(()));
                    prop_assert!(decoded == *cluster);
                }
            }
        }

        #[test]
        fn hostile_streams_are_errors(stored in prop::collection::vec(any::<u8>(), 0..2000)) {
            for codec in [Codec::Deflate, Codec::Zstd] {
                let mut cluster = vec![0; 4096];
                let _ = Decoder::new(codec).decode(&stored, &mut cluster);
            }
        }
    }

    #[test]
    fn a_stream_of_another_length_is_refused_and_several_frames_are_read() {
        for compression in compressions() {
            let mut encoder = Encoder::new(compression);
            let mut into = vec![0; 9000];
            let bytes = encoder.encode(&[3; 4096], &mut into).unwrap();
            for cluster in [2048, 8192] {
                assert!(
                    Decoder::new(compression.codec()).decode(&into[..bytes], &mut vec![0; cluster]).is_err(),
                    "{compression:?}"
                );
            }
        }
        let mut encoder = Encoder::new(Compression::new(Codec::Zstd));
        let mut frames = vec![0; 9000];
        let first = encoder.encode(&[1; 1000], &mut frames).unwrap();
        let second = encoder.encode(&[2; 3096], &mut frames[first..]).unwrap();
        let mut cluster = vec![0; 4096];
        Decoder::new(Codec::Zstd).decode(&frames[..first + second + 77], &mut cluster).unwrap();
        assert!(cluster[..1000].iter().all(|&byte| byte == 1) && cluster[1000..].iter().all(|&byte| byte == 2));
    }

    #[test]
    fn levels_are_checked() {
        assert!(Compression::with_level(Codec::Deflate, 12).is_ok() && Compression::with_level(Codec::Deflate, 13).is_err());
        assert!(Compression::with_level(Codec::Zstd, 0).is_err());
    }
}
