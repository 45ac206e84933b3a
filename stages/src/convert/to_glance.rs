//! A source becomes a new image in Glance: survey, layout, emit.
//!
//! The image is made (POST) only after the survey, when its exact length is known and compared with the quota, and its id
//! is chosen here, so that it can be removed even if the answer to the POST is lost. It counts as done, and gets
//! `virta_verified`, only when the source's hash agreed and Glance's size and hash of it are ours. Anything else,
//! an interrupt included, deletes it.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use engine::{BufferPool, CancelToken, ErrorKind, Pipeline, RunError};
use serde_json::json;
use tokio::runtime::Handle;

use super::{
    Budget, JobError, Notices, Options, Report,
    report::{HashReport, ReportParts},
    source::{Source, retry_lines},
    to_file::{LEASE_ALIGN, collect_and_hash},
};
use crate::{
    extent::EXTENT_BYTES,
    glance::Upload,
    hash::{ExpectedHash, HashLane, Hasher},
    openstack::{
        ApiError, Image, Session,
        image::{SOURCE_HASH, SOURCE_ID, VERIFIED, check_properties, converted_record},
    },
    progress::{Phase, Progress},
    qcow2::{Geometry, Layout, StreamWriter},
    store::{Collect, Emit, EmitReport, Keep, MemoryStore, Survey},
    text::size,
    units::to_usize,
};

/// How long Glance may take to make an uploaded image `active`.
const ACTIVE_WITHIN: Duration = Duration::from_secs(900);
/// How long the answer to a POST is waited for after an interrupt.
const ANSWER_AFTER_CANCEL: Duration = Duration::from_secs(3);
/// How long removing a half-made image may take.
const CLEAN_UP_WITHIN: Duration = Duration::from_secs(60);

/// What a name in Glance means for a conversion.
pub enum NameCheck {
    /// No finished image has it. Unfinished ones of this very source may: dead runs left them, or live ones make them.
    Free {
        /// Their ids.
        unfinished: Vec<String>,
    },
    /// This source's own finished conversion has it.
    AlreadyDone(Box<Image>),
}

/// Who has this name already? Asked while the source is looked up; [`check_name`] decides.
///
/// # Errors
/// [`JobError::Usage`] if the name cannot be an image's: empty, too long, or a UUID.
pub async fn images_of_name(session: &Session, name: &str) -> Result<Vec<Image>, JobError> {
    if name.is_empty() {
        return Err(JobError::Usage("glance: needs a name for the new image, as in glance:my-server-qcow2".to_owned()));
    }
    if name.chars().count() > 255 {
        return Err(JobError::Usage("the new image's name is longer than Glance's 255 characters".to_owned()));
    }
    if uuid::Uuid::parse_str(name).is_ok() {
        return Err(JobError::Usage(format!(
            "{name} is an id: a conversion always makes a new image and never writes into one that is there. Give it a name"
        )));
    }
    Ok(session.images_named(name).await?)
}

/// May an image of this name be made, with `taken` having it?
///
/// # Errors
/// [`JobError::Usage`] if it is taken and `force` is not given; it lists who has it.
pub fn check_name(taken: Vec<Image>, name: &str, source: &Source, force: bool) -> Result<NameCheck, JobError> {
    let (taken, waiting): (Vec<Image>, Vec<Image>) = taken.into_iter().partition(|image| image.status == "active");
    let unfinished = || {
        let Source::Glance { image: source, .. } = source else { return Vec::new() };
        let of_source = waiting.iter().filter(|image| image.property(SOURCE_ID) == Some(&source.id));
        of_source.filter(|image| matches!(image.status.as_str(), "queued" | "saving")).map(Image::shown_id).collect()
    };
    if let Source::Glance { image: source, .. } = source {
        let ours = |image: &&Image| image.property(SOURCE_ID) == Some(&source.id) && image.id != source.id;
        if let Some(done) = taken.iter().find(|image| ours(image) && is_finished(image, source)) {
            return Ok(NameCheck::AlreadyDone(Box::new(done.clone())));
        }
        if let Some(unproven) = taken.iter().find(ours).filter(|_| !force) {
            return Err(JobError::Usage(format!(
                "image {name} ({id}) says that it was made from this source, but not that it was verified since: the run that made it \
                 may have died, or it is a snapshot that inherited the mark. Take another name; or, if nobody needs it, remove it and \
                 start again: openstack image delete {id}",
                name = crate::text::printable(name),
                id = unproven.shown_id()
            )));
        }
    }
    if taken.is_empty() || force {
        return Ok(NameCheck::Free { unfinished: unfinished() });
    }
    let lines: Vec<String> = taken.iter().map(|image| format!("\n    {}", image.line())).collect();
    Err(JobError::Usage(format!(
        "an image called {} is there already; choose another name, or make a second one with --force:{}",
        crate::text::printable(name),
        lines.concat()
    )))
}

