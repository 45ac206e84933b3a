//! A source becomes a local qcow2 file, in one pass.

use std::path::Path;

use engine::{BufferPool, Pipeline, StageError, TokioLocal};
use tokio::runtime::Handle;

use super::{
    Job, Report, Source, Verify,
    job::{LEASE_ALIGN, ReportOf},
    readback::{Target, against_survey},
    report::{HashReport, Tiers},
    survey::collect_and_hash,
};
use crate::{
    budget::Budget,
    disk::{
        Backend, OutputFile, choose_backend,
        output::partial_of,
        pwrite::PwriteQueue,
        uring::{UringExecutor, UringQueue},
        write::WriteImage,
    },
    error::JobError,
    extent::EXTENT_BYTES,
    hash::HashLane,
    progress::Phase,
    store::Collect,
    units::to_usize,
    watermark::Watermark,
};

/// Writes in flight: enough to keep a device and the page cache busy, few enough to be no matter for memory.
pub const WRITE_DEPTH: usize = 8;
/// Threads that call `pwrite` where there is no io_uring.
pub const PWRITE_THREADS: usize = 2;

/// Converts the job's source into a qcow2 file at `destination`.
///
/// # Errors
/// [`JobError`]; the destination is then as it was before.
///
/// # Cancel safety
/// Cancel with the job's token: everything in flight is waited for and the partial file removed. Dropping the future leaves
/// that to the threads.
pub async fn to_file(job: &Job, destination: &Path) -> Result<Report, JobError> {
    let Job { source, options, progress, cancel, .. } = job;
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
    let how = match backend {
        Backend::Uring => "io_uring",
        Backend::Pwrite => "pwrite",
    };
    job.announce(&format!("{} (written with {how})", destination.display()), &budget)?;

    let expected = job.expected_hash();
    progress.set_virtual_bytes(source.bytes().unwrap_or(0));
    progress.set_hash_expected(expected.as_ref().and_then(|_| source.bytes()).unwrap_or(0));
    progress.set_phase(Phase::Reading);
    let pool = BufferPool::new(budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, cancel);
    let (pipeline, source_handle) = job.read_source(&pool, &Watermark::new(u64::MAX));
    drop(pool);
    let survey = options.verify == Verify::Readback;
    let pipeline = if survey || options.compression.is_some() {
        pipeline.cpu("encode", options.workers.get(), || job.encoder())
    } else {
        pipeline
    };
    let file = output.handle()?;
    let (sync, index_limit_bytes) = (options.sync, budget.index_bytes / 2);
    let (cluster_bits, codec) = (options.cluster_bits, job.codec());
    let io = |error| StageError::new(engine::ErrorKind::Io, error);
    let (pipeline, written) = match backend {
        Backend::Uring => pipeline.ring_reporting("write", UringExecutor, move || {
            let queue = UringQueue::new(file, WRITE_DEPTH).map_err(io)?;
            Ok(WriteImage { queue, cluster_bits, codec, sync, index_limit_bytes })
        }),
        Backend::Pwrite => pipeline.ring_reporting("write", TokioLocal, move || {
            let queue = PwriteQueue::new(file, WRITE_DEPTH, PWRITE_THREADS).map_err(io)?;
            Ok(WriteImage { queue, cluster_bits, codec, sync, index_limit_bytes })
        }),
    };
    let collect = Collect { cluster_bits, source_bytes: source.bytes(), index_limit_bytes, survey, watermark: None };
    let file = if expected.is_some() { Some(output.handle()?) } else { None };
    let lane = HashLane { expected: expected.clone(), file, cluster_bits, codec, progress: progress.clone(), watermark: None };
    let (pipeline, surveyed): (Pipeline<_>, _) = collect_and_hash(pipeline, &budget, collect, lane);
    let stages =
        pipeline.start(&Handle::current()).join().await.map_err(|error| JobError::from(error).writing_to(destination))?;
    job.check_unchanged().await?;
    let written = written.one().await.ok_or_else(|| JobError::bug("the writer left no report"))?;
    progress.set_image_bytes(written.image_bytes);
    if survey {
        let surveyed = surveyed.one().await.ok_or_else(|| JobError::bug("the survey left no report"))?;
        progress.set_virtual_bytes(surveyed.source_bytes);
        let target = Target::Path(output.path().to_owned());
        against_survey(&target, &surveyed.into(), options.workers.get(), progress, cancel).await?;
    }
    progress.set_phase(Phase::Finishing);
    let destination = output.commit(options.sync)?;
    Ok(job.report(ReportOf {
        destination: destination.display().to_string(),
        virtual_bytes: written.virtual_bytes,
        stored_bytes: written.stored_bytes,
        image_bytes: written.image_bytes,
        access: source_handle.access().await,
        read_back: survey,
        read_twice: false,
        tiers: Tiers::default(),
        expected,
        image_hash: HashReport::none(),
        stages,
    }))
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
