//! A source becomes a local qcow2 file, in one pass.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use engine::{BufferPool, CancelToken, Pipeline, StageError, TokioLocal};
use tokio::runtime::Handle;

use super::{
    Budget, JobError, Notices, Options, Report,
    report::{HashReport, ReportParts},
    source::{Source, retry_lines},
};
use crate::{
    disk::{
        Backend, OutputFile, choose_backend,
        output::partial_of,
        pwrite::PwriteQueue,
        uring::{UringExecutor, UringQueue},
        write::WriteImage,
    },
    extent::{EXTENT_BYTES, PlacedRun},
    hash::HashLane,
    progress::{Phase, Progress},
    qcow2::Geometry,
    store::{Collect, collect::HELD_MAX},
    text::size,
    units::{to_u64, to_usize},
};

/// Writes in flight: enough to keep a device and the page cache busy, few enough to be no matter for memory.
const WRITE_DEPTH: usize = 8;
/// Threads that call `pwrite` where there is no io_uring.
const PWRITE_THREADS: usize = 2;
/// Alignment of leases: what every disk in use asks of memory for direct I/O.
pub(super) const LEASE_ALIGN: usize = 4096;

/// Converts `source` into a qcow2 file at `destination`.
///
/// # Errors
/// [`JobError`]; the destination is then as it was before.
///
/// # Cancel safety
/// Cancel with `cancel`: everything in flight is waited for and the partial file removed. Dropping the future leaves
/// that to the threads.
pub async fn to_file(
    source: &Source,
    destination: &Path,
    options: &Options,
    progress: &Progress,
    notices: &Arc<dyn Notices>,
    cancel: &CancelToken,
) -> Result<Report, JobError> {
    let started = Instant::now();
    let geometry = Geometry::new(source.bytes(), options.cluster_bits)?;
    let budget = Budget::split(options.memory_bytes, source.leases(options) + WRITE_DEPTH, false)?;
    if let Source::Local(raw) = source
        && (same_file(raw.path(), destination) || same_file(raw.path(), &partial_of(destination)))
    {
        return Err(JobError::Usage(format!(
            "{} is source and destination at once (or what the destination is called while it is written)",
            raw.path().display()
        )));
    }
    let ends_with_slash = destination.as_os_str().as_encoded_bytes().ends_with(b"/");
    if ends_with_slash || destination.file_name().is_none() {
        return Err(JobError::Usage(format!(
            "{:?} names a folder, not a file: add the image's name",
            destination.display().to_string()
        )));
    }
    let output = OutputFile::create(destination, options.force)?;
    let backend = choose_backend(options.io, output.folder())?;
    notices.note(&source.line());
    notices.note(&format!(
        "destination: {}, qcow2 with {} clusters, written with {}",
        destination.display(),
        size(options.cluster_bits.cluster_bytes()),
        match backend {
            Backend::Uring => "io_uring",
            Backend::Pwrite => "pwrite",
        }
    ));
    notices.note(&format!("{}; {} workers", budget.describe(), options.workers));
    if let Some(warning) = budget.index_warning(geometry) {
        notices.warn(&warning);
    }

    let expected = source.expected_hash();
    progress.set_virtual_bytes(source.bytes());
    progress.set_hash_expected(if expected.is_some() { source.bytes() } else { 0 });
    progress.set_phase(Phase::Reading);
    let retries = Arc::new(Mutex::new(Vec::new()));
    let pool = BufferPool::new(budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, cancel);
    let (pipeline, source_handle) = source.pipeline(options, &pool, progress, &retries, notices, cancel);

    let file = output.handle()?;
    let (sync, index_limit_bytes) = (options.sync, budget.index_bytes / 2);
    let io = |error| StageError::new(engine::ErrorKind::Io, error);
    let (pipeline, written) = match backend {
        Backend::Uring => pipeline.ring_reporting("write", UringExecutor, move || {
            let queue = UringQueue::new(file, WRITE_DEPTH).map_err(io)?;
            Ok(WriteImage { queue, geometry, sync, index_limit_bytes })
        }),
        Backend::Pwrite => pipeline.ring_reporting("write", TokioLocal, move || {
            let queue = PwriteQueue::new(file, WRITE_DEPTH, PWRITE_THREADS).map_err(io)?;
            Ok(WriteImage { queue, geometry, sync, index_limit_bytes })
        }),
    };
    let collect = Collect { geometry, source_bytes: source.bytes(), index_limit_bytes };
    let file = if expected.is_some() { Some(output.handle()?) } else { None };
    let (pipeline, _) = collect_and_hash(pipeline, &budget, collect, HashLane { expected, file, progress: progress.clone() });
    let stages =
        pipeline.start(&Handle::current()).join().await.map_err(|error| JobError::from(error).writing_to(destination))?;
    source.check_unchanged()?;
    let written = written.one().await.ok_or_else(|| JobError::bug("the writer left no report"))?;
    progress.set_image_bytes(written.image_bytes);
    progress.set_phase(Phase::Finishing);
    let destination = output.commit(options.sync)?;
    let source_report = source_handle.report().await;
    Ok(Report::assemble(ReportParts {
        source: source.shown(),
        destination: destination.display().to_string(),
        virtual_bytes: geometry.virtual_bytes(),
        stored_bytes: written.stored_bytes,
        image_bytes: written.image_bytes,
        started,
        access: source_report.access,
        retried_bytes: source_report.retried_bytes,
        source_hash: HashReport::checked(source.expected_hash()),
        image_hash: HashReport::none(),
        stages,
        retries: retry_lines(&retries),
        progress,
    }))
}

/// Adds the collector and the hash lane, which may lag by as many extents as the disk has, as far as their records (not
/// their bytes) fit into a quarter of the index's memory.
pub(super) fn collect_and_hash(
    pipeline: Pipeline<crate::extent::Placed>,
    budget: &Budget,
    collect: Collect,
    lane: HashLane,
) -> (Pipeline<engine::NoOutput>, engine::ReportHandle<crate::store::Survey>) {
    // at worst every cluster of an extent is a run of its own
    let runs = EXTENT_BYTES / collect.geometry.cluster_bits().cluster_bytes();
    let record_bytes = (runs * to_u64(size_of::<PlacedRun>())).max(1);
    let lag = collect.source_bytes.div_ceil(EXTENT_BYTES).min(budget.index_bytes / 4 / record_bytes);
    let lag = to_usize(lag).clamp(16, HELD_MAX);
    let (mut collect, mut lane) = (Some(collect), Some(lane));
    let (pipeline, survey) = pipeline.port(64).threads_reporting("collect", 1, || collect.take().expect("one worker asks once"));
    (pipeline.port(lag).threads("hash", 1, || lane.take().expect("one worker asks once")), survey)
}

/// Do two paths lead to one file, or to one block device, or to a file and the loop device over it?
#[must_use]
pub fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let (Ok(a_data), Ok(b_data)) = (std::fs::metadata(a), std::fs::metadata(b)) else { return false };
    if a_data.dev() == b_data.dev() && a_data.ino() == b_data.ino() {
        return true;
    }
    let device = |data: &std::fs::Metadata| data.file_type().is_block_device().then(|| data.rdev());
    let backing = |rdev: u64| {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file")).ok()
    };
    let is_backed_by = |rdev: u64, file: &Path| backing(rdev).is_some_and(|path| same_file(Path::new(path.trim_end()), file));
    match (device(&a_data), device(&b_data)) {
        (Some(a), Some(b)) => a == b,
        (Some(rdev), None) => is_backed_by(rdev, b),
        (None, Some(rdev)) => is_backed_by(rdev, a),
        (None, None) => false,
    }
}
