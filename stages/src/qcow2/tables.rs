//! The bytes of a file's tables, for either writer.

use super::{
    entry::{L1Entry, L2Entry, RefcountTableEntry},
    layout::Placement,
};
use crate::units::{ClusterBits, to_u64, to_usize};

/// Largest piece of metadata handed out at once, bytes (or one cluster, where that is more). Large enough that
/// a write or a network frame is worth its system call, small enough to be no matter for the memory budget.
const PIECE_BYTES: u64 = 256 << 10;

/// Consecutive guest clusters on consecutive host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRun {
    /// Index of the first guest cluster.
    pub guest_first: u64,
    /// Index of the first host cluster.
    pub host_first: u64,
    /// Number of clusters, at least 1.
    pub count: u64,
}

/// The header's cluster.
#[must_use]
pub fn header_cluster(placement: &Placement) -> Vec<u8> {
    let mut cluster = vec![0; to_usize(placement.geometry.cluster_bits().cluster_bytes())];
    let header = placement.header().to_bytes();
    cluster[..header.len()].copy_from_slice(&header);
    cluster
}

/// A table of 8-byte words in pieces of whole clusters; the words past `words` are zero.
fn word_table(bits: ClusterBits, clusters: u64, word_at: impl Fn(u64) -> u64) -> impl Iterator<Item = Vec<u8>> {
    let clusters_per_piece = (PIECE_BYTES / bits.cluster_bytes()).max(1);
    (0..clusters.div_ceil(clusters_per_piece)).map(move |piece| {
        let first = piece * clusters_per_piece;
        let end = (first + clusters_per_piece).min(clusters);
        let words = first * bits.entries_per_cluster()..end * bits.entries_per_cluster();
        words.flat_map(|index| word_at(index).to_be_bytes()).collect()
    })
}

/// The refcount table in pieces.
pub fn refcount_table(placement: &Placement) -> impl Iterator<Item = Vec<u8>> + use<> {
    let placement = *placement;
    word_table(placement.geometry.cluster_bits(), placement.refcount_table.clusters, move |index| {
        if index < placement.refcount_blocks.clusters {
            RefcountTableEntry::block(placement.host_offset(placement.refcount_blocks.first + index)).word()
        } else {
            0
        }
    })
}

/// The refcount blocks in pieces: 1 for every cluster of the file, 0 beyond.
pub fn refcount_blocks(placement: &Placement) -> impl Iterator<Item = Vec<u8>> + use<> {
    let bits = placement.geometry.cluster_bits();
    let total = placement.total_clusters();
    let blocks = placement.refcount_blocks.clusters;
    let blocks_per_piece = (PIECE_BYTES / bits.cluster_bytes()).max(1);
    (0..blocks.div_ceil(blocks_per_piece)).map(move |piece| {
        let first = piece * blocks_per_piece;
        let end = (first + blocks_per_piece).min(blocks);
        let mut bytes = vec![0; to_usize((end - first) * bits.cluster_bytes())];
        let counted = total.saturating_sub(first * bits.refcounts_per_block());
        for refcount in bytes.chunks_exact_mut(2).take(to_usize(counted)) {
            refcount[1] = 1;
        }
        bytes
    })
}

/// The L1 table in pieces. `populated` are the L1 indices that have an L2 table, ascending.
pub fn l1_table<'a>(placement: &Placement, populated: &'a [u32]) -> impl Iterator<Item = Vec<u8>> + use<'a> {
    let placement = *placement;
    word_table(placement.geometry.cluster_bits(), placement.l1.clusters, move |index| {
        let table = u32::try_from(index).ok().and_then(|index| populated.binary_search(&index).ok());
        table.map_or(0, |table| L1Entry::table(placement.host_offset(placement.l2.first + to_u64(table))).word())
    })
}

/// The populated L2 tables one after the other, each a cluster, from mapped runs in guest order.
pub struct L2Tables<I: Iterator<Item = MappedRun>> {
    runs: std::iter::Peekable<I>,
    /// What is left of a run that went past the table before.
    rest: Option<MappedRun>,
    placement: Placement,
}

impl<I: Iterator<Item = MappedRun>> L2Tables<I> {
    /// Tables for `runs`, which ascend by guest cluster and do not overlap.
    pub fn new(placement: &Placement, runs: I) -> Self {
        Self { runs: runs.peekable(), rest: None, placement: *placement }
    }

    fn next_run(&mut self) -> Option<MappedRun> {
        self.rest.take().or_else(|| self.runs.next())
    }
}

impl<I: Iterator<Item = MappedRun>> Iterator for L2Tables<I> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let bits = self.placement.geometry.cluster_bits();
        let per_table = bits.entries_per_cluster();
        let mut run = self.next_run()?;
        let index = run.guest_first / per_table;
        let table_end = (index + 1) * per_table;
        let mut table = vec![0; to_usize(bits.cluster_bytes())];
        loop {
            let here = run.count.min(table_end - run.guest_first);
            for step in 0..here {
                let at = to_usize((run.guest_first + step) % per_table) * 8;
                let entry = L2Entry::data(self.placement.host_offset(run.host_first + step));
                table[at..at + 8].copy_from_slice(&entry.word().to_be_bytes());
            }
            if here < run.count {
                self.rest = Some(MappedRun {
                    guest_first: run.guest_first + here,
                    host_first: run.host_first + here,
                    count: run.count - here,
                });
                break;
            }
            match self.runs.peek() {
                Some(next) if next.guest_first < table_end => run = self.runs.next().expect("just peeked"),
                _ => break,
            }
        }
        Some(table)
    }
}
