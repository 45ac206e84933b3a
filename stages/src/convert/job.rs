//! A conversion under way: what every part of it needs.

use std::{sync::Arc, time::Instant};

use engine::CancelToken;

use super::{
    Options, Report, Verify,
    report::{HashReport, ReportParts, Tiers},
    source::Source,
};
use crate::{
    access::Access,
    budget::Budget,
    compress::{Codec, EncodeClusters},
    error::JobError,
    glance::Remote,
    hash::ExpectedHash,
    openstack::{Image, Session},
    progress::Progress,
    qcow2::Geometry,
    reporter::Reporter,
    retry::Retries,
    text::size,
};

/// Alignment of leases: what every disk in use asks of memory for direct I/O.
pub(super) const LEASE_ALIGN: usize = 4096;

/// What every part of a conversion needs.
pub struct Job {
    /// What is converted.
    pub source: Source,
    /// How.
    pub options: Options,
    /// Counters.
    pub progress: Progress,
    /// Who is told.
    pub reporter: Arc<dyn Reporter>,
    /// Ends it.
    pub cancel: CancelToken,
    /// The record of retries.
    pub retries: Retries,
    /// When it began.
    pub started: Instant,
}

impl Job {
    /// A conversion that is about to begin.
    #[must_use]
    pub fn new(
        source: Source,
        options: Options,
        progress: &Progress,
        reporter: &Arc<dyn Reporter>,
        cancel: &CancelToken,
    ) -> Self {
        let told = Arc::clone(reporter);
        let retries = Retries::new(progress, Arc::new(move |line| told.note(&line)));
        let (progress, reporter, cancel) = (progress.clone(), Arc::clone(reporter), cancel.clone());
        Self { source, options, progress, reporter, cancel, retries, started: Instant::now() }
    }

    /// An image as something to read for this job, beside what the conversion itself reads.
    #[must_use]
    pub fn remote(&self, session: &Session, image: &Image) -> Remote {
        let (retries, patience) = (self.retries.clone(), self.options.patience);
        Remote { again: true, ..Remote::of_image(session, image, &self.progress, retries, patience, &self.cancel) }
    }

    pub(super) fn codec(&self) -> Option<Codec> {
        self.options.compression.map(crate::compress::Compression::codec)
    }

    pub(super) fn encoder(&self) -> EncodeClusters {
        EncodeClusters::new(self.options.cluster_bits, self.options.compression, self.progress.clone())
    }

    /// The opening lines.
    pub(super) fn announce(&self, destination: &str, budget: &Budget) -> Result<(), JobError> {
        let reporter = &self.reporter;
        reporter.note(&self.source.line());
        let compression = match self.options.compression {
            Some(compression) => format!("{} level {}", compression.codec().name(), compression.level()),
            None => "uncompressed".to_owned(),
        };
        reporter.note(&format!(
            "destination: {destination}, qcow2 with {} clusters, {compression}",
            size(self.options.cluster_bits.cluster_bytes())
        ));
        reporter.note(&format!("{}; {} workers", budget.describe(), self.options.workers));
        if let Some(bytes) = self.source.bytes() {
            let geometry = Geometry::new(bytes, self.options.cluster_bits)?;
            if let Some(warning) = budget.index_warning(geometry) {
                reporter.warn(&warning);
            }
        }
        if let Some(warning) = budget.available_warning() {
            reporter.warn(&warning);
        }
        if self.source.expected_hash().is_none() && matches!(self.source, Source::Glance { .. }) {
            reporter.warn(
                "Glance has no hash of the source (as after a direct Ceph snapshot): what is read cannot be checked against one",
            );
        }
        Ok(())
    }

    pub(super) fn expected_hash(&self) -> Option<ExpectedHash> {
        self.source.expected_hash().filter(|_| self.options.verify > Verify::None)
    }

    /// Is the source still what it was?
    ///
    /// # Errors
    /// [`JobError::Source`] for a file that changed, [`JobError::Verification`] for an image that is another one now.
    pub(super) async fn check_unchanged(&self) -> Result<(), JobError> {
        self.source_unchanged().await.map(|_| ())
    }

    /// [`Self::check_unchanged`], and an image as it is now.
    pub(super) async fn source_unchanged(&self) -> Result<Option<Image>, JobError> {
        match &self.source {
            Source::Local(raw) => Ok(raw.check_unchanged().map(|()| None)?),
            Source::Pipe(_) => Ok(None),
            Source::Glance { session, image, .. } => {
                let now = self.cancel.guard(session.image(&image.id)).await.map_err(|_| JobError::interrupted())??;
                if let Some(what) = image.differs_from(&now) {
                    return Err(JobError::Verification(format!(
                        "the source image {} is not what it was when this run began: its {what} differs",
                        image.id
                    )));
                }
                Ok(Some(now))
            }
        }
    }

    pub(super) fn report(&self, surveyed: ReportOf) -> Report {
        Report::assemble(ReportParts {
            source: self.source.shown(),
            destination: surveyed.destination,
            virtual_bytes: surveyed.virtual_bytes,
            stored_bytes: surveyed.stored_bytes,
            image_bytes: surveyed.image_bytes,
            started: self.started,
            access: surveyed.access,
            read_back: surveyed.read_back,
            read_twice: surveyed.read_twice,
            verify: match self.options.verify {
                Verify::None => "none",
                Verify::Hash => "hash",
                Verify::Readback => "readback",
            },
            compression: self.codec().map_or("none", Codec::name),
            tiers: surveyed.tiers,
            source_hash: HashReport::checked(surveyed.expected),
            image_hash: surveyed.image_hash,
            stages: surveyed.stages,
            retries: self.retries.lines(),
            progress: &self.progress,
        })
    }
}

/// What a report needs beside the job.
pub(super) struct ReportOf {
    pub(super) destination: String,
    pub(super) virtual_bytes: u64,
    pub(super) stored_bytes: u64,
    pub(super) image_bytes: u64,
    pub(super) access: Access,
    pub(super) read_back: bool,
    pub(super) read_twice: bool,
    pub(super) tiers: Tiers,
    pub(super) expected: Option<ExpectedHash>,
    pub(super) image_hash: HashReport,
    pub(super) stages: Vec<engine::MetricsSnapshot>,
}
