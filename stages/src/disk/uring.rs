//! The device seam over io_uring, on the thread that owns the ring.
//!
//! tokio-uring stays inside this module. Its driver keeps the buffer of a dropped operation alive until the kernel
//! is done with it, and each operation here is a local task that owns its bytes, so a cancelled run frees nothing
//! that is still being written (engine I4).
#![allow(unsafe_code)] // IoBuf: a promise about pointers, see the SAFETY lines

use std::{fs, io, path::Path, pin::Pin, rc::Rc};

use engine::{ErrorKind, LocalExecutor, StageError};
use tokio::sync::mpsc;
use tokio_uring::buf::{BoundedBuf, IoBuf};

use super::queue::{Completion, WriteBytes, WriteError, WriteOp, WriteQueue, no_progress};
use crate::units::to_u64;

// SAFETY: the bytes lie on the heap (a pool's buffer, a Vec's or a Bytes' allocation) or are static, so they do not move when the
// value does; they are initialised, and nobody writes to them while the value lives (Slice and Bytes are read-only, a Vec owned).
unsafe impl IoBuf for WriteBytes {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ref().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.as_ref().len()
    }

    fn bytes_total(&self) -> usize {
        self.as_ref().len()
    }
}

/// Runs its work on a thread that owns a tokio-uring runtime.
#[derive(Clone, Copy, Debug, Default)]
pub struct UringExecutor;

impl LocalExecutor for UringExecutor {
    fn block_on(self, work: Pin<Box<dyn Future<Output = ()> + '_>>) -> Result<(), StageError> {
        // `tokio_uring::start` panics where io_uring is denied; this returns the error
        let runtime =
            tokio_uring::Runtime::new(&tokio_uring::builder()).map_err(|error| StageError::new(ErrorKind::Io, error))?;
        runtime.block_on(work);
        Ok(())
    }
}

/// Does io_uring work for files in `folder`? Builds a ring, writes 4 KiB into an unnamed file and reads them back:
/// some file systems and sandboxes fail only then.
///
/// # Errors
/// What failed first.
pub fn probe(folder: &Path) -> io::Result<()> {
    // On a thread of its own: the caller's may be inside another runtime, and the ring's limits end with it.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("uring/probe".to_owned()).spawn_scoped(scope, || probe_here(folder))?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the io_uring runtime panicked in a probe")))
    })
}

fn probe_here(folder: &Path) -> io::Result<()> {
    let runtime = tokio_uring::Runtime::new(&tokio_uring::builder())?;
    let file = unnamed_file(folder)?;
    runtime.block_on(async move {
        let file = tokio_uring::fs::File::from_std(file);
        let (written, _) = file.write_at(vec![0x56_u8; 4096], 0).submit().await;
        let (read, bytes) = file.read_at(Vec::with_capacity(4096), 0).await;
        let (written, read) = (written?, read?);
        let good = written == 4096 && read == 4096 && bytes.iter().all(|&byte| byte == 0x56);
        file.close().await?;
        if good { Ok(()) } else { Err(io::Error::other("a probe write did not read back")) }
    })
}

/// A file without a name in `folder`, where the file system can; else one that is removed at once.
fn unnamed_file(folder: &Path) -> io::Result<fs::File> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = open(folder, flags, Mode::RUSR | Mode::WUSR) {
        return Ok(file.into());
    }
    let path = folder.join(format!(".virta-probe-{}", uuid::Uuid::new_v4()));
    let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// A file written through the ring of the current thread.
pub struct UringQueue {
    file: Rc<tokio_uring::fs::File>,
    to_sync: fs::File,
    done: (mpsc::UnboundedSender<Completion>, mpsc::UnboundedReceiver<Completion>),
    in_flight: usize,
    depth: usize,
}

impl UringQueue {
    /// Takes the file over. Call on a thread that runs a [`UringExecutor`].
    ///
    /// # Errors
    /// If the file cannot be shared between the ring and `fsync`.
    pub fn new(file: fs::File, depth: usize) -> io::Result<Self> {
        let to_sync = file.try_clone()?;
        Ok(Self {
            file: Rc::new(tokio_uring::fs::File::from_std(file)),
            to_sync,
            done: mpsc::unbounded_channel(), // holds at most `depth`
            in_flight: 0,
            depth,
        })
    }
}

impl WriteQueue for UringQueue {
    fn submit(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        if self.in_flight >= self.depth {
            return Err(op);
        }
        self.in_flight += 1;
        let (file, done) = (Rc::clone(&self.file), self.done.0.clone());
        tokio_uring::spawn(async move {
            let total = op.len_bytes();
            let WriteOp { host_offset, bytes, tag } = op;
            let lost = WriteError {
                host_offset,
                bytes: total,
                done: 0,
                source: io::Error::other("the write's task ended without a result"),
            };
            let mut report = Report { completion: Some(Completion { tag, result: Err(lost) }), done };
            let result = write_op(&file, host_offset, bytes).await;
            report.completion = Some(Completion { tag, result });
        });
        Ok(())
    }

    async fn reap(&mut self) -> Option<Completion> {
        if self.in_flight == 0 {
            return None;
        }
        let completion = self.done.1.recv().await?;
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
        self.to_sync.sync_all()
    }
}

/// Sends a completion when it is dropped, so that a task which panics is not waited for in vain.
struct Report {
    completion: Option<Completion>,
    done: mpsc::UnboundedSender<Completion>,
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(completion) = self.completion.take() {
            // The receiver is gone only if the run is over; then nobody waits for this.
            let _ = self.done.send(completion);
        }
    }
}

/// Writes all bytes, going on from the gap after a short write.
async fn write_op(file: &tokio_uring::fs::File, host_offset: u64, mut bytes: WriteBytes) -> Result<(), WriteError> {
    let total = bytes.as_ref().len();
    let mut done = 0;
    while done < total {
        let (result, part) = file.write_at(bytes.slice(done..), host_offset + to_u64(done)).submit().await;
        bytes = part.into_inner();
        let error = match result {
            Ok(0) => no_progress(),
            Ok(written) => {
                done += written;
                continue;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
            Err(error) => error,
        };
        return Err(WriteError { host_offset, bytes: to_u64(total), done: to_u64(done), source: error });
    }
    Ok(())
}
