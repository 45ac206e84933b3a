//! A source becomes a new image in Glance: survey, layout, emit.
//!
//! The image is made (POST) before the source is read: that is the claim ([`crate::ownership`]). It gets its name and `virta_verified` when the source's hash agreed,
//! Glance's size and hash of it are ours, and, where asked for, what Glance serves decodes to the source's bytes. Anything else, an interrupt included, deletes it.
//!
//! How uploads that fail are mended: `transfer.rs`.

use engine::{CancelToken, ErrorKind, Pipeline, ReportHandle, RunError};
use reqwest::StatusCode;

use super::{
    After, Job, Report, Source, Verify,
    drive::{Both, Filled, Finished, Work, drive},
    job::ReportOf,
    maker::Maker,
    names::{conversion_of_gone, images_of_name, in_the_way, taken},
    readback::{Target, against_survey, prove},
    report::HashReport,
    retire,
    survey::{Surveyed, cause_of},
    transfer::{Active, ImageBytes, Sent, Stages, Transfer},
};
use crate::{
    error::JobError,
    extent::Chunk,
    glance::ImageFile,
    hash::Hasher,
    openstack::{
        Image, Session,
        carry_over::{check_properties, converted_record},
    },
    ownership::{self, Family, Goal, Mark, Proof, claim::Moves},
    qcow2::Geometry,
    store::EmitReport,
    text::{printable, shell_word, size},
};

/// What a conversion came to.
#[derive(Debug)]
pub enum Conversion {
    /// A new image.
    Made(Box<Report>),
    /// An image of an earlier run is the source's conversion. What was left to do with the source is done.
    Earlier(Box<Image>),
}

/// What a run knows already, and need not ask again.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Images that have the new name, hidden ones too ([`images_of_name`]).
    pub named: Option<Vec<Image>>,
    /// Images that were made of the source, as a list from just now has them.
    pub made: Option<Vec<Image>>,
}

/// Converts the job's source into a new image called `name`, or into one that takes its name where it is replaced.
///
/// # Errors
/// [`JobError`]; no image is left behind then, or the error says which. [`JobError::Held`]: another run converts this source.
///
/// # Cancel safety
/// Cancel with the job's token: the unfinished image is deleted before this returns. If the future is dropped instead, the image stays, `queued`, `saving` or
/// unmarked, with `virta_run` in it.
pub async fn to_glance(job: &Job, session: &Session, name: &str) -> Result<Conversion, JobError> {
    to_glance_knowing(job, session, name, Known::default()).await
}

/// [`to_glance`], with what was asked just now.
///
/// # Errors
/// Those of [`to_glance`].
///
/// # Cancel safety
/// That of [`to_glance`].
pub async fn to_glance_knowing(job: &Job, session: &Session, name: &str, known: Known) -> Result<Conversion, JobError> {
    check_properties(&job.options.properties).map_err(JobError::Usage)?;
    let source = job.source.record();
    let name = match source {
        Some(source) if job.options.after == After::Replace => source.name.as_deref().unwrap_or_default(),
        _ => name,
    };
    let mut maker = maker(job, session, name)?;
    let named = match known.named {
        Some(named) => named,
        None => maker.guard(images_of_name(session, name)).await??,
    };
    // the family is asked first: what has the name may be this source's own conversion of an earlier release
    let others = in_the_way(&named, &maker.family, source, job.options.after);
    if !others.is_empty() && !job.options.force {
        let refusal = taken(name, &others, source);
        let sighting = maker.look(true, None, known.made.clone()).await?;
        if sighting.highest().is_none() && !matches!(sighting.other, Some((_, ownership::Member::Marked(_)))) {
            return Err(refusal);
        }
    }
    if source.is_some_and(|source| source.os_hidden == Some(true)) {
        job.reporter.note("the source is hidden; the new image is visible");
    }
    let proof = job.options.verify.proof();
    let deletes_source = job.options.after != After::Keep && source.is_some();
    let goal = Goal { proof, deletes_source, own_proof: deletes_source && job.source.expected_hash().is_none() };
    let mut work =
        Converting { job, session, name: name.to_owned(), surveyed: None, tries: 0, proven: None, carried: Vec::new() };
    if source.is_none() {
        // nobody else is to be kept away, and a pipe's size is known at its end
        let surveyed = survey_within_quota(&maker, job, session, name).await?;
        maker.record = record(job, surveyed.layout.sections().geometry.virtual_bytes());
        work.surveyed = Some(Survey { surveyed, stages: None });
    }
    let driven = drive(&mut maker, &mut work, goal, known.made).await;
    if driven.is_err()
        && let Some(running) = work.surveyed.as_mut().and_then(|survey| survey.surveyed.running.take())
    {
        job.cancel.cancel(engine::Cause::Requested("another part of the job failed".to_owned()));
        let _ = running.join().await;
    }
    let finished = match driven {
        Err(error) if !matches!(error, JobError::LeftBehind { .. }) => {
            match converted_meanwhile(job, session, name, &error).await {
                Some(image) => Finished::Earlier(image),
                None => return Err(error),
            }
        }
        driven => driven?,
    };
    if job.options.after == After::Replace {
        job.reporter.note(&format!(
            "the new image is called {}; its id has changed: what names the old id has to be changed, too",
            printable(name)
        ));
    }
    match finished {
        Finished::Earlier(image) => {
            job.reporter.note(&format!(
                "made earlier, with the options of then ({}): for another one take another name, or --force",
                image.line()
            ));
            Ok(Conversion::Earlier(Box::new(image)))
        }
        Finished::Made(image) => Ok(Conversion::Made(Box::new(work.report(&image)?))),
    }
}

