//! An image in Glance as [`ReadAt`]: for reading back what was made.
//!
//! Where ranges are served, any offset is a request away. Where they are not, two GETs are read forward, one through the tables of a qcow2
//! and one through its data ([`ImageFile::split_at`]): a file that was written metadata first is read front to back by each, with a window
//! behind the place that was reached. What lies further back costs another GET.

use std::{
    io,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use engine::Cancelled;
use tokio::runtime::Handle;

use super::{
    connection::{Asking, Connection, ReadError, Remote},
    probe::{Probe, SAMPLE_BYTES, probe},
};
use crate::{
    access::Access,
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// Bytes fetched at once.
const STEP_BYTES: u64 = 4 << 20;
/// Bytes kept behind the place that a forward reading has reached: the data of a qcow2 that was written forward goes back by less than
/// this.
const BEHIND_BYTES: u64 = 20 << 20;
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
    Forward { below: Forward, above: Forward, split: u64 },
}

/// One forward reading.
struct Forward {
    connection: Connection,
    /// Bytes from `start` on, up to the place that was reached.
    start: u64,
    window: Vec<u8>,
    restarts: u32,
    used: Instant,
}

fn io_error(error: ReadError) -> io::Error {
    match error {
        ReadError::Cancelled => io::Error::other(Cancelled),
        ReadError::Failed(error) => io::Error::other(error),
    }
}

impl ImageFile {
    /// An image read by ranges, or forward.
    #[must_use]
    pub fn new(remote: Remote, access: Access, runtime: Handle) -> Self {
        let image_bytes = remote.image_bytes;
        let state = match access {
            Access::Random => State::Ranges { connection: Connection::new(remote, Asking::Ranges), start: 0, window: Vec::new() },
            Access::Sequential | Access::Once => {
                State::Forward { below: Forward::new(remote.clone()), above: Forward::new(remote), split: u64::MAX }
            }
        };
        Self { image_bytes, runtime, state: Mutex::new(state) }
    }

    /// Offsets from here on are read by a GET of their own: where a qcow2's tables end and its data begins.
    pub fn split_at(&self, file_offset: u64) {
        if let State::Forward { split, .. } = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            *split = file_offset;
        }
    }

    /// How this image can be read: asks for a range behind its first bytes, and compares with a reading from the start.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn access(remote: &Remote) -> Result<Access, ReadError> {
        Ok(match Self::serves_ranges(remote).await? {
            Some(true) => Access::Random,
            Some(false) | None => Access::Sequential,
        })
    }

    /// Are ranges of this image served? `None`: it cannot be told, for its first bytes repeat themselves in all places that are compared.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn serves_ranges(remote: &Remote) -> Result<Option<bool>, ReadError> {
        // beyond 64 KiB: a qcow2's second cluster differs from its first
        let sample = to_u64(SAMPLE_BYTES);
        let places = [sample, 64 << 10, 1 << 20];
        let mut connection = Connection::new(remote.clone(), Asking::Whole);
        let mut head = vec![0; SAMPLE_BYTES];
        if remote.image_bytes < 2 * sample {
            return Ok(None);
        }
        connection.read(0, remote.image_bytes, &mut head).await?;
        for place in places.into_iter().filter(|place| place + sample <= remote.image_bytes) {
            let mut bytes = vec![0; SAMPLE_BYTES];
            connection.read(place, remote.image_bytes, &mut bytes).await?;
            if bytes != head {
                connection.close();
                return Ok(Some(probe(remote, place, &bytes).await == Probe::Random));
            }
        }
        Ok(None)
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
            State::Forward { below, above, split } => {
                let (low, high) = buf.split_at_mut(to_usize(split.saturating_sub(file_offset)).min(buf.len()));
                let at = file_offset + to_u64(low.len());
                if !low.is_empty() {
                    below.read(self.image_bytes, &self.runtime, file_offset, low)?;
                }
                if high.is_empty() { Ok(()) } else { above.read(self.image_bytes, &self.runtime, at, high) }
            }
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
    fn new(remote: Remote) -> Self {
        let connection = Connection::new(remote, Asking::Whole);
        Self { connection, start: 0, window: Vec::new(), restarts: 0, used: Instant::now() }
    }

    fn read(&mut self, image_bytes: u64, runtime: &Handle, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset + to_u64(buf.len());
        let mut at = file_offset;
        while at < end {
            let reached = self.start + to_u64(self.window.len());
            if at >= self.start && at < reached {
                at += copy_part(self.start, &self.window, at, file_offset, buf);
                continue;
            }
            if at < self.start {
                self.restarts += 1;
                if self.restarts > RESTARTS_MAX {
                    return Err(io::Error::other(
                        "the image store serves no ranges, and the image's clusters are not in the order of the disk: \
                         download it first, and compare the file",
                    ));
                }
                (self.start, self.window) = (at, Vec::new());
                self.connection.close();
            }
            self.step(image_bytes, runtime, at)?;
        }
        Ok(())
    }

    /// Reads on, or on from `at` if that is further.
    fn step(&mut self, image_bytes: u64, runtime: &Handle, at: u64) -> io::Result<()> {
        // the other GET may have been read for minutes: servers cut what nobody reads
        if self.used.elapsed() > self.connection.remote().patience.unread {
            self.connection.close();
        }
        let behind = to_usize(BEHIND_BYTES);
        if at > self.start + to_u64(self.window.len()) + STEP_BYTES {
            (self.start, self.window) = (at, Vec::new()); // nothing between was asked for
        } else if self.window.len() > 2 * behind {
            let gone = self.window.len() - behind;
            self.window.drain(..gone);
            self.start += to_u64(gone);
        }
        let filled = self.window.len();
        let reached = self.start + to_u64(filled);
        let bytes = to_usize(STEP_BYTES.min(image_bytes - reached));
        self.window.resize(filled + bytes, 0);
        let read = runtime.block_on(self.connection.read(reached, image_bytes, &mut self.window[filled..]));
        self.used = Instant::now();
        if let Err(error) = read {
            self.window.truncate(filled);
            return Err(io_error(error));
        }
        Ok(())
    }
}
