//! The image strictly forward: metadata, then the kept clusters in guest order.

use std::sync::Arc;

use bytes::Bytes;
use engine::{BlockingStage, Inlet, Item, NoInput, Outlet, StageContext, StageError};

use super::Survey;
use crate::{
    hash::Hasher,
    qcow2::{Layout, StreamWriter},
    units::to_u64,
};

/// The next bytes of the file.
#[derive(Debug)]
pub struct Chunk(pub Bytes);

impl Item for Chunk {
    fn bytes(&self) -> u64 {
        to_u64(self.0.len())
    }
}

/// What was emitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmitReport {
    /// Bytes; equals the layout's.
    pub bytes: u64,
    /// Digest over them, lower-case hexadecimal.
    pub digest: String,
}

/// Source: the file that the layout plans, out of the survey.
pub struct Emit {
    /// What is in the image.
    pub survey: Arc<Survey>,
    /// Where it goes.
    pub layout: Arc<Layout>,
    /// Digest to compute on the way.
    pub hasher: Hasher,
}

impl BlockingStage for Emit {
    type In = NoInput;
    type Out = Chunk;
    type Report = EmitReport;

    fn run(mut self, _: Inlet<NoInput>, outlet: Outlet<Chunk>, _: StageContext) -> Result<EmitReport, StageError> {
        let mut bytes = 0;
        let metadata = StreamWriter::new(&self.layout, &self.survey.map).metadata().map(Bytes::from);
        for chunk in metadata.chain(self.survey.kept.iter().cloned()) {
            self.hasher.update(&chunk);
            bytes += to_u64(chunk.len());
            outlet.send_blocking(Chunk(chunk))?;
        }
        if bytes != self.layout.file_bytes() {
            return Err(StageError::bug(format!("emitted {bytes} bytes of an image of {}", self.layout.file_bytes())));
        }
        outlet.finish();
        Ok(EmitReport { bytes, digest: self.hasher.finish() })
    }
}
