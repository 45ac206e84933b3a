//! Refcounts against reachability: the counterpart of `qemu-img check` for images without snapshots.
//!
//! Found: refcounts below (corruption) or above (leak) the references, COPIED flags that disagree, tables and
//! clusters that overlap, misaligned or past the file's end, reserved bits. And what `qemu-img check` does not
//! find: a file cut short by less than a cluster.

use super::{
    Qcow2, Qcow2Error,
    entry::{L2Entry, L2Kind, RefcountTableEntry},
    reader::be_word,
};
use crate::{
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Host clusters of the file.
    pub host_clusters: u64,
    /// Guest clusters that are stored as they are.
    pub data_clusters: u64,
    /// Guest clusters that are stored compressed.
    pub compressed_clusters: u64,
    /// Host clusters with a refcount above their references.
    pub leaked_clusters: u64,
}

/// Clusters of a file up to which a check is made: 24 GiB of counters, 256 TiB of file at 64 KiB clusters. A
/// sparse file can claim any length.
const HOST_CLUSTERS_MAX: u64 = 1 << 32;

/// Checks all metadata of an image. Memory: 4 bytes for each host cluster of the file.
///
/// # Errors
/// The first corruption found. Leaks are counted, not an error.
pub fn check<R: ReadAt>(image: &Qcow2<R>) -> Result<CheckReport, Qcow2Error> {
    let header = image.header();
    let bits = header.cluster_bits;
    let cluster_bytes = bits.cluster_bytes();
    if header.snapshots != 0 {
        return Err(Qcow2Error::Unsupported { feature: "internal snapshots" });
    }
    if header.refcount_bits != 16 {
        return Err(Qcow2Error::Unsupported { feature: "a refcount width other than 16 bits" });
    }
    let host_clusters = bits.clusters_for(image.file_bytes());
    if host_clusters > HOST_CLUSTERS_MAX {
        return Err(Qcow2Error::Unsupported { feature: "a file of more than 4294967296 clusters in a check" });
    }
    let mut references = References { counts: vec![0; to_usize(host_clusters)], cluster_bytes };
    let mut report = CheckReport { host_clusters, ..CheckReport::default() };

    references.add(0, cluster_bytes)?;
    references.add(header.l1_table.0, u64::from(header.l1_entries) * 8)?;
    references.add(header.refcount_table.0, u64::from(header.refcount_table_clusters) * cluster_bytes)?;
    for (entry, index) in image.l1().iter().zip(0_u64..) {
        let Some(table) = image.l2_table(index)? else { continue };
        let host = entry.host_offset().expect("there is a table");
        references.add(host.0, cluster_bytes)?;
        // Tables that share a cluster would make the work unbounded: 4 Mi entries may point at one table.
        if references.at(host.0) > 1 {
            let what = "is an L2 table and something else, too".to_owned();
            return Err(Qcow2Error::Corrupt { host_cluster: host.0 / cluster_bytes, what });
        }
        for (word, in_table) in table.chunks_exact(8).zip(0_u64..) {
            let entry = L2Entry::from_word(be_word(word));
            let cluster = index * bits.entries_per_cluster() + in_table;
            match entry.kind(bits) {
                L2Kind::Compressed { host, sector_rounded_bytes } => {
                    let first_sector = host.0 & !511;
                    let end = (host.0 + sector_rounded_bytes).min(image.file_bytes());
                    references.add(first_sector, end.saturating_sub(first_sector))?;
                    report.compressed_clusters += 1;
                }
                _ if entry.reserved_bits(header.version) != 0 => {
                    return Err(Qcow2Error::Entry {
                        table: "L2",
                        index: cluster,
                        entry: entry.word(),
                        rule: "reserved bits are set",
                    });
                }
                L2Kind::Unallocated | L2Kind::Zero { host: None } => {}
                L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => {
                    if host.0 % cluster_bytes != 0 {
                        return Err(Qcow2Error::Entry {
                            table: "L2",
                            index: cluster,
                            entry: entry.word(),
                            rule: "is not cluster aligned",
                        });
                    }
                    references.add(host.0, cluster_bytes)?;
                    report.data_clusters += 1;
                }
            }
        }
    }

    // refcount blocks: first their own references, then what they say
    let mut table = vec![0; to_usize(u64::from(header.refcount_table_clusters) * cluster_bytes)];
    let table_at = header.refcount_table.0;
    image.storage().read_exact_at(table_at, &mut table).map_err(|source| Qcow2Error::Io { host_offset: table_at, source })?;
    let blocks: Vec<RefcountTableEntry> =
        table.chunks_exact(8).map(|word| RefcountTableEntry::from_word(be_word(word))).collect();
    for (entry, index) in blocks.iter().zip(0_u64..) {
        let bad = |rule| Qcow2Error::Entry { table: "refcount table", index, entry: entry.word(), rule };
        if entry.reserved_bits() != 0 {
            return Err(bad("reserved bits are set"));
        }
        let Some(host) = entry.host_offset() else { continue };
        if host.0 % cluster_bytes != 0 {
            return Err(bad("is not cluster aligned"));
        }
        references.add(host.0, cluster_bytes)?;
    }
    let mut block = vec![0; to_usize(cluster_bytes)];
    let mut stored = vec![0_u16; to_usize(host_clusters)];
    for (entry, index) in blocks.iter().zip(0_usize..) {
        let Some(host) = entry.host_offset() else { continue };
        image.storage().read_exact_at(host.0, &mut block).map_err(|source| Qcow2Error::Io { host_offset: host.0, source })?;
        let first = index * to_usize(bits.refcounts_per_block());
        for (refcount, cluster) in block.chunks_exact(2).zip(first..) {
            if let Some(stored) = stored.get_mut(cluster) {
                *stored = u16::from_be_bytes([refcount[0], refcount[1]]);
            }
        }
    }
    for ((&stored, &references), host_cluster) in stored.iter().zip(&references.counts).zip(0_u64..) {
        if u32::from(stored) < references {
            let what = format!("refcount is {stored}, but {references} references lead there");
            return Err(Qcow2Error::Corrupt { host_cluster, what });
        }
        report.leaked_clusters += u64::from(u32::from(stored) > references);
    }
    check_copied_flags(image, &stored)?;
    Ok(report)
}