/// Another run may have finished, and deleted the source while this one read it: a request for it failed then, and this run's stages with it.
async fn converted_meanwhile(job: &Job, session: &Session, name: &str, error: &JobError) -> Option<Image> {
    let Source::Glance { session: source_session, image, .. } = &job.source else { return None };
    let gone = || error.api().is_some_and(|api| api.status() == Some(StatusCode::NOT_FOUND));
    if !gone() || source_session.image_if_there(&image.id).await.ok()?.is_some() {
        return None;
    }
    let found = conversion_of_gone(source_session, session, &image.id, &[], Some(name)).await.ok()?;
    found.inspect(|_| job.reporter.note("another run has converted this source, and deleted it"))
}

/// The family that a conversion ends in: what a plan asks, too.
#[must_use]
pub fn family_of(source: Option<&Image>, session: &Session, name: &str, force: bool) -> Family {
    let project = session.whoami().project_id.as_deref().unwrap_or_default();
    let family = Family::of_image(source.map_or("", |source| &source.id), project, name, ownership::Content::Exact);
    match source {
        Some(_) if !force => family,
        _ => family.alone(),
    }
}

fn record(job: &Job, virtual_bytes: u64) -> serde_json::Map<String, serde_json::Value> {
    let options = &job.options;
    converted_record(job.source.record(), retire::wanted_visibility(job), virtual_bytes, &options.properties, options.elsewhere)
}

fn maker<'a>(job: &'a Job, session: &'a Session, name: &str) -> Result<Maker<'a>, JobError> {
    let source = job.source.record();
    let options = &job.options;
    let virtual_bytes = match job.source.bytes() {
        Some(bytes) => Geometry::new(bytes, options.cluster_bits)?.virtual_bytes(),
        None => 0,
    };
    let record = record(job, virtual_bytes);
    // policies differ between clouds: what a source has is not always ours to set
    let given = |key: &&String| options.properties.iter().any(|(name, _)| name == *key);
    let droppable = source.into_iter().flat_map(|image| image.properties.keys()).filter(|key| !given(key)).cloned().collect();
    let goes = options.after != After::Keep;
    let unhashed = job.source.expected_hash().is_none();
    let moves = Moves {
        source_bytes: job.source.bytes().unwrap_or(0),
        // once, again for what no tier holds, and again where nothing else can be compared before it goes
        readings: 2 + u64::from(goes && unhashed),
        read_back: options.verify == Verify::Readback,
        rate_limit: session.rate_bytes_per_s(),
        jobs: u64::try_from(options.jobs.get()).unwrap_or(u64::MAX),
    };
    Ok(Maker {
        session,
        family: family_of(source, session, name, options.force),
        run: options.run.clone(),
        record,
        droppable,
        claim: moves.claim(),
        source: source.map(|image| (image.id.clone(), image.hash_text())),
        any_name: (options.any_name && options.after != After::Replace).then_some(options.verify.proof()),
        replaces: options.after == After::Replace,
        protected: source.is_some_and(|image| image.protected == Some(true)),
        take_over: options.take_over,
        patience: options.patience,
        cancel: &job.cancel,
        reporter: &job.reporter,
        retries: &job.retries,
        seen: Vec::new(),
        of_source: Vec::new(),
        failed_posts: 0,
    })
}

