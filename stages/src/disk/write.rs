//! The writer stage: data clusters go to the end of the file as they arrive, tables follow, the header comes last.

use std::collections::HashMap;

use engine::{Cancelled, ErrorKind, Inlet, LocalStage, Outlet, StageContext, StageError};

use super::queue::{Completion, WriteBytes, WriteError, WriteOp, WriteQueue};
use crate::{
    extent::{Classified, Fate, Place, Placed, PlacedRun},
    qcow2::{Arrival, Geometry, Qcow2Error},
    units::{GuestRange, to_usize},
};

/// Memory for the record of placed clusters ran out.
#[derive(Debug, thiserror::Error)]
#[error(
    "the index of placed clusters passes its {limit_bytes} bytes at guest offset {guest_offset:#x}: \
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
}

/// Writes a qcow2 file through a [`WriteQueue`] and passes on where each extent went, in order of completion.
pub struct WriteImage<Q> {
    /// The file.
    pub queue: Q,
    /// Disk and cluster size.
    pub geometry: Geometry,
    /// Flush data before the header is written, and the header after it.
    pub sync: bool,
    /// Memory for the record of placed clusters, bytes.
    pub index_limit_bytes: u64,
}

/// An extent with writes in flight.
struct Pending {
    placed: Placed,
    writes_left: usize,
}

impl<Q: WriteQueue> LocalStage for WriteImage<Q> {
    type In = Classified;
    type Out = Placed;
    type Report = WriteReport;

    async fn run(self, inlet: Inlet<Classified>, outlet: Outlet<Placed>, _: StageContext) -> Result<WriteReport, StageError> {
        let (sync, limit_bytes, geometry) = (self.sync, self.index_limit_bytes, self.geometry);
        let mut writer = Writer { queue: self.queue, arrival: Arrival::new(geometry), pending: HashMap::new(), next_tag: 0 };
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
    pending: HashMap<u64, Pending>,
    next_tag: u64,
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
        outlet: &Outlet<Placed>,
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
    async fn next_input(&mut self, inlet: &Inlet<Classified>, outlet: &Outlet<Placed>) -> Result<Option<Classified>, StageError> {
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

    /// Gives the extent's data runs their places and submits their writes.
    async fn start_extent(&mut self, classified: Classified, outlet: &Outlet<Placed>) -> Result<(), StageError> {
        let cluster_bytes = self.arrival_cluster_bytes();
        let Classified { guest, runs, payload } = classified;
        let tag = self.next_tag;
        self.next_tag += 1;
        let mut placed = Placed { guest, runs: Vec::with_capacity(runs.len()) };
        let mut ops = Vec::new();
        let mut at = 0;
        for run in runs {
            let padded = run.clusters * cluster_bytes;
            let guest_run = GuestRange::new(guest.start.0 + at, padded.min(guest.bytes() - at));
            let place = match run.fate {
                Fate::Zero => Place::Zeros,
                Fate::Data => {
                    let payload = payload.as_ref().ok_or_else(|| StageError::bug("data clusters without bytes"))?;
                    let host = self.arrival.place(guest_run.start.0 / cluster_bytes, run.clusters);
                    let bytes = payload.part(to_usize(at)..to_usize(at + padded));
                    ops.push(WriteOp { host_offset: host.0, bytes: WriteBytes::Slice(bytes), tag });
                    Place::Host(host)
                }
            };
            placed.runs.push(PlacedRun { guest: guest_run, place });
            at += padded;
        }
        drop(payload);
        if ops.is_empty() {
            return Ok(outlet.send(placed).await?);
        }
        self.pending.insert(tag, Pending { placed, writes_left: ops.len() });
        for op in ops {
            self.submit(op, outlet).await?;
        }
        Ok(())
    }

    fn arrival_cluster_bytes(&self) -> u64 {
        self.arrival.geometry().cluster_bits().cluster_bytes()
    }

    /// Submits, taking completions while the queue is full.
    async fn submit(&mut self, mut op: WriteOp, outlet: &Outlet<Placed>) -> Result<(), StageError> {
        while let Err(rejected) = self.queue.submit(op) {
            op = rejected;
            if let Some(completion) = self.queue.reap().await {
                self.completed(completion, outlet).await?;
            }
        }
        Ok(())
    }

    async fn completed(&mut self, completion: Completion, outlet: &Outlet<Placed>) -> Result<(), StageError> {
        completion.result.map_err(write_error)?;
        let std::collections::hash_map::Entry::Occupied(mut entry) = self.pending.entry(completion.tag) else {
            return Err(StageError::bug("a write completed that nobody started"));
        };
        entry.get_mut().writes_left -= 1;
        if entry.get().writes_left == 0 {
            outlet.send(entry.remove().placed).await?;
        }
        Ok(())
    }

    /// Takes all completions; returns the first failure, but not before nothing is in flight.
    async fn drain(&mut self, outlet: &Outlet<Placed>) -> Result<(), StageError> {
        let mut first = Ok(());
        while let Some(completion) = self.queue.reap().await {
            let result = if first.is_ok() { self.completed(completion, outlet).await } else { Err(Cancelled.into()) };
            first = first.and(result);
        }
        first
    }

    /// Tables, then, once they and the data are flushed, the header.
    async fn write_metadata(&mut self, sync: bool) -> Result<WriteReport, StageError> {
        let geometry = self.arrival.geometry();
        let arrival = std::mem::replace(&mut self.arrival, Arrival::new(geometry));
        let stored_bytes = arrival.data_clusters() * arrival.geometry().cluster_bits().cluster_bytes();
        let sealed = arrival.seal().map_err(format_error)?;
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
        Ok(WriteReport { image_bytes: sealed.placement().file_bytes(), stored_bytes })
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
