//! What was made is read, decoded and compared: with what the survey saw, or with another image.

use std::{io, path::PathBuf, sync::Arc};

use engine::{BlockingStage, CancelToken, ErrorKind, Inlet, NoInput, NoOutput, Outlet, Pipeline, StageContext, StageError};
use tokio::runtime::Handle;

use super::Job;
use crate::{
    access::Access,
    compare::{Compare, Difference, GuestBytes, RawGuest, Sweep, read_padded},
    compress::encode::digest,
    disk::RawFile,
    error::JobError,
    glance::{ImageFile, Remote},
    magic::DiskFormat,
    openstack::{Image, Session},
    progress::{Phase, Progress},
    qcow2::{Qcow2, Qcow2Error},
    read_at::ReadAt,
    store::Survey,
    units::to_usize,
    zero::is_zero,
};

/// Guest bytes that a worker takes at once.
const STEP_BYTES: u64 = 2 << 20;
/// Bytes of an image in Glance that are worth a worker: less would be fetched several times over.
const WORTH_BYTES: u64 = 16 << 20;
/// Most workers that read at once: each has its own connection.
const WORKERS_MAX: usize = 8;

/// An image to look into, wherever it is.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // there are two of them in a comparison
pub enum Target {
    /// A local file or block device.
    Path(PathBuf),
    /// An image in Glance.
    Glance {
        /// Which.
        remote: Remote,
        /// How it can be read.
        access: Access,
    },
}

/// An image that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what} cannot be read: it is damaged, cut short, or out of reach")]
pub struct CannotRead {
    /// Which.
    pub what: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl Target {
    fn shown(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Glance { remote, .. } => format!("glance:{}", remote.image_id),
        }
    }

    /// An image in Glance; finds out how it can be read.
    ///
    /// # Errors
    /// [`JobError::Fetch`].
    pub async fn glance(remote: Remote) -> Result<Self, JobError> {
        let access = ImageFile::access(&remote).await?;
        Ok(Self::Glance { remote, access })
    }

    /// So many workers as are worth it: each fetches some MiB at a time.
    fn workers(&self, wanted: usize) -> usize {
        let most = match self {
            Self::Path(_) => WORKERS_MAX,
            Self::Glance { remote, .. } => {
                usize::try_from(remote.image_bytes / WORTH_BYTES).unwrap_or(usize::MAX).saturating_add(1)
            }
        };
        if self.is_random() { wanted.clamp(1, WORKERS_MAX).min(most) } else { 1 }
    }

    /// Can several workers read it at once?
    const fn is_random(&self) -> bool {
        matches!(self, Self::Path(_) | Self::Glance { access: Access::Random, .. })
    }

    /// Opens it, raw or qcow2 by its bytes. Blocks.
    fn open(&self, runtime: &Handle) -> io::Result<Box<dyn GuestBytes>> {
        match self {
            Self::Path(path) => {
                // looked at before it is opened: opening a FIFO would wait for its other end
                if let Some(what) = crate::disk::no_file(std::fs::metadata(path)?.file_type()) {
                    return Err(io::Error::other(format!("it is {what}")));
                }
                let file = std::fs::File::open(path)?;
                let mut head = [0; 8];
                let bytes = std::os::unix::fs::FileExt::read_at(&file, &mut head, 0)?;
                if DiskFormat::detect(&head[..bytes], &[]) == DiskFormat::Qcow2 {
                    return Ok(Box::new(Qcow2::open(file).map_err(io::Error::other)?));
                }
                Ok(Box::new(RawFile::from_file(file, path).map_err(io::Error::other)?))
            }
            Self::Glance { remote, access } => {
                let file = ImageFile::new(remote.clone(), *access, runtime.clone());
                let mut head = vec![0; to_usize(remote.image_bytes.min(8))];
                file.read_exact_at(0, &mut head)?;
                if DiskFormat::detect(&head, &[]) == DiskFormat::Qcow2 {
                    let image = Qcow2::open(file).map_err(io::Error::other)?;
                    // whatever was written metadata first has its tables below its first data cluster
                    if let Some(host) = image.first_data().map_err(io::Error::other)? {
                        image.storage().split_at(host.0);
                    }
                    return Ok(Box::new(image));
                }
                Ok(Box::new(RawGuest(file, remote.image_bytes)))
            }
        }
    }
}

