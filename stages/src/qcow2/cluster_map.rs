//! Which guest clusters hold data: a bitmap that costs nothing where there is none.

use std::collections::BTreeMap;

use crate::units::to_usize;

/// Clusters in one chunk of the bitmap: 512 bytes of bits, 256 MiB of guest at 64 KiB clusters.
const CHUNK_CLUSTERS: u64 = 4096;
/// Bytes that a chunk takes, its place in the tree included (measured bound, used for the memory budget).
const CHUNK_BYTES: u64 = 512 + 64;

/// A set of guest clusters, by index. Everything not in it reads as zeros.
///
/// One bit a cluster where a chunk of 4096 clusters has any data, nothing elsewhere: an all-zero disk of any
/// size takes no memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterMap {
    chunks: BTreeMap<u64, Box<[u64; 64]>>,
    clusters: u64,
}

/// A maximal run of consecutive data clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRun {
    /// Index of the first guest cluster.
    pub first: u64,
    /// Number of clusters, at least 1.
    pub count: u64,
}

impl ClusterMap {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Marks `count` clusters from `first` on as data. Marking twice changes nothing.
    pub fn insert_run(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            let chunk = self.chunks.entry(cluster / CHUNK_CLUSTERS).or_insert_with(|| Box::new([0; 64]));
            let in_chunk = cluster % CHUNK_CLUSTERS;
            let word = &mut chunk[to_usize(in_chunk / 64)];
            let bit = 1_u64 << (in_chunk % 64);
            self.clusters += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Is this cluster data?
    #[must_use]
    pub fn contains(&self, cluster: u64) -> bool {
        self.chunks.get(&(cluster / CHUNK_CLUSTERS)).is_some_and(|chunk| {
            let in_chunk = cluster % CHUNK_CLUSTERS;
            chunk[to_usize(in_chunk / 64)] >> (in_chunk % 64) & 1 == 1
        })
    }

    /// Number of data clusters.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.clusters
    }

    /// Numbers of the chunks that hold data, each with its count of data clusters.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().map(|(chunk, words)| (*chunk, words.iter().map(|word| u64::from(word.count_ones())).sum()))
    }

    /// Data clusters of `cluster`'s chunk that come before it, and the chunk's number.
    pub(super) fn before_in_chunk(&self, cluster: u64) -> Option<(u64, u64)> {
        let chunk = cluster / CHUNK_CLUSTERS;
        let words = self.chunks.get(&chunk)?;
        let in_chunk = cluster % CHUNK_CLUSTERS;
        let whole = to_usize(in_chunk / 64);
        let before: u64 = words[..whole].iter().map(|word| u64::from(word.count_ones())).sum();
        let part = words[whole] & ((1 << (in_chunk % 64)) - 1);
        Some((chunk, before + u64::from(part.count_ones())))
    }

    /// Memory that the set takes now, bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        CHUNK_BYTES * self.chunks.len() as u64
    }

    /// All data clusters in guest order, as maximal runs.
    pub fn runs(&self) -> impl Iterator<Item = DataRun> + '_ {
        let mut words = self
            .chunks
            .iter()
            .flat_map(|(chunk, words)| {
                words.iter().zip(0_u64..).map(move |(word, index)| (chunk * CHUNK_CLUSTERS + index * 64, *word))
            })
            .filter(|(_, word)| *word != 0);
        let mut current: Option<(u64, u64)> = None; // a word's first cluster, and its bits still to report
        let mut next_word = move || words.next();
        std::iter::from_fn(move || {
            let (base, bits) = match current.take() {
                Some(rest) => rest,
                None => next_word()?,
            };
            let skip = bits.trailing_zeros();
            let first = base + u64::from(skip);
            let ones = (bits >> skip).trailing_ones();
            let mut count = u64::from(ones);
            let end_bit = skip + ones;
            if end_bit < 64 {
                let rest = bits >> end_bit << end_bit;
                if rest != 0 {
                    current = Some((base, rest));
                }
                return Some(DataRun { first, count });
            }
            // the run reaches the word's end: go on as long as the following words continue it
            loop {
                match next_word() {
                    Some((next_base, next_bits)) if next_base == first + count && next_bits & 1 == 1 => {
                        let ones = next_bits.trailing_ones();
                        count += u64::from(ones);
                        if ones == 64 {
                            continue;
                        }
                        let rest = next_bits >> ones << ones;
                        if rest != 0 {
                            current = Some((next_base, rest));
                        }
                    }
                    Some(other) => current = Some(other),
                    None => {}
                }
                return Some(DataRun { first, count });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_map_equals_a_plain_set(runs in prop::collection::vec((0_u64..20_000, 1_u64..300), 0..30)) {
            let mut map = ClusterMap::new();
            let mut set = BTreeSet::new();
            for (first, count) in runs {
                map.insert_run(first, count);
                set.extend(first..first + count);
            }
            prop_assert_eq!(map.count(), set.len() as u64);
            let runs: Vec<_> = map.runs().collect();
            let flat: Vec<u64> = runs.iter().flat_map(|run| run.first..run.first + run.count).collect();
            prop_assert_eq!(flat, set.iter().copied().collect::<Vec<_>>());
            for pair in runs.windows(2) {
                prop_assert!(pair[0].first + pair[0].count < pair[1].first, "runs are maximal");
            }
            for cluster in [0, 1, 63, 64, 4095, 4096, 19_999] {
                prop_assert_eq!(map.contains(cluster), set.contains(&cluster));
            }
        }
    }
}
