//! The device seam: what the writer stage asks of a disk.

use std::io;

use bytes::Bytes;
use engine::Slice;

use crate::units::to_u64;

/// Bytes to write; owned by the operation until it completes.
#[derive(Debug)]
pub enum WriteBytes {
    /// Part of a lease.
    Slice(Slice),
    /// Metadata.
    Owned(Vec<u8>),
    /// Packed clusters.
    Shared(Bytes),
}

impl AsRef<[u8]> for WriteBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Slice(slice) => slice,
            Self::Owned(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// One write.
#[derive(Debug)]
pub struct WriteOp {
    /// Where its first byte goes in the file.
    pub host_offset: u64,
    /// What is written.
    pub bytes: WriteBytes,
    /// Comes back with the completion.
    pub tag: u64,
}

impl WriteOp {
    /// Number of bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        to_u64(self.bytes.as_ref().len())
    }
}

/// How a write ended. Its bytes were released before.
#[derive(Debug)]
pub struct Completion {
    /// The operation's tag.
    pub tag: u64,
    /// `Ok` only if every byte was written.
    pub result: Result<(), WriteError>,
}

/// A write that did not happen, or not wholly.
#[derive(Debug, thiserror::Error)]
#[error("write at host offset {host_offset:#x}: {done} of {bytes} bytes written")]
pub struct WriteError {
    /// Where.
    pub host_offset: u64,
    /// How many bytes were asked for.
    pub bytes: u64,
    /// How many were written.
    pub done: u64,
    /// Why no more.
    #[source]
    pub source: io::Error,
}

/// A file that takes a bounded number of writes at a time.
pub trait WriteQueue: 'static {
    /// Starts a write. Never blocks.
    ///
    /// # Errors
    /// Gives the operation back if [`WriteQueue::depth`] are in flight already.
    fn submit(&mut self, op: WriteOp) -> Result<(), WriteOp>;

    /// Waits for a write to end; `None` if none is in flight.
    ///
    /// # Cancel safety
    /// Safe: a completion is either returned or still to come.
    fn reap(&mut self) -> impl Future<Output = Option<Completion>>;

    /// Writes in flight.
    fn in_flight(&self) -> usize;

    /// The most that may be in flight.
    fn depth(&self) -> usize;

    /// Waits until everything written is on stable storage. Call with nothing in flight.
    ///
    /// # Errors
    /// What the file reports.
    fn sync(&mut self) -> impl Future<Output = io::Result<()>>;
}

/// A write that returned 0 bytes: the device takes no more.
pub(super) fn no_progress() -> io::Error {
    io::Error::new(io::ErrorKind::WriteZero, "the device took no more bytes")
}
