//! A source becomes a new image in Glance: survey, layout, emit.
//!
//! The image is made (POST) only after the survey, when its exact length is known and compared with the quota, and its id
//! is chosen here, so that it can be removed even if the answer to the POST is lost. It counts as done, and gets
//! `virta_verified`, only when the source's hash agreed, Glance's size and hash of it are ours, and, where asked for, what Glance
//! serves decodes to the source's bytes. Anything else, an interrupt included, deletes it.
//!
//! # Uploads that fail
//! | what happened | what is done |
//! |---|---|
//! | cut, silent, 5xx, 408, 429, 401; the image is `queued` again | sent again from the store |
//! | the image stays `saving` (a worker died), is gone, or got a 5xx of its own | deleted; a new one is made |
//! | the answer alone was lost, and Glance has all bytes | success, if size and hash say so |
//! | 400, 403, 409, 413, 415 | ends the run at once, with Glance's own words |

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use engine::{ErrorKind, RunError};
use reqwest::StatusCode;
use serde_json::json;
use tokio::runtime::Handle;

use super::{
    After, Job, JobError, Report, Source, Verify,
    job::{ReportOf, Surveyed, cause_of},
    names::verified_mark,
    readback::{Target, against_survey},
    report::HashReport,
    retire,
};
use crate::{
    glance::{ImageFile, Upload, upload::UploadError},
    hash::{ExpectedHash, Hasher},
    openstack::{
        ApiError, Image, Session,
        image::{VERIFIED, check_properties, converted_record},
    },
    progress::Phase,
    store::EmitReport,
    text::{causes, printable, shell_word, size},
};

/// Converts the job's source into a new image called `name`.
///
/// # Errors
/// [`JobError`]; no image is left behind then, or the error says which.
///
/// # Cancel safety
/// Cancel with the job's token: the half-made image is deleted before this returns. If the future is dropped instead, the image
/// stays, `queued` or `saving`, with `virta_run` in it.
pub async fn to_glance(job: &Job, session: &Session, name: &str) -> Result<Report, JobError> {
    check_properties(&job.options.properties).map_err(JobError::Usage)?;
    let quota = tokio::spawn({
        let session = session.clone();
        async move { session.quota_left_bytes().await }
    });
    let mut surveyed = job.survey(&format!("new image {}", printable(name))).await?;
    let image_bytes = surveyed.layout.file_bytes();
    let running = surveyed.running.take().ok_or_else(|| JobError::bug("a survey runs once"))?;
    let quota_left = match job.cancel.guard(quota).await {
        Ok(left) => left.unwrap_or(None),
        Err(_) => return Err(cause_of(JobError::interrupted(), running).await),
    };
    if let Some(left) = quota_left
        && image_bytes > left
    {
        return Err(JobError::Refused(format!(
            "the quota for images has {} left, and the new one needs {} beside the old. The way out: convert to a local file \
             (virta convert {} {}.qcow2), check it, delete the raw image, then upload the file",
            size(left),
            size(image_bytes),
            shell_word(&job.source.shown()),
            shell_word(name),
        )));
    }
    let emission = Emission {
        job,
        session,
        surveyed: &surveyed,
        name,
        run: job.options.run.clone().unwrap_or_else(|| uuid::Uuid::new_v4().hyphenated().to_string()),
        made: Mutex::new(Vec::new()),
    };
    let emitting = async {
        let result = emission.until_active().await;
        // where the job is cancelled already, its own cause is on its way, and nothing may come before it
        if result.is_err() && !job.cancel.is_cancelled() {
            job.cancel.cancel(engine::Cause::Requested("another part of the job failed".to_owned()));
        }
        result
    };
    let (emitted, surveying) = tokio::join!(emitting, running.join());
    let done = match (emitted, surveying) {
        (Ok(made), Ok(stages)) => emission.prove(made, stages).await,
        // what stopped the emission may be the hash lane: its error says more
        (Err(JobError::Interrupted(_)), Err(failed @ RunError::Failed { .. })) | (Ok(_), Err(failed)) => Err(failed.into()),
        (Err(JobError::Interrupted(_)), Err(RunError::Cancelled(why))) => Err(JobError::Interrupted(why)),
        (Err(error), _) => Err(error),
    };
    let made = match done {
        Ok(made) => made,
        Err(error) => return Err(emission.clean_up(error).await),
    };
    emission.remove_all_but(&made.id).await;
    retire::after_conversion(job, session, &made.id, false).await?;
    Ok(job.report(ReportOf {
        destination: format!("glance:{}", made.id),
        virtual_bytes: surveyed.layout.placement().geometry.virtual_bytes(),
        stored_bytes: surveyed.survey.index.stored_bytes(),
        image_bytes,
        access: surveyed.access,
        read_back: made.read_back,
        read_twice: made.read_twice,
        tiers: surveyed.tiers,
        expected: surveyed.expected.clone(),
        image_hash: made.image_hash,
        stages: made.stages,
    }))
}

