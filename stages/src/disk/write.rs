//! The writer stage: data clusters go to the end of the file as they arrive, tables follow, the header comes last.

use std::collections::HashMap;

use engine::{Cancelled, ErrorKind, Inlet, LocalStage, Outlet, StageContext, StageError};

use super::queue::{Completion, WriteBytes, WriteError, WriteOp, WriteQueue};
use crate::{
    compress::Codec,
    extent::{Classified, Fate, Holder, Position, Stored, StoredExtent, StoredRun},
    qcow2::{Arrival, Geometry, Qcow2Error},
    units::{ClusterBits, GuestRange, to_usize},
};

/// Memory for the record of stored_extent clusters ran out.
#[derive(Debug, thiserror::Error)]
#[error(
    "the index of stored_extent clusters passes its {limit_bytes} bytes at guest offset {guest_offset:#x}: \
     raise --memory, or use a larger --cluster-size"
)]
pub struct IndexFull {
    /// Bytes it may take.
    pub limit_bytes: u64,
    /// How far the conversion came.
    pub guest_offset: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteReport {
    /// Length of the file, bytes.
    pub image_bytes: u64,
    /// Bytes of data clusters in it.
    pub stored_bytes: u64,
    /// Size of its disk, bytes.
    pub virtual_bytes: u64,
}

/// Writes a qcow2 file through a [`WriteQueue`] and passes on where each extent went, in order of completion.
pub struct WriteImage<Q> {
    /// The file.
    pub queue: Q,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// How compressed clusters are compressed, if there are any.
    pub codec: Option<Codec>,
    /// Flush data before the header is written, and the header after it.
    pub sync: bool,
    /// Memory for the record of stored_extent clusters, bytes.
    pub index_limit_bytes: u64,
}

/// An extent with writes in flight.
struct Pending {
    stored_extent: StoredExtent,
    writes_left: usize,
}

impl<Q: WriteQueue> LocalStage for WriteImage<Q> {
    type In = Classified;
    type Out = StoredExtent;
    type Report = WriteReport;

    async fn run(
        self,
        inlet: Inlet<Classified>,
        outlet: Outlet<StoredExtent>,
        _: StageContext,
    ) -> Result<WriteReport, StageError> {
        let (sync, limit_bytes) = (self.sync, self.index_limit_bytes);
        let arrival = Arrival::new(self.cluster_bits, self.codec);
        let mut writer = Writer { queue: self.queue, arrival, disk_end: 0, pending: HashMap::new(), next_tag: 0 };
        let result = writer.write_data(&inlet, &outlet, limit_bytes).await;
        // Whatever happened, nothing is in flight when this stage returns (engine I4).
        let drained = writer.drain(&outlet).await;
        result?;
        drained?;
        let report = writer.write_metadata(sync).await;
        let drained = writer.reap_all_metadata().await;
        let report = report?;
        drained?;
        outlet.finish();
        Ok(report)
    }
}

struct Writer<Q> {
    queue: Q,
    arrival: Arrival,
    /// One past the last guest byte seen.
    disk_end: u64,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
}

fn shared(host_offset: u64, bytes: bytes::Bytes, tag: u64) -> WriteOp {
    WriteOp { host_offset, bytes: WriteBytes::Shared(bytes), tag }
}

fn write_error(error: WriteError) -> StageError {
    StageError::new(ErrorKind::Io, error)
}

fn format_error(error: Qcow2Error) -> StageError {
    StageError::new(ErrorKind::Limit, error)
}

impl<Q: WriteQueue> Writer<Q> {
    async fn write_data(
        &mut self,
        inlet: &Inlet<Classified>,
        outlet: &Outlet<StoredExtent>,
        limit_bytes: u64,
    ) -> Result<(), StageError> {
        while let Some(classified) = self.next_input(inlet, outlet).await? {
            let guest = classified.guest;
            self.start_extent(classified, outlet).await?;
            if self.arrival.memory_bytes() > limit_bytes {
                return Err(StageError::new(ErrorKind::Limit, IndexFull { limit_bytes, guest_offset: guest.start.0 }));
            }
        }
        Ok(())
    }

    /// The next extent; meanwhile completions are taken.
    async fn next_input(
        &mut self,
        inlet: &Inlet<Classified>,
        outlet: &Outlet<StoredExtent>,
    ) -> Result<Option<Classified>, StageError> {
        loop {
            if let Some(classified) = inlet.try_recv()? {
                return Ok(Some(classified));
            }
            if self.queue.in_flight() == 0 {
                return Ok(inlet.recv().await?);
            }
            // Both are cancel-safe: the branch not taken loses nothing.
            let completion = tokio::select! {
                biased;
                completion = self.queue.reap() => completion,
                input = inlet.recv() => return Ok(input?),
            };
            if let Some(completion) = completion {
                self.completed(completion, outlet).await?;
            }
        }
    }

    /// Gives the extent's data clusters their places and submits their writes.
    async fn start_extent(&mut self, classified: Classified, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        self.disk_end = self.disk_end.max(classified.guest.end.0);
        let tag = self.next_tag;
        self.next_tag += 1;
        let mut ops = Vec::new();
        let runs = self.place(&classified, tag, &mut ops)?;
        let Classified { guest, records, .. } = classified;
        let holder = if ops.is_empty() { Holder::Nowhere } else { Holder::File };
        let stored_extent = StoredExtent { guest, runs, records, holder };
        if ops.is_empty() {
            return Ok(outlet.send(stored_extent).await?);
        }
        self.pending.insert(tag, Pending { stored_extent, writes_left: ops.len() });
        for op in ops {
            self.submit(op, outlet).await?;
        }
        Ok(())
    }

