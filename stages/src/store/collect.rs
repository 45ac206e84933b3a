//! Puts extents into guest order, proves that they cover the disk, and remembers where its data is.

use bytes::Bytes;
use engine::{BlockingStage, ErrorKind, Inlet, Outlet, Reorder, StageContext, StageError};

use crate::{
    disk::write::IndexFull,
    extent::{Home, Placed},
    qcow2::ClusterIndex,
    units::{ClusterBits, GuestRange, to_u64},
    watermark::Watermark,
};

/// Extents held back until their turn: parallel ranges deliver out of order, by at most the window of the fetch. Each
/// is a few hundred bytes here; its data lies in the store or in the file.
pub const HELD_MAX: usize = 1 << 16;

/// Where an extent's data clusters are until they are emitted.
#[derive(Clone, Debug)]
pub enum KeptIn {
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
    pub kept: KeptIn,
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
        self.extents.iter().filter(|extent| matches!(extent.kept, KeptIn::Source)).map(|extent| extent.guest).collect()
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
    type In = Placed;
    type Out = Placed;
    type Report = Survey;

    fn run(self, inlet: Inlet<Placed>, outlet: Outlet<Placed>, _: StageContext) -> Result<Survey, StageError> {
        let cluster_bytes = self.cluster_bits.cluster_bytes();
        let mut order = Reorder::new(HELD_MAX);
        let mut survey =
            Survey { source_bytes: 0, cluster_bits: self.cluster_bits, index: ClusterIndex::new(), extents: Vec::new() };
        let mut passing = false;
        while let Some(placed) = inlet.recv_blocking()? {
            let guest = placed.guest;
            order.push(guest.start.0, guest.end.0, placed).map_err(StageError::bug)?;
            while let Some(placed) = order.pop() {
                if self.survey {
                    survey.add(&placed, cluster_bytes)?;
                    let index_bytes = survey.index.memory_bytes() + to_u64(survey.extents.capacity() * size_of::<KeptExtent>());
                    if index_bytes > self.index_limit_bytes {
                        let full = IndexFull { limit_bytes: self.index_limit_bytes, guest_offset: placed.guest.start.0 };
                        return Err(StageError::new(ErrorKind::Limit, full));
                    }
                }
                passing |= matches!(&placed.home, Home::Passing(bytes) if !bytes.is_empty());
                if let Some(watermark) = self.watermark.as_ref().filter(|_| !passing) {
                    watermark.advance(placed.guest.end.0);
                }
                outlet.send_blocking(placed)?;
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
    fn add(&mut self, placed: &Placed, cluster_bytes: u64) -> Result<(), StageError> {
        let kept = match &placed.home {
            Home::Nowhere => return Ok(()),
            Home::Memory(bytes) => Some(KeptIn::Memory(bytes.clone())),
            Home::Scratch(at) => Some(KeptIn::Scratch(*at)),
            Home::Passing(_) => Some(KeptIn::Source),
            Home::File => None, // written already: the index alone is wanted
        };
        let mut records = placed.records.iter();
        let mut data_clusters = 0;
        for run in placed.runs.iter().filter(|run| run.place != crate::extent::Place::Zeros) {
            for step in 0..run.guest.bytes().div_ceil(cluster_bytes) {
                let record = records.next().ok_or_else(|| StageError::bug("a data cluster without a record"))?;
                let whole = u64::from(record.stored_bytes) == cluster_bytes;
                self.index.push(run.guest.start.0 / cluster_bytes + step, *record, whole);
                data_clusters += 1;
            }
        }
        self.extents.extend(kept.map(|kept| KeptExtent { guest: placed.guest, data_clusters, kept }));
        Ok(())
    }
}
