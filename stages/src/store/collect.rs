//! Puts extents into guest order, proves that they cover the disk, and remembers where its data is.

use bytes::Bytes;
use engine::{BlockingStage, ErrorKind, Inlet, Outlet, Reorder, StageContext, StageError};

use crate::{
    disk::write::IndexFull,
    extent::{Holder, StoredExtent},
    qcow2::ClusterIndex,
    units::{ClusterBits, GuestRange, to_u64},
    watermark::Watermark,
};

/// Extents held back until their turn: parallel ranges deliver out of order, by at most the window of the fetch. Each
/// is a few hundred bytes here; its data lies in the store or in the file.
pub const HELD_MAX: usize = 1 << 16;

/// Where an extent's data clusters are until they are emitted.
#[derive(Clone, Debug)]
pub enum Tier {
    /// Here, packed.
    Memory(Bytes),
    /// In the scratch file, packed, from this file offset on.
    Scratch(u64),
    /// Nowhere: it is read again.
    Source,
}

/// An extent with data.
#[derive(Clone, Debug)]
pub struct KeptExtent {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// Number of its data clusters.
    pub data_clusters: u32,
    /// Where they are.
    pub kept: Tier,
}

/// What a survey of the source found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Bytes of the source.
    pub source_bytes: u64,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// The data clusters.
    pub index: ClusterIndex,
    /// Extents with data, in guest order.
    pub extents: Vec<KeptExtent>,
}

impl Survey {
    /// Extents that are to be read again.
    #[must_use]
    pub fn wanted(&self) -> Vec<GuestRange> {
        self.extents.iter().filter(|extent| matches!(extent.kept, Tier::Source)).map(|extent| extent.guest).collect()
    }
}

/// Takes extents in any order, passes them on in guest order, and reports the survey.
pub struct Collect {
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Bytes the source has, where that is known beforehand; what the extents have to cover.
    pub source_bytes: Option<u64>,
    /// Memory for the index, bytes.
    pub index_limit_bytes: u64,
    /// Is the survey wanted? Without it the order alone is made and checked.
    pub survey: bool,
    /// Told how far everything is dealt with, until an extent passes that only the hash lane can deal with.
    pub watermark: Option<Watermark>,
}

impl BlockingStage for Collect {
    type In = StoredExtent;
    type Out = StoredExtent;
    type Report = Survey;

    fn run(self, inlet: Inlet<StoredExtent>, outlet: Outlet<StoredExtent>, _: StageContext) -> Result<Survey, StageError> {
        let cluster_bytes = self.cluster_bits.cluster_bytes();
        let mut order = Reorder::new(HELD_MAX);
        let mut survey =
            Survey { source_bytes: 0, cluster_bits: self.cluster_bits, index: ClusterIndex::new(), extents: Vec::new() };
        let mut passing = false;
        while let Some(stored_extent) = inlet.recv_blocking()? {
            let guest = stored_extent.guest;
            order.push(guest.start.0, guest.end.0, stored_extent).map_err(StageError::bug)?;
            while let Some(stored_extent) = order.pop() {
                if self.survey {
                    survey.add(&stored_extent, cluster_bytes)?;
                    let index_bytes = survey.index.memory_bytes() + to_u64(survey.extents.capacity() * size_of::<KeptExtent>());
                    if index_bytes > self.index_limit_bytes {
                        let full = IndexFull { limit_bytes: self.index_limit_bytes, guest_offset: stored_extent.guest.start.0 };
                        return Err(StageError::new(ErrorKind::Limit, full));
                    }
                }
                passing |= matches!(&stored_extent.holder, Holder::Passing(bytes) if !bytes.is_empty());
                if let Some(watermark) = self.watermark.as_ref().filter(|_| !passing) {
                    watermark.advance(stored_extent.guest.end.0);
                }
                outlet.send_blocking(stored_extent)?;
            }
        }
        // Every byte of the source has passed, once: an image that lacks a part is never sealed.
        survey.source_bytes = order.next();
        let expected = self.source_bytes.unwrap_or(order.next());
        if order.next() != expected || order.held() != 0 {
            return Err(StageError::bug(format!("{:#x} of {expected:#x} guest bytes arrived", order.next())));
        }
        survey.index.complete();
        outlet.finish();
        Ok(survey)
    }
}

impl Survey {
    fn add(&mut self, stored_extent: &StoredExtent, cluster_bytes: u64) -> Result<(), StageError> {
        let kept = match &stored_extent.holder {
            Holder::Nowhere => return Ok(()),
            Holder::Memory(bytes) => Some(Tier::Memory(bytes.clone())),
            Holder::Scratch(at) => Some(Tier::Scratch(*at)),
            Holder::Passing(_) => Some(Tier::Source),
            Holder::File => None, // written already: the index alone is wanted
        };
        let mut records = stored_extent.records.iter();
        let mut data_clusters = 0;
        for run in stored_extent.runs.iter().filter(|run| run.position != crate::extent::Position::Zeros) {
            for step in 0..run.guest.bytes().div_ceil(cluster_bytes) {
                let record = records.next().ok_or_else(|| StageError::bug("a data cluster without a record"))?;
                let whole = u64::from(record.stored_bytes) == cluster_bytes;
                self.index.push(run.guest.start.0 / cluster_bytes + step, *record, whole);
                data_clusters += 1;
            }
        }
        self.extents.extend(kept.map(|kept| KeptExtent { guest: stored_extent.guest, data_clusters, kept }));
        Ok(())
    }
}
