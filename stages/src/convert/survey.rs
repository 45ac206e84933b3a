//! The survey: the source read once, so that the image's exact layout is known; and emissions of the image out of it.

use std::sync::{Arc, Mutex};

use engine::{
    BlockingStage, BufferPool, CancelToken, Inlet, NoInput, Outlet, Pipeline, ReportHandle, Running, StageContext, StageError,
    TokioLocal,
};
use tokio::runtime::Handle;

use super::{
    job::{Job, LEASE_ALIGN},
    reading::connections_within,
    report::Tiers,
    source::Source,
};
use crate::{
    access::Access,
    budget::Budget,
    disk::{
        Backend, choose_backend,
        pwrite::PwriteQueue,
        uring::{UringExecutor, UringQueue},
    },
    error::JobError,
    extent::{Chunk, EXTENT_BYTES, StoredExtent, StoredRun},
    glance::{Fetch, Trickle, fetch},
    hash::{ExpectedHash, HashLane, Hasher},
    progress::Phase,
    qcow2::{Geometry, Layout},
    store::{
        Collect, Emit, EmitReport, Keep, MemoryStore, ReadAgain, Rebuilt, Recheck, ScratchFile, ScratchWrite, Survey, Tier,
        collect::HELD_MAX, keep::Overflow,
    },
    text::size,
    units::{to_u64, to_usize},
    watermark::Watermark,
};

/// Writes of the scratch file in flight.
const SCRATCH_DEPTH: usize = 4;
/// Threads that call `pwrite` where there is no io_uring.
const PWRITE_THREADS: usize = 2;

/// What a survey found, and what still goes on.
pub(super) struct Surveyed {
    pub(super) survey: Arc<Survey>,
    pub(super) layout: Arc<Layout>,
    pub(super) scratch: Option<ScratchFile>,
    pub(super) access: Access,
    /// The hash lane may still be at it; joined before anything counts as done.
    pub(super) running: Option<Running>,
    pub(super) expected: Option<ExpectedHash>,
    pub(super) tiers: Tiers,
    budget: Budget,
}

/// A source that has nothing to give.
struct Nothing;

impl BlockingStage for Nothing {
    type In = NoInput;
    type Out = Rebuilt;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Rebuilt>, _: StageContext) -> Result<(), StageError> {
        outlet.finish();
        Ok(())
    }
}

impl Job {
    /// What is said of the tiers before the first byte is read.
    fn announce_tiers(&self, budget: &Budget) {
        if self.source.bytes().is_some_and(|bytes| bytes <= budget.store_bytes) {
            return;
        }
        let scratch = match &self.options.scratch {
            Some(folder) if self.options.scratch_limit_bytes == u64::MAX => {
                format!("then a scratch file in {}, until the disk is full", folder.display())
            }
            Some(folder) => {
                format!("then up to {} in a scratch file in {}", size(self.options.scratch_limit_bytes), folder.display())
            }
            None => "no scratch file".to_owned(),
        };
        let last = match &self.source {
            Source::Pipe(_) => {
                "a pipe cannot be read again: data beyond that ends the run, and raising --memory or giving --scratch DIR helps"
            }
            Source::Glance { .. } => "data beyond that is fetched twice",
            Source::Local(_) => "data beyond that is read twice",
        };
        self.reporter.note(&format!("stored data: up to {} in memory, {scratch}; {last}", size(budget.store_bytes)));
    }

