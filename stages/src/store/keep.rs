//! Keeps data clusters in memory: the store's first tier.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use bytes::Bytes;
use engine::{Emitter, ErrorKind, StageError, Transform};

use super::FreeList;
use crate::{
    compress::EncodeClusters,
    extent::{Classified, Holder, Stored, StoredExtent},
    text::size,
    units::{ClusterBits, to_u64, to_usize},
};

/// What an allocation costs beside its bytes: the allocator's header and rounding, the record of the extent.
const OVERHEAD_BYTES: u64 = 256;

/// The store is full, and the source cannot be read again.
#[derive(Debug, thiserror::Error)]
#[error(
    "the disk's data is more than the {} of memory for it, and what comes through a pipe cannot be read again: full at guest offset \
     {guest_offset:#x}. Raise --memory (now {}), or give a folder for a scratch file with --scratch DIR, or convert from a file \
     or from Glance",
    size(*.limit_bytes), size(*.memory_bytes)
)]
pub struct StoreFull {
    /// The store's part of the memory budget, bytes.
    pub limit_bytes: u64,
    /// The whole budget, bytes.
    pub memory_bytes: u64,
    /// Where the survey was.
    pub guest_offset: u64,
}

/// What becomes of data that memory does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// It is passed on to whoever still needs it: the scratch file, the hash lane.
    PassOn,
    /// Nobody needs it before it is read again.
    LetGo,
    /// It would be lost: the run ends, naming the whole budget.
    Refuse {
        /// The whole budget, bytes.
        memory_bytes: u64,
    },
}

/// Memory for data clusters. Clones share one limit.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    used: Arc<AtomicU64>,
    limit_bytes: u64,
    overflow: Overflow,
    buffers: FreeList,
}

impl MemoryStore {
    /// A store of `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: u64, overflow: Overflow) -> Self {
        Self { used: Arc::default(), limit_bytes, overflow, buffers: FreeList::default() }
    }

    /// Its memory comes from there, and returns when nobody reads it any more.
    #[must_use]
    pub fn with_buffers(self, buffers: FreeList) -> Self {
        Self { buffers, ..self }
    }

    /// Bytes taken, overhead included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        let cost = bytes + OVERHEAD_BYTES;
        let fits = self.used.fetch_add(cost, Relaxed) + cost <= self.limit_bytes;
        if !fits {
            self.used.fetch_sub(cost, Relaxed);
        }
        fits
    }

    /// Takes an extent's data clusters over, or passes them on. Its lease can go afterwards. Never waits.
    ///
    /// # Errors
    /// [`StoreFull`] where what does not fit would be lost.
    pub fn keep(&self, classified: Classified, cluster_bits: ClusterBits) -> Result<StoredExtent, StoreFull> {
        let runs = StoredExtent::packed_runs(&classified, cluster_bits, 0);
        let Classified { guest, records, stored, runs: fates } = classified;
        let data_clusters: u64 = to_u64(records.len());
        let holder = match stored {
            Stored::Nothing => Holder::Nowhere,
            Stored::Packed(packed) => self.find_home(to_u64(packed.len()), guest.start.0, || self.buffers.counted(packed))?,
            Stored::Whole(slice) => {
                let cluster_bytes = cluster_bits.cluster_bytes();
                self.find_home(data_clusters * cluster_bytes, guest.start.0, || {
                    let mut packed = self.buffers.buffer(to_usize(data_clusters * cluster_bytes));
                    let mut at = 0;
                    for run in &fates {
                        let end = at + to_usize(run.clusters * cluster_bytes);
                        if run.fate == crate::extent::Fate::Data {
                            packed.extend_from_slice(&slice[at..end]);
                        }
                        at = end;
                    }
                    packed.freeze()
                })?
            }
        };
        Ok(StoredExtent { guest, runs, records, holder })
    }

    fn find_home(&self, bytes: u64, guest_offset: u64, packed: impl FnOnce() -> Bytes) -> Result<Holder, StoreFull> {
        if self.take(bytes) {
            return Ok(Holder::Memory(packed()));
        }
        match self.overflow {
            Overflow::PassOn => Ok(Holder::Passing(packed())),
            Overflow::LetGo => Ok(Holder::Passing(Bytes::new())),
            Overflow::Refuse { memory_bytes } => Err(StoreFull { limit_bytes: self.limit_bytes, memory_bytes, guest_offset }),
        }
    }
}

/// Encodes and keeps, as a CPU stage.
pub struct Keep {
    /// The store.
    pub store: MemoryStore,
    /// Makes records, and compresses.
    pub encoder: EncodeClusters,
    /// Cluster size of the image to be.
    pub cluster_bits: ClusterBits,
}

impl Transform for Keep {
    type In = Classified;
    type Out = StoredExtent;
    type Report = ();

    fn apply(&mut self, classified: Classified, out: &mut Emitter<'_, StoredExtent>) -> Result<(), StageError> {
        // the lease returns before this thread may have to wait
        let stored_extent = self.store.keep(self.encoder.encode(classified), self.cluster_bits);
        out.emit(stored_extent.map_err(|full| StageError::new(ErrorKind::Limit, full))?)
    }

    fn finish(self, _: &mut Emitter<'_, StoredExtent>) -> Result<(), StageError> {
        Ok(())
    }
}
