//! Is everything there that an image's tables point to?
//!
//! Glance looks at a header alone: a file that was cut off while it was copied becomes an active image of which no server boots. Here
//! every table is read and every place compared with the file's length; no data is.

use super::{
    Qcow2, Qcow2Error,
    entry::{L2Entry, L2Kind},
    reader::be_word,
};
use crate::{read_at::ReadAt, units::to_u64};

/// What the tables say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Guest clusters that are stored as they are.
    pub data_clusters: u64,
    /// Guest clusters that are stored compressed.
    pub compressed_clusters: u64,
    /// Host bytes that compressed clusters take, each rounded to sectors.
    pub compressed_bytes: u64,
}

/// Reads all L2 tables. Memory: one table, and 8 bytes for each.
///
/// # Errors
/// [`Qcow2Error`] naming the first entry that points past the file's end or is not allowed; tables that are used twice, which would make
/// the work unbounded.
pub fn contents<R: ReadAt>(image: &Qcow2<R>) -> Result<Contents, Qcow2Error> {
    let bits = image.header().cluster_bits;
    let cluster_bytes = bits.cluster_bytes();
    let refcounts = u64::from(image.header().refcount_table_clusters) * cluster_bytes;
    if image.header().refcount_table.0.checked_add(refcounts).is_none_or(|end| end > image.file_bytes()) {
        let (field, value) = ("refcount_table_offset", image.header().refcount_table.0);
        return Err(Qcow2Error::Header { field, value, rule: "the table passes the end of the file" });
    }
    let mut tables: Vec<(u64, u64)> =
        image.l1().iter().zip(0_u64..).filter_map(|(entry, index)| entry.host_offset().map(|host| (host.0, index))).collect();
    tables.sort_unstable();
    if let Some(pair) = tables.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let what = format!("is the L2 table of L1 entries {} and {}", pair[0].1, pair[1].1);
        return Err(Qcow2Error::Corrupt { host_cluster: pair[0].0 / cluster_bytes, what });
    }
    let guest_clusters = bits.clusters_for(image.virtual_bytes());
    let mut contents = Contents::default();
    for index in 0..to_u64(image.l1().len()) {
        let Some(table) = image.l2_table(index)? else { continue };
        for (word, in_table) in table.chunks_exact(8).zip(0_u64..) {
            let cluster = index * bits.entries_per_cluster() + in_table;
            if cluster >= guest_clusters {
                break;
            }
            let entry = L2Entry::from_word(be_word(word));
            let bad = |rule| Qcow2Error::Entry { table: "L2", index: cluster, entry: entry.word(), rule };
            match entry.kind(bits) {
                L2Kind::Compressed { host, sector_rounded_bytes } => {
                    let end = host.0.checked_add(sector_rounded_bytes);
                    if end.is_none_or(|end| end > image.file_bytes().next_multiple_of(512)) {
                        return Err(bad("points past the end of the file"));
                    }
                    contents.compressed_clusters += 1;
                    contents.compressed_bytes += sector_rounded_bytes;
                }
                _ if entry.reserved_bits(image.header().version) != 0 => return Err(bad("reserved bits are set")),
                L2Kind::Data { host } => {
                    if host.0 % cluster_bytes != 0 {
                        return Err(bad("is not cluster aligned"));
                    }
                    if host.0.checked_add(cluster_bytes).is_none_or(|end| end > image.file_bytes()) {
                        return Err(bad("points past the end of the file"));
                    }
                    contents.data_clusters += 1;
                }
                L2Kind::Unallocated | L2Kind::Zero { .. } => {}
            }
        }
    }
    Ok(contents)
}
