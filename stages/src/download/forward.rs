//! An image's bytes into a pipe.

use std::fs::File;

use engine::{BlockingStage, ErrorKind, Inlet, NoOutput, Outlet, StageContext, StageError};

use super::PIPE_BYTES;
use crate::{
    convert::to_stream::write_part,
    extent::{EXTENT_BYTES, Extent, Payload},
    hash::{ExpectedHash, HashMismatch, Hasher},
    progress::Progress,
    units::{to_u64, to_usize},
};

/// Sink: writes extents, which come in order, to a pipe.
pub(super) struct Forward {
    pub(super) output: File,
    pub(super) name: String,
    pub(super) total: u64,
    pub(super) expected: Option<ExpectedHash>,
    pub(super) progress: Progress,
}

impl BlockingStage for Forward {
    type In = Extent;
    type Out = NoOutput;
    type Report = ();

    fn run(mut self, inlet: Inlet<Extent>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<(), StageError> {
        let mut hasher = self.expected.as_ref().and_then(|expected| Hasher::new(&expected.algorithm));
        let zeros = vec![0; to_usize(EXTENT_BYTES)];
        let mut written = 0;
        while let Some(Extent { guest, payload }) = inlet.recv_blocking()? {
            let bytes = match &payload {
                Payload::Bytes(lease) => &lease[..to_usize(guest.bytes())],
                Payload::Zeros => &zeros[..to_usize(guest.bytes())],
            };
            if let Some(hasher) = hasher.as_mut() {
                hasher.update(bytes);
                self.progress.add_hashed(guest.bytes());
            }
            if guest.end.0 == self.total
                && let (Some(expected), Some(hasher)) = (&self.expected, hasher.take())
            {
                let actual = hasher.finish();
                if actual != expected.value.to_ascii_lowercase() {
                    let (algorithm, expected) = (expected.algorithm.clone(), expected.value.clone());
                    return Err(StageError::new(ErrorKind::InvalidData, HashMismatch { algorithm, expected, actual }));
                }
            }
            for part in bytes.chunks(PIPE_BYTES) {
                write_part(&mut self.output, part, (&self.name, written, self.total), &cx.cancel)?;
                written += to_u64(part.len());
            }
            self.progress.add_surveyed(guest.bytes());
        }
        outlet.finish();
        Ok(())
    }
}
