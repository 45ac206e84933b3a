//! The cores: zero test, hashing, compression, with the converter's own code.

use std::{
    hint::black_box,
    io,
    time::{Duration, Instant},
};

use engine::CancelToken;
use stages::{
    compress::{Codec, Compression, Encoder, append_stored},
    hash::Hasher,
    zero::is_zero,
};

use super::{
    disk::{rate, threads_shown},
    record::{Group, Measure},
};

const CLUSTER_BYTES: usize = 64 << 10;
/// Levels that are measured: the fastest, the default, one for patience.
const LEVELS: [(Codec, &str, [u8; 3]); 2] = [(Codec::Deflate, "zlib", [1, 2, 6]), (Codec::Zstd, "zstd", [1, 3, 9])];

/// What is to be measured, and for how long.
pub struct Processor<'a> {
    pub cores: usize,
    /// For one figure.
    pub slice: Duration,
    /// A disk's data, whole clusters.
    pub sample: &'a [u8],
    pub cancel: &'a CancelToken,
}

impl Processor<'_> {
    /// Measures.
    ///
    /// # Errors
    /// If it is cancelled.
    pub fn measure(&self) -> io::Result<Vec<Measure>> {
        let zeros = vec![0_u8; 8 << 20];
        let mut found = Vec::new();
        let all = self.cores;
        for threads in if all > 1 { vec![1, all] } else { vec![1] } {
            let samples = self.samples(threads, || {
                || {
                    black_box(zeros.chunks(CLUSTER_BYTES).filter(|cluster| is_zero(cluster)).count());
                    zeros.len()
                }
            })?;
            let key = format!("processor.zero.{threads}");
            found.extend(Measure::new(
                &key,
                Group::Processor,
                &format!("zero test, {}", threads_shown(threads)),
                threads,
                samples,
            ));
        }
        let hash = |algorithm: &'static str, of_zeros: bool| {
            let sample = &self.sample[..self.sample.len().min(8 << 20)];
            self.samples(1, move || {
                let mut hasher = Hasher::new(algorithm).expect("an algorithm that is known");
                move || {
                    if of_zeros {
                        hasher.update_zeros(sample.len() as u64)
                    } else {
                        hasher.update(sample)
                    }
                    sample.len()
                }
            })
        };
        for (key, name, algorithm, of_zeros) in [
            ("processor.sha512.data", "SHA-512 of data, 1 thread", "sha512", false),
            ("processor.sha512.zeros", "SHA-512 of zeros, 1 thread", "sha512", true),
            ("processor.md5", "MD5, 1 thread", "md5", false),
        ] {
            found.extend(Measure::new(key, Group::Processor, name, 1, hash(algorithm, of_zeros)?));
        }
        for (codec, name, levels) in LEVELS {
            for level in levels {
                let compression = Compression::with_level(codec, level).map_err(io::Error::other)?;
                let samples = self.samples(all, || {
                    let (mut encoder, mut packed, mut next) = (Encoder::new(compression), Vec::new(), 0);
                    move || {
                        packed.clear();
                        // a piece at a time, so that a slow level ends in time, too
                        let piece = &self.sample[next..(next + (1 << 20)).min(self.sample.len())];
                        next = if next + piece.len() >= self.sample.len() { 0 } else { next + piece.len() };
                        compress(&mut encoder, piece, &mut packed);
                        piece.len()
                    }
                })?;
                let (key, shown) = (format!("processor.{name}.{level}"), format!("{name} level {level}, {}", threads_shown(all)));
                let Some(measure) = Measure::new(&key, Group::Processor, &shown, all, samples) else { continue };
                let (mut encoder, mut packed) = (Encoder::new(compression), Vec::new());
                // every eighth MiB tells the ratio
                let (mut bytes, mut stored) = (0, 0);
                for piece in self.sample.chunks(1 << 20).step_by(8) {
                    packed.clear();
                    compress(&mut encoder, piece, &mut packed);
                    bytes += piece.len();
                    stored += packed.len();
                }
                #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
                let ratio = stored as f64 / bytes as f64;
                found.push(Measure { ratio: Some(ratio), ..measure });
            }
        }
        Ok(found)
    }

    /// Three samples of `threads` threads that each work for a third of the slice. `make` prepares a thread's work, which tells how many bytes it did.
    fn samples<W: FnMut() -> usize + Send>(&self, threads: usize, make: impl Fn() -> W) -> io::Result<Vec<f64>> {
        (0..3)
            .map(|_| {
                self.cancel.check().map_err(io::Error::other)?;
                let work: Vec<W> = (0..threads).map(|_| make()).collect();
                let until = Instant::now() + self.slice / 3;
                Ok(std::thread::scope(|scope| {
                    let workers: Vec<_> = work
                        .into_iter()
                        .map(|mut one| {
                            scope.spawn(move || {
                                let (started, mut bytes) = (Instant::now(), 0_u64);
                                while bytes == 0 || Instant::now() < until {
                                    bytes += one() as u64;
                                }
                                rate(bytes, started)
                            })
                        })
                        .collect();
                    workers.into_iter().filter_map(|worker| worker.join().ok()).sum::<f64>()
                }))
            })
            .collect()
    }
}

/// Stores clusters as the converter does.
fn compress(encoder: &mut Encoder, piece: &[u8], packed: &mut Vec<u8>) {
    for cluster in piece.chunks(CLUSTER_BYTES) {
        append_stored(encoder, cluster, packed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_there_and_compression_tells_its_ratio() {
        let sample: Vec<u8> = b"a line of text, number 1234\n".iter().copied().cycle().take(1 << 20).collect();
        let cancel = CancelToken::new();
        let found = Processor { cores: 2, slice: Duration::from_millis(3), sample: &sample, cancel: &cancel }.measure().unwrap();
        assert_eq!(found.len(), 2 + 3 + 6);
        let zlib = found.iter().find(|measure| measure.key == "processor.zlib.2").unwrap();
        assert!(zlib.ratio.unwrap() < 0.1, "{zlib:?}");
        cancel.cancel(engine::Cause::Requested("test".to_owned()));
        assert!(Processor { cores: 1, slice: Duration::ZERO, sample: &sample, cancel: &cancel }.measure().is_err());
    }
}
