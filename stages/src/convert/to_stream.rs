//! A source becomes bytes on a pipe: survey, layout, emit. The length is known before the first byte leaves.

use std::{
    fs::File,
    io::{self, Write},
    sync::mpsc,
    time::Duration,
};

use engine::{BlockingStage, CancelToken, Cancelled, ErrorKind, Inlet, NoOutput, Outlet, StageContext, StageError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;

use super::{Job, Report, job::ReportOf, report::HashReport};
use crate::{
    error::JobError,
    extent::Chunk,
    hash::Hasher,
    progress::{Phase, Progress},
    units::to_u64,
};

/// How often a wait for the reader looks whether the run was cancelled.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Bytes written at once: a pipe takes at most what it has room for, and a wait is broken off between two writes.
const WRITE_BYTES: usize = 64 << 10;

/// The reader went away.
#[derive(Debug, thiserror::Error)]
#[error("writing to {name}: {written} of {total} bytes were taken")]
pub struct PipeBroken {
    /// What it is called.
    pub name: String,
    /// Bytes that went through.
    pub written: u64,
    /// Bytes in all.
    pub total: u64,
    /// Why no more.
    #[source]
    pub source: io::Error,
}

/// Converts the job's source into an image that is written forward to `output`, which `name` names in messages.
///
/// # Errors
/// [`JobError`]. What was written until then is no image: its reader sees the end too early.
///
/// # Cancel safety
/// Cancel with the job's token.
pub async fn to_stream(job: &Job, output: File, name: &str) -> Result<Report, JobError> {
    let mut surveyed = job.survey(name).await?;
    let running = surveyed.running.take().ok_or_else(|| JobError::bug("a survey runs once"))?;
    let (layout, progress) = (&surveyed.layout, &job.progress);
    progress.set_phase(Phase::Uploading);
    let (agreed, gate) = mpsc::channel();
    let sink = WritePipe { output, name: name.to_owned(), total: layout.file_bytes(), gate, progress: progress.clone() };
    let mut sink = Some(sink);
    let (pipeline, emitted) = surveyed.emission(job, &job.cancel, Hasher::sha512()).await?;
    let emitting = pipeline.threads("pipe", 1, || sink.take().expect("one worker asks once")).start(&Handle::current());
    let surveying = async {
        let result = running.join().await;
        if result.is_ok() {
            let _ = agreed.send(()); // a sink that is gone has failed, and says why
        }
        result
    };
    let (emitting, surveying) = tokio::join!(emitting.join(), surveying);
    let (emitted_stages, surveyed_stages) = super::to_glance::both(emitting, surveying)?;
    let emitted = emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?;
    Ok(job.report(ReportOf {
        destination: name.to_owned(),
        virtual_bytes: layout.sections().geometry.virtual_bytes(),
        stored_bytes: surveyed.survey.index.stored_bytes(),
        image_bytes: emitted.bytes,
        access: surveyed.access,
        read_back: false,
        read_twice: false,
        tiers: surveyed.tiers,
        expected: surveyed.expected,
        image_hash: HashReport { algorithm: Some("sha512".to_owned()), value: Some(emitted.digest), checked: false },
        stages: surveyed_stages.into_iter().chain(emitted_stages).collect(),
    }))
}

/// Sink: writes chunks to a pipe. Its last bytes leave only when the source's hash has agreed: a reader takes an end of input for
/// success, and a cancelled run must end before it.
struct WritePipe {
    output: File,
    name: String,
    total: u64,
    gate: mpsc::Receiver<()>,
    progress: Progress,
}

impl BlockingStage for WritePipe {
    type In = Chunk;
    type Out = NoOutput;
    type Report = ();

    fn run(mut self, inlet: Inlet<Chunk>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<(), StageError> {
        let mut written = 0;
        while let Some(Chunk(chunk)) = inlet.recv_blocking()? {
            for part in chunk.chunks(WRITE_BYTES) {
                if written + to_u64(part.len()) == self.total {
                    while let Err(error) = self.gate.recv_timeout(Duration::from_millis(200)) {
                        cx.cancel.check()?;
                        if error == mpsc::RecvTimeoutError::Disconnected {
                            return Err(Cancelled.into());
                        }
                    }
                }
                write_part(&mut self.output, part, (&self.name, written, self.total), &cx.cancel)?;
                written += to_u64(part.len());
                self.progress.add_uploaded(to_u64(part.len()));
            }
        }
        outlet.finish();
        Ok(())
    }
}

/// Writes a part; `place`: the pipe's name, bytes written before, bytes in all.
pub(crate) fn write_part(
    output: &mut File,
    part: &[u8],
    (name, written, total): (&str, u64, u64),
    cancel: &CancelToken,
) -> Result<(), StageError> {
    let result = write_whole(output, part, cancel)?;
    result.map_err(|source| StageError::new(ErrorKind::Io, PipeBroken { name: name.to_owned(), written, total, source }))
}

/// Waits until the pipe takes something, writes, until all is taken. Cancelled while it waits, it returns at once.
fn write_whole(output: &mut File, mut bytes: &[u8], cancel: &CancelToken) -> Result<io::Result<()>, Cancelled> {
    while !bytes.is_empty() {
        cancel.check()?;
        let mut waiting = [PollFd::new(&*output, PollFlags::OUT)];
        match poll(&mut waiting, Some(&LOOK_EVERY)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Ok(Err(error.into())),
        }
        // poll says that a page fits (pipe(7)); more could block where nobody looks for a cancellation
        match output.write(&bytes[..bytes.len().min(4096)]) {
            Ok(0) => return Ok(Err(io::ErrorKind::WriteZero.into())),
            Ok(taken) => bytes = &bytes[taken..],
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(()))
}
