//! A source becomes a new image in Glance: survey, layout, emit.
//!
//! The image is made (POST) only after the survey, when its exact length is known and compared with the quota (before it where the source
//! is claimed: `claim.rs`), and its id is chosen here, so that it can be removed even if the answer to the POST is lost. It counts as done, and gets
//! `virta_verified`, only when the source's hash agreed, Glance's size and hash of it are ours, and, where asked for, what Glance
//! serves decodes to the source's bytes. Anything else, an interrupt included, deletes it.
//!
//! How uploads that fail are mended: `sending.rs`.

use engine::{CancelToken, ErrorKind, Pipeline, ReportHandle, RunError};
use reqwest::StatusCode;
use serde_json::json;

use super::{
    After, Job, JobError, Report, Source, Verify,
    claim::{self, Claim},
    finishing,
    job::{ReportOf, Surveyed, cause_of},
    making::Maker,
    names::{carries_its_own_proof, verified_mark},
    readback::{Target, against_survey},
    report::HashReport,
    retire,
    sending::{Active, Content, Sending, Stages},
};
use crate::{
    glance::ImageFile,
    hash::Hasher,
    openstack::{
        Change, Image, Session,
        error::ApiError,
        image::{CLAIM_UNTIL, RUN, VERIFIED, check_properties, converted_record},
    },
    qcow2::Geometry,
    store::{Chunk, EmitReport},
    text::{printable, shell_word, size},
};

/// Converts the job's source into a new image called `name`. Where the options say so, the source is claimed first.
///
/// # Errors
/// [`JobError`]; no image is left behind then, or the error says which. [`JobError::Held`]: another run has claimed the source;
/// [`JobError::GoneOnWith`]: one has taken the image on.
///
/// # Cancel safety
/// Cancel with the job's token: the half-made image is deleted before this returns. If the future is dropped instead, the image
/// stays, `queued` or `saving`, with `virta_run` in it.
pub async fn to_glance(job: &Job, session: &Session, name: &str) -> Result<Report, JobError> {
    check_properties(&job.options.properties).map_err(JobError::Usage)?;
    let Some((source_bytes, claim)) = claim_of(job, session)? else {
        let surveyed = survey_within_quota(job, session, name).await?;
        let maker = maker(job, session, name, surveyed.layout.placement().geometry.virtual_bytes());
        return emit(job, &maker, None, surveyed).await;
    };
    let virtual_bytes = Geometry::new(source_bytes, job.options.cluster_bits)?.virtual_bytes();
    let mut maker = maker(job, session, name, virtual_bytes);
    maker.claim = Some(claim);
    let claiming = async {
        let id = maker.create_or_stop().await?;
        if let Some(claim) = &maker.claim {
            claim.keep_queued(session, &id, &job.cancel, &job.notices);
        }
        Ok((id, survey_within_quota(job, session, name).await?))
    };
    match claiming.await {
        Ok((id, surveyed)) => emit(job, &maker, Some(id), surveyed).await,
        Err(error) => Err(given_up(&maker, error).await),
    }
}

/// The claim that the options ask for, and the source's size.
fn claim_of(job: &Job, session: &Session) -> Result<Option<(u64, Claim)>, JobError> {
    let Source::Glance { image, bytes, .. } = &job.source else { return Ok(None) };
    if !job.options.claim {
        return Ok(None);
    }
    let Some(project) = &session.whoami().project_id else {
        return Err(JobError::Refused("a source can only be claimed for a project, and this sign-in has none".to_owned()));
    };
    Ok(Some((*bytes, Claim::new(&image.id, project, *bytes, session.rate_bytes_per_s(), job.options.patience.claim))))
}

fn maker<'a>(job: &'a Job, session: &'a Session, name: &str, virtual_bytes: u64) -> Maker<'a> {
    let source = match &job.source {
        Source::Glance { image, .. } => Some(&**image),
        Source::Local(_) | Source::Pipe(_) => None,
    };
    let options = &job.options;
    let run = options.run.clone().unwrap_or_else(|| uuid::Uuid::new_v4().hyphenated().to_string());
    let record = converted_record(source, name, virtual_bytes, &run, &options.properties, options.elsewhere);
    // policies differ between clouds: what a source has is not always ours to set
    let given = |key: &&String| options.properties.iter().any(|(name, _)| name == *key);
    let droppable = source.into_iter().flat_map(|image| image.properties.keys()).filter(|key| !given(key)).cloned().collect();
    let mut maker = Maker::new(session, record, options.patience, &job.cancel, &job.notices, &job.retries);
    maker.droppable = droppable;
    maker
}