/// Is `image` a conversion of `source` that was verified? Properties alone prove nothing: Nova copies them onto the snapshots
/// of servers that boot from an image. The mark has to name the hash of the very image that carries it.
fn is_finished(image: &Image, source: &Image) -> bool {
    let hash = |image: &Image| image.expected_hash().map(|hash| format!("{}:{}", hash.algorithm, hash.value));
    let Some(own) = hash(image) else { return false };
    image.disk_format.as_deref() == Some("qcow2")
        && image.owner == source.owner
        && image.property(VERIFIED) == Some(&verified_mark(&own))
        && image.property(SOURCE_HASH).map(str::to_owned) == hash(source)
}

/// The value of `virta_verified` for an image of this hash. Glance keeps 255 characters.
fn verified_mark(hash: &str) -> String {
    format!("hash:{hash}").chars().take(255).collect()
}

/// Converts `source` into a new image called `name`.
///
/// # Errors
/// [`JobError`]; no image is left behind then, or the error says which.
///
/// # Cancel safety
/// Cancel with `cancel`: the half-made image is deleted before this returns. If the future is dropped instead, the image
/// stays, `queued` or `saving`, with `virta_run` in it.
pub async fn to_glance(
    source: &Source,
    session: &Session,
    name: &str,
    options: &Options,
    progress: &Progress,
    notices: &Arc<dyn Notices>,
    cancel: &CancelToken,
) -> Result<Report, JobError> {
    let started = Instant::now();
    check_properties(&options.properties).map_err(JobError::Usage)?;
    let geometry = Geometry::new(source.bytes(), options.cluster_bits)?;
    let budget = Budget::split(options.memory_bytes, source.leases(options), true)?;
    notices.note(&source.line());
    notices.note(&format!(
        "destination: new image {}, qcow2 with {} clusters",
        crate::text::printable(name),
        size(options.cluster_bits.cluster_bytes())
    ));
    notices.note(&format!("{}; {} workers, {} connections", budget.describe(), options.workers, options.connections));
    if let Some(warning) = budget.index_warning(geometry) {
        notices.warn(&warning);
    }
    if let Some(warning) = budget.store_warning(source.bytes()) {
        notices.note(&warning);
    }
    if let Some(warning) = budget.available_warning() {
        notices.warn(&warning);
    }
    let expected = source.expected_hash();
    if expected.is_none() && matches!(source, Source::Glance { .. }) {
        notices.warn(
            "Glance has no hash of the source (as after a direct Ceph snapshot): what is read cannot be checked against one",
        );
    }
    // survey
    progress.set_virtual_bytes(source.bytes());
    progress.set_hash_expected(if expected.is_some() { source.bytes() } else { 0 });
    progress.set_phase(Phase::Reading);
    let retries = Arc::new(Mutex::new(Vec::new()));
    let pool = BufferPool::new(budget.leases, to_usize(EXTENT_BYTES), LEASE_ALIGN, cancel);
    let store = MemoryStore::new(budget.store_bytes, budget.memory_bytes, geometry.virtual_bytes());
    let (pipeline, source_handle) = source.pipeline(options, &pool, progress, &retries, notices, cancel);
    let cluster_bits = options.cluster_bits;
    let pipeline = pipeline.cpu("keep", options.workers.get(), || Keep { store: store.clone(), cluster_bits });
    let collect = Collect { geometry, source_bytes: source.bytes(), index_limit_bytes: budget.index_bytes };
    let lane = HashLane { expected: expected.clone(), file: None, progress: progress.clone() };
    let (pipeline, survey) = collect_and_hash(pipeline, &budget, collect, lane);
    let surveying = pipeline.start(&Handle::current());
    let (survey, quota_left) = tokio::join!(survey.one(), cancel.guard(session.quota_left_bytes()));
    let quota_left = quota_left.unwrap_or(None);
    let Some(survey) = survey else {
        surveying.join().await?;
        return Err(JobError::bug("the survey left no report"));
    };
    source.check_unchanged()?;

    // layout
    let survey = Arc::new(survey);
    let layout = Arc::new(Layout::plan(geometry, &survey.map)?);
    let image_bytes = layout.file_bytes();
    progress.set_image_bytes(image_bytes);
    notices.note(&format!("the image will be {}, exactly {image_bytes} bytes", size(image_bytes)));
    if let Some(left) = quota_left
        && image_bytes > left
    {
        return Err(JobError::Refused(format!(
            "the quota for images has {} left, and the new one needs {} beside the old. The way out: convert to a local file \
             (virta convert {} {}.qcow2), check it, delete the raw image, then upload the file",
            size(left),
            size(image_bytes),
            crate::text::shell_word(&source.shown()),
            crate::text::shell_word(name),
        )));
    }

    // emit
    let id = uuid::Uuid::new_v4().hyphenated().to_string();
    let run = uuid::Uuid::new_v4().hyphenated().to_string();
    let source_image = match source {
        Source::Glance { image, .. } => Some(&**image),
        Source::Local(_) => None,
    };
    let record = converted_record(source_image, &id, name, geometry.virtual_bytes(), &run, &options.properties);
    let job = EmitJob { session, survey: &survey, layout: &layout, id: &id, record: &record, progress, cancel };
    let made = job.run(surveying).await;
    let made = match made {
        Ok(made) => made,
        Err(error) => return Err(clean_up(session, &id, error).await),
    };
    if source_image.is_some_and(|image| image.protected == Some(true))
        && let Err(error) = session.set_property(&id, "protected", &json!(true)).await
    {
        notices.warn(&format!("the source is protected, the new image could not be: {error}"));
    }
    let source_report = source_handle.report().await;
    Ok(Report::assemble(ReportParts {
        source: source.shown(),
        destination: format!("glance:{id}"),
        virtual_bytes: geometry.virtual_bytes(),
        stored_bytes: survey.map.count() * cluster_bits.cluster_bytes(),
        image_bytes,
        started,
        access: source_report.access,
        retried_bytes: source_report.retried_bytes,
        source_hash: HashReport::checked(expected),
        image_hash: made.image_hash,
        stages: made.stages,
        retries: retry_lines(&retries),
        progress,
    }))
}

