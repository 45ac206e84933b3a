//! Extents land in the file; zeros become holes.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use engine::{BlockingStage, ErrorKind, Inlet, NoInput, Outlet, StageContext, StageError};

use crate::{
    disk::queue::WriteError,
    extent::{EXTENT_BYTES, Extent, Holder, Payload, Position, StoredExtent, StoredRun},
    progress::Progress,
    units::{GuestRange, to_u64, to_usize},
    zero::is_zero,
};

/// Zeros of so many bytes, aligned, become a hole.
pub(super) const HOLE_BYTES: usize = 64 << 10;

/// Writes extents to their position. Zeros become holes where the file can have them.
pub(super) struct Land {
    pub(super) file: Arc<File>,
    pub(super) holes: bool,
    pub(super) progress: Progress,
}

impl Land {
    /// Writes what is not zero; returns how much was.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<u64> {
        if !self.holes {
            self.file.write_all_at(bytes, at)?;
            return Ok(0);
        }
        let mut zeros = 0;
        let mut data_from = None;
        let mut here = 0;
        while here < bytes.len() {
            // pieces end at multiples of the hole's size in the file, not in the buffer
            let into = to_usize((at + to_u64(here)) % to_u64(HOLE_BYTES));
            let end = (here + HOLE_BYTES - into).min(bytes.len());
            if is_zero(&bytes[here..end]) {
                zeros += to_u64(end - here);
                if let Some(from) = data_from.take() {
                    self.file.write_all_at(&bytes[from..here], at + to_u64(from))?;
                }
            } else {
                data_from.get_or_insert(here);
            }
            here = end;
        }
        if let Some(from) = data_from {
            self.file.write_all_at(&bytes[from..], at + to_u64(from))?;
        }
        Ok(zeros)
    }
}

impl BlockingStage for Land {
    type In = Extent;
    type Out = StoredExtent;
    type Report = ();

    fn run(self, inlet: Inlet<Extent>, outlet: Outlet<StoredExtent>, _: StageContext) -> Result<(), StageError> {
        while let Some(Extent { guest, payload }) = inlet.recv_blocking()? {
            let written = match payload {
                Payload::Zeros if self.holes => Ok(guest.bytes()),
                // over what is there already
                Payload::Zeros => self.write(guest.start.0, &vec![0; to_usize(guest.bytes())]),
                Payload::Bytes(lease) => self.write(guest.start.0, &lease[..to_usize(guest.bytes())]),
            };
            let zeros = written.map_err(|source| {
                let error = WriteError { host_offset: guest.start.0, bytes: guest.bytes(), done: 0, source };
                StageError::new(ErrorKind::Io, error)
            })?;
            self.progress.add_surveyed(guest.bytes());
            self.progress.add_zero(zeros);
            self.progress.add_data(guest.bytes() - zeros);
            outlet.send_blocking(stored_extent(guest))?;
        }
        outlet.finish();
        Ok(())
    }
}

/// Source stage: bytes that are all in the file.
pub(super) struct There {
    pub(super) bytes: u64,
}

impl BlockingStage for There {
    type In = NoInput;
    type Out = StoredExtent;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<StoredExtent>, _: StageContext) -> Result<(), StageError> {
        for start in (0..self.bytes).step_by(to_usize(EXTENT_BYTES)) {
            outlet.send_blocking(stored_extent(GuestRange::new(start, EXTENT_BYTES.min(self.bytes - start))))?;
        }
        outlet.finish();
        Ok(())
    }
}

/// Bytes that are in the file, each at its own position.
pub(super) fn stored_extent(guest: GuestRange) -> StoredExtent {
    StoredExtent {
        guest,
        runs: vec![StoredRun { guest, position: Position::Plain(guest.start.0) }],
        records: Vec::new(),
        holder: Holder::File,
    }
}
