//! An image's way into Glance: made, sent as often as it takes, compared, and removed if it comes to nothing.
//!
//! # Uploads that fail
//! | what happened | what is done |
//! |---|---|
//! | cut, silent, 5xx, 408, 429, 401; the image is `queued` again | sent again |
//! | the image stays `saving` (a worker died), is gone, or got a 5xx of its own | deleted; a new one is made |
//! | the answer alone was lost, and Glance has all bytes | success, if size and hash say so |
//! | 400, 403, 409, 413, 415 | ends the run at once, with Glance's own words |

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use engine::{CancelToken, Pipeline, ReportHandle};
use reqwest::StatusCode;
use serde_json::{Map, Value};
use tokio::runtime::Handle;

use super::{JobError, Notices, report::HashReport};
use crate::{
    glance::{Patience, Retries, Upload, upload::UploadError},
    hash::{ExpectedHash, Hasher},
    openstack::{ApiError, Image, Session},
    progress::{Phase, Progress},
    store::{Chunk, EmitReport},
    text::{causes, printable},
};

/// The bytes of an image, which can be sent as often as it takes.
pub(super) trait Content {
    /// How many, exactly.
    fn bytes(&self) -> u64;

    /// Them, strictly forward, with a digest computed on the way. `cancel` is this emission's own token.
    async fn emission(
        &self,
        cancel: &CancelToken,
        hasher: Hasher,
    ) -> Result<(Pipeline<Chunk>, ReportHandle<EmitReport>), JobError>;
}

/// What is sent, and for whom.
pub(super) struct Sending<'a, C> {
    pub(super) session: &'a Session,
    pub(super) content: C,
    /// The image's record; its id is chosen with each image that is made.
    pub(super) record: Map<String, Value>,
    /// Properties that stay behind where Glance refuses them.
    pub(super) droppable: Vec<String>,
    pub(super) patience: Patience,
    pub(super) progress: &'a Progress,
    pub(super) cancel: &'a CancelToken,
    pub(super) notices: &'a dyn Notices,
    pub(super) retries: &'a Retries,
    /// Ids of images that were made, or that were about to be.
    pub(super) made: Mutex<Vec<String>>,
}

pub(super) type Stages = Vec<engine::MetricsSnapshot>;

/// An image that Glance has wholly.
pub(super) struct Active {
    pub(super) image: Image,
    pub(super) emitted: EmitReport,
    pub(super) stages: Stages,
}

/// What to do after an upload that failed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Send it again.
    Again,
    /// Send it again, into a new image.
    New,
}

impl<C: Content> Sending<'_, C> {
    /// Work that the job's end ends.
    async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.cancel.guard(work).await.map_err(|_| JobError::interrupted())
    }

    /// Makes an image and sends it, as often as it takes, until Glance has it.
    pub(super) async fn until_active(&self) -> Result<Active, JobError> {
        let patience = self.patience;
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
            if self.cancel.is_cancelled() {
                return Err(JobError::interrupted());
            }
            let next = self.what_next(&id, &error).await?;
            let (Some(next), true) = (next, tries < patience.uploads) else { return Err(error) };
            self.retries.note(format!("upload tried again ({tries} of {}): {}", patience.uploads, causes(&error)));
            self.progress.restart_upload();
            self.progress.set_phase(Phase::Uploading);
            if next == Next::New {
                self.retries.say(format!("image {id} cannot take the data any more: a new one is made"));
                if let Err(error) = self.guard(self.session.delete_image(&id)).await? {
                    self.retries.say(format!("image {id} could not be deleted yet: {}", causes(&error)));
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
        let patience = self.patience;
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
            () = self.cancel.cancelled() => {
                let _ = tokio::time::timeout(self.patience.clean_up / 2, create).await;
                Err(JobError::interrupted())
            }
        }
    }

    async fn create(&self) -> Result<String, JobError> {
        let id = uuid::Uuid::new_v4().hyphenated().to_string();
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(id.clone());
        self.notices.making(&id);
        let mut record = self.record.clone();
        record.insert("id".to_owned(), serde_json::json!(id));
        let mut lost = false;
        loop {
            let error = match self.session.create_image(&record).await {
                Ok(_) => return Ok(id),
                Err(error) => error,
            };
            // a property that is not ours to set here (policies differ between clouds) stays behind
            if let Some(key) = self.refused_property(&error, &record) {
                record.remove(&key);
                self.notices.warn(&format!("property {} was not taken over: {}", printable(&key), causes(&error)));
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
            self.retries.note(format!("making the image tried again: {}", causes(&error)));
        }
    }

    /// The property that Glance's refusal names, if it names one that may stay behind.
    fn refused_property(&self, error: &ApiError, record: &Map<String, Value>) -> Option<String> {
        let ApiError::Status(refusal) = error else { return None };
        if !matches!(refusal.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) {
            return None;
        }
        let named = |key: &&String| {
            let quoted = [format!("'{key}'"), format!("\"{key}\""), format!(" {key} ")];
            quoted.iter().any(|quoted| refusal.text.contains(quoted.as_str()))
        };
        self.droppable.iter().filter(|key| record.contains_key(*key)).find(named).cloned()
    }

    /// One upload, with a token of its own: its failure ends nothing else.
    async fn send(&self, id: &str) -> Result<(EmitReport, bool, Stages), JobError> {
        let progress = self.progress;
        progress.set_phase(Phase::Uploading);
        let attempt = self.cancel.child();
        let (pipeline, emitted) = self.content.emission(&attempt, Hasher::sha512()).await?;
        let upload = Upload {
            session: self.session.clone(),
            image_id: id.to_owned(),
            total_bytes: self.content.bytes(),
            progress: progress.clone(),
            patience: self.patience,
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
        let mut pause = self.patience.pause / 2;
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

    /// Glance's size and hash of the new image against our own.
    pub(super) async fn compare(&self, image: &Image, emitted: &EmitReport) -> Result<HashReport, JobError> {
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
        let attempt = self.cancel.child();
        let (pipeline, emitted) = self.content.emission(&attempt, hasher).await?;
        pipeline.threads("discard", 1, || Discard).start(&Handle::current()).join().await?;
        Ok(emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?.digest)
    }

    /// Removes images that were made on the way, but for the one that counts.
    pub(super) async fn remove_all_but(&self, id: &str) {
        let others = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for other in others.iter().filter(|other| *other != id) {
            if let Err(error) = self.session.delete_image(other).await {
                let cause = causes(&error);
                self.notices.warn(&format!(
                    "an earlier try left image {other} half made, and deleting it failed ({cause}); remove it: virta image delete {other}"
                ));
            }
        }
    }

    /// Removes everything that was made, whatever happened, and says so if even that fails.
    pub(super) async fn clean_up(&self, error: JobError) -> JobError {
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
            JobError::Interrupted(_) => self.patience.clean_up,
            _ => self.patience.silence.max(self.patience.clean_up),
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
    type In = Chunk;
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
