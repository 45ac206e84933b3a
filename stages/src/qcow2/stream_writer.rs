//! A qcow2 file strictly forward, for sinks that cannot seek: metadata first, then the data in guest order.

use super::{
    ClusterMap, Layout,
    tables::{self, L2Tables, MappedRun},
};

/// Produces everything of a file that comes before its data. The data clusters follow in guest order, each
/// whole (the last one padded with zeros), until [`Layout::file_bytes`] are out.
#[derive(Clone, Copy)]
pub struct StreamWriter<'a> {
    layout: &'a Layout,
    data: &'a ClusterMap,
}

impl<'a> StreamWriter<'a> {
    /// For the layout that was planned from this very map.
    ///
    /// # Panics
    /// If the map has changed since.
    #[must_use]
    pub fn new(layout: &'a Layout, data: &'a ClusterMap) -> Self {
        assert_eq!(layout.placement().data.clusters, data.count(), "a layout belongs to its map");
        Self { layout, data }
    }

    /// The metadata, piece by piece, in file order: [`Layout::metadata_bytes`] bytes in all.
    pub fn metadata(self) -> impl Iterator<Item = Vec<u8>> + 'a {
        let placement = *self.layout.placement();
        let mut host_next = placement.data.first;
        let runs = self.data.runs().map(move |run| {
            let mapped = MappedRun { guest_first: run.first, host_first: host_next, count: run.count };
            host_next += run.count;
            mapped
        });
        std::iter::once(tables::header_cluster(&placement))
            .chain(tables::refcount_table(&placement))
            .chain(tables::refcount_blocks(&placement))
            .chain(tables::l1_table(&placement, self.layout.populated()))
            .chain(L2Tables::new(&placement, runs))
    }
}