/// An image whose errors name it.
struct Named {
    what: String,
    image: Box<dyn GuestBytes>,
}

impl GuestBytes for Named {
    fn virtual_bytes(&self) -> u64 {
        self.image.virtual_bytes()
    }

    fn read(&self, guest_offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let read = self.image.read(guest_offset, buf);
        read.map_err(|source| io::Error::other(CannotRead { what: self.what.clone(), source }))
    }
}

/// Do two images show a guest the same bytes? Workers read in parallel where both can be read at any offset.
///
/// # Errors
/// [`JobError::Verification`] with the first guest offset that differs, or both sizes.
pub async fn compare(a: &Target, b: &Target, workers: usize, progress: &Progress, cancel: &CancelToken) -> Result<u64, JobError> {
    progress.restart_verify();
    progress.set_phase(Phase::Verifying);
    let workers = a.workers(workers).min(b.workers(workers));
    let sweep = Sweep::default();
    let make = || OpenAndCompare {
        a: a.clone(),
        b: b.clone(),
        runtime: Handle::current(),
        sweep: sweep.clone(),
        progress: progress.clone(),
    };
    let (pipeline, sizes) = Pipeline::new(cancel).threads_reporting("verify", workers, make);
    match pipeline.start(&Handle::current()).join().await {
        Ok(_) => {}
        Err(engine::RunError::Failed { error, .. }) if difference(&error).is_some() => {
            return Err(JobError::Verification(difference(&error).map(ToString::to_string).unwrap_or_default()));
        }
        Err(engine::RunError::Failed { error, .. }) => {
            return Err(JobError::Compare { source: error.source.unwrap_or_else(|| "it gave no reason".into()) });
        }
        Err(error) => return Err(error.into()),
    }
    match sweep.first_difference() {
        None => sizes.all().await.and_then(|sizes| sizes.first().copied()).ok_or_else(|| JobError::bug("nobody compared")),
        Some(guest_offset) => Err(JobError::Verification(Difference::Byte { guest_offset }.to_string())),
    }
}

/// Is it the images' content that is wrong, and not the way to them?
fn is_about_content(error: &JobError) -> bool {
    if matches!(error, JobError::Verification(_)) {
        return true;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        let inner =
            error.downcast_ref::<io::Error>().and_then(io::Error::get_ref).and_then(|inner| inner.downcast_ref::<Qcow2Error>());
        if let Some(found) = error.downcast_ref::<Qcow2Error>().or(inner) {
            return !matches!(found, Qcow2Error::Io { .. });
        }
        cause = error.source();
    }
    false
}

fn difference(error: &StageError) -> Option<&Difference> {
    error.source.as_ref().and_then(|source| source.downcast_ref::<Difference>())
}

