//! The source stages over a raw file: one finds data and holes, several read.

use std::sync::Arc;

use engine::{BlockingStage, BufferPool, ErrorKind, Inlet, Item, NoInput, Outlet, StageContext, StageError};

use super::raw_file::{RawFile, SourceError};
use crate::{
    extent::{Classified, EXTENT_BYTES, Extent, Payload},
    progress::Progress,
    read_at::ReadAt,
    units::{ClusterBits, GuestRange, round_up, to_usize},
    watermark::Watermark,
    zero::classify::classify,
};

/// A part of the file to look at.
#[derive(Debug)]
pub struct ReadJob {
    guest: GuestRange,
    data: bool,
}

impl Item for ReadJob {
    fn bytes(&self) -> u64 {
        self.guest.bytes()
    }
}

fn source_error(error: SourceError) -> StageError {
    StageError::new(ErrorKind::Io, error)
}

/// Source: cuts the file into extents of data, each within one aligned 2 MiB, and runs of holes.
pub struct PlanReads {
    /// The file.
    pub source: Arc<RawFile>,
    /// Cluster size of the image to be; holes are widened inwards to whole clusters.
    pub cluster_bits: ClusterBits,
    /// How far ahead it may plan.
    pub watermark: Watermark,
}

impl BlockingStage for PlanReads {
    type In = NoInput;
    type Out = ReadJob;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<ReadJob>, cx: StageContext) -> Result<(), StageError> {
        let cluster_bytes = self.cluster_bits.cluster_bytes();
        let end = self.source.bytes();
        let mut at = 0;
        while at < end {
            cx.cancel.check()?;
            // the hole at `at`, if there is one, whole clusters only
            let run = self.source.run_at(at).map_err(source_error)?.expect("`at` is inside the file");
            if !run.data {
                let hole_end = if run.end == end { end } else { run.end & !(cluster_bytes - 1) };
                if hole_end > at {
                    outlet.send_blocking(ReadJob { guest: GuestRange::new(at, hole_end - at), data: false })?;
                    at = hole_end;
                    continue;
                }
            }
            // data, or a hole smaller than the cluster it is in
            let data_end = if run.data { run.end } else { at + 1 };
            let data_end = round_up(data_end, cluster_bytes).min(end);
            while at < data_end {
                let extent_end = ((at / EXTENT_BYTES + 1) * EXTENT_BYTES).min(data_end);
                while !self.watermark.admits(extent_end) {
                    cx.cancel.check()?;
                    self.watermark.wait_blocking(extent_end);
                }
                outlet.send_blocking(ReadJob { guest: GuestRange::new(at, extent_end - at), data: true })?;
                at = extent_end;
            }
        }
        outlet.finish();
        Ok(())
    }
}

/// Reads extents and classifies them while they are in the processor's cache.
pub struct ReadExtents {
    /// The file.
    pub source: Arc<RawFile>,
    /// Where leases come from.
    pub pool: BufferPool,
    /// Cluster size of the image to be.
    pub cluster_bits: ClusterBits,
    /// Told of what was found.
    pub progress: Progress,
}

impl BlockingStage for ReadExtents {
    type In = ReadJob;
    type Out = Classified;
    type Report = ();

    fn run(self, inlet: Inlet<ReadJob>, outlet: Outlet<Classified>, _: StageContext) -> Result<(), StageError> {
        while let Some(ReadJob { guest, data }) = inlet.recv_blocking()? {
            let payload = if data {
                let mut lease = self.pool.acquire_blocking()?;
                let bytes = &mut lease[..to_usize(guest.bytes())];
                self.source.file().read_exact_at(guest.start.0, bytes).map_err(|source| {
                    let path = self.source.path().display().to_string();
                    source_error(match source.kind() {
                        std::io::ErrorKind::UnexpectedEof => SourceError::Changed { path, what: "it became shorter" },
                        _ => SourceError::Io { action: "read", path: format!("{path} at guest offset {}", guest.start), source },
                    })
                })?;
                Payload::Bytes(lease)
            } else {
                Payload::Zeros
            };
            let classified = classify(Extent { guest, payload }, self.cluster_bits);
            self.progress.surveyed(&classified, self.cluster_bits);
            outlet.send_blocking(classified)?;
        }
        outlet.finish();
        Ok(())
    }
}
