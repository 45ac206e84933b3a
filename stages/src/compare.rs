//! Do two images show a guest the same bytes?

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use engine::{BlockingStage, ErrorKind, Inlet, NoInput, NoOutput, Outlet, StageContext, StageError};

use crate::{
    disk::RawFile,
    progress::Progress,
    qcow2::{Mapping, Qcow2, Qcow2Error},
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// Bytes compared at once.
const STEP_BYTES: u64 = 8 << 20;

/// The guest bytes differ.
#[derive(Debug, thiserror::Error)]
pub enum Difference {
    /// A byte differs.
    #[error("the images differ: first at guest offset {guest_offset:#x}")]
    Byte {
        /// The first one.
        guest_offset: u64,
    },
    /// The disks are of different sizes.
    #[error("the images differ: one disk has {a} bytes, the other {b}")]
    Size {
        /// Of the first, bytes.
        a: u64,
        /// Of the second, bytes.
        b: u64,
    },
}

/// Something with guest bytes. Calls may block.
pub trait GuestBytes: Send {
    /// Size of the disk, bytes.
    fn virtual_bytes(&self) -> u64;

    /// Fills `buf` from `guest_offset` on. `false` if all of it is known to be zero and `buf` was not touched.
    ///
    /// # Errors
    /// What the storage or the format reports.
    fn read(&self, guest_offset: u64, buf: &mut [u8]) -> io::Result<bool>;
}

/// A raw disk.
pub struct RawGuest<R>(pub R, pub u64);

impl<R: ReadAt + Send> GuestBytes for RawGuest<R> {
    fn virtual_bytes(&self) -> u64 {
        self.1
    }

    fn read(&self, guest_offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.0.read_exact_at(guest_offset, buf).map(|()| true)
    }
}

impl GuestBytes for RawFile {
    fn virtual_bytes(&self) -> u64 {
        self.bytes()
    }

    fn read(&self, guest_offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if let Some(run) = self.run_at(guest_offset).map_err(io::Error::other)?
            && !run.data
            && run.end - guest_offset >= to_u64(buf.len())
        {
            return Ok(false);
        }
        self.file().read_exact_at(guest_offset, buf).map(|()| true)
    }
}

impl<R: ReadAt + Send> GuestBytes for Qcow2<R> {
    fn virtual_bytes(&self) -> u64 {
        Self::virtual_bytes(self)
    }

    fn read(&self, guest_offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let error = |error: Qcow2Error| io::Error::other(error);
        if let Some((range, Mapping::Zero)) = self.mapping_at(guest_offset).map_err(error)?
            && range.bytes() >= to_u64(buf.len())
        {
            return Ok(false);
        }
        self.read_guest(guest_offset, buf).map(|()| true).map_err(error)
    }
}

/// A disk looked through by several workers, each taking the next step. Clones are the same sweep.
#[derive(Clone)]
pub struct Sweep {
    cursor: Arc<AtomicU64>,
    first: Arc<AtomicU64>,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { cursor: Arc::default(), first: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl Sweep {
    /// The start of the next step; `None` at the end, or past a difference: what comes before one that was found is still looked at.
    #[must_use]
    pub fn claim(&self, step_bytes: u64, total_bytes: u64) -> Option<u64> {
        let start = self.cursor.fetch_add(step_bytes, Relaxed);
        (start < total_bytes && start <= self.first.load(Relaxed)).then_some(start)
    }

    /// A difference was found.
    pub fn differs_at(&self, guest_offset: u64) {
        self.first.fetch_min(guest_offset, Relaxed);
    }

    /// The first guest offset that differs, once all workers are over.
    #[must_use]
    pub fn first_difference(&self) -> Option<u64> {
        Some(self.first.load(Relaxed)).filter(|first| *first != u64::MAX)
    }
}

/// Source and sink at once: several workers compare two images, each with its own readers. What they find is in the sweep.
///
/// Sizes may differ by what a qcow2 rounds up to 512 bytes; those bytes have to be zero.
pub struct Compare {
    /// One image, mostly the raw one.
    pub a: Box<dyn GuestBytes>,
    /// The other.
    pub b: Box<dyn GuestBytes>,
    /// How far the workers are, together, and what they found.
    pub sweep: Sweep,
    /// Told how far they are.
    pub progress: Progress,
}

impl BlockingStage for Compare {
    type In = NoInput;
    type Out = NoOutput;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<(), StageError> {
        let (a_bytes, b_bytes) = (self.a.virtual_bytes(), self.b.virtual_bytes());
        if a_bytes.next_multiple_of(512) != b_bytes.next_multiple_of(512) {
            return Err(StageError::new(ErrorKind::InvalidData, Difference::Size { a: a_bytes, b: b_bytes }));
        }
        let total = a_bytes.max(b_bytes);
        let (mut a, mut b) = (vec![0; to_usize(STEP_BYTES)], vec![0; to_usize(STEP_BYTES)]);
        while let Some(start) = self.sweep.claim(STEP_BYTES, total) {
            cx.cancel.check()?;
            let bytes = to_usize(STEP_BYTES.min(total - start));
            let (a, b) = (&mut a[..bytes], &mut b[..bytes]);
            let has_a = read_padded(&*self.a, start, a).map_err(|error| StageError::new(ErrorKind::Io, error))?;
            let has_b = read_padded(&*self.b, start, b).map_err(|error| StageError::new(ErrorKind::Io, error))?;
            let same = match (has_a, has_b) {
                (true, true) => a == b,
                (true, false) => crate::zero::is_zero(a),
                (false, true) => crate::zero::is_zero(b),
                (false, false) => true,
            };
            if !same {
                let byte = |has: bool, bytes: &[u8], at: usize| if has { bytes[at] } else { 0 };
                let at = (0..bytes).find(|&at| byte(has_a, a, at) != byte(has_b, b, at)).unwrap_or(0);
                self.sweep.differs_at(start + to_u64(at));
                break;
            }
            self.progress.add_verified(to_u64(bytes));
        }
        outlet.finish();
        Ok(())
    }
}

/// Reads, with zeros for what lies past the disk's end.
pub(crate) fn read_padded(image: &dyn GuestBytes, start: u64, buf: &mut [u8]) -> io::Result<bool> {
    let there = to_usize(image.virtual_bytes().saturating_sub(start)).min(buf.len());
    let (inside, outside) = buf.split_at_mut(there);
    outside.fill(0);
    if inside.is_empty() {
        return Ok(true);
    }
    let read = image.read(start, inside)?;
    if !read && !outside.is_empty() {
        inside.fill(0);
        return Ok(true);
    }
    Ok(read)
}
