//! The first part of every pipeline: from the source to classified extents.

use std::{num::NonZeroUsize, sync::Arc};

use engine::{BufferPool, Pipeline, ReportHandle};

use super::{Job, Source};
use crate::{
    access::Access,
    disk::{
        pipe::ReadPipe,
        read::{PlanReads, ReadExtents},
    },
    extent::Classified,
    glance::{Fetch, Remote, fetch::FetchPlan},
    watermark::Watermark,
    zero::classify::Classify,
};

/// How to learn how a source was read.
pub(super) enum SourceHandle {
    Known(Access),
    Glance(ReportHandle<Access>),
}

impl SourceHandle {
    pub(super) async fn access(self) -> Access {
        match self {
            Self::Known(access) => access,
            Self::Glance(handle) => handle.one().await.unwrap_or(Access::Sequential),
        }
    }
}

impl Job {
    /// The source image as something to read, if it is one.
    pub(super) fn source_remote(&self) -> Option<Remote> {
        let Source::Glance { session, image, bytes } = &self.source else { return None };
        debug_assert_eq!(image.size, Some(*bytes));
        Some(Remote { again: false, ..self.remote(session, image) })
    }

    /// The pipeline's first part: from the source to classified extents.
    pub(super) fn read_source(&self, pool: &BufferPool, watermark: &Watermark) -> (Pipeline<Classified>, SourceHandle) {
        let (options, cancel, progress) = (&self.options, &self.cancel, &self.progress);
        let cluster_bits = options.cluster_bits;
        let workers = options.workers.get();
        let classify = || Classify { cluster_bits, progress: progress.clone() };
        match &self.source {
            Source::Local(raw) => {
                let plan = || PlanReads { source: Arc::clone(raw), cluster_bits, watermark: watermark.clone() };
                let read =
                    || ReadExtents { source: Arc::clone(raw), pool: pool.clone(), cluster_bits, progress: progress.clone() };
                let pipeline = Pipeline::new(cancel).threads("plan", 1, plan).port(16).threads("read", workers, read);
                (pipeline, SourceHandle::Known(Access::Random))
            }
            Source::Pipe(pipe) => {
                let read = || ReadPipe { source: pipe.clone(), pool: pool.clone() };
                let pipeline = Pipeline::new(cancel).threads("read", 1, read).cpu("classify", workers, classify);
                (pipeline, SourceHandle::Known(Access::Once))
            }
            Source::Glance { .. } => {
                let fetch = Fetch {
                    remote: self.source_remote().expect("it is an image"),
                    plan: FetchPlan::All,
                    only_raw: true,
                    connections: connections_within(options.connections, pool),
                    all_at_once: options.all_connections,
                    pool: pool.clone(),
                    watermark: watermark.clone(),
                };
                let (pipeline, report) = Pipeline::new(cancel).network_reporting("fetch", fetch);
                (pipeline.cpu("classify", workers, classify), SourceHandle::Glance(report))
            }
        }
    }
}

/// A connection without a lease could only wait.
pub(super) fn connections_within(wanted: NonZeroUsize, pool: &BufferPool) -> NonZeroUsize {
    wanted.min(NonZeroUsize::new(pool.count() / 2).unwrap_or(NonZeroUsize::MIN))
}
