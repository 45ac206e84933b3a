//! The device seam over `pwrite` on a few threads: for kernels and sandboxes without io_uring.

use std::{fs, io, os::unix::fs::FileExt, sync::Arc, thread};

use crossbeam::channel;

use super::queue::{Completion, WriteError, WriteOp, WriteQueue, no_progress};
use crate::units::to_u64;

/// A file written by threads.
pub struct PwriteQueue {
    file: Arc<fs::File>,
    /// OS threads alone wait at its other end.
    ops: Option<channel::Sender<WriteOp>>,
    done: async_channel::Receiver<Completion>,
    threads: Vec<thread::JoinHandle<()>>,
    in_flight: usize,
    depth: usize,
}

impl PwriteQueue {
    /// Takes the file over and starts `threads` threads.
    ///
    /// # Errors
    /// If the machine has no thread left.
    pub fn new(file: fs::File, depth: usize, threads: usize) -> io::Result<Self> {
        let file = Arc::new(file);
        let (ops, inbox) = channel::bounded::<WriteOp>(depth);
        let (outbox, done) = async_channel::bounded(depth);
        let spawn = |index| {
            let (file, inbox, outbox) = (Arc::clone(&file), inbox.clone(), outbox.clone());
            thread::Builder::new().name(format!("pwrite/{index}")).spawn(move || {
                for op in inbox {
                    let result = write_op(|bytes, at| file.write_at(bytes, at), &op);
                    let tag = op.tag;
                    drop(op); // its bytes are released before the completion is seen
                    if outbox.send_blocking(Completion { tag, result }).is_err() {
                        break;
                    }
                }
            })
        };
        let threads = (0..threads.max(1)).map(spawn).collect::<io::Result<_>>()?;
        Ok(Self { file, ops: Some(ops), done, threads, in_flight: 0, depth })
    }
}

impl WriteQueue for PwriteQueue {
    fn submit(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        let Some(ops) = self.ops.as_ref().filter(|_| self.in_flight < self.depth) else { return Err(op) };
        // There is room: the channel holds `depth`, and fewer are in flight.
        ops.try_send(op).map_err(channel::TrySendError::into_inner)?;
        self.in_flight += 1;
        Ok(())
    }

    async fn reap(&mut self) -> Option<Completion> {
        if self.in_flight == 0 {
            return None;
        }
        let completion = self.done.recv().await.ok()?;
        self.in_flight -= 1;
        Some(completion)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }

    async fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Drop for PwriteQueue {
    fn drop(&mut self) {
        self.ops = None;
        self.done.close();
        for thread in self.threads.drain(..) {
            // A panic there was a panic in `write`: nothing to add to it here.
            let _ = thread.join();
        }
    }
}

/// Writes all bytes of `op`, going on from the gap after a short write.
///
/// # Errors
/// [`WriteError`]: an error of `write`, or one that wrote nothing.
pub fn write_op(mut write: impl FnMut(&[u8], u64) -> io::Result<usize>, op: &WriteOp) -> Result<(), WriteError> {
    let bytes = op.bytes.as_ref();
    let mut done = 0;
    while done < bytes.len() {
        let source = match write(&bytes[done..], op.host_offset + to_u64(done)) {
            Ok(0) => no_progress(),
            Ok(written) => {
                done += written;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => error,
        };
        return Err(WriteError { host_offset: op.host_offset, bytes: op.len_bytes(), done: to_u64(done), source });
    }
    Ok(())
}