/// COPIED is set exactly where the refcount is 1.
fn check_copied_flags<R: ReadAt>(image: &Qcow2<R>, stored: &[u16]) -> Result<(), Qcow2Error> {
    let bits = image.header().cluster_bits;
    let refcount_at = |host: u64| stored.get(to_usize(host / bits.cluster_bytes())).copied().unwrap_or(0);
    for (entry, index) in image.l1().iter().zip(0_u64..) {
        let Some(host) = entry.host_offset() else { continue };
        let rule = "the COPIED flag disagrees with the refcount";
        if entry.is_copied() != (refcount_at(host.0) == 1) {
            return Err(Qcow2Error::Entry { table: "L1", index, entry: entry.word(), rule });
        }
        let Some(table) = image.l2_table(index)? else { continue };
        for (word, in_table) in table.chunks_exact(8).zip(0_u64..) {
            let entry = L2Entry::from_word(be_word(word));
            let host = match entry.kind(bits) {
                L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => host,
                _ => continue,
            };
            if entry.is_copied() != (refcount_at(host.0) == 1) {
                let cluster = index * bits.entries_per_cluster() + in_table;
                return Err(Qcow2Error::Entry { table: "L2", index: cluster, entry: entry.word(), rule });
            }
        }
    }
    Ok(())
}

struct References {
    counts: Vec<u32>,
    cluster_bytes: u64,
}

impl References {
    /// References to the host cluster at this offset, which was added before.
    fn at(&self, host_offset: u64) -> u32 {
        self.counts[to_usize(host_offset / self.cluster_bytes)]
    }

    /// One reference to each host cluster that `[host_offset, host_offset + bytes)` touches.
    fn add(&mut self, host_offset: u64, bytes: u64) -> Result<(), Qcow2Error> {
        if bytes == 0 {
            return Ok(());
        }
        let file_clusters = to_u64(self.counts.len());
        let past_end = |host_cluster| Qcow2Error::Corrupt {
            host_cluster,
            what: format!("is referenced, but the file has {file_clusters:#x} clusters"),
        };
        let first = host_offset / self.cluster_bytes;
        let end = host_offset.checked_add(bytes).ok_or_else(|| past_end(first))?;
        let last = (end - 1) / self.cluster_bytes;
        if last >= file_clusters {
            return Err(past_end(last));
        }
        for count in &mut self.counts[to_usize(first)..=to_usize(last)] {
            *count += 1;
        }
        Ok(())
    }
}
