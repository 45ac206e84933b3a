//! Copies data clusters into the store.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use bytes::{Bytes, BytesMut};
use engine::{Emitter, ErrorKind, StageError, Transform};

use crate::{
    extent::{Classified, Fate, Place, Placed, PlacedRun},
    text::size,
    units::{ClusterBits, GuestRange, to_u64, to_usize},
};

/// What an allocation costs beside its bytes: the allocator's header and rounding, the record of the extent.
const OVERHEAD_BYTES: u64 = 256;

/// The store is full.
#[derive(Debug, thiserror::Error)]
#[error(
    "the snapshot's data is more than the {} of memory for it: full after {}% of the disk (guest offset {guest_offset:#x} of \
     {virtual_bytes:#x}); at this rate all of it needs --memory {}. Raise --memory (now {}), or convert to a local file, which needs \
     64 MiB: virta convert SOURCE FILE.qcow2",
    size(*.limit_bytes), percent(*.guest_offset, *.virtual_bytes), needed(self), size(*.memory_bytes)
)]
pub struct StoreFull {
    /// The store's part of the memory budget, bytes.
    pub limit_bytes: u64,
    /// The whole budget, bytes.
    pub memory_bytes: u64,
    /// Where the survey was.
    pub guest_offset: u64,
    /// Size of the disk.
    pub virtual_bytes: u64,
}

fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100) / whole.max(1)
}

/// What the rest of the disk would ask for if it is like its beginning, and some.
fn needed(full: &StoreFull) -> String {
    let part = u128::from(full.guest_offset.max(1));
    let all = u128::from(full.memory_bytes) * u128::from(full.virtual_bytes) / part;
    format!("{}M", (all >> 20) * 5 / 4 + 1)
}

/// Memory for data clusters. Clones share one limit.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    used: Arc<AtomicU64>,
    limit_bytes: u64,
    memory_bytes: u64,
    virtual_bytes: u64,
}

impl MemoryStore {
    /// A store of `limit_bytes`, out of a whole budget of `memory_bytes`, for a disk of `virtual_bytes`.
    #[must_use]
    pub fn new(limit_bytes: u64, memory_bytes: u64, virtual_bytes: u64) -> Self {
        Self { used: Arc::default(), limit_bytes, memory_bytes, virtual_bytes }
    }

    /// Bytes taken, overhead included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Relaxed)
    }

    fn take(&self, bytes: u64, guest_offset: u64) -> Result<BytesMut, StoreFull> {
        let cost = bytes + OVERHEAD_BYTES;
        if self.used.fetch_add(cost, Relaxed) + cost > self.limit_bytes {
            self.used.fetch_sub(cost, Relaxed);
            return Err(StoreFull {
                limit_bytes: self.limit_bytes,
                memory_bytes: self.memory_bytes,
                guest_offset,
                virtual_bytes: self.virtual_bytes,
            });
        }
        Ok(BytesMut::with_capacity(to_usize(bytes)))
    }

    /// Copies an extent's data clusters into the store. Its lease can go afterwards.
    ///
    /// # Errors
    /// [`StoreFull`]; nothing of the extent is kept then.
    pub fn keep(&self, classified: &Classified, cluster_bits: ClusterBits) -> Result<Placed, StoreFull> {
        let cluster_bytes = cluster_bits.cluster_bytes();
        let guest = classified.guest;
        let data_clusters: u64 = classified.runs.iter().filter(|run| run.fate == Fate::Data).map(|run| run.clusters).sum();
        let packed = match (&classified.payload, data_clusters) {
            (Some(payload), 1..) => {
                let mut packed = self.take(data_clusters * cluster_bytes, guest.start.0)?;
                let mut at = 0;
                for run in &classified.runs {
                    let end = at + run.clusters * cluster_bytes;
                    if run.fate == Fate::Data {
                        packed.extend_from_slice(&payload[to_usize(at)..to_usize(end)]);
                    }
                    at = end;
                }
                packed.freeze()
            }
            _ => Bytes::new(),
        };
        let (mut at, mut in_packed) = (0, 0);
        let runs = classified.runs.iter().map(|run| {
            let padded = run.clusters * cluster_bytes;
            let range = GuestRange::new(guest.start.0 + at, padded.min(guest.bytes() - at));
            at += padded;
            let place = match run.fate {
                Fate::Zero => Place::Zeros,
                Fate::Data => {
                    let bytes = packed.slice(in_packed..in_packed + to_usize(padded));
                    in_packed += to_usize(padded);
                    Place::Memory(bytes)
                }
            };
            PlacedRun { guest: range, place }
        });
        let placed = Placed { guest, runs: runs.collect() };
        debug_assert_eq!(to_u64(packed.len()), data_clusters * cluster_bytes);
        Ok(placed)
    }
}

/// [`MemoryStore::keep`] as a CPU stage.
pub struct Keep {
    /// The store.
    pub store: MemoryStore,
    /// Cluster size of the image to be.
    pub cluster_bits: ClusterBits,
}

impl Transform for Keep {
    type In = Classified;
    type Out = Placed;
    type Report = ();

    fn apply(&mut self, classified: Classified, out: &mut Emitter<'_, Placed>) -> Result<(), StageError> {
        let placed = self.store.keep(&classified, self.cluster_bits);
        drop(classified); // the lease returns before this thread may have to wait
        out.emit(placed.map_err(|full| StageError::new(ErrorKind::Limit, full))?)
    }

    fn finish(self, _: &mut Emitter<'_, Placed>) -> Result<(), StageError> {
        Ok(())
    }
}
