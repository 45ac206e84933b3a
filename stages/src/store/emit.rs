//! The image strictly forward: metadata, then the stored clusters.

use std::{collections::HashMap, fs::File, sync::Arc};

use bytes::Bytes;
use engine::{BlockingStage, ErrorKind, Inlet, Outlet, StageContext, StageError};

use super::{Survey, Tier, collect::KeptExtent, reread::Rebuilt};
use crate::{
    compress::{Decoder, encode::digest},
    extent::{Chunk, Record},
    hash::Hasher,
    qcow2::{Layout, StreamWriter, packing::InFileOrder},
    read_at::ReadAt,
    units::{GuestRange, to_u64, to_usize},
};

/// What was emitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmitReport {
    /// Bytes; equals the layout's.
    pub bytes: u64,
    /// Digest over them, lower-case hexadecimal.
    pub digest: String,
}

/// The file that the layout plans, out of the survey, and out of what is read again.
pub struct Emit {
    /// What is in the image.
    pub survey: Arc<Survey>,
    /// Where it goes.
    pub layout: Arc<Layout>,
    /// The scratch file, where there is one.
    pub scratch: Option<File>,
    /// Digest to compute on the way.
    pub hasher: Hasher,
    /// Made when it is needed.
    pub decoder: Option<Decoder>,
}

/// The scratch file does not give back what was written to it.
#[derive(Debug, thiserror::Error)]
#[error(
    "the scratch file lost what was written to it (guest bytes {guest}): its disk is not to be trusted, use another folder for --scratch, or none"
)]
pub struct ScratchDamaged {
    /// Whose clusters.
    pub guest: GuestRange,
}

impl BlockingStage for Emit {
    type In = Rebuilt;
    type Out = Chunk;
    type Report = EmitReport;

    fn run(mut self, inlet: Inlet<Rebuilt>, outlet: Outlet<Chunk>, _: StageContext) -> Result<EmitReport, StageError> {
        let survey = Arc::clone(&self.survey);
        let layout = Arc::clone(&self.layout);
        let writer = StreamWriter::new(&layout, &survey.index);
        let mut bytes = 0;
        let mut send = |hasher: &mut Hasher, chunk: Bytes| {
            hasher.update(&chunk);
            bytes += to_u64(chunk.len());
            outlet.send_blocking(Chunk(chunk)).map_err(StageError::from)
        };
        for piece in writer.metadata() {
            send(&mut self.hasher, piece.into())?;
        }
        let mut order = writer.data();
        let mut records = survey.index.records();
        let mut early = HashMap::new();
        for extent in &survey.extents {
            let records: Vec<Record> = records.by_ref().take(to_usize(u64::from(extent.data_clusters))).collect();
            let lengths: Vec<u32> = records.iter().map(|record| record.stored_bytes).collect();
            let (packed, credit) = match &extent.kept {
                Tier::Memory(packed) => (packed.clone(), None),
                Tier::Scratch(at) => (self.read_scratch(*at, extent.guest, &records)?, None),
                Tier::Source => {
                    let rebuilt = next_rebuilt(&inlet, &mut early, extent.guest)?;
                    (rebuilt.packed.clone(), Some(rebuilt))
                }
            };
            self.push(&mut order, extent, &packed, &lengths)?;
            while let Some(chunk) = order.pop() {
                send(&mut self.hasher, chunk)?;
            }
            drop(credit);
        }
        if inlet.recv_blocking()?.is_some() || !early.is_empty() {
            return Err(StageError::bug("an extent was read again that nobody wanted"));
        }
        order.close();
        while let Some(chunk) = order.pop() {
            send(&mut self.hasher, chunk)?;
        }
        if bytes != self.layout.file_bytes() {
            return Err(StageError::bug(format!("emitted {bytes} bytes of an image of {}", self.layout.file_bytes())));
        }
        outlet.finish();
        Ok(EmitReport { bytes, digest: self.hasher.finish() })
    }
}

/// The extent that is due; what comes before its turn is held, with its credit.
fn next_rebuilt(inlet: &Inlet<Rebuilt>, early: &mut HashMap<u64, Rebuilt>, guest: GuestRange) -> Result<Rebuilt, StageError> {
    loop {
        if let Some(rebuilt) = early.remove(&guest.start.0) {
            return Ok(rebuilt);
        }
        match inlet.recv_blocking()? {
            Some(rebuilt) => _ = early.insert(rebuilt.guest.start.0, rebuilt),
            None => return Err(StageError::bug(format!("guest bytes {guest} were not read again"))),
        }
    }
}

impl Emit {
    /// An extent's packed clusters out of the scratch file, each compared with its digest: a disk that takes writes and loses them later
    /// (a full thin volume, a quota on the network) says nothing to whoever reads.
    fn read_scratch(&mut self, at: u64, guest: GuestRange, records: &[Record]) -> Result<Bytes, StageError> {
        let scratch = self.scratch.as_ref().ok_or_else(|| StageError::bug("bytes in a scratch file, but no file"))?;
        let mut packed = vec![0; to_usize(records.iter().map(|record| u64::from(record.stored_bytes)).sum())];
        scratch.read_exact_at(at, &mut packed).map_err(|error| StageError::new(ErrorKind::Io, error))?;
        let mut cluster = vec![0; to_usize(self.survey.cluster_bits.cluster_bytes())];
        let mut rest = packed.as_slice();
        for record in records {
            let (stored, after) = rest.split_at(to_usize(u64::from(record.stored_bytes)));
            rest = after;
            let good = if stored.len() == cluster.len() {
                digest(stored) == record.digest
            } else {
                let codec = self.layout.sections().codec.ok_or_else(|| StageError::bug("compressed bytes, but no codec"))?;
                let decoder = self.decoder.get_or_insert_with(|| Decoder::new(codec));
                decoder.decode(stored, &mut cluster).is_ok() && digest(&cluster) == record.digest
            };
            if !good {
                return Err(StageError::new(ErrorKind::InvalidData, ScratchDamaged { guest }));
            }
        }
        Ok(packed.into())
    }

    /// Cuts an extent's packed clusters apart: runs of plain ones in one piece, compressed ones each.
    fn push(&self, order: &mut InFileOrder, extent: &KeptExtent, packed: &Bytes, lengths: &[u32]) -> Result<(), StageError> {
        let cluster_bytes = to_usize(self.survey.cluster_bits.cluster_bytes());
        let mut at = 0;
        for run in lengths.chunk_by(|a, b| a == b && to_usize(u64::from(*a)) == cluster_bytes) {
            let bytes = to_usize(run.iter().map(|&bytes| u64::from(bytes)).sum());
            if at + bytes > packed.len() {
                return Err(StageError::bug(format!("guest bytes {} are not all there", extent.guest)));
            }
            let piece = packed.slice(at..at + bytes);
            at += bytes;
            if run.first().is_some_and(|&first| to_usize(u64::from(first)) == cluster_bytes) {
                order.push_plain(piece, to_u64(run.len()));
            } else {
                order.push_compressed(piece);
            }
        }
        Ok(())
    }
}