/// Is `image`, which claims to be made from the job's source, really its conversion? Both are read and compared.
///
/// # Errors
/// [`JobError`] if one of them cannot be read. A difference is no error.
pub async fn prove(job: &Job, session: &Session, image: &Image) -> Result<bool, JobError> {
    let Some(source) = job.source_remote() else { return Ok(false) };
    let made = job.remote(session, image);
    let (source, made) = (Target::glance(source).await?, Target::glance(made).await?);
    match compare(&source, &made, job.options.connections.get(), &job.progress, &job.cancel).await {
        Ok(_) => Ok(true),
        // different, or no image at all; what could not be asked is neither
        Err(error) if is_about_content(&error) => {
            job.reporter.note(&format!("image {}: {}", image.shown_id(), crate::text::causes(&error)));
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// [`Compare`], with the images opened on the worker's thread.
struct OpenAndCompare {
    a: Target,
    b: Target,
    runtime: Handle,
    sweep: Sweep,
    progress: Progress,
}

impl BlockingStage for OpenAndCompare {
    type In = NoInput;
    type Out = NoOutput;
    type Report = u64;

    fn run(self, inlet: Inlet<NoInput>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<u64, StageError> {
        let open = |target: &Target| {
            let failed = |source| StageError::new(ErrorKind::Io, CannotRead { what: target.shown(), source });
            target.open(&self.runtime).map_err(failed)
        };
        let (a, b) = (open(&self.a)?, open(&self.b)?);
        let named = |target: &Target, image| Box::new(Named { what: target.shown(), image });
        let (a, b) = (named(&self.a, a), named(&self.b, b));
        let bytes = a.virtual_bytes().max(b.virtual_bytes());
        self.progress.set_virtual_bytes(bytes);
        Compare { a, b, sweep: self.sweep, progress: self.progress }.run(inlet, outlet, cx)?;
        Ok(bytes)
    }
}

/// Does `target` show a guest what the survey saw of the source? Each data cluster has to have its digest, and each other one to be
/// zero.
///
/// # Errors
/// [`JobError::Verification`] with the first guest offset that differs.
pub(super) async fn against_survey(
    target: &Target,
    survey: &Arc<Survey>,
    workers: usize,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<(), JobError> {
    progress.restart_verify();
    progress.set_phase(Phase::Verifying);
    let workers = target.workers(workers);
    let sweep = Sweep::default();
    let make = || AgainstSurvey {
        target: target.clone(),
        survey: Arc::clone(survey),
        runtime: Handle::current(),
        sweep: sweep.clone(),
        progress: progress.clone(),
    };
    Pipeline::new(cancel).threads("verify", workers, make).start(&Handle::current()).join().await?;
    match sweep.first_difference() {
        None => Ok(()),
        Some(guest_offset) => Err(JobError::Verification(format!(
            "read back, the image does not show the source's bytes: first at guest offset {guest_offset:#x}"
        ))),
    }
}

struct AgainstSurvey {
    target: Target,
    survey: Arc<Survey>,
    runtime: Handle,
    sweep: Sweep,
    progress: Progress,
}

impl BlockingStage for AgainstSurvey {
    type In = NoInput;
    type Out = NoOutput;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<(), StageError> {
        let io = |error| StageError::new(ErrorKind::Io, error);
        let image = self.target.open(&self.runtime).map_err(io)?;
        let cluster_bytes = self.survey.cluster_bits.cluster_bytes();
        let total = self.survey.source_bytes;
        if image.virtual_bytes().next_multiple_of(512) != total.next_multiple_of(512) {
            self.sweep.differs_at(image.virtual_bytes().min(total));
        }
        let mut buffer = vec![0; to_usize(STEP_BYTES)];
        while let Some(start) = self.sweep.claim(STEP_BYTES, total) {
            cx.cancel.check()?;
            let bytes = STEP_BYTES.min(total - start);
            let padded = to_usize(bytes.next_multiple_of(cluster_bytes));
            let buffer = &mut buffer[..padded];
            let has_bytes = read_padded(&*image, start, buffer).map_err(io)?;
            for (cluster, number) in buffer.chunks(to_usize(cluster_bytes)).zip(start / cluster_bytes..) {
                let same = match self.survey.index.record(number) {
                    Some(record) => has_bytes && digest(cluster) == record.digest,
                    None => !has_bytes || is_zero(cluster),
                };
                if !same {
                    self.sweep.differs_at(number * cluster_bytes);
                    break;
                }
            }
            self.progress.add_verified(bytes);
        }
        outlet.finish();
        Ok(())
    }
}

const _: () = assert!(STEP_BYTES.is_multiple_of(1 << 21), "steps are whole clusters");
