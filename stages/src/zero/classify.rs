//! Cuts extents into runs of zero and data clusters.

use engine::{Emitter, StageError, Transform};

use super::is_zero;
use crate::{
    extent::{Classified, Extent, Fate, FateRun, Payload, Stored},
    progress::Progress,
    units::{ClusterBits, round_up, to_usize},
};

/// The fates of the clusters in `bytes`, which begin at a cluster boundary; the last may be partial.
#[must_use]
pub fn fates(bytes: &[u8], cluster_bits: ClusterBits) -> Vec<FateRun> {
    let mut runs: Vec<FateRun> = Vec::new();
    for cluster in bytes.chunks(to_usize(cluster_bits.cluster_bytes())) {
        let fate = if is_zero(cluster) { Fate::Zero } else { Fate::Data };
        match runs.last_mut() {
            Some(last) if last.fate == fate => last.clusters += 1,
            _ => runs.push(FateRun { clusters: 1, fate }),
        }
    }
    runs
}

/// Classifies one extent. The lease goes back where every cluster is zero, and is frozen otherwise.
///
/// # Panics
/// If the lease is shorter than the extent's whole clusters: the source's bug.
#[must_use]
pub fn classify(extent: Extent, cluster_bits: ClusterBits) -> Classified {
    let guest = extent.guest;
    match extent.payload {
        Payload::Zeros => Classified::zeros(guest, cluster_bits),
        Payload::Bytes(mut lease) => {
            let bytes = to_usize(guest.bytes());
            let padded = to_usize(round_up(guest.bytes(), cluster_bits.cluster_bytes()));
            lease[bytes..padded].fill(0);
            let runs = fates(&lease[..padded], cluster_bits);
            let has_data = runs.iter().any(|run| run.fate == Fate::Data);
            let stored = if has_data { Stored::Whole(lease.freeze(padded)) } else { Stored::Nothing };
            Classified { guest, runs, records: Vec::new(), stored }
        }
    }
}

/// [`classify`] as a CPU stage.
pub struct Classify {
    /// Cluster size of the image to be.
    pub cluster_bits: ClusterBits,
    /// Told of what was found.
    pub progress: Progress,
}

impl Transform for Classify {
    type In = Extent;
    type Out = Classified;
    type Report = ();

    fn apply(&mut self, extent: Extent, out: &mut Emitter<'_, Classified>) -> Result<(), StageError> {
        let classified = classify(extent, self.cluster_bits);
        self.progress.surveyed(&classified, self.cluster_bits);
        out.emit(classified)
    }

    fn finish(self, _: &mut Emitter<'_, Classified>) -> Result<(), StageError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use engine::{BufferPool, CancelToken};

    use super::*;
    use crate::units::{GuestRange, to_u64};

    #[test]
    fn stale_bytes_behind_the_disks_end_never_reach_the_image() {
        let pool = BufferPool::new(1, 1 << 21, 4096, &CancelToken::new());
        let mut lease = pool.acquire_blocking().unwrap();
        lease.fill(0xff); // what the last holder left
        lease[..1000].fill(0);
        lease[999] = 1;
        let extent = Extent { guest: GuestRange::new(0, 1000), payload: Payload::Bytes(lease) };
        let classified = classify(extent, ClusterBits::DEFAULT);
        let Stored::Whole(payload) = &classified.stored else { panic!("no bytes") };
        assert_eq!(to_u64(payload.len()), 65536);
        assert_eq!(payload.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 1);
        assert_eq!(classified.data_bytes(ClusterBits::DEFAULT), 1000);
    }

    #[test]
    fn a_zero_extent_gives_its_lease_back() {
        let pool = BufferPool::new(1, 1 << 21, 4096, &CancelToken::new());
        let lease = pool.acquire_blocking().unwrap();
        let extent = Extent { guest: GuestRange::new(1 << 21, 1 << 21), payload: Payload::Bytes(lease) };
        let classified = classify(extent, ClusterBits::DEFAULT);
        assert!(matches!(classified.stored, Stored::Nothing));
        assert_eq!(classified.runs, [FateRun { clusters: 32, fate: Fate::Zero }]);
        assert_eq!(pool.available(), 1);
    }
}
