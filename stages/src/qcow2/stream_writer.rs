//! A qcow2 file strictly forward, for sinks that cannot seek: metadata first, then the data in guest order.

use super::{
    ClusterIndex, Layout,
    entry::L2Entry,
    packing::{InFileOrder, Look, Packing, Refcounts},
    tables::{self, L2Tables},
};
use crate::units::{HostOffset, to_usize};

/// Produces everything of a file that comes before its data. The stored clusters follow through [`StreamWriter::data`], until
/// [`Layout::file_bytes`] are out.
#[derive(Clone, Copy)]
pub struct StreamWriter<'a> {
    layout: &'a Layout,
    index: &'a ClusterIndex,
}

impl<'a> StreamWriter<'a> {
    /// For the layout that was planned from this very index.
    #[must_use]
    pub const fn new(layout: &'a Layout, index: &'a ClusterIndex) -> Self {
        Self { layout, index }
    }

    /// The metadata, piece by piece, in file order: [`Layout::metadata_bytes`] bytes in all.
    pub fn metadata(self) -> impl Iterator<Item = Vec<u8>> + 'a {
        let sections = *self.layout.sections();
        let (bits, first) = (sections.geometry.cluster_bits(), sections.data.first);
        let tables_of_ones = std::iter::repeat_n(1_u16, to_usize(first));
        let lengths = self.index.records().map(|record| u64::from(record.stored_bytes));
        let refcounts = tables_of_ones.chain(Refcounts::new(bits, first, lengths));
        let mut packing = Packing::new(bits, first, Look::ahead(bits));
        let entries = self.index.clusters().map(move |(cluster, record)| {
            let bytes = u64::from(record.stored_bytes);
            let host = HostOffset(packing.place(bytes));
            let whole = bytes == bits.cluster_bytes();
            (cluster, if whole { L2Entry::data(host) } else { L2Entry::compressed(host, bytes, bits) })
        });
        std::iter::once(tables::header_cluster(&sections))
            .chain(tables::refcount_table(&sections))
            .chain(tables::refcount_blocks(&sections, refcounts))
            .chain(tables::l1_table(&sections, self.layout.populated()))
            .chain(L2Tables::new(&sections, entries))
    }

    /// Takes the stored clusters in guest order and gives the file's data in its order.
    #[must_use]
    pub fn data(self) -> InFileOrder {
        let sections = self.layout.sections();
        InFileOrder::new(sections.geometry.cluster_bits(), sections.data.first)
    }
}
