//! A raw disk that comes through a pipe: read once, in order, as long as it comes.

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
};

use engine::{BlockingStage, BufferPool, CancelToken, Cancelled, ErrorKind, Inlet, NoInput, Outlet, StageContext, StageError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::raw_file::SourceError;
use crate::{
    extent::{EXTENT_BYTES, Extent, Payload},
    magic::{DiskFormat, HEAD_BYTES},
    units::{GuestRange, to_u64, to_usize},
};

/// How often a wait for the pipe looks whether the run was cancelled.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// The reading end of a pipe. Clones are the same pipe; the first reader takes it.
#[derive(Clone)]
pub struct PipeSource {
    file: Arc<Mutex<Option<File>>>,
    name: Arc<str>,
    expected_bytes: Option<u64>,
}

impl PipeSource {
    /// Over an open pipe, socket or terminal; `name` is what it is called in messages. A pipe that breaks looks like one that ends: only
    /// who knows how many bytes there have to be can tell.
    #[must_use]
    pub fn new(file: File, name: &str, expected_bytes: Option<u64>) -> Self {
        Self { file: Arc::new(Mutex::new(Some(file))), name: name.into(), expected_bytes }
    }

    /// Bytes that it has to have, if that is known.
    #[must_use]
    pub const fn expected_bytes(&self) -> Option<u64> {
        self.expected_bytes
    }
}

/// Source: extents of what comes through a pipe.
pub struct ReadPipe {
    /// The pipe.
    pub source: PipeSource,
    /// Where leases come from.
    pub pool: BufferPool,
}

impl BlockingStage for ReadPipe {
    type In = NoInput;
    type Out = Extent;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Extent>, cx: StageContext) -> Result<(), StageError> {
        let name = self.source.name.to_string();
        let source_error = |error: SourceError| StageError::new(ErrorKind::Io, error);
        let taken = self.source.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut file = taken.ok_or_else(|| StageError::bug("a pipe was read twice"))?;
        let mut at = 0;
        loop {
            let mut lease = self.pool.acquire_blocking()?;
            let filled = fill(&mut file, &mut lease[..to_usize(EXTENT_BYTES)], &cx.cancel)?.map_err(|source| {
                source_error(SourceError::Io { action: "read", path: format!("{name} at guest offset {at:#x}"), source })
            })?;
            if filled == 0 {
                break;
            }
            if at == 0 {
                let format = DiskFormat::detect(&lease[..filled.min(to_usize(HEAD_BYTES))], &[]);
                if !format.is_disk() {
                    let advice = format.advice("FILE");
                    return Err(source_error(SourceError::NotRaw { path: name, format, advice }));
                }
            }
            let guest = GuestRange::new(at, to_u64(filled));
            at = guest.end.0;
            outlet.send_blocking(Extent { guest, payload: Payload::Bytes(lease) })?;
            if to_u64(filled) < EXTENT_BYTES {
                break; // less than asked for comes only at the end
            }
        }
        if at == 0 {
            return Err(source_error(SourceError::Empty { path: name }));
        }
        if let Some(expected) = self.source.expected_bytes.filter(|expected| *expected != at) {
            return Err(source_error(SourceError::Length { path: name, bytes: at, expected }));
        }
        outlet.finish();
        Ok(())
    }
}

/// Reads until `buf` is full or the other end is closed. Cancelled while it waits, it returns at once.
fn fill(file: &mut File, buf: &mut [u8], cancel: &CancelToken) -> Result<io::Result<usize>, Cancelled> {
    let mut filled = 0;
    while filled < buf.len() {
        cancel.check()?;
        let mut waiting = [PollFd::new(&*file, PollFlags::IN)];
        match poll(&mut waiting, Some(&LOOK_EVERY)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Ok(Err(error.into())),
        }
        match file.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(filled))
}