/// Surveys, and compares the exact length with what the quota has left.
async fn survey_within_quota(maker: &Maker<'_>, job: &Job, session: &Session, name: &str) -> Result<Surveyed, JobError> {
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
        let project = session.whoami().project_id.as_deref();
        let others = maker.seen.iter().filter(|image| ownership::proof_of(image, project).is_none());
        let unfinished: Vec<String> = others.map(Image::shown_id).collect();
        let room = match unfinished.as_slice() {
            [] => String::new(),
            ids => format!(
                ". Unfinished images of this conversion take room; if no run is making them: virta image delete {}",
                ids.join(" ")
            ),
        };
        return Err(JobError::Quota(format!(
            "the quota for images has {} left, and the new one needs {} beside the old{room}. The way out: convert to a local file \
             (virta convert {} {}.qcow2), check it, delete the raw image, then upload the file",
            size(left),
            size(image_bytes),
            shell_word(&job.source.shown()),
            shell_word(name),
        )));
    }
    Ok(surveyed)
}

/// A survey, and what became of its pipeline.
struct Survey {
    surveyed: Surveyed,
    /// Once the hash lane came to its end.
    stages: Option<Stages>,
}

/// An image that is what it should be.
struct Proven {
    image_hash: HashReport,
    read_back: bool,
    read_twice: bool,
    stages: Stages,
}

/// A source's way into one image after the other, until one has it.
struct Converting<'a> {
    job: &'a Job,
    session: &'a Session,
    name: String,
    surveyed: Option<Survey>,
    tries: u32,
    proven: Option<Proven>,
    carried: Vec<String>,
}

/// A survey's image as something to send.
struct SurveyedImage<'a> {
    job: &'a Job,
    surveyed: &'a Surveyed,
}

impl ImageBytes for SurveyedImage<'_> {
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

impl Work for Converting<'_> {
    async fn fill(&mut self, maker: &Maker<'_>, id: &str) -> Result<Filled, JobError> {
        let job = self.job;
        let mut survey = match self.surveyed.take() {
            Some(survey) => survey,
            None => Survey { surveyed: survey_within_quota(maker, job, self.session, &self.name).await?, stages: None },
        };
        let running = survey.surveyed.running.take();
        let is_surveying = running.is_some();
        let content = SurveyedImage { job, surveyed: &survey.surveyed };
        let transfer = Transfer { maker, content: &content, progress: &job.progress };
        let emitting = async {
            let result = transfer.until_active(id, &mut self.tries).await;
            // where the job is cancelled already, its own cause is on its way, and nothing may come before it
            if result.is_err() && is_surveying && !job.cancel.is_cancelled() {
                job.cancel.cancel(engine::Cause::Requested("another part of the job failed".to_owned()));
            }
            result
        };
        let sent = match running {
            None => emitting.await?,
            Some(running) => match tokio::join!(emitting, running.join()) {
                (Ok(sent), Ok(stages)) => {
                    survey.stages = Some(stages);
                    sent
                }
                // what stopped the emission may be the hash lane: its error says more
                (Err(JobError::Interrupted(_)), Err(failed @ RunError::Failed { .. })) | (Ok(_), Err(failed)) => {
                    return Err(failed.into());
                }
                (Err(JobError::Interrupted(_)), Err(RunError::Cancelled(why))) => return Err(JobError::Interrupted(why)),
                (Err(error), _) => return Err(error),
            },
        };
        let filled = match sent {
            Sent::Useless => Ok(Filled::Useless),
            Sent::Active(active) => {
                let image_hash = transfer.compare(&active.image, &active.emitted).await?;
                self.proof(&survey, *active, image_hash).await.map(Filled::Proven)
            }
        };
        self.surveyed = Some(survey);
        filled
    }

    async fn prove(&mut self, result: &Image) -> Result<bool, JobError> {
        prove(self.job, self.session, result).await
    }

    async fn settle(&mut self, result: &Image) -> Result<(), JobError> {
        self.carried = retire::carry_over(self.job, self.session, result).await?;
        Ok(())
    }

    async fn look_at_both(&mut self, result: &Image) -> Result<Both, JobError> {
        retire::look_at_both(self.job, self.session, result, &self.carried).await
    }

    fn source(&self) -> Option<(&Session, &Image)> {
        match &self.job.source {
            Source::Glance { session, image, .. } => Some((session, image)),
            Source::Local(_) | Source::Pipe(_) => None,
        }
    }
}