/// The image's way into Glance.
struct Emission<'a> {
    job: &'a Job,
    session: &'a Session,
    surveyed: &'a Surveyed,
    name: &'a str,
    /// The run's name, in each image it makes.
    run: String,
    /// Ids of images that were made, or that were about to be.
    made: Mutex<Vec<String>>,
}

/// An image that Glance has wholly.
struct Active {
    image: Image,
    emitted: EmitReport,
    stages: Stages,
}

/// An image that is what it should be.
struct Proven {
    id: String,
    image_hash: HashReport,
    read_back: bool,
    read_twice: bool,
    stages: Stages,
}

/// What to do after an upload that failed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Send it again.
    Again,
    /// Send it again, into a new image.
    New,
}

type Stages = Vec<engine::MetricsSnapshot>;

impl Emission<'_> {
    async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.job.cancel.guard(work).await.map_err(|_| JobError::interrupted())
    }

    /// Makes an image and sends it, as often as it takes, until Glance has it.
    async fn until_active(&self) -> Result<Active, JobError> {
        let patience = self.job.options.patience;
        let mut image: Option<String> = None;
        let mut tries = 0;
        loop {
            tries += 1;
            let id = match image.take() {
                Some(id) => id,
                None => self.create_or_stop().await?,
            };
            let error = match self.send(&id).await {
                Ok((emitted, answered, stages)) => {
                    // without an answer Glance may still be at work on what it got
                    let within = if answered { patience.saving } else { patience.answer };
                    match self.wait_until_active(&id, within).await {
                        Ok(found) => return Ok(Active { image: found, emitted, stages }),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            if self.job.cancel.is_cancelled() {
                return Err(JobError::interrupted());
            }
            let next = self.what_next(&id, &error).await?;
            let (Some(next), true) = (next, tries < patience.uploads) else { return Err(error) };
            self.job.retries.note(format!("upload tried again ({tries} of {}): {}", patience.uploads, causes(&error)));
            self.job.progress.restart_upload();
            self.job.progress.set_phase(Phase::Uploading);
            if next == Next::New {
                self.job.retries.say(format!("image {id} cannot take the data any more: a new one is made"));
                if let Err(error) = self.guard(self.session.delete_image(&id)).await? {
                    self.job.retries.say(format!("image {id} could not be deleted yet: {}", causes(&error)));
                }
            } else {
                image = Some(id);
            }
            let retry_after = api_error(&error).and_then(ApiError::retry_after_s);
            self.guard(tokio::time::sleep(patience.pause_after(tries, retry_after))).await?;
        }
    }

    /// Is another try worth it, and into which image? `None`: it is not.
    async fn what_next(&self, id: &str, error: &JobError) -> Result<Option<Next>, JobError> {
        let stuck = matches!(error, JobError::Stuck { .. });
        let Some(api) = api_error(error) else { return Ok(stuck.then_some(Next::New)) };
        let retryable = api.is_retryable()
            || matches!(api, ApiError::Answer { .. })
            || matches!(api.status(), Some(StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND | StatusCode::GONE));
        if !retryable {
            return Ok(None);
        }
        // what became of the image? A client that goes away leaves it saving for about a second
        let started = Instant::now();
        let patience = self.job.options.patience;
        loop {
            let found = self.guard(self.session.image(id)).await?;
            match found.as_ref().map(|image| image.status.as_str()) {
                // a 5xx to a PUT can be a file that a refused upload left behind: each further one would get it, too
                Ok("queued") if api.status().is_some_and(|status| status.is_server_error()) => return Ok(Some(Next::New)),
                Ok("queued") => return Ok(Some(Next::Again)),
                Ok("active" | "deactivated" | "killed" | "deleted") => return Ok(Some(Next::New)),
                Ok(_) if started.elapsed() > patience.saving / 4 => return Ok(Some(Next::New)),
                Ok(_) => {}
                Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => return Ok(Some(Next::New)),
                Err(_) if started.elapsed() > patience.saving => return Ok(Some(Next::New)),
                Err(_) => {}
            }
            self.guard(tokio::time::sleep(patience.pause)).await?;
        }
    }

    /// [`Self::create`]; when the run is cancelled meanwhile, its answer is still waited for, for a while: the image that it
    /// makes has to be there before it can be deleted.
    async fn create_or_stop(&self) -> Result<String, JobError> {
        let create = self.create();
        tokio::pin!(create);
        tokio::select! {
            result = &mut create => result,
            () = self.job.cancel.cancelled() => {
                let _ = tokio::time::timeout(self.job.options.patience.clean_up / 2, create).await;
                Err(JobError::interrupted())
            }
        }
    }

    async fn create(&self) -> Result<String, JobError> {
        let id = uuid::Uuid::new_v4().hyphenated().to_string();
        let source = match &self.job.source {
            Source::Glance { image, .. } => Some(&**image),
            Source::Local(_) | Source::Pipe(_) => None,
        };
        let virtual_bytes = self.surveyed.layout.placement().geometry.virtual_bytes();
        let record = converted_record(
            source,
            &id,
            self.name,
            virtual_bytes,
            &self.run,
            &self.job.options.properties,
            self.job.options.elsewhere,
        );
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
        self.job.notices.making(&id);
        let mut record = record;
        let mut lost = false;
        loop {
            let error = match self.session.create_image(&record).await {
                Ok(_) => return Ok(id),
                Err(error) => error,
            };
            // a property that is not ours to set here (policies differ between clouds) stays behind
            if let Some(key) = self.refused_property(&error, &record) {
                record.remove(&key);
                self.job.notices.warn(&format!("property {} was not taken over: {}", printable(&key), causes(&error)));
                continue;
            }
            // The answer may have been lost on its way: the id is ours, so the image tells.
            if lost && error.status() == Some(StatusCode::CONFLICT) && self.session.image(&id).await.is_ok() {
                return Ok(id);
            }
            if !error.is_retryable() || lost {
                return Err(error.into());
            }
            if self.session.image(&id).await.is_ok() {
                return Ok(id);
            }
            lost = true;
            self.job.retries.note(format!("making the image tried again: {}", causes(&error)));
        }
    }

    /// The property of the source that Glance's refusal names, if it names one.
    fn refused_property(&self, error: &ApiError, record: &serde_json::Map<String, serde_json::Value>) -> Option<String> {
        let ApiError::Status(refusal) = error else { return None };
        if !matches!(refusal.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) {
            return None;
        }
        let Source::Glance { image, .. } = &self.job.source else { return None };
        let given = |key: &str| self.job.options.properties.iter().any(|(name, _)| name == key);
        let named = |key: &&String| {
            let quoted = [format!("'{key}'"), format!("\"{key}\""), format!(" {key} ")];
            quoted.iter().any(|quoted| refusal.text.contains(quoted.as_str()))
        };
        let taken_over = image.properties.keys().filter(|key| record.contains_key(*key) && !given(key));
        taken_over.into_iter().find(named).cloned()
    }

    /// One upload, with a token of its own: its failure ends nothing else.
    async fn send(&self, id: &str) -> Result<(EmitReport, bool, Stages), JobError> {
        let Job { progress, options, cancel, .. } = self.job;
        progress.set_phase(Phase::Uploading);
        let attempt = cancel.child();
        let (pipeline, emitted) = self.surveyed.emission(self.job, &attempt).await?;
        let upload = Upload {
            session: self.session.clone(),
            image_id: id.to_owned(),
            total_bytes: self.surveyed.layout.file_bytes(),
            progress: progress.clone(),
            patience: options.patience,
        };
        let (pipeline, uploaded) = pipeline.network_reporting("upload", upload);
        let stages = pipeline.start(&Handle::current()).join().await?;
        progress.set_phase(Phase::Finishing);
        let emitted = emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?;
        let uploaded = uploaded.one().await.ok_or_else(|| JobError::bug("the upload left no report"))?;
        Ok((emitted, uploaded.answered, stages))
    }

    async fn wait_until_active(&self, id: &str, within: std::time::Duration) -> Result<Image, JobError> {
        let started = Instant::now();
        let mut pause = self.job.options.patience.pause / 2;
        loop {
            let status = match self.guard(self.session.image(id)).await? {
                Ok(image) if image.status == "active" => return Ok(image),
                Ok(image) => image.status,
                // everything is sent: a service that stumbles now gets the time to get up again
                Err(error) if error.is_retryable() && started.elapsed() < within => "not answering".to_owned(),
                Err(error) => return Err(error.into()),
            };
            let working = matches!(status.as_str(), "saving" | "importing" | "uploading" | "not answering");
            if !working || started.elapsed() > within {
                return Err(JobError::Stuck { id: id.to_owned(), status, seconds: started.elapsed().as_secs() });
            }
            self.guard(tokio::time::sleep(pause)).await?;
            pause = (pause * 2).min(std::time::Duration::from_secs(5));
        }
    }

    /// Size, hash and, if asked for, content of the new image; then its mark.
    async fn prove(&self, active: Active, surveyed_stages: Stages) -> Result<Proven, JobError> {
        let Active { image, emitted, stages } = active;
        let image_hash = self.compare(&image, &emitted).await?;
        // a source never goes on the strength of a size alone
        let goes = self.job.options.after != After::Keep;
        let read_back = self.job.options.verify == Verify::Readback || (goes && !image_hash.checked);
        if read_back {
            self.read_back(&image).await?;
        }
        // before the mark: an image that is made of something else than the source has none
        let read_twice = goes && retire::second_reading(self.job, &self.surveyed.survey).await?;
        let hashed = self.job.options.verify > Verify::None || self.job.source.expected_hash().is_none() || read_back;
        let verified = match (&image_hash.algorithm, &image_hash.value) {
            (Some(algorithm), Some(value)) if image_hash.checked && hashed => verified_mark(&format!("{algorithm}:{value}")),
            // what was read was compared with nothing: a later run does not take it for finished
            (Some(algorithm), _) if image_hash.checked => format!("{algorithm} of what was sent"),
            _ => format!("size:{}", emitted.bytes),
        };
        self.guard(self.session.set_property(&image.id, VERIFIED, &json!(verified))).await??;
        if let Source::Glance { image: source, .. } = &self.job.source
            && source.protected == Some(true)
            && let Err(error) = self.guard(self.session.set_property(&image.id, "protected", &json!(true))).await?
        {
            self.job.notices.warn(&format!("the source is protected, the new image could not be: {error}"));
        }
        let stages = surveyed_stages.into_iter().chain(stages).collect();
        Ok(Proven { id: image.id, image_hash, read_back, read_twice, stages })
    }

    /// Glance's size and hash of the new image against our own.
    async fn compare(&self, image: &Image, emitted: &EmitReport) -> Result<HashReport, JobError> {
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
        let ours = if theirs.algorithm == "sha512" { emitted.digest.clone() } else { self.digest(&theirs).await? };
        if ours != theirs.value.to_ascii_lowercase() {
            return Err(JobError::Verification(format!(
                "Glance's {} of the new image is {}, ours is {ours}: it did not arrive as it was sent",
                theirs.algorithm, theirs.value
            )));
        }
        Ok(HashReport { algorithm: Some(theirs.algorithm), value: Some(ours), checked: true })
    }

    /// The image's digest by the algorithm that this Glance uses: emitted once more, to nobody.
    async fn digest(&self, theirs: &ExpectedHash) -> Result<String, JobError> {
        let hasher = Hasher::new(&theirs.algorithm).ok_or_else(|| JobError::bug("a hash that is expected is known"))?;
        let attempt = self.job.cancel.child();
        let (pipeline, emitted) = self.surveyed.emission_with(self.job, &attempt, hasher).await?;
        pipeline.threads("discard", 1, || Discard).start(&Handle::current()).join().await?;
        Ok(emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?.digest)
    }

    async fn read_back(&self, image: &Image) -> Result<(), JobError> {
        let job = self.job;
        let remote = job.remote(self.session, image);
        job.notices.note(&format!("reading {} back and comparing it with what was read of the source", size(remote.image_bytes)));
        let access = ImageFile::access(&remote).await?;
        let target = Target::Glance { remote, access };
        let workers = job.options.connections.get();
        against_survey(&target, &self.surveyed.survey, workers, &job.progress, &job.cancel).await
    }

    /// Removes images that were made on the way, but for the one that counts.
    async fn remove_all_but(&self, id: &str) {
        let others = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for other in others.iter().filter(|other| *other != id) {
            if let Err(error) = self.session.delete_image(other).await {
                let cause = causes(&error);
                self.job.notices.warn(&format!(
                    "an earlier try left image {other} half made, and deleting it failed ({cause}); remove it: virta image delete {other}"
                ));
            }
        }
    }

    /// Removes everything that was made, whatever happened, and says so if even that fails.
    async fn clean_up(&self, error: JobError) -> JobError {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let deleting = async {
            let mut left = Vec::new();
            for id in &made {
                if let Err(error) = self.session.delete_image(id).await {
                    left.push((id.clone(), error));
                }
            }
            // a POST that was still on its way may land behind the DELETE
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            if let Some(id) = made.last()
                && let Err(error) = self.session.delete_image(id).await
                && left.iter().all(|(known, _)| known != id)
            {
                left.push((id.clone(), error));
            }
            left
        };
        // an interrupt is answered within seconds; otherwise a service that stumbles gets the time to get up again
        let within = match error {
            JobError::Interrupted(_) => self.job.options.patience.clean_up,
            _ => self.job.options.patience.silence.max(self.job.options.patience.clean_up),
        };
        match tokio::time::timeout(within, deleting).await {
            Ok(left) if left.is_empty() => error,
            Ok(mut left) => {
                let ids: Vec<String> = left.iter().map(|(id, _)| id.clone()).collect();
                let first = left.swap_remove(0).1;
                JobError::LeftBehind { id: ids.join(" "), error: Box::new(error), left: Some(first) }
            }
            Err(_) => JobError::LeftBehind { id: made.join(" "), error: Box::new(error), left: None::<ApiError> },
        }
    }
}

/// Sink: wants the emitter's digest alone.
struct Discard;

impl engine::BlockingStage for Discard {
    type In = crate::store::Chunk;
    type Out = engine::NoOutput;
    type Report = ();

    fn run(
        self,
        inlet: engine::Inlet<Self::In>,
        outlet: engine::Outlet<engine::NoOutput>,
        _: engine::StageContext,
    ) -> Result<(), engine::StageError> {
        while inlet.recv_blocking()?.is_some() {}
        outlet.finish();
        Ok(())
    }
}

/// What Glance answered to the request that failed.
fn api_error(error: &JobError) -> Option<&ApiError> {
    match error {
        JobError::Api(error) => Some(error),
        JobError::Stage { source, .. } => match source.downcast_ref::<UploadError>() {
            Some(UploadError::Api { source, .. }) => Some(source),
            _ => None,
        },
        _ => None,
    }
}

/// The outcome of two runs that share a token: the one that knows the cause tells it.
pub(super) fn both(a: Result<Stages, RunError>, b: Result<Stages, RunError>) -> Result<(Stages, Stages), JobError> {
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
