//! A source becomes a local qcow2 file, in one pass.

use std::{path::Path, sync::Arc, time::Instant};

use engine::{BufferPool, CancelToken, Pipeline, ReportHandle, TokioLocal};
use tokio::runtime::Handle;

use super::{
    Budget, JobError, Notices, Options, Report,
    report::{Access, HashReport, rss_peak_bytes},
};
use crate::{
    disk::{
        Backend, OutputFile, RawFile, choose_backend,
        pwrite::PwriteQueue,
        read::{PlanReads, ReadExtents},
        uring::{UringExecutor, UringQueue},
        write::{WriteImage, WriteReport},
    },
    extent::{Classified, EXTENT_BYTES, Placed},
    hash::{ExpectedHash, HashLane},
    progress::{Phase, Progress},
    qcow2::Geometry,
    store::{Collect, Survey},
    text::size,
    units::to_usize,
};

/// Writes in flight: enough to keep a device and the page cache busy, few enough to be no matter for memory.
const WRITE_DEPTH: usize = 8;
/// Threads that call `pwrite` where there is no io_uring.
const PWRITE_THREADS: usize = 2;
/// Alignment of leases: what every disk in use asks of memory for direct I/O.
pub(super) const LEASE_ALIGN: usize = 4096;

/// What a file conversion's pipeline will tell.
pub(super) struct FileReports {
    pub(super) written: ReportHandle<WriteReport>,
    pub(super) survey: ReportHandle<Survey>,
    pub(super) hash: ReportHandle<Option<ExpectedHash>>,
}

/// What the tail of a file conversion needs to know.
pub(super) struct FileTail<'a> {
    pub(super) output: &'a OutputFile,
    pub(super) backend: Backend,
    pub(super) geometry: Geometry,
    pub(super) source_bytes: u64,
    pub(super) budget: Budget,
    pub(super) sync: bool,
    pub(super) expected: Option<ExpectedHash>,
    pub(super) progress: &'a Progress,
}

/// Adds writer, collector and hash lane to a pipeline of classified extents.
pub(super) fn write_to_file(
    pipeline: Pipeline<Classified>,
    tail: FileTail<'_>,
) -> Result<(Pipeline<engine::NoOutput>, FileReports), JobError> {
    let FileTail { output, backend, geometry, source_bytes, budget, sync, expected, progress } = tail;
    let file = output.handle()?;
    let index_limit_bytes = budget.index_bytes / 2;
    let io = |error| engine::StageError::new(engine::ErrorKind::Io, error);
    let (pipeline, written): (Pipeline<Placed>, _) = match backend {
        Backend::Uring => pipeline.ring_reporting("write", UringExecutor, move || {
            let queue = UringQueue::new(file, WRITE_DEPTH).map_err(io)?;
            Ok(WriteImage { queue, geometry, sync, index_limit_bytes })
        }),
        Backend::Pwrite => pipeline.ring_reporting("write", TokioLocal, move || {
            let queue = PwriteQueue::new(file, WRITE_DEPTH, PWRITE_THREADS).map_err(io)?;
            Ok(WriteImage { queue, geometry, sync, index_limit_bytes })
        }),
    };
    let mut collect = Some(Collect { geometry, source_bytes, index_limit_bytes });
    let (pipeline, survey) = pipeline.port(64).threads_reporting("collect", 1, || collect.take().expect("one worker asks once"));
    let file = if expected.is_some() { Some(output.handle()?) } else { None };
    let mut lane = Some(HashLane { expected, file, progress: progress.clone() });
    // The lane may lag by the whole disk: what waits here are records, not bytes.
    let lag = to_usize(source_bytes.div_ceil(EXTENT_BYTES)).clamp(64, crate::store::collect::HELD_MAX);
    let (pipeline, hash) = pipeline.port(lag).threads_reporting("hash", 1, || lane.take().expect("one worker asks once"));
    Ok((pipeline, FileReports { written, survey, hash }))
}

/// Converts the raw disk image at `source` into a qcow2 file at `destination`.
///
/// # Errors
/// [`JobError`]; the destination is then as it was before.
pub async fn local_to_file(
    source: &Path,
    destination: &Path,
    options: &Options,
    progress: &Progress,
    notices: &dyn Notices,
    cancel: &CancelToken,
) -> Result<Report, JobError> {
    let started = Instant::now();
    let raw = Arc::new(RawFile::open(source)?);
    let geometry = Geometry::new(raw.bytes(), options.cluster_bits)?;
    let workers = options.workers.get();
    let budget = Budget::split(options.memory_bytes, 2 * workers + WRITE_DEPTH + 4, false)?;
    let output = OutputFile::create(destination, options.force)?;
    if same_file(source, output.target()) {
        return Err(JobError::Usage(format!("{} is source and destination at once", source.display())));
    }
    let backend = choose_backend(options.io, output.folder())?;
    notices.note(&format!(
        "{}: {} raw, to {} with {} clusters",
        source.display(),
        size(raw.bytes()),
        destination.display(),
        size(options.cluster_bits.cluster_bytes())
    ));
    let backend_name = match backend {
        Backend::Uring => "io_uring",
        Backend::Pwrite => "pwrite",
    };
    notices.note(&format!("{}; {workers} workers; writing with {backend_name}", budget.describe()));
    if let Some(warning) = budget.index_warning(geometry) {
        notices.warn(&warning);
    }

    progress.set_virtual_bytes(raw.bytes());
    progress.set_phase(Phase::Reading);
    let pool = BufferPool::new(budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, cancel);
    let cluster_bits = options.cluster_bits;
    let plan = || PlanReads { source: Arc::clone(&raw), cluster_bits };
    let read = || ReadExtents { source: Arc::clone(&raw), pool: pool.clone(), cluster_bits, progress: progress.clone() };
    let pipeline = Pipeline::new(cancel).threads("plan", 1, plan).port(16).threads("read", workers, read);
    let tail = FileTail {
        output: &output,
        backend,
        geometry,
        source_bytes: raw.bytes(),
        budget,
        sync: options.sync,
        expected: None,
        progress,
    };
    let (pipeline, reports) = write_to_file(pipeline, tail)?;
    let stages = pipeline.start(&Handle::current()).join().await?;
    raw.check_unchanged()?;
    let written = reports.written.one().await.ok_or_else(|| JobError::Refused("the writer left no report".to_owned()))?;
    let destination = output.commit(options.sync)?;
    progress.set_image_bytes(written.image_bytes);
    progress.set_phase(Phase::Finishing);
    Ok(Report {
        source: source.display().to_string(),
        destination: destination.display().to_string(),
        virtual_bytes: geometry.virtual_bytes(),
        fetched_bytes: 0,
        zero_bytes: progress.zero_bytes(),
        free_bytes: 0,
        data_bytes: progress.data_bytes(),
        stored_bytes: written.stored_bytes,
        image_bytes: written.image_bytes,
        uploaded_bytes: 0,
        scratch_peak_bytes: 0,
        rss_peak_bytes: rss_peak_bytes(),
        elapsed_s: started.elapsed().as_secs_f64(),
        access: Access::Random,
        source_hash: HashReport::none(),
        image_hash: HashReport::none(),
        reread_bytes: 0,
        retried_bytes: 0,
        filesystems: Vec::new(),
        stages: stages.into_iter().map(Into::into).collect(),
        retries: Vec::new(),
        warnings: Vec::new(),
    })
}

/// Do two paths lead to one file?
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}