impl Converting<'_> {
    /// Size, hash and, if asked for, content of the new image. Then, right before its mark, the name is looked at once more.
    async fn proof(&mut self, survey: &Survey, active: Active, image_hash: HashReport) -> Result<Mark, JobError> {
        let Active { image, stages, .. } = active;
        let job = self.job;
        // a source never goes on the strength of a size alone
        let goes = job.options.after != After::Keep;
        let read_back = job.options.verify == Verify::Readback || (goes && !image_hash.checked);
        if read_back {
            self.read_back(&image, survey).await?;
        }
        // before the mark: an image that is made of something else than the source has none
        let read_twice = goes && retire::second_reading(job, &survey.surveyed.survey).await?;
        let hashed = job.options.verify > Verify::None || job.source.expected_hash().is_none();
        let proof = match (read_back, image_hash.checked && hashed) {
            (true, _) => Proof::Readback,
            (false, true) => Proof::Hash,
            (false, false) => Proof::Sent,
        };
        self.warn_of_the_name(&image).await?;
        let stages = survey.stages.iter().flatten().cloned().chain(stages).collect();
        self.proven = Some(Proven { image_hash, read_back, read_twice, stages });
        Ok(Mark::of(&image, proof))
    }

    /// Another image may have got the name meanwhile: there are two of it then.
    async fn warn_of_the_name(&self, image: &Image) -> Result<(), JobError> {
        if self.job.options.force {
            return Ok(());
        }
        let looking = self.job.cancel.guard(images_of_name(self.session, &self.name)).await;
        let named = looking.map_err(|_| JobError::interrupted())??;
        let source = self.job.source.record();
        let family = family_of(source, self.session, &self.name, false);
        let others = in_the_way(&named, &family, source, self.job.options.after);
        if let Some(other) = others.first().filter(|other| other.id != image.id) {
            self.job.reporter.warn(&format!(
                "image {} is called {}, too, since this run began; the new one is {}",
                other.shown_id(),
                printable(&self.name),
                image.shown_id()
            ));
        }
        Ok(())
    }

    async fn read_back(&self, image: &Image, survey: &Survey) -> Result<(), JobError> {
        let job = self.job;
        let remote = job.remote(self.session, image);
        job.reporter
            .note(&format!("reading {} back and comparing it with what was read of the source", size(remote.image_bytes)));
        let access = ImageFile::access(&remote).await?;
        let target = Target::Glance { remote, access };
        let workers = job.options.connections.get();
        against_survey(&target, &survey.surveyed.survey, workers, &job.progress, &job.cancel).await
    }

    fn report(self, image: &Image) -> Result<Report, JobError> {
        let missing = || JobError::bug("an image without a survey");
        let Survey { surveyed, .. } = self.surveyed.ok_or_else(missing)?;
        let proven = self.proven.ok_or_else(missing)?;
        Ok(self.job.report(ReportOf {
            destination: format!("glance:{}", image.id),
            virtual_bytes: surveyed.layout.sections().geometry.virtual_bytes(),
            stored_bytes: surveyed.survey.index.stored_bytes(),
            image_bytes: surveyed.layout.file_bytes(),
            access: surveyed.access,
            read_back: proven.read_back,
            read_twice: proven.read_twice,
            tiers: surveyed.tiers,
            expected: surveyed.expected.clone(),
            image_hash: proven.image_hash,
            stages: proven.stages,
        }))
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
