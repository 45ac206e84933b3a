//! An image in Glance as [`ReadAt`]: for reading back what was made.
//!
//! Where ranges are served, any offset is a request away. Where they are not, one GET is read forward: the first bytes (a qcow2's
//! tables) are kept, and a window behind the place that was reached. What lies further back costs another GET.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use engine::Cancelled;
use tokio::runtime::Handle;

use super::{
    connection::{Asking, Connection, ReadError, Remote},
    probe::{Probe, SAMPLE_BYTES, probe},
};
use crate::{
    convert::report::Access,
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// Bytes fetched at once.
const STEP_BYTES: u64 = 4 << 20;
/// Largest head that is kept of an image without ranges: the tables of a full disk of 256 GiB, and some.
const HEAD_BYTES_MAX: u64 = 48 << 20;
/// Bytes kept behind the place that a forward reading has reached: a qcow2 that was written forward goes back by less than this.
const BEHIND_BYTES: u64 = 24 << 20;
/// GETs from the start that one file is worth.
const RESTARTS_MAX: u32 = 16;

/// An image. Calls block: use it on a thread that may, never on a runtime's.
pub struct ImageFile {
    image_bytes: u64,
    runtime: Handle,
    state: Mutex<State>,
}

#[allow(clippy::large_enum_variant)] // one a file
enum State {
    Ranges { connection: Connection, start: u64, window: Vec<u8> },
    Forward(Box<Forward>),
}

struct Forward {
    connection: Connection,
    head_bytes: u64,
    head: Vec<u8>,
    /// Bytes from `start` on, up to the place that was reached.
    start: u64,
    window: Vec<u8>,
    restarts: u32,
}

fn io_error(error: ReadError) -> io::Error {
    match error {
        ReadError::Cancelled => io::Error::other(Cancelled),
        ReadError::Failed(error) => io::Error::other(error),
    }
}

impl ImageFile {
    /// An image read by ranges, or forward; of the latter, `head_bytes` from its start on are kept.
    #[must_use]
    pub fn new(remote: Remote, access: Access, head_bytes: u64, runtime: Handle) -> Self {
        let image_bytes = remote.image_bytes;
        let state = match access {
            Access::Random => State::Ranges { connection: Connection::new(remote, Asking::Ranges), start: 0, window: Vec::new() },
            Access::Sequential | Access::Once => State::Forward(Box::new(Forward {
                connection: Connection::new(remote, Asking::Whole),
                head_bytes: head_bytes.min(HEAD_BYTES_MAX),
                head: Vec::new(),
                start: 0,
                window: Vec::new(),
                restarts: 0,
            })),
        };
        Self { image_bytes, runtime, state: Mutex::new(state) }
    }

    /// How this image can be read: asks for a range behind its first bytes, and compares with a reading from the start.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn access(remote: &Remote) -> Result<Access, ReadError> {
        // beyond 64 KiB: a qcow2's second cluster differs from its first
        let sample = to_u64(SAMPLE_BYTES);
        let places = [sample, 64 << 10, 1 << 20];
        let mut connection = Connection::new(remote.clone(), Asking::Whole);
        let mut head = vec![0; SAMPLE_BYTES];
        if remote.image_bytes < 2 * sample {
            return Ok(Access::Sequential);
        }
        connection.read(0, remote.image_bytes, &mut head).await?;
        for place in places.into_iter().filter(|place| place + sample <= remote.image_bytes) {
            let mut bytes = vec![0; SAMPLE_BYTES];
            connection.read(place, remote.image_bytes, &mut bytes).await?;
            if bytes != head {
                connection.close();
                return Ok(match probe(remote, place, &bytes).await {
                    Probe::Random => Access::Random,
                    Probe::Sequential(_) => Access::Sequential,
                });
            }
        }
        Ok(Access::Sequential)
    }
}

impl ReadAt for ImageFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.image_bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset.checked_add(to_u64(buf.len())).filter(|end| *end <= self.image_bytes);
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Ranges { connection, start, window } => {
                let mut at = file_offset;
                while at < end {
                    if at < *start || at >= *start + to_u64(window.len()) {
                        let bytes = STEP_BYTES.min(self.image_bytes - at);
                        window.clear();
                        let mut fetched = vec![0; to_usize(bytes)];
                        self.runtime.block_on(connection.read(at, at + bytes, &mut fetched)).map_err(io_error)?;
                        (*start, *window) = (at, fetched);
                    }
                    at += copy_part(*start, window, at, file_offset, buf);
                }
                Ok(())
            }
            State::Forward(forward) => forward.read(self.image_bytes, &self.runtime, file_offset, buf),
        }
    }
}

/// Copies what `window`, which begins at `start`, has of the bytes from `at` on into the buffer for `file_offset`; returns how much.
fn copy_part(start: u64, window: &[u8], at: u64, file_offset: u64, buf: &mut [u8]) -> u64 {
    let from = to_usize(at - start);
    let to = to_usize(at - file_offset);
    let here = (window.len() - from).min(buf.len() - to);
    buf[to..to + here].copy_from_slice(&window[from..from + here]);
    to_u64(here)
}

impl Forward {
    fn read(&mut self, image_bytes: u64, runtime: &Handle, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset + to_u64(buf.len());
        let mut at = file_offset;
        while at < end {
            let reached = self.start + to_u64(self.window.len());
            if at < to_u64(self.head.len()) {
                at += copy_part(0, &self.head, at, file_offset, buf);
            } else if at >= self.start && at < reached {
                at += copy_part(self.start, &self.window, at, file_offset, buf);
            } else {
                if at < self.start {
                    self.restarts += 1;
                    if self.restarts > RESTARTS_MAX {
                        return Err(io::Error::other(
                            "the image store serves no ranges, and the image's clusters are not in the order of the disk: \
                             download it first, and compare the file",
                        ));
                    }
                    (self.start, self.window) = (0, Vec::new());
                    self.connection.close();
                }
                self.step(image_bytes, runtime)?;
            }
        }
        Ok(())
    }

    /// Reads on.
    fn step(&mut self, image_bytes: u64, runtime: &Handle) -> io::Result<()> {
        let reached = self.start + to_u64(self.window.len());
        let bytes = to_usize(STEP_BYTES.min(image_bytes - reached));
        let behind = to_usize(BEHIND_BYTES);
        if self.window.len() > 2 * behind {
            let gone = self.window.len() - behind;
            self.window.drain(..gone);
            self.start += to_u64(gone);
        }
        let filled = self.window.len();
        self.window.resize(filled + bytes, 0);
        let read = runtime.block_on(self.connection.read(reached, image_bytes, &mut self.window[filled..]));
        if let Err(error) = read {
            self.window.truncate(filled);
            return Err(io_error(error));
        }
        let missing = self.head_bytes.saturating_sub(to_u64(self.head.len()));
        if missing > 0 && reached == to_u64(self.head.len()) {
            let here = to_usize(missing).min(bytes);
            self.head.extend_from_slice(&self.window[filled..filled + here]);
        }
        Ok(())
    }
}
