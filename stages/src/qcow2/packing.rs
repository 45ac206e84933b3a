//! Where stored clusters go: those that are stored as they are at cluster boundaries, compressed ones byte after byte.
//!
//! # Rules
//! - P1: a compressed cluster begins at any byte, and may go on into the next host cluster only if that one is physically next
//!   (block/qcow2-refcount.c, `qcow2_alloc_bytes`).
//! - P2: a host cluster's refcount is the number of stored clusters whose bytes touch it; rounded up to sectors, as
//!   `qemu-img check` counts, that is the same number, since a host cluster is made of whole sectors.
//! - P3: where compressed and plain clusters alternate, the partly filled host cluster stays open while plain ones are placed
//!   behind it. A file that is written forward closes it after [`Look::ahead`] clusters: what is behind it has to wait in
//!   memory until it is full.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::units::{ClusterBits, round_up, to_u64, to_usize};

/// References that one host cluster can have: what 16 bits count.
const REFERENCES_MAX: u64 = 65_535;
/// Plain clusters that may wait behind an open host cluster in a file that is written forward.
const LOOK_AHEAD_CLUSTERS: u64 = 64;
/// Bytes of them at most: with the largest clusters, 64 would be 128 MiB.
const LOOK_AHEAD_BYTES: u64 = 16 << 20;

/// How far a partly filled host cluster stays open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look(u64);

impl Look {
    /// For a file that is written forward.
    #[must_use]
    pub const fn ahead(cluster_bits: ClusterBits) -> Self {
        let clusters = LOOK_AHEAD_BYTES >> cluster_bits.bits();
        Self(if clusters < LOOK_AHEAD_CLUSTERS { clusters } else { LOOK_AHEAD_CLUSTERS })
    }

    /// For a file that can be written anywhere.
    #[must_use]
    pub const fn anywhere() -> Self {
        Self(u64::MAX)
    }
}

#[derive(Clone, Copy, Debug)]
struct Open {
    cluster: u64,
    used: u64,
    references: u64,
    /// Plain clusters that were placed since it was opened.
    passed: u64,
}

/// Gives stored clusters their places, one after the other. A pure function of their lengths.
#[derive(Clone, Debug)]
pub struct Packing {
    cluster_bytes: u64,
    next: u64,
    open: Option<Open>,
    look: Look,
}

impl Packing {
    /// The first host cluster that may be used is `first`.
    #[must_use]
    pub const fn new(cluster_bits: ClusterBits, first: u64, look: Look) -> Self {
        Self { cluster_bytes: cluster_bits.cluster_bytes(), next: first, open: None, look }
    }

    /// Host clusters `count` in a row, for clusters that are stored as they are; returns the first one's offset.
    pub const fn place_plain(&mut self, count: u64) -> u64 {
        let first = self.next;
        self.next += count;
        if let Some(open) = &mut self.open {
            open.passed += count;
            if open.passed >= self.look.0 {
                self.open = None;
            }
        }
        first * self.cluster_bytes
    }

    /// A place for a compressed cluster of `bytes` bytes, fewer than a cluster has; returns its offset.
    pub fn place_compressed(&mut self, bytes: u64) -> u64 {
        debug_assert!(bytes > 0 && bytes < self.cluster_bytes);
        if let Some(open) = &mut self.open
            && open.references < REFERENCES_MAX
        {
            let at = open.cluster * self.cluster_bytes + open.used;
            let left = self.cluster_bytes - open.used;
            if bytes <= left {
                open.used += bytes;
                open.references += 1;
                if bytes == left {
                    self.open = None;
                }
                return at;
            }
            if open.cluster + 1 == self.next {
                self.open = Some(Open { cluster: self.next, used: bytes - left, references: 1, passed: 0 });
                self.next += 1;
                return at;
            }
        }
        let cluster = self.next;
        self.next += 1;
        self.open = Some(Open { cluster, used: bytes, references: 1, passed: 0 });
        cluster * self.cluster_bytes
    }

    /// A place for a cluster whose stored form has `bytes` bytes.
    pub fn place(&mut self, bytes: u64) -> u64 {
        if bytes == self.cluster_bytes { self.place_plain(1) } else { self.place_compressed(bytes) }
    }

    /// Every byte below this offset has been given away, or never will be.
    #[must_use]
    pub fn settled(&self) -> u64 {
        match self.open {
            Some(open) => open.cluster * self.cluster_bytes + open.used,
            None => self.next * self.cluster_bytes,
        }
    }

