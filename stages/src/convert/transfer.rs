//! An image's way into Glance: sent as often as it takes, and compared.
//!
//! # Uploads that fail
//! | what happened | what is done |
//! |---|---|
//! | cut, silent, 5xx, 408, 429, 401; the image is `queued` again | sent again |
//! | the image stays `saving` (a worker died), is gone, or got a 5xx of its own | it is useless: another one is made |
//! | the answer alone was lost, and Glance has all bytes | success, if size and hash say so |
//! | 400, 403, 409, 413, 415 | ends the run at once, with Glance's own words |

use std::time::Instant;

use engine::{CancelToken, Pipeline, ReportHandle};
use reqwest::StatusCode;
use tokio::runtime::Handle;

use super::{maker::Maker, report::HashReport};
use crate::{
    error::JobError,
    extent::Chunk,
    glance::{Upload, upload::UploadError},
    hash::{ExpectedHash, Hasher},
    openstack::{ApiError, Image},
    progress::{Phase, Progress},
    store::EmitReport,
    text::{causes, time},
};

/// The bytes of an image, which can be sent as often as it takes.
pub(super) trait ImageBytes {
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
pub(super) struct Transfer<'a, 'b, C> {
    pub(super) maker: &'a Maker<'b>,
    pub(super) content: &'a C,
    pub(super) progress: &'a Progress,
}

pub(super) type Stages = Vec<engine::MetricsSnapshot>;

/// An image that Glance has wholly.
pub(super) struct Active {
    pub(super) image: Image,
    pub(super) emitted: EmitReport,
    pub(super) stages: Stages,
}

/// What sending came to.
pub(super) enum Sent {
    /// Glance has all bytes.
    Active(Box<Active>),
    /// The image takes no data any more.
    Useless,
}

impl<C: ImageBytes> Transfer<'_, '_, C> {
    /// Work that the job's end ends.
    async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.maker.guard(work).await
    }

    /// Sends the bytes into image `id`, as often as it takes, until Glance has them. `tries`: uploads so far, of all images.
    pub(super) async fn until_active(&self, id: &str, tries: &mut u32) -> Result<Sent, JobError> {
        let patience = self.maker.patience;
        loop {
            *tries += 1;
            let error = match self.send(id).await {
                Ok((emitted, answered, stages)) => {
                    // without an answer Glance may still be at work on what it got
                    let within = if answered { patience.saving } else { patience.answer };
                    if !answered {
                        self.maker.retries.say(format!(
                            "all was sent, and the connection broke before Glance answered: it gets {} to say what became of image {id}",
                            time(within.as_secs_f64())
                        ));
                    }
                    match self.wait_until_active(id, within).await {
                        Ok(image) => return Ok(Sent::Active(Box::new(Active { image, emitted, stages }))),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            if self.maker.cancel.is_cancelled() {
                return Err(JobError::interrupted());
            }
            let again = self.takes_more(id, &error).await?;
            let (Some(again), true) = (again, *tries < patience.uploads) else { return Err(error) };
            self.maker.retries.note(format!("upload tried again ({tries} of {}): {}", patience.uploads, causes(&error)));
            self.progress.restart_upload();
            self.progress.set_phase(Phase::Uploading);
            if !again {
                return Ok(Sent::Useless);
            }
            let retry_after = api_error(&error).and_then(ApiError::retry_after_s);
            self.guard(tokio::time::sleep(patience.pause_after(*tries, retry_after))).await?;
        }
    }

    /// Is another try worth it (`None`: it is not), and does this image take it?
    async fn takes_more(&self, id: &str, error: &JobError) -> Result<Option<bool>, JobError> {
        let stuck = matches!(error, JobError::Stuck { .. });
        let Some(api) = api_error(error) else { return Ok(stuck.then_some(false)) };
        let retryable = api.is_retryable()
            || matches!(api, ApiError::Answer { .. })
            || matches!(api.status(), Some(StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND | StatusCode::GONE));
        if !retryable {
            return Ok(None);
        }
        // the PUT's own 500 ends Glance's work on the image; a gateway's answer (502 to 504) says nothing of it
        let is_over = matches!(error, JobError::Stage { .. }) && api.status() == Some(StatusCode::INTERNAL_SERVER_ERROR);
        // what became of the image? A client that goes away leaves it saving for about a second
        let started = Instant::now();
        let patience = self.maker.patience;
        loop {
            let found = self.guard(self.maker.session.image(id)).await?;
            match found.as_ref().map(|image| image.status.as_str()) {
                // a 5xx to a PUT can be a file that a refused upload left behind: each further one would get it, too
                Ok("queued") if api.status().is_some_and(|status| status.is_server_error()) => return Ok(Some(false)),
                Ok("queued") => return Ok(Some(true)),
                Ok("active" | "deactivated" | "killed" | "deleted") => return Ok(Some(false)),
                Ok(_) if is_over || started.elapsed() > patience.saving / 4 => return Ok(Some(false)),
                Ok(_) => {}
                Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => return Ok(Some(false)),
                Err(_) if started.elapsed() > patience.saving => return Ok(Some(false)),
                Err(_) => {}
            }
            self.guard(tokio::time::sleep(patience.pause)).await?;
        }
    }

    /// One upload, with a token of its own: its failure ends nothing else.
    async fn send(&self, id: &str) -> Result<(EmitReport, bool, Stages), JobError> {
        let progress = self.progress;
        progress.set_phase(Phase::Uploading);
        let attempt = self.maker.cancel.child();
        let (pipeline, emitted) = self.content.emission(&attempt, Hasher::sha512()).await?;
        let upload = Upload {
            session: self.maker.session.clone(),
            image_id: id.to_owned(),
            total_bytes: self.content.bytes(),
            progress: progress.clone(),
            patience: self.maker.patience,
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
        let mut pause = self.maker.patience.pause / 2;
        loop {
            let status = match self.guard(self.maker.session.image(id)).await? {
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
        let attempt = self.maker.cancel.child();
        let (pipeline, emitted) = self.content.emission(&attempt, hasher).await?;
        pipeline.threads("discard", 1, || Discard).start(&Handle::current()).join().await?;
        Ok(emitted.one().await.ok_or_else(|| JobError::bug("the emitter left no report"))?.digest)
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