/// Surveys, and compares the exact length with what the quota has left.
async fn survey_within_quota(job: &Job, session: &Session, name: &str) -> Result<Surveyed, JobError> {
    let quota = tokio::spawn({
        let session = session.clone();
        async move { session.quota_left_bytes().await }
    });
    let mut surveyed = job.survey(&format!("new image {}", printable(name))).await?;
    let image_bytes = surveyed.layout.file_bytes();
    let quota_left = match job.cancel.guard(quota).await {
        Ok(left) => left.unwrap_or(None),
        Err(_) => {
            let running = surveyed.running.take().ok_or_else(|| JobError::bug("a survey runs once"))?;
            return Err(cause_of(JobError::interrupted(), running).await);
        }
    };
    if let Some(left) = quota_left
        && image_bytes > left
    {
        return Err(JobError::Quota(format!(
            "the quota for images has {} left, and the new one needs {} beside the old. The way out: convert to a local file \
             (virta convert {} {}.qcow2), check it, delete the raw image, then upload the file",
            size(left),
            size(image_bytes),
            shell_word(&job.source.shown()),
            shell_word(name),
        )));
    }
    Ok(surveyed)
}

/// Sends what was surveyed, into `first` if that is made already, and proves it; then the source goes, if it shall.
async fn emit(job: &Job, maker: &Maker<'_>, first: Option<String>, mut surveyed: Surveyed) -> Result<Report, JobError> {
    let image_bytes = surveyed.layout.file_bytes();
    let running = surveyed.running.take().ok_or_else(|| JobError::bug("a survey runs once"))?;
    let content = SurveyedImage { job, surveyed: &surveyed };
    let emission =
        Emission { job, surveyed: &surveyed, maker, sending: Sending { maker, content, progress: &job.progress, first } };
    let emitting = async {
        let result = emission.sending.until_active().await;
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
        Err(error) => return Err(given_up(maker, error).await),
    };
    maker.remove_all_but(&made.id).await;
    let retired = retire::after_conversion(job, maker.session, &made.id, false).await;
    if let Some(claim) = maker.claim.as_ref().filter(|_| job.options.after != After::Keep) {
        emission.release(claim, &made.id, &retired).await;
    }
    retired?;
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

/// Nothing comes of it: what was made goes. An image that somebody else deleted is the cause of whatever followed.
async fn given_up(maker: &Maker<'_>, error: JobError) -> JobError {
    let lost = maker.claim.as_ref().is_some_and(Claim::is_lost);
    if let Some(claim) = &maker.claim {
        let interrupted = matches!(error, JobError::Interrupted(_));
        claim.leave_within(if interrupted { maker.patience.clean_up } else { maker.patience.silence }).await;
    }
    let error = maker.clean_up(error).await;
    match error {
        JobError::Interrupted(_) if lost => JobError::Lost { image: maker.last_made() },
        error => error,
    }
}

/// A survey's image as something to send.
struct SurveyedImage<'a> {
    job: &'a Job,
    surveyed: &'a Surveyed,
}

impl Content for SurveyedImage<'_> {
    fn bytes(&self) -> u64 {
        self.surveyed.layout.file_bytes()
    }

    async fn emission(
        &self,
        cancel: &CancelToken,
        hasher: Hasher,
    ) -> Result<(Pipeline<Chunk>, ReportHandle<EmitReport>), JobError> {
        self.surveyed.emission(self.job, cancel, hasher).await
    }
}

/// The image's way into Glance.
struct Emission<'a> {
    job: &'a Job,
    surveyed: &'a Surveyed,
    maker: &'a Maker<'a>,
    sending: Sending<'a, SurveyedImage<'a>>,
}

/// An image that is what it should be.
struct Proven {
    id: String,
    image_hash: HashReport,
    read_back: bool,
    read_twice: bool,
    stages: Stages,
}

