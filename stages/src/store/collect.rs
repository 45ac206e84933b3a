//! Puts extents into guest order, proves that they cover the disk, and remembers where its data is.

use bytes::Bytes;
use engine::{BlockingStage, ErrorKind, Inlet, Outlet, Reorder, StageContext, StageError};

use crate::{
    disk::write::IndexFull,
    extent::{Place, Placed},
    qcow2::{ClusterMap, Geometry},
    units::to_u64,
};

/// Extents held back until their turn: parallel ranges deliver out of order, by at most the window of the fetch. Each
/// is a few hundred bytes here; its data lies in the store or in the file.
pub const HELD_MAX: usize = 1 << 16;

/// What a survey of the source found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Disk and cluster size.
    pub geometry: Geometry,
    /// The data clusters.
    pub map: ClusterMap,
    /// Their bytes in guest order, whole clusters.
    pub kept: Vec<Bytes>,
}

/// Takes extents in any order, passes them on in guest order, and reports the survey.
pub struct Collect {
    /// Disk and cluster size.
    pub geometry: Geometry,
    /// Bytes the source has; what the extents have to cover.
    pub source_bytes: u64,
    /// Memory for the index, bytes.
    pub index_limit_bytes: u64,
}

impl BlockingStage for Collect {
    type In = Placed;
    type Out = Placed;
    type Report = Survey;

    fn run(self, inlet: Inlet<Placed>, outlet: Outlet<Placed>, _: StageContext) -> Result<Survey, StageError> {
        let cluster_bytes = self.geometry.cluster_bits().cluster_bytes();
        let mut order = Reorder::new(HELD_MAX);
        let mut survey = Survey { geometry: self.geometry, map: ClusterMap::new(), kept: Vec::new() };
        while let Some(placed) = inlet.recv_blocking()? {
            let guest = placed.guest;
            order.push(guest.start.0, guest.end.0, placed).map_err(StageError::bug)?;
            while let Some(placed) = order.pop() {
                for run in &placed.runs {
                    if matches!(run.place, Place::Zeros) {
                        continue;
                    }
                    survey.map.insert_run(run.guest.start.0 / cluster_bytes, run.guest.bytes().div_ceil(cluster_bytes));
                    if let Place::Memory(bytes) = &run.place {
                        survey.kept.push(bytes.clone());
                    }
                }
                let index_bytes = survey.map.memory_bytes() + to_u64(survey.kept.capacity() * size_of::<Bytes>());
                if index_bytes > self.index_limit_bytes {
                    let full = IndexFull { limit_bytes: self.index_limit_bytes, guest_offset: placed.guest.start.0 };
                    return Err(StageError::new(ErrorKind::Limit, full));
                }
                outlet.send_blocking(placed)?;
            }
        }
        // Every byte of the source has passed, once: an image that lacks a part is never sealed.
        if order.next() != self.source_bytes || order.held() != 0 {
            return Err(StageError::bug(format!("{:#x} of {:#x} guest bytes arrived", order.next(), self.source_bytes)));
        }
        outlet.finish();
        Ok(survey)
    }
}