    /// Reads the source once: what is in it, where it is kept, and so the exact layout of the image.
    ///
    /// The watermark and the window bound what is in memory for the hash lane alone.
    pub(super) async fn survey(&self, destination: &str) -> Result<Surveyed, JobError> {
        let options = &self.options;
        let budget = Budget::split(options.memory_bytes, self.source.leases(options), true)?;
        self.announce(destination, &budget)?;
        self.announce_tiers(&budget);
        let expected = self.expected_hash();
        self.progress.set_virtual_bytes(self.source.bytes().unwrap_or(0));
        self.progress.set_hash_expected(expected.as_ref().and_then(|_| self.source.bytes()).unwrap_or(0));
        self.progress.set_phase(Phase::Reading);

        let scratch = options.scratch.as_deref().map(ScratchFile::create).transpose()?;
        let overflow = match (&self.source, &scratch, &expected) {
            (Source::Pipe(_), None, _) => Overflow::Refuse { memory_bytes: budget.memory_bytes },
            (_, Some(_), _) | (_, _, Some(_)) => Overflow::PassOn,
            (_, None, None) => Overflow::LetGo,
        };
        let store = MemoryStore::new(budget.store_bytes, overflow).with_buffers(options.free_list.clone());
        let pool = BufferPool::new(budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, &self.cancel);
        let watermark = Watermark::new(budget.window_bytes);
        let (pipeline, source) = self.read_source(&pool, &watermark);
        drop(pool);
        let cluster_bits = options.cluster_bits;
        let pipeline =
            pipeline.cpu("keep", options.workers.get(), || Keep { store: store.clone(), encoder: self.encoder(), cluster_bits });
        let pipeline = match &scratch {
            Some(scratch) => self.with_scratch(pipeline, scratch, budget.memory_bytes)?,
            None => pipeline,
        };
        let collect = Collect {
            cluster_bits,
            source_bytes: self.source.bytes(),
            index_limit_bytes: budget.index_bytes,
            survey: true,
            watermark: Some(watermark.clone()),
        };
        let lane = HashLane {
            expected: expected.clone(),
            file: scratch.as_ref().map(open_again).transpose()?,
            cluster_bits,
            codec: self.codec(),
            progress: self.progress.clone(),
            watermark: Some(watermark),
        };
        let (pipeline, survey) = collect_and_hash(pipeline, &budget, collect, lane);
        let running = pipeline.start(&Handle::current());
        let Some(survey) = survey.one().await else {
            running.join().await?;
            return Err(JobError::bug("the survey left no report"));
        };
        let access = source.access().await;
        if let Err(error) = self.check_unchanged().await {
            return Err(cause_of(error, running).await);
        }
        let survey = Arc::new(survey);
        let geometry = Geometry::new(survey.source_bytes, cluster_bits)?;
        self.progress.set_virtual_bytes(survey.source_bytes);
        let layout = Arc::new(Layout::plan(geometry, &survey.index, self.codec())?);
        self.progress.set_image_bytes(layout.file_bytes());
        let mut tiers = Tiers { memory_bytes: store.used_bytes(), source_bytes: 0 };
        let mut again_bytes = 0;
        for extent in &survey.extents {
            if matches!(extent.kept, Tier::Source) {
                tiers.source_bytes += extent.guest.bytes();
                again_bytes = if access == Access::Random { again_bytes + extent.guest.bytes() } else { extent.guest.end.0 };
            }
        }
        self.reporter.note(&format!("the image will be {}, exactly {} bytes", size(layout.file_bytes()), layout.file_bytes()));
        if tiers.source_bytes > 0 {
            self.reporter.note(&format!(
                "{} of the disk's data did not fit and will be read again: {} to {} ({again_bytes} bytes)",
                size(tiers.source_bytes),
                size(again_bytes),
                if access == Access::Random { "read by ranges" } else { "fetch in one stream" },
            ));
        }
        Ok(Surveyed { survey, layout, scratch, access, running: Some(running), expected, tiers, budget })
    }

    fn with_scratch(
        &self,
        pipeline: Pipeline<StoredExtent>,
        scratch: &ScratchFile,
        memory_bytes: u64,
    ) -> Result<Pipeline<StoredExtent>, JobError> {
        let folder = self.options.scratch.as_deref().ok_or_else(|| JobError::bug("a scratch file without a folder"))?;
        let file = open_again(scratch)?;
        // what a pipe gave and nothing keeps is lost
        let refuse = matches!(self.source, Source::Pipe(_)).then_some(memory_bytes);
        let (limit_bytes, progress, retries) = (self.options.scratch_limit_bytes, self.progress.clone(), self.retries.clone());
        let io = |error| StageError::new(engine::ErrorKind::Io, error);
        Ok(match choose_backend(self.options.io, folder)? {
            Backend::Uring => pipeline.ring("scratch", UringExecutor, move || {
                let queue = UringQueue::new(file, SCRATCH_DEPTH).map_err(io)?;
                Ok(ScratchWrite { queue, limit_bytes, refuse, progress, retries })
            }),
            Backend::Pwrite => pipeline.ring("scratch", TokioLocal, move || {
                let queue = PwriteQueue::new(file, SCRATCH_DEPTH, PWRITE_THREADS).map_err(io)?;
                Ok(ScratchWrite { queue, limit_bytes, refuse, progress, retries })
            }),
        })
    }
}