impl Emission<'_> {
    async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.job.cancel.guard(work).await.map_err(|_| JobError::interrupted())
    }

    /// Size, hash and, if asked for, content of the new image; then its mark.
    async fn prove(&self, active: Active, surveyed_stages: Stages) -> Result<Proven, JobError> {
        let Active { image, emitted, stages } = active;
        let image_hash = self.sending.compare(&image, &emitted).await?;
        // a source never goes on the strength of a size alone
        let goes = self.job.options.after != After::Keep;
        if goes && !image_hash.checked {
            self.job.notices.warn(
                "Glance computed no hash of the new image, so no later run could tell that it is the one that was verified: the source will stay",
            );
        }
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
        self.mark(&image.id, &verified).await?;
        if !goes && self.maker.claim.as_ref().is_some_and(Claim::is_doubted) {
            finishing::look_again_later(self.job, self.maker.session, &image.id).await?;
        }
        if let Source::Glance { image: source, .. } = &self.job.source
            && source.protected == Some(true)
            && let Err(error) = self.guard(self.maker.session.set_property(&image.id, "protected", &json!(true))).await?
        {
            self.job.notices.warn(&format!("the source is protected, the new image could not be: {error}"));
        }
        let stages = surveyed_stages.into_iter().chain(stages).collect();
        Ok(Proven { id: image.id, image_hash, read_back, read_twice, stages })
    }

    /// Marks the image as verified, and ends the claim, unless the source is still to go: then nobody may delete the image any more.
    async fn mark(&self, image_id: &str, verified: &str) -> Result<(), JobError> {
        let mut changes = vec![Change::Set(VERIFIED.to_owned(), json!(verified))];
        let goes = self.job.options.after != After::Keep;
        if let Some(claim) = &self.maker.claim {
            // Glance reads an image, changes it and saves it: a renewal meanwhile would undo the mark
            claim.leave().await;
            self.guard(claim.assure(self.maker.session, image_id, self.maker.run(), &*self.job.notices)).await??;
            claim.write_doubts_down(&*self.job.notices, image_id);
            if goes {
                changes.push(Change::Set("protected".to_owned(), json!(true)));
                changes.push(Change::Set(CLAIM_UNTIL.to_owned(), json!(claim::last_end(self.maker.session.now()))));
            } else if self.mark_and_unclaim(image_id, verified).await? {
                return Ok(());
            }
        } else {
            // nobody kept others away: one of them may have taken the image on, and its proof, which may be all that is left to show for a source
            // that went, is not to be written over
            let found = self.guard(self.maker.session.image_if_there(image_id)).await??;
            let image = found.ok_or_else(|| JobError::Lost { image: image_id.to_owned() })?;
            if let Some(other) = image.property(RUN).filter(|run| *run != self.maker.run()) {
                if !goes && carries_its_own_proof(&image) {
                    return Ok(());
                }
                if goes || !verified.starts_with("hash:") {
                    return Err(JobError::GoneOnWith { image: image_id.to_owned(), run: other.to_owned() });
                }
            }
        }
        // not broken off: what cleans up has to see what became of it
        let marking = self.maker.session.change_image(image_id, &changes);
        let error = match self.job.options.patience.to_its_end(&self.job.cancel, marking).await {
            Some(Ok(_)) => None,
            Some(Err(gone)) if gone.status() == Some(StatusCode::NOT_FOUND) => {
                return Err(JobError::Lost { image: image_id.to_owned() });
            }
            Some(Err(error)) => Some(Some(error)),
            None => Some(None),
        };
        if let Some(error) = error {
            if goes && self.maker.claim.is_some() && error.as_ref().is_none_or(ApiError::may_have_been_heard) {
                self.job.notices.warn(&format!(
                    "it may be that image {image_id} is verified and stays protected: virta image set --unprotected {image_id}"
                ));
            }
            return Err(error.map_or_else(JobError::interrupted, JobError::from));
        }
        // by a request of its own: while the mark's answer was lost and it was sent again, others still kept away
        if self.maker.claim.is_some() && !goes {
            let removing = self.maker.session.remove_property(image_id, CLAIM_UNTIL);
            if let Some(cause) = self.job.options.patience.failure_of(&self.job.cancel, removing).await {
                self.job.notices.warn(&format!("the mark of this run's claim stays on image {image_id}: {cause}"));
            }
        }
        Ok(())
    }

    /// The mark and the end of the claim in one request. `false`: it was not heard, and the image is claimed as before.
    ///
    /// It is not repeated: if it was heard, somebody else may have gone on with the image, and have proven it by more than this run did.
    async fn mark_and_unclaim(&self, image_id: &str, verified: &str) -> Result<bool, JobError> {
        let session = self.maker.session;
        let changes = [Change::Set(VERIFIED.to_owned(), json!(verified)), Change::Remove(CLAIM_UNTIL.to_owned())];
        // an interrupt waits for it: whoever cleans up afterwards has to see what became of it
        let marking = session.change_image_once(image_id, &changes);
        if matches!(self.job.options.patience.to_its_end(&self.job.cancel, marking).await, Some(Ok(()))) {
            return Ok(true);
        }
        let found = self.guard(session.image_if_there(image_id)).await??;
        let image = found.ok_or_else(|| JobError::Lost { image: image_id.to_owned() })?;
        match image.property(RUN) {
            Some(other) if other != self.maker.run() && !carries_its_own_proof(&image) => {
                Err(JobError::GoneOnWith { image: image_id.to_owned(), run: other.to_owned() })
            }
            Some(other) if other != self.maker.run() => Ok(true),
            _ => Ok(image.property(VERIFIED) == Some(verified) && image.property(CLAIM_UNTIL).is_none()),
        }
    }

    /// The source is gone, or stays for good: the claim ends, and the image can be deleted again.
    async fn release(&self, claim: &Claim, image_id: &str, retired: &Result<(), JobError>) {
        let going = matches!(retired, Err(JobError::SourceGoing { .. }));
        if !claim.is_doubted() || finishing::outlast_deletions(self.job, image_id, going).await {
            finishing::release_or_warn(self.job, self.maker.session, image_id, Some(self.maker.run())).await;
        }
    }

    async fn read_back(&self, image: &Image) -> Result<(), JobError> {
        let job = self.job;
        let remote = job.remote(self.maker.session, image);
        job.notices.note(&format!("reading {} back and comparing it with what was read of the source", size(remote.image_bytes)));
        let access = ImageFile::access(&remote).await?;
        let target = Target::Glance { remote, access };
        let workers = job.options.connections.get();
        against_survey(&target, &self.surveyed.survey, workers, &job.progress, &job.cancel).await
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