struct EmitJob<'a> {
    session: &'a Session,
    survey: &'a Arc<Survey>,
    layout: &'a Arc<Layout>,
    id: &'a str,
    record: &'a serde_json::Map<String, serde_json::Value>,
    progress: &'a Progress,
    cancel: &'a CancelToken,
}

struct Made {
    image_hash: HashReport,
    stages: Vec<engine::MetricsSnapshot>,
}

impl EmitJob<'_> {
    /// Makes the image, sends its bytes, waits for the source's hash and for Glance, and compares.
    async fn run(&self, surveying: engine::Running) -> Result<Made, JobError> {
        if let Err(error) = self.create_or_stop().await {
            // what stopped it may be the survey's hash lane: its error says more
            return Err(match surveying.join().await {
                Err(failed @ RunError::Failed { .. }) if self.cancel.is_cancelled() => failed.into(),
                _ => error,
            });
        }
        self.progress.set_phase(Phase::Uploading);
        let emit = Emit {
            survey: Arc::clone(self.survey),
            layout: Arc::clone(self.layout),
            hasher: Hasher::new("sha512").ok_or_else(|| JobError::bug("sha512 is known"))?,
        };
        let upload = Upload {
            session: self.session.clone(),
            image_id: self.id.to_owned(),
            total_bytes: self.layout.file_bytes(),
            progress: self.progress.clone(),
        };
        let mut emit = Some(emit);
        let (pipeline, emitted) =
            Pipeline::new(self.cancel).threads_reporting("emit", 1, || emit.take().expect("one worker asks once"));
        let emitting = pipeline.network("upload", upload).start(&Handle::current());
        let (emitted_stages, surveyed_stages) = {
            let emitting = async {
                let result = emitting.join().await;
                self.progress.set_phase(Phase::Finishing);
                result
            };
            let (emitting, surveying) = tokio::join!(emitting, surveying.join());
            both(emitting, surveying)?
        };
        let emitted = emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?;
        let image = self
            .cancel
            .guard(self.wait_until_active())
            .await
            .map_err(|_| JobError::Interrupted("interrupted".to_owned()))
            .flatten()?;
        let image_hash = self.compare(&image, &emitted)?;
        let verified = match (&image_hash.algorithm, &image_hash.value) {
            (Some(algorithm), Some(value)) if image_hash.checked => verified_mark(&format!("{algorithm}:{value}")),
            _ => format!("size:{}", self.layout.file_bytes()),
        };
        match self.cancel.guard(self.session.set_property(self.id, VERIFIED, &json!(verified))).await {
            Ok(set) => set?,
            Err(_) => return Err(JobError::Interrupted("interrupted".to_owned())),
        }
        Ok(Made { image_hash, stages: surveyed_stages.into_iter().chain(emitted_stages).collect() })
    }

    /// [`Self::create`]; when the run is cancelled meanwhile, its answer is still waited for, for a while: the image that it
    /// makes has to be there before it can be deleted.
    async fn create_or_stop(&self) -> Result<(), JobError> {
        let create = self.create();
        tokio::pin!(create);
        tokio::select! {
            result = &mut create => result,
            () = self.cancel.cancelled() => {
                let _ = tokio::time::timeout(ANSWER_AFTER_CANCEL, create).await;
                Err(JobError::Interrupted("interrupted".to_owned()))
            }
        }
    }

    async fn create(&self) -> Result<(), JobError> {
        match self.session.create_image(self.record).await {
            Ok(_) => Ok(()),
            // The answer may have been lost on its way: the id is ours, so the image tells.
            Err(error) if error.is_retryable() => match self.session.image(self.id).await {
                Ok(_) => Ok(()),
                Err(_) => match self.session.create_image(self.record).await {
                    Ok(_) => Ok(()),
                    Err(again) => Err(again.into()),
                },
            },
            Err(error) => Err(error.into()),
        }
    }

    async fn wait_until_active(&self) -> Result<Image, JobError> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(200);
        loop {
            let image = match self.session.image(self.id).await {
                Ok(image) => image,
                // everything is sent: a service that stumbles now gets the time to get up again
                Err(error) if error.is_retryable() && started.elapsed() < ACTIVE_WITHIN => {
                    tokio::time::sleep(Duration::from_secs(5)).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            match image.status.as_str() {
                "active" => return Ok(image),
                "saving" | "importing" | "uploading" if started.elapsed() < ACTIVE_WITHIN => {}
                other => {
                    return Err(JobError::Refused(format!(
                        "the whole image was sent, but Glance has it as {other} after {} s",
                        started.elapsed().as_secs()
                    )));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Glance's size and hash of the new image against our own.
    fn compare(&self, image: &Image, emitted: &EmitReport) -> Result<HashReport, JobError> {
        if image.size != Some(emitted.bytes) {
            return Err(JobError::Verification(format!(
                "the new image has {} bytes in Glance, but {} were sent",
                image.size.map_or_else(|| "no".to_owned(), |bytes| bytes.to_string()),
                emitted.bytes
            )));
        }
        let Some(theirs) = image.expected_hash() else {
            return Ok(HashReport { algorithm: Some("sha512".to_owned()), value: Some(emitted.digest.clone()), checked: false });
        };
        let ours = if theirs.algorithm == "sha512" { emitted.digest.clone() } else { self.digest(&theirs) };
        if ours != theirs.value.to_ascii_lowercase() {
            return Err(JobError::Verification(format!(
                "Glance's {} of the new image is {}, ours is {ours}: it did not arrive as it was sent",
                theirs.algorithm, theirs.value
            )));
        }
        Ok(HashReport { algorithm: Some(theirs.algorithm), value: Some(ours), checked: true })
    }

    /// The image's digest by the algorithm that this Glance uses, out of the store once more.
    fn digest(&self, theirs: &ExpectedHash) -> String {
        let Some(mut hasher) = Hasher::new(&theirs.algorithm) else { return String::new() };
        for piece in StreamWriter::new(self.layout, &self.survey.map).metadata() {
            hasher.update(&piece);
        }
        for kept in &self.survey.kept {
            hasher.update(kept);
        }
        hasher.finish()
    }
}

type Stages = Vec<engine::MetricsSnapshot>;

/// The outcome of two runs that share a token: the one that knows the cause tells it.
fn both(a: Result<Stages, RunError>, b: Result<Stages, RunError>) -> Result<(Stages, Stages), JobError> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        // a failure that is itself a consequence (a port dropped by the stage that failed) is a bug's kind
        (Err(RunError::Failed { error, .. }), Err(other @ RunError::Failed { .. })) if error.kind == ErrorKind::Bug => {
            Err(other.into())
        }
        (Err(failed @ RunError::Failed { .. }), _) | (_, Err(failed @ RunError::Failed { .. })) => Err(failed.into()),
        (Err(cancelled), Err(other)) => {
            let shared = |error: &RunError| matches!(error, RunError::Cancelled(why) if why.starts_with("cancelled with"));
            Err(if shared(&cancelled) { other } else { cancelled }.into())
        }
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error.into()),
    }
}

/// Removes the half-made image, whatever happened, and says so if even that fails.
async fn clean_up(session: &Session, id: &str, error: JobError) -> JobError {
    let deleting = async {
        session.delete_image(id).await?;
        // a POST that was still on its way may land behind the DELETE
        tokio::time::sleep(Duration::from_millis(300)).await;
        session.delete_image(id).await
    };
    match tokio::time::timeout(CLEAN_UP_WITHIN, deleting).await {
        Ok(Ok(())) => error,
        Ok(Err(left)) => JobError::LeftBehind { id: id.to_owned(), error: Box::new(error), left: Some(left) },
        Err(_) => JobError::LeftBehind { id: id.to_owned(), error: Box::new(error), left: None::<ApiError> },
    }
}