    /// One past the last host cluster that was used.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.next
    }
}

/// Puts stored clusters that come in guest order into file order, for a file that is written forward. Holds at most what
/// [`Look::ahead`] lets wait.
#[derive(Debug)]
pub struct InFileOrder {
    packing: Packing,
    waiting: BTreeMap<u64, Bytes>,
    written: u64,
}

impl InFileOrder {
    /// The data begins at host cluster `first`.
    #[must_use]
    pub fn new(cluster_bits: ClusterBits, first: u64) -> Self {
        let packing = Packing::new(cluster_bits, first, Look::ahead(cluster_bits));
        Self { written: first * cluster_bits.cluster_bytes(), packing, waiting: BTreeMap::new() }
    }

    /// The next `count` clusters in guest order, all stored as they are, in one piece.
    pub fn push_plain(&mut self, bytes: Bytes, count: u64) {
        let at = self.packing.place_plain(count);
        self.waiting.insert(at, bytes);
    }

    /// The next cluster in guest order, compressed.
    pub fn push_compressed(&mut self, bytes: Bytes) {
        let at = self.packing.place_compressed(to_u64(bytes.len()));
        self.waiting.insert(at, bytes);
    }

    /// The next bytes of the file, if they are known.
    pub fn pop(&mut self) -> Option<Bytes> {
        let settled = self.packing.settled();
        if self.written >= settled {
            return None;
        }
        match self.waiting.first_key_value() {
            Some((&at, _)) if at == self.written => {
                let (_, bytes) = self.waiting.pop_first().expect("just seen");
                self.written += to_u64(bytes.len());
                Some(bytes)
            }
            first => {
                // what no cluster fills any more
                let end = first.map_or(settled, |(&at, _)| at.min(settled));
                let gap = (end - self.written).min(self.packing.cluster_bytes);
                self.written += gap;
                Some(Bytes::from(vec![0; to_usize(gap)]))
            }
        }
    }

    /// No more clusters come: [`InFileOrder::pop`] gives the rest, up to the end of the last host cluster.
    pub const fn close(&mut self) {
        self.packing.open = None;
    }

    /// The file offset reached.
    #[must_use]
    pub const fn written(&self) -> u64 {
        self.written
    }
}

/// Refcounts of the host clusters from `first` on, in their order, from the stored lengths in guest order.
pub struct Refcounts<I> {
    lengths: I,
    packing: Packing,
    /// Counts from host cluster `at` on.
    counts: VecDeque<u16>,
    at: u64,
    over: bool,
}

impl<I: Iterator<Item = u64>> Refcounts<I> {
    /// For stored clusters of these lengths, placed as [`InFileOrder`] does.
    pub fn new(cluster_bits: ClusterBits, first: u64, lengths: I) -> Self {
        let packing = Packing::new(cluster_bits, first, Look::ahead(cluster_bits));
        Self { lengths, packing, counts: VecDeque::new(), at: first, over: false }
    }
}

impl<I: Iterator<Item = u64>> Iterator for Refcounts<I> {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        // a host cluster that is open, or that could be continued into, may still get references
        while !self.over && self.at >= self.packing.settled() / self.packing.cluster_bytes {
            match self.lengths.next() {
                Some(bytes) => {
                    let start = self.packing.place(bytes) / self.packing.cluster_bytes;
                    self.counts.resize(to_usize(self.packing.end() - self.at), 0);
                    let end = self.packing.end();
                    // a compressed cluster touches the host cluster it begins in, and the next one if it went on there
                    let begins = self.counts.get_mut(to_usize(start - self.at))?;
                    *begins += 1;
                    let goes_on = bytes < self.packing.cluster_bytes
                        && self
                            .packing
                            .open
                            .is_some_and(|open| open.cluster == start + 1 && end == start + 2 && open.references == 1);
                    if goes_on && let Some(next) = self.counts.get_mut(to_usize(start + 1 - self.at)) {
                        *next += 1;
                    }
                }
                None => {
                    self.over = true;
                    self.packing.open = None;
                }
            }
        }
        let count = self.counts.pop_front()?;
        self.at += 1;
        Some(count)
    }
}