impl Surveyed {
    /// The image's bytes, strictly forward, as often as one likes. `cancel` is the emission's own token.
    ///
    /// # Errors
    /// If the source is not what it was, or cannot be asked.
    pub(super) async fn emission(
        &self,
        job: &Job,
        cancel: &CancelToken,
        hasher: Hasher,
    ) -> Result<(Pipeline<Chunk>, ReportHandle<EmitReport>), JobError> {
        let wanted = Arc::new(self.survey.wanted());
        let reads_again = !wanted.is_empty();
        if reads_again {
            job.check_unchanged().await?;
        }
        let workers = job.options.workers.get();
        let recheck = || Recheck::new(Arc::clone(&self.survey), job.options.compression);
        let pipeline = if reads_again {
            let pool = BufferPool::new(self.budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, cancel);
            let again = match &job.source {
                Source::Local(source) => {
                    let claimed = Arc::new(Mutex::new(0));
                    Pipeline::new(cancel).threads("again", workers, || ReadAgain {
                        source: Arc::clone(source),
                        pool: pool.clone(),
                        wanted: Arc::clone(&wanted),
                        claimed: Arc::clone(&claimed),
                    })
                }
                Source::Glance { .. } => {
                    let mut remote = job.source_remote().ok_or_else(|| JobError::bug("an image is remote"))?;
                    remote.again = true;
                    remote.cancel = cancel.clone();
                    let fetch = Fetch {
                        remote,
                        plan: fetch::FetchPlan::Again { access: self.access, wanted },
                        only_raw: true,
                        connections: connections_within(job.options.connections, &pool),
                        all_at_once: job.options.all_connections,
                        pool,
                        watermark: Watermark::new(u64::MAX),
                    };
                    Pipeline::new(cancel).network("again", fetch)
                }
                Source::Pipe(_) => return Err(JobError::bug("a pipe cannot be read again")),
            };
            again.cpu("recheck", workers, recheck)
        } else {
            Pipeline::new(cancel).threads("again", 1, || Nothing)
        };
        let mut emit = Some(Emit {
            survey: Arc::clone(&self.survey),
            layout: Arc::clone(&self.layout),
            scratch: self.scratch.as_ref().map(open_again).transpose()?,
            hasher,
            decoder: None,
        });
        let (pipeline, emitted) = pipeline.threads_reporting("emit", 1, || emit.take().expect("one worker asks once"));
        let pipeline =
            if reads_again { pipeline.network("trickle", Trickle { every: job.options.patience.trickle }) } else { pipeline };
        Ok((pipeline, emitted))
    }
}

fn open_again(scratch: &ScratchFile) -> Result<std::fs::File, JobError> {
    scratch.handle().map_err(|error| JobError::Refused(format!("opening the scratch file again: {error}")))
}

/// What interrupted a wait may be a stage of this run: its error says more.
pub(super) async fn cause_of(error: JobError, running: Running) -> JobError {
    match (error, running.join().await) {
        (JobError::Interrupted(_), Err(cause)) => cause.into(),
        (error, _) => error,
    }
}

/// Adds the collector and the hash lane, which may lag by as many extents as the disk has, as far as their records (not
/// their bytes) fit into a quarter of the index's memory.
pub(super) fn collect_and_hash(
    pipeline: Pipeline<StoredExtent>,
    budget: &Budget,
    collect: Collect,
    lane: HashLane,
) -> (Pipeline<engine::NoOutput>, ReportHandle<Survey>) {
    // at worst every cluster of an extent is a run of its own
    let runs = EXTENT_BYTES / collect.cluster_bits.cluster_bytes();
    let record_bytes = (runs * to_u64(size_of::<StoredRun>() + size_of::<crate::extent::Record>())).max(1);
    let lag = (budget.index_bytes / 4 / record_bytes).min(collect.source_bytes.unwrap_or(u64::MAX).div_ceil(EXTENT_BYTES));
    let lag = to_usize(lag).clamp(16, HELD_MAX);
    let (mut collect, mut lane) = (Some(collect), Some(lane));
    let (pipeline, survey) = pipeline.port(64).threads_reporting("collect", 1, || collect.take().expect("one worker asks once"));
    (pipeline.port(lag).threads("hash", 1, || lane.take().expect("one worker asks once")), survey)
}