    fn place(&mut self, classified: &Classified, tag: u64, ops: &mut Vec<WriteOp>) -> Result<Vec<StoredRun>, StageError> {
        let bits = self.arrival.cluster_bits();
        let cluster_bytes = bits.cluster_bytes();
        let packed = match &classified.stored {
            Stored::Packed(packed) => packed,
            whole => {
                let place = |(guest, run): (GuestRange, crate::extent::FateRun)| {
                    if run.fate == Fate::Zero {
                        return Ok(StoredRun { guest, position: Position::Zeros });
                    }
                    let Stored::Whole(slice) = whole else { return Err(StageError::bug("data clusters without bytes")) };
                    let host = self.arrival.place(guest.start.0 / cluster_bytes, run.clusters);
                    let at = guest.start.0 - classified.guest.start.0;
                    let bytes = slice.part(to_usize(at)..to_usize(at + run.clusters * cluster_bytes));
                    ops.push(WriteOp { host_offset: host.0, bytes: WriteBytes::Slice(bytes), tag });
                    Ok(StoredRun { guest, position: Position::Plain(host.0) })
                };
                return classified.ranges(bits).map(place).collect();
            }
        };
        // neighbours in the packed bytes that are neighbours in the file, too, are written at once
        let mut write: Option<(u64, std::ops::Range<usize>)> = None;
        let mut runs = StoredExtent::packed_runs(classified, bits, 0);
        for run in &mut runs {
            let cluster = run.guest.start.0 / cluster_bytes;
            let (at, bytes, host) = match run.position {
                Position::Zeros => continue,
                Position::Plain(at) => {
                    let clusters = run.guest.bytes().div_ceil(cluster_bytes);
                    let host = self.arrival.place(cluster, clusters);
                    run.position = Position::Plain(host.0);
                    (at, clusters * cluster_bytes, host)
                }
                Position::Compressed(at, bytes) => {
                    let host = self.arrival.place_compressed(cluster, bytes);
                    run.position = Position::Compressed(host.0, bytes);
                    (at, u64::from(bytes), host)
                }
            };
            let part = to_usize(at)..to_usize(at + bytes);
            match &mut write {
                Some((first, range)) if range.end == part.start && *first + crate::units::to_u64(range.len()) == host.0 => {
                    range.end = part.end;
                }
                other => {
                    let before = other.replace((host.0, part));
                    ops.extend(before.map(|(host_offset, range)| shared(host_offset, packed.slice(range), tag)));
                }
            }
        }
        ops.extend(write.map(|(host_offset, range)| shared(host_offset, packed.slice(range), tag)));
        Ok(runs)
    }

    /// Submits, taking completions while the queue is full.
    async fn submit(&mut self, mut op: WriteOp, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        while let Err(rejected) = self.queue.submit(op) {
            op = rejected;
            if let Some(completion) = self.queue.reap().await {
                self.completed(completion, outlet).await?;
            }
        }
        Ok(())
    }

    async fn completed(&mut self, completion: Completion, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        completion.result.map_err(write_error)?;
        let std::collections::hash_map::Entry::Occupied(mut entry) = self.pending.entry(completion.tag) else {
            return Err(StageError::bug("a write completed that nobody started"));
        };
        entry.get_mut().writes_left -= 1;
        if entry.get().writes_left == 0 {
            outlet.send(entry.remove().stored_extent).await?;
        }
        Ok(())
    }

    /// Takes all completions; returns the first failure, but not before nothing is in flight.
    async fn drain(&mut self, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        let mut first = Ok(());
        while let Some(completion) = self.queue.reap().await {
            let result = if first.is_ok() { self.completed(completion, outlet).await } else { Err(Cancelled.into()) };
            first = first.and(result);
        }
        first
    }

    /// Tables, then, once they and the data are flushed, the header.
    async fn write_metadata(&mut self, sync: bool) -> Result<WriteReport, StageError> {
        let bits = self.arrival.cluster_bits();
        let geometry = Geometry::new(self.disk_end, bits).map_err(format_error)?;
        let arrival = std::mem::replace(&mut self.arrival, Arrival::new(bits, None));
        let stored_bytes = arrival.stored_bytes();
        let sealed = arrival.seal(geometry).map_err(format_error)?;
        for (host, piece) in sealed.tables() {
            let mut op = WriteOp { host_offset: host.0, bytes: WriteBytes::Owned(piece), tag: 0 };
            while let Err(rejected) = self.queue.submit(op) {
                op = rejected;
                self.reap_metadata().await?;
            }
        }
        self.reap_all_metadata().await?;
        let flush_error = |error| StageError::new(ErrorKind::Io, error);
        if sync {
            self.queue.sync().await.map_err(flush_error)?;
        }
        let header = WriteOp { host_offset: 0, bytes: WriteBytes::Owned(sealed.header_cluster()), tag: 0 };
        self.queue.submit(header).map_err(|_| StageError::bug("a queue with nothing in flight is full"))?;
        self.reap_all_metadata().await?;
        if sync {
            self.queue.sync().await.map_err(flush_error)?;
        }
        let virtual_bytes = geometry.virtual_bytes();
        Ok(WriteReport { image_bytes: sealed.sections().file_bytes(), stored_bytes, virtual_bytes })
    }

    async fn reap_metadata(&mut self) -> Result<bool, StageError> {
        match self.queue.reap().await {
            Some(completion) => completion.result.map(|()| true).map_err(write_error),
            None => Ok(false),
        }
    }

    /// Waits for all metadata writes; returns the first failure, but not before nothing is in flight.
    async fn reap_all_metadata(&mut self) -> Result<(), StageError> {
        let mut first = Ok(());
        while self.queue.in_flight() > 0 {
            first = first.and(self.reap_metadata().await.map(|_| ()));
        }
        first
    }
}
