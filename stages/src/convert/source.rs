//! What is converted: a local file or an image in Glance, checked before anything is made.

use std::{
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use engine::{BufferPool, CancelToken, Pipeline, ReportHandle};

use super::{JobError, Notices, Options, report::Access};
use crate::{
    disk::{
        RawFile,
        read::{PlanReads, ReadExtents},
    },
    extent::Classified,
    glance::{
        Fetch, FetchReport,
        fetch::{Say, glance_advice},
    },
    hash::ExpectedHash,
    magic::DiskFormat,
    openstack::{Image, Session},
    progress::Progress,
    text::{shell_word, size},
    zero::classify::Classify,
};

/// A checked source.
#[derive(Clone)]
pub enum Source {
    /// A local file or block device.
    Local(Arc<RawFile>),
    /// An image in Glance.
    Glance {
        /// Signed in where it is.
        session: Session,
        /// Its record.
        image: Box<Image>,
        /// Its size, bytes.
        bytes: u64,
    },
}

/// What a source tells at the end.
pub(super) struct SourceReport {
    pub(super) access: Access,
    pub(super) retried_bytes: u64,
}

/// How to get it.
pub(super) enum SourceHandle {
    Local,
    Glance(ReportHandle<FetchReport>),
}

impl Source {
    /// A local source.
    ///
    /// # Errors
    /// If it cannot be read or is not raw.
    pub fn local(path: &Path) -> Result<Self, JobError> {
        Ok(Self::Local(Arc::new(RawFile::open(path)?)))
    }

    /// The image of this name or id, if it can be converted.
    ///
    /// # Errors
    /// [`JobError`]: not there, two of one name, not active, not raw, without bytes; each says what to do.
    pub async fn glance(session: &Session, name_or_id: &str) -> Result<Self, JobError> {
        let image = session.find_image(name_or_id).await?;
        let shown = format!("image {} ({})", image.shown(), image.id);
        if image.is_volume_backed() {
            return Err(JobError::Refused(format!(
                "{shown} is the snapshot of a volume-backed server: it has no bytes of its own, only a pointer to volume snapshots. \
                 To get an image with the bytes: make a volume from the snapshot, then \
                 `openstack image create --volume VOLUME --disk-format qcow2 NAME`; the block storage service converts it on the way"
            )));
        }
        match image.status.as_str() {
            "active" => {}
            "queued" | "saving" | "importing" | "uploading" => {
                let id = &image.id;
                let status = &image.status;
                return Err(JobError::Refused(format!(
                    "{shown} is still {status}: wait until it is active (openstack image show {id} -c status)"
                )));
            }
            "deactivated" => {
                return Err(JobError::Refused(format!(
                    "{shown} is deactivated: its data cannot be downloaded until an administrator reactivates it"
                )));
            }
            other => return Err(JobError::Refused(format!("{shown} is {other}, not active"))),
        }
        let format = image.disk_format.as_deref().unwrap_or("unset");
        if format != "raw" {
            let advice = match format {
                "qcow2" => glance_advice(DiskFormat::Qcow2, &image.id),
                "iso" => glance_advice(DiskFormat::Iso, &image.id),
                "ami" | "ari" | "aki" => "such images are kernels and file systems, not disks".to_owned(),
                other => {
                    let other = shell_word(other);
                    let id = &image.id;
                    format!(
                        "openstack image save --file image.{other} {id}; then qemu-img convert -f {other} -O qcow2 image.{other} image.qcow2"
                    )
                }
            };
            return Err(JobError::Refused(format!("{shown} has disk_format {format}, not raw: {advice}")));
        }
        if image.container_format.as_deref() != Some("bare") {
            let container = image.container_format.as_deref().unwrap_or("unset");
            return Err(JobError::Refused(format!(
                "{shown} has container_format {container}, not bare: its disk is inside a container"
            )));
        }
        let bytes = image.size.unwrap_or(0);
        if bytes == 0 {
            return Err(JobError::Refused(format!("{shown} is empty: there is no disk in it to convert")));
        }
        Ok(Self::Glance { session: session.clone(), image: Box::new(image), bytes })
    }

    /// Its size, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Local(raw) => raw.bytes(),
            Self::Glance { bytes, .. } => *bytes,
        }
    }

    /// How it is named in reports.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Local(raw) => raw.path().display().to_string(),
            Self::Glance { image, .. } => format!("glance:{}", image.id),
        }
    }

    /// The line about it.
    #[must_use]
    pub fn line(&self) -> String {
        match self {
            Self::Local(raw) => format!("source: {}, {} raw", raw.path().display(), size(raw.bytes())),
            Self::Glance { image, bytes, .. } => format!("source: image {} ({}), {} raw", image.shown(), image.id, size(*bytes)),
        }
    }

    /// The digest that what is read has to have.
    #[must_use]
    pub fn expected_hash(&self) -> Option<ExpectedHash> {
        match self {
            Self::Local(_) => None,
            Self::Glance { image, .. } => image.expected_hash(),
        }
    }

    /// Leases that keep this source and its workers busy.
    #[must_use]
    pub fn leases(&self, options: &Options) -> usize {
        let workers = options.workers.get();
        match self {
            Self::Local(_) => 2 * workers + 4,
            Self::Glance { .. } => 2 * options.connections.get() + 2 * workers + 4,
        }
    }

    /// The pipeline's first part: from the source to classified extents.
    pub(super) fn pipeline(
        &self,
        options: &Options,
        pool: &BufferPool,
        progress: &Progress,
        retries: &Arc<Mutex<Vec<String>>>,
        notices: &Arc<dyn Notices>,
        cancel: &CancelToken,
    ) -> (Pipeline<Classified>, SourceHandle) {
        let cluster_bits = options.cluster_bits;
        let workers = options.workers.get();
        match self {
            Self::Local(raw) => {
                let plan = || PlanReads { source: Arc::clone(raw), cluster_bits };
                let read =
                    || ReadExtents { source: Arc::clone(raw), pool: pool.clone(), cluster_bits, progress: progress.clone() };
                let pipeline = Pipeline::new(cancel).threads("plan", 1, plan).port(16).threads("read", workers, read);
                (pipeline, SourceHandle::Local)
            }
            Self::Glance { session, image, bytes } => {
                let notices = Arc::clone(notices);
                let say: Say = Arc::new(move |line| notices.note(&line));
                let fetch = Fetch {
                    session: session.clone(),
                    image_id: image.id.clone(),
                    image_bytes: *bytes,
                    connections: connections_within(options.connections, pool),
                    pool: pool.clone(),
                    progress: progress.clone(),
                    retries: Arc::clone(retries),
                    say,
                };
                let (pipeline, report) = Pipeline::new(cancel).network_reporting("fetch", fetch);
                let classify = || Classify { cluster_bits, progress: progress.clone() };
                (pipeline.cpu("classify", workers, classify), SourceHandle::Glance(report))
            }
        }
    }

    /// After reading: is it still what it was?
    pub(super) fn check_unchanged(&self) -> Result<(), JobError> {
        match self {
            Self::Local(raw) => Ok(raw.check_unchanged()?),
            Self::Glance { .. } => Ok(()), // an image's data never changes; its hash is checked by the lane
        }
    }
}

/// A connection without a lease could only wait.
fn connections_within(wanted: NonZeroUsize, pool: &BufferPool) -> NonZeroUsize {
    wanted.min(NonZeroUsize::new(pool.count() / 2).unwrap_or(NonZeroUsize::MIN))
}

impl SourceHandle {
    pub(super) async fn report(self) -> SourceReport {
        match self {
            Self::Local => SourceReport { access: Access::Random, retried_bytes: 0 },
            Self::Glance(handle) => match handle.one().await {
                Some(report) => SourceReport { access: report.access, retried_bytes: report.retried_bytes },
                None => SourceReport { access: Access::Sequential, retried_bytes: 0 },
            },
        }
    }
}

/// The lines of retries so far.
pub(super) fn retry_lines(retries: &Mutex<Vec<String>>) -> Vec<String> {
    retries.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
