//! The bytes of a file's tables, for either writer.

use super::{
    entry::{L1Entry, L2Entry, RefcountTableEntry},
    layout::Sections,
};
use crate::units::{ClusterBits, to_u64, to_usize};

/// Largest piece of metadata handed out at once, bytes (or one cluster, where that is more). Large enough that
/// a write or a network frame is worth its system call, small enough to be no matter for the memory budget.
const PIECE_BYTES: u64 = 256 << 10;

/// The header's cluster.
#[must_use]
pub fn header_cluster(sections: &Sections) -> Vec<u8> {
    let mut cluster = vec![0; to_usize(sections.geometry.cluster_bits().cluster_bytes())];
    let header = sections.header().to_bytes();
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
pub fn refcount_table(sections: &Sections) -> impl Iterator<Item = Vec<u8>> + use<> {
    let sections = *sections;
    word_table(sections.geometry.cluster_bits(), sections.refcount_table.clusters, move |index| {
        if index < sections.refcount_blocks.clusters {
            RefcountTableEntry::block(sections.host_offset(sections.refcount_blocks.first + index)).word()
        } else {
            0
        }
    })
}

/// The refcount blocks in pieces, from the refcounts of the file's clusters in order; what they do not reach is 0.
pub fn refcount_blocks<I: Iterator<Item = u16>>(sections: &Sections, counts: I) -> impl Iterator<Item = Vec<u8>> + use<I> {
    let bits = sections.geometry.cluster_bits();
    let blocks = sections.refcount_blocks.clusters;
    let blocks_per_piece = (PIECE_BYTES / bits.cluster_bytes()).max(1);
    let mut counts = counts;
    (0..blocks.div_ceil(blocks_per_piece)).map(move |piece| {
        let first = piece * blocks_per_piece;
        let end = (first + blocks_per_piece).min(blocks);
        let mut bytes = vec![0; to_usize((end - first) * bits.cluster_bytes())];
        for (refcount, count) in bytes.chunks_exact_mut(2).zip(&mut counts) {
            refcount.copy_from_slice(&count.to_be_bytes());
        }
        bytes
    })
}

/// The L1 table in pieces. `populated` are the L1 indices that have an L2 table, ascending.
pub fn l1_table<'a>(sections: &Sections, populated: &'a [u32]) -> impl Iterator<Item = Vec<u8>> + use<'a> {
    let sections = *sections;
    word_table(sections.geometry.cluster_bits(), sections.l1.clusters, move |index| {
        let table = u32::try_from(index).ok().and_then(|index| populated.binary_search(&index).ok());
        table.map_or(0, |table| L1Entry::table(sections.host_offset(sections.l2.first + to_u64(table))).word())
    })
}

/// The populated L2 tables one after the other, each a cluster, from entries in guest order.
pub struct L2Tables<I: Iterator<Item = (u64, L2Entry)>> {
    entries: std::iter::Peekable<I>,
    bits: ClusterBits,
}

impl<I: Iterator<Item = (u64, L2Entry)>> L2Tables<I> {
    /// Tables for these guest clusters, which ascend.
    pub fn new(sections: &Sections, entries: I) -> Self {
        Self { entries: entries.peekable(), bits: sections.geometry.cluster_bits() }
    }
}

impl<I: Iterator<Item = (u64, L2Entry)>> Iterator for L2Tables<I> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let per_table = self.bits.entries_per_cluster();
        let index = self.entries.peek()?.0 / per_table;
        let mut table = vec![0; to_usize(self.bits.cluster_bytes())];
        while let Some((cluster, entry)) = self.entries.next_if(|(cluster, _)| cluster / per_table == index) {
            let at = to_usize(cluster % per_table) * 8;
            table[at..at + 8].copy_from_slice(&entry.word().to_be_bytes());
        }
        Some(table)
    }
}
