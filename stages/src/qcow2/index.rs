//! What the survey remembers of each data cluster: 20 bytes and two bits, in guest order.

use super::ClusterMap;
use crate::{extent::Record, units::to_u64};

/// Records in one piece of the list: pieces never move, so growing costs no copy and no spike of memory.
const PIECE_RECORDS: usize = 1 << 15;

/// Data clusters with their records.
#[derive(Clone, Debug, Default)]
pub struct ClusterIndex {
    map: ClusterMap,
    pieces: Vec<Vec<Record>>,
    /// Chunks of the map with the number of data clusters before each; made when the index is complete.
    ranks: Vec<(u64, u64)>,
    compressed_clusters: u64,
    stored_bytes: u64,
}

impl ClusterIndex {
    /// An empty index.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next data cluster; guest clusters ascend. `whole` says that it is stored as it is.
    ///
    /// # Panics
    /// If the clusters do not ascend: the caller's bug.
    pub fn push(&mut self, cluster: u64, record: Record, whole: bool) {
        assert!(!self.map.contains(cluster), "cluster {cluster:#x} twice");
        self.map.insert_run(cluster, 1);
        if self.pieces.last().is_none_or(|piece| piece.len() == PIECE_RECORDS) {
            self.pieces.push(Vec::with_capacity(PIECE_RECORDS));
        }
        self.compressed_clusters += u64::from(!whole);
        self.stored_bytes += u64::from(record.stored_bytes);
        self.pieces.last_mut().expect("just made").push(record);
    }

    /// No more clusters come: records can be looked up by cluster from now on.
    pub fn complete(&mut self) {
        let mut before = 0;
        self.ranks = self
            .map
            .chunks()
            .map(|(chunk, count)| {
                let rank = before;
                before += count;
                (chunk, rank)
            })
            .collect();
    }

    /// The record of a guest cluster; `None` where it reads as zeros.
    #[must_use]
    pub fn record(&self, cluster: u64) -> Option<Record> {
        if !self.map.contains(cluster) {
            return None;
        }
        let (chunk, before) = self.map.before_in_chunk(cluster)?;
        let at = self.ranks.binary_search_by_key(&chunk, |(chunk, _)| *chunk).ok()?;
        let rank = usize::try_from(self.ranks[at].1 + before).ok()?;
        self.pieces.get(rank / PIECE_RECORDS)?.get(rank % PIECE_RECORDS).copied()
    }

    /// Guest clusters that hold data.
    #[must_use]
    pub const fn map(&self) -> &ClusterMap {
        &self.map
    }

    /// Records in guest order.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        self.pieces.iter().flatten().copied()
    }

    /// Data clusters with their records, in guest order.
    pub fn clusters(&self) -> impl Iterator<Item = (u64, Record)> + '_ {
        self.map.runs().flat_map(|run| run.first..run.first + run.count).zip(self.records())
    }

    /// Number of data clusters.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.map.count()
    }

    /// Of those, compressed.
    #[must_use]
    pub const fn compressed_clusters(&self) -> u64 {
        self.compressed_clusters
    }

    /// Bytes of all stored forms.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Memory that it takes now, bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.map.memory_bytes() + to_u64(self.pieces.len() * PIECE_RECORDS * size_of::<Record>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_by_cluster() {
        let mut index = ClusterIndex::new();
        let clusters: Vec<u64> =
            (0..200_000).filter(|cluster| cluster % 7 < 3 || cluster % 9000 == 17).map(|cluster| cluster * 3).collect();
        for &cluster in &clusters {
            index.push(cluster, Record { stored_bytes: u32::try_from(cluster + 1).unwrap(), digest: [0; 4] }, true);
        }
        index.complete();
        for &cluster in &clusters {
            assert_eq!(u64::from(index.record(cluster).unwrap().stored_bytes), cluster + 1);
            assert_eq!(index.record(cluster + 1), None);
        }
        assert_eq!(index.clusters().map(|(cluster, _)| cluster).collect::<Vec<_>>(), clusters);
        assert_eq!(size_of::<Record>(), 20);
    }
}
