//! Clusters that are read again, against the survey's record.
//!
//! Nothing but what the survey saw may leave: each data cluster has to have its digest, each other one has to be zero, and the
//! stored form that is made again has to have the length that the layout counted on.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use engine::{
    BlockingStage, BufferPool, Emitter, ErrorKind, Inlet, Item, Lease, NoInput, Outlet, StageContext, StageError, Transform,
};

use super::Survey;
use crate::{
    compress::{Compression, Encoder, encode::digest},
    disk::RawFile,
    extent::{Extent, Payload},
    read_at::ReadAt,
    units::{GuestRange, round_up, to_u64, to_usize},
    zero::is_zero,
};

/// The source is not what it was.
#[derive(Debug, thiserror::Error)]
#[error("the source has changed since it was first read: its bytes at guest offset {guest_offset:#x} differ from what they were")]
pub struct SourceChanged {
    /// Where the cluster begins that differs.
    pub guest_offset: u64,
}

/// An extent's data clusters in their stored form, made again.
#[derive(Debug)]
pub struct Rebuilt {
    /// Which guest bytes.
    pub guest: GuestRange,
    /// Its data clusters, packed.
    pub packed: Bytes,
    /// The lease is the credit under which the packed copy waits for its turn; it returns when its clusters are in file order.
    _credit: Lease,
}

impl Item for Rebuilt {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

/// Checks extents and makes their stored form again. One a thread.
pub struct Recheck {
    survey: Arc<Survey>,
    encoder: Option<Encoder>,
}

impl Recheck {
    /// Against this survey, with the compression that it was made with.
    #[must_use]
    pub fn new(survey: Arc<Survey>, compression: Option<Compression>) -> Self {
        Self { survey, encoder: compression.map(Encoder::new) }
    }

    /// The data clusters of `bytes`, which are the guest's from `guest_offset` on, padded with zeros to whole clusters.
    fn rebuild(&mut self, guest_offset: u64, bytes: &[u8]) -> Result<Vec<u8>, SourceChanged> {
        let cluster_bytes = self.survey.cluster_bits.cluster_bytes();
        let mut packed = Vec::new();
        let first = guest_offset / cluster_bytes;
        for (cluster, number) in bytes.chunks(to_usize(cluster_bytes)).zip(first..) {
            let changed = || SourceChanged { guest_offset: number * cluster_bytes };
            let Some(record) = self.survey.index.record(number) else {
                if is_zero(cluster) {
                    continue;
                }
                return Err(changed());
            };
            if digest(cluster) != record.digest {
                return Err(changed());
            }
            if u64::from(record.stored_bytes) == cluster_bytes {
                packed.extend_from_slice(cluster);
                continue;
            }
            let encoded = self.encoder.as_mut().and_then(|encoder| encoder.append(cluster, cluster.len(), &mut packed));
            if encoded.map(to_u64) != Some(u64::from(record.stored_bytes)) {
                return Err(changed());
            }
        }
        packed.shrink_to_fit();
        Ok(packed)
    }
}

impl Transform for Recheck {
    type In = Extent;
    type Out = Rebuilt;
    type Report = ();

    fn apply(&mut self, extent: Extent, out: &mut Emitter<'_, Rebuilt>) -> Result<(), StageError> {
        let Extent { guest, payload: Payload::Bytes(mut lease) } = extent else {
            return Err(StageError::bug("an extent that was wanted again came without bytes"));
        };
        let bytes = to_usize(guest.bytes());
        let padded = to_usize(round_up(guest.bytes(), self.survey.cluster_bits.cluster_bytes()));
        lease[bytes..padded].fill(0);
        let packed = self.rebuild(guest.start.0, &lease[..padded]);
        let packed = packed.map_err(|changed| StageError::new(ErrorKind::InvalidData, changed))?.into();
        out.emit(Rebuilt { guest, packed, _credit: lease })
    }

    fn finish(self, _: &mut Emitter<'_, Rebuilt>) -> Result<(), StageError> {
        Ok(())
    }
}

/// Source: extents of a local file, once more. Workers share the list; an extent is claimed together with its lease, in guest order, so
/// that the oldest one can always land.
pub struct ReadAgain {
    /// The file.
    pub source: Arc<RawFile>,
    /// Where leases come from.
    pub pool: BufferPool,
    /// What is wanted; ascends.
    pub wanted: Arc<Vec<GuestRange>>,
    /// How much of it is claimed.
    pub claimed: Arc<Mutex<usize>>,
}

impl BlockingStage for ReadAgain {
    type In = NoInput;
    type Out = Extent;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Extent>, _: StageContext) -> Result<(), StageError> {
        loop {
            let (guest, mut lease) = {
                let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(guest) = self.wanted.get(*claimed).copied() else { break };
                let lease = self.pool.acquire_blocking()?;
                *claimed += 1;
                (guest, lease)
            };
            let part: Range<usize> = 0..to_usize(guest.bytes());
            let read = self.source.file().read_exact_at(guest.start.0, &mut lease[part]);
            read.map_err(|error| StageError::new(ErrorKind::Io, error))?;
            outlet.send_blocking(Extent { guest, payload: Payload::Bytes(lease) })?;
        }
        outlet.finish();
        Ok(())
    }
}
