//! The device seam in memory, as unkind as a device may be: completes out of order, writes short, holds writes back,
//! fails or loses power at a chosen write. For tests of whatever writes through the seam.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use stages::{
    disk::{
        pwrite::write_op,
        queue::{Completion, WriteOp, WriteQueue},
    },
    units::{to_u64, to_usize},
};

/// How unkind.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Each write call takes at most this many bytes; 0 for no limit.
    pub short_bytes: usize,
    /// The write with this number (from 0) fails with "no space left".
    pub fail_at: Option<u64>,
    /// The latest writes complete first.
    pub newest_first: bool,
    /// `sync` fails.
    pub sync_fails: bool,
    /// Most writes in flight.
    pub depth: usize,
}

/// What is on the simulated disk, and what happened to it.
#[derive(Debug, Default)]
pub struct Disk {
    /// The file's bytes.
    pub bytes: Vec<u8>,
    /// Writes completed, in order: host offset and length.
    pub log: Vec<(u64, u64)>,
    /// Writes submitted and not yet completed.
    pub in_flight: usize,
    /// Calls of `sync`, with the number of writes completed before each.
    pub syncs: Vec<usize>,
}

/// The simulated file.
pub struct SimQueue {
    disk: Arc<Mutex<Disk>>,
    behaviour: Behaviour,
    waiting: VecDeque<WriteOp>,
    number: u64,
}

impl SimQueue {
    /// Writes to `disk`, which the test keeps.
    #[must_use]
    pub fn new(disk: Arc<Mutex<Disk>>, behaviour: Behaviour) -> Self {
        Self { disk, behaviour, waiting: VecDeque::new(), number: 0 }
    }
}

impl WriteQueue for SimQueue {
    fn submit(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        if self.waiting.len() >= self.depth() {
            return Err(op);
        }
        self.disk.lock().unwrap_or_else(PoisonError::into_inner).in_flight += 1;
        self.waiting.push_back(op);
        Ok(())
    }

    async fn reap(&mut self) -> Option<Completion> {
        // Something is always in between: a completion is never there at once.
        tokio::task::yield_now().await;
        let op = if self.behaviour.newest_first { self.waiting.pop_back() } else { self.waiting.pop_front() }?;
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        disk.in_flight -= 1;
        let fails = self.behaviour.fail_at == Some(self.number);
        self.number += 1;
        let short = if self.behaviour.short_bytes == 0 { usize::MAX } else { self.behaviour.short_bytes };
        let mut calls = 0;
        let result = write_op(
            |bytes, at| {
                calls += 1;
                if fails && (calls > 1 || short == usize::MAX) {
                    return Err(io::Error::from(io::ErrorKind::StorageFull));
                }
                let bytes = &bytes[..bytes.len().min(short)];
                let end = to_usize(at) + bytes.len();
                if disk.bytes.len() < end {
                    disk.bytes.resize(end, 0);
                }
                disk.bytes[to_usize(at)..end].copy_from_slice(bytes);
                Ok(bytes.len())
            },
            &op,
        );
        disk.log.push((op.host_offset, to_u64(op.bytes.as_ref().len())));
        Some(Completion { tag: op.tag, result })
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn depth(&self) -> usize {
        self.behaviour.depth.max(1)
    }

    async fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        let completed = disk.log.len();
        disk.syncs.push(completed);
        if self.behaviour.sync_fails { Err(io::Error::other("flush failed")) } else { Ok(()) }
    }
}