/// References of each host cluster in `[first, end)` from places in any order: `(host offset, bytes)`, bytes rounded to sectors.
#[must_use]
pub fn count_references(cluster_bits: ClusterBits, end: u64, places: impl Iterator<Item = (u64, u64)>) -> Vec<u16> {
    let cluster_bytes = cluster_bits.cluster_bytes();
    let mut counts = vec![0_u16; to_usize(end)];
    for (host, bytes) in places {
        let last = round_up(host + bytes, 512) - 1;
        for count in &mut counts[to_usize(host / cluster_bytes)..=to_usize(last / cluster_bytes)] {
            *count = count.saturating_add(1);
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lengths as compression makes them: plain clusters, tiny ones, any.
    fn lengths(cluster_bytes: u64) -> impl Strategy<Value = Vec<u64>> {
        let one = prop_oneof![Just(cluster_bytes), 1..cluster_bytes, 1..cluster_bytes / 8, Just(cluster_bytes - 1)];
        prop::collection::vec(one, 0..400)
    }

    proptest! {
        #[test]
        fn places_never_overlap_refcounts_are_references_and_the_file_is_written_forward(
            bits in 9_u32..=16, lengths in (9_u32..=16).prop_flat_map(|bits| lengths(1 << bits)), first in 1_u64..40,
        ) {
            let bits = ClusterBits::from_bits(bits).unwrap();
            let cluster_bytes = bits.cluster_bytes();
            let lengths: Vec<u64> = lengths.into_iter().map(|bytes| bytes.min(cluster_bytes)).collect();
            for look in [Look::ahead(bits), Look::anywhere()] {
                let mut packing = Packing::new(bits, first, look);
                let mut places: Vec<(u64, u64)> = lengths.iter().map(|&bytes| (packing.place(bytes), bytes)).collect();
                for &(at, bytes) in &places {
                    prop_assert!(bytes < cluster_bytes || at % cluster_bytes == 0, "plain clusters are aligned");
                    prop_assert!(at >= first * cluster_bytes && at + bytes <= packing.end() * cluster_bytes);
                }
                let counted = count_references(bits, packing.end(), places.iter().copied());
                if look == Look::ahead(bits) {
                    let streamed: Vec<u16> = Refcounts::new(bits, first, lengths.iter().copied()).collect();
                    prop_assert_eq!(&counted[to_usize(first)..], &streamed[..]);
                    prop_assert!(streamed.iter().all(|&count| count > 0), "no host cluster is given away for nothing");
                }
                places.sort_unstable();
                for pair in places.windows(2) {
                    prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "overlap");
                }
            }
            // the bytes come out at their places, and what waits is bounded
            let mut order = InFileOrder::new(bits, first);
            let mut packing = Packing::new(bits, first, Look::ahead(bits));
            let mut file = vec![0xee; to_usize(first * cluster_bytes)];
            let mut expected = Vec::new();
            for (index, &bytes) in lengths.iter().enumerate() {
                let mark = u8::try_from(index % 250).unwrap() + 1;
                expected.push((packing.place(bytes), bytes, mark));
                let stored = Bytes::from(vec![mark; to_usize(bytes)]);
                if bytes == cluster_bytes { order.push_plain(stored, 1) } else { order.push_compressed(stored) }
                while let Some(piece) = order.pop() {
                    file.extend_from_slice(&piece);
                }
                let waiting: usize = order.waiting.values().map(Bytes::len).sum();
                prop_assert!(to_u64(waiting) <= (LOOK_AHEAD_CLUSTERS + 2) * cluster_bytes);
            }
            order.close();
            while let Some(piece) = order.pop() {
                file.extend_from_slice(&piece);
            }
            prop_assert_eq!(to_u64(file.len()), packing.end() * cluster_bytes);
            for (at, bytes, mark) in expected {
                prop_assert!(file[to_usize(at)..to_usize(at + bytes)].iter().all(|&byte| byte == mark));
            }
        }
    }

    #[test]
    fn alternating_clusters_do_not_leave_host_clusters_half_empty() {
        let bits = ClusterBits::DEFAULT;
        let mut packing = Packing::new(bits, 1, Look::ahead(bits));
        for _ in 0..1000 {
            packing.place(65536);
            packing.place(20_000);
        }
        let packed = (1000_u64 * 20_000).div_ceil(65536);
        assert!(packing.end() - 1001 <= packed + packed / 8, "{} for {packed}", packing.end() - 1001);
    }
}
