//! The source goes, or the new image takes its place.
//!
//! # The order, and what a kill leaves
//! 1. The new image is proven; a source without a hash is read a second time and compared with what was read of it at first. Then the new
//!    image gets `virta_verified`: both are there.
//! 2. To replace: `virta_replaces` and `virta_replaces_name` on the new image; visibility and members: both are there.
//! 3. Both images are looked at once more: the new one still active, still marked, still this run's, the source as it was read, and shared with nobody who
//!    is not with the new one.
//! 4. DELETE of the source, at once. Not answered: 3 again, before it is sent again. Refused (403, 409): both are there, each under its own name.
//! 5. To replace: the name. A kill before it leaves the new image, whose properties tell a later run what is left to do
//!    ([`finish_replacing`](super::finishing::finish_replacing)).
//!
//! At no point is neither there.

use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::json;

use super::{
    After, Job, JobError, Source, Verify,
    finishing::rename,
    names::carries_its_own_proof,
    readback::{Target, against_survey, prove},
};
use crate::{
    clock::seen_in_time,
    glance::Remote,
    openstack::{
        ApiError, Change, Image, Session,
        image::{REPLACES, REPLACES_NAME, RUN, VERIFIED},
    },
    store::Survey,
    text::{counted, printable, size},
};

/// Before a byte is read: may the source go at the end, as far as can be told now?
///
/// # Errors
/// [`JobError::Usage`] where the options contradict each other, [`JobError::Refused`] with what stands in the way.
pub async fn check(job: &Job, force: bool) -> Result<(), JobError> {
    let options = &job.options;
    let Source::Glance { session, image, bytes } = &job.source else {
        if options.after == After::Keep && !options.copy_members {
            return Ok(());
        }
        return Err(JobError::Usage(
            "--delete-source, --replace and --copy-members are about a source in Glance: glance:IMAGE".to_owned(),
        ));
    };
    let members =
        if options.after == After::Keep && !options.copy_members { Vec::new() } else { members(session, image).await? };
    if options.after == After::Keep {
        return Ok(());
    }
    if options.verify == Verify::None {
        return Err(JobError::Usage(
            "a source is deleted only after verification: leave --verify none out (readback is the default then), or say --verify hash"
                .to_owned(),
        ));
    }
    let shown = format!("image {} ({})", image.shown(), image.shown_id());
    if image.protected == Some(true) {
        return Err(JobError::Refused(format!(
            "{shown} is protected and will not be deleted; if it may be: virta image set --unprotected {}",
            image.shown_id()
        )));
    }
    let project = session.whoami().project_id.as_ref();
    if project.is_some() && image.owner.as_ref() != project {
        return Err(JobError::Refused(format!("{shown} belongs to another project: only its owner can delete it")));
    }
    match session.servers_of_image(&image.id).await? {
        Some(servers) if !servers.is_empty() && !force => {
            return Err(JobError::Refused(format!(
                "{} servers were built from {shown} and may need it to be rebuilt or resized; delete it all the same with --force:\n    {}",
                servers.len(),
                servers.join("\n    ")
            )));
        }
        Some(_) => {}
        None => job.notices.note("this cloud has no compute service: nobody can say whether servers were built from the image"),
    }
    if !members.is_empty() && options.elsewhere {
        return Err(JobError::Refused(format!(
            "{shown} is shared with {} of its own cloud, which would lose it: stop sharing it first",
            counted(members.len(), "project")
        )));
    }
    if !members.is_empty() && !options.copy_members {
        let list: Vec<String> = members.iter().map(|member| printable(member)).collect();
        return Err(JobError::Refused(format!(
            "{shown} is shared with {}, which would lose it; carry them over with --copy-members (each has to accept the new \
             image again):\n    {}",
            counted(members.len(), "project"),
            list.join("\n    ")
        )));
    }
    if image.expected_hash().is_none() {
        job.notices.note(&format!(
            "the source has no hash in Glance: before it is deleted, it is read a second time and compared ({} more to fetch)",
            size(*bytes)
        ));
    }
    Ok(())
}

async fn members(session: &Session, image: &Image) -> Result<Vec<String>, JobError> {
    if image.visibility.as_deref() != Some("shared") {
        return Ok(Vec::new());
    }
    Ok(session.members(&image.id).await?)
}

/// DELETEs, each after a look.
const DELETE_TRIES: u32 = 4;

/// What a source that is not there, or cannot be asked for, leads to.
const SOURCE_NOT_SEEN: &str = "the source could not be looked at again (another run may have deleted it)";

/// After the new image is proven: carries members over, deletes the source, gives the new image its name, as far as asked for. An image
/// that an earlier run made (`compare_first`) is compared with the source before that goes.
///
/// # Errors
/// [`JobError`], which says that the new image is there.
pub async fn after_conversion(job: &Job, session: &Session, new_id: &str, compare_first: bool) -> Result<(), JobError> {
    let Source::Glance { session: source_session, image: source, .. } = &job.source else { return Ok(()) };
    let after = job.options.after;
    if after == After::Keep && !job.options.copy_members {
        return Ok(());
    }
    if compare_first && after != After::Keep {
        compare_again(job, session, new_id).await?;
    }
    let source = (**source).clone();
    let mut retirement = Retirement { job, session, source_session, new_id, source, carried: Vec::new() };
    job.cancel.guard(retirement.prepare()).await.unwrap_or_else(|_| Err(retirement.kept()))?;
    if after == After::Keep {
        return Ok(());
    }
    retirement.delete_source().await?;
    let source = &retirement.source;
    job.notices.note(&format!("the source image {} ({}) is deleted", source.shown(), source.shown_id()));
    retirement.look_back().await?;
    if after == After::Replace {
        rename(session, new_id, source.name.as_deref().unwrap_or_default(), &[REPLACES, REPLACES_NAME]).await?;
        job.notices.note(&format!(
            "the new image is called {} now; its id is {new_id}: what names the old id has to be changed",
            source.shown()
        ));
    }
    Ok(())
}

/// A source on its way out, and the image that is to be in its place.
struct Retirement<'a> {
    job: &'a Job,
    /// Where the new image is.
    session: &'a Session,
    /// Where the source is.
    source_session: &'a Session,
    new_id: &'a str,
    /// The source as it was when it was looked at last: it may have been shared or renamed since the run began.
    source: Image,
    /// The projects that the new image was shared with in its place.
    carried: Vec<String>,
}

impl Retirement<'_> {
    fn failed(&self, what: &str, error: ApiError) -> JobError {
        JobError::SourceKept { new_id: self.new_id.to_owned(), what: what.to_owned(), error }
    }

    fn kept(&self) -> JobError {
        JobError::Interrupted(format!(
            "interrupted before the source was deleted: both images are there, and the new one ({}) is verified",
            self.new_id
        ))
    }

    /// Everything before the last look. Broken off anywhere, both images are there.
    async fn prepare(&mut self) -> Result<(), JobError> {
        let Self { job, session, source_session, new_id, .. } = *self;
        let after = job.options.after;
        let mut gone = false;
        if after != After::Keep {
            let new = session.image_if_there(new_id).await?;
            refuse_overtaken(job, &new.ok_or_else(|| JobError::Lost { image: new_id.to_owned() })?)?;
            let found =
                source_session.image_if_there(&self.source.id).await.map_err(|error| self.failed(SOURCE_NOT_SEEN, error))?;
            // the last look says so, when all else is done
            gone = found.is_none();
            if let Some(found) = found {
                self.source = found;
            }
        }
        if after == After::Replace {
            let marks = [(REPLACES_NAME, self.source.name.clone().unwrap_or_default()), (REPLACES, self.source.id.clone())];
            let set =
                |(key, value): (&str, String)| Change::Set(key.to_owned(), json!(value.chars().take(255).collect::<String>()));
            let marking = session.change_image(new_id, &marks.map(set)).await;
            marking.map_err(|error| self.failed("marking the new image", error))?;
        }
        let visibility = self.source.visibility.as_deref().unwrap_or("private");
        if job.options.copy_members || (after == After::Replace && visibility != "private") {
            let set = session.set_property(new_id, "visibility", &json!(visibility)).await;
            set.map_err(|error| self.failed(&format!("making the new image {visibility}"), error))?;
        }
        if job.options.copy_members && !gone {
            // asked for again: somebody may have been added meanwhile
            self.carried = members(source_session, &self.source).await?;
            for member in &self.carried {
                let added = session.add_member(new_id, member).await;
                added.map_err(|error| self.failed(&format!("sharing the new image with {}", printable(member)), error))?;
            }
            job.notices.note(&format!(
                "the new image is shared with {}, which has to be accepted there",
                counted(self.carried.len(), "project")
            ));
        }
        Ok(())
    }

    /// Right before a DELETE of the source: is all as it has to be?
    async fn last_look(&self) -> Result<(), JobError> {
        let Self { job, session, new_id, .. } = *self;
        // two questions at once: each may wait behind somebody's transfer. The new image comes last, for it is what remains
        let (last, members) = tokio::join!(job.source_unchanged(), members(self.source_session, &self.source));
        let not_seen = |error| match error {
            JobError::Api(error) => self.failed(SOURCE_NOT_SEEN, error),
            error => error,
        };
        let (last, members) = (last.map_err(not_seen)?, members.map_err(not_seen)?);
        if let Some(last) = last {
            let renamed = job.options.after == After::Replace && last.name != self.source.name;
            if renamed || last.visibility != self.source.visibility {
                return Err(JobError::Refused(format!(
                    "the source's {} was changed just now, so its deletion is asked for no further; the new image is {new_id}. The same command goes on",
                    if renamed { "name" } else { "visibility" }
                )));
            }
        }
        let forgotten = members.iter().filter(|member| !self.carried.contains(member)).count();
        if forgotten > 0 {
            let way = match (job.options.copy_members, job.options.elsewhere) {
                (true, _) => "The same command goes on",
                (false, true) => "Stop sharing it first",
                (false, false) => "Carry them over with --copy-members",
            };
            return Err(JobError::Refused(format!(
                "the source was shared with {} meanwhile, so its deletion is asked for no further; the new image is {new_id}. {way}",
                counted(forgotten, "project")
            )));
        }
        let new = session.image_if_there(new_id).await?.ok_or_else(|| JobError::Lost { image: new_id.to_owned() })?;
        refuse_overtaken(job, &new)?;
        if new.status == "active" && new.expected_hash().is_none() {
            return Err(JobError::Refused(format!(
                "the source's deletion is asked for no further: Glance computed no hash of the new image {new_id}, so nobody could tell later that it \
                 is what was made and compared just now. If that is enough: virta image delete {}",
                self.source.shown_id()
            )));
        }
        if new.status != "active" || !carries_its_own_proof(&new) {
            return Err(JobError::Refused(format!(
                "the new image {new_id} is {} and not as it was verified any more: the source's deletion is asked for no further",
                new.status
            )));
        }
        Ok(())
    }

    /// [`Self::last_look`], over and over until one is quick enough: what a slow one, or one that the machine slept through, has seen may be over.
    async fn look_in_time(&self) -> Result<(), JobError> {
        let too_slow =
            || self.failed("Glance is too slow to be sure of both images", self.source_session.too_slow(&self.source.id));
        seen_in_time(|| self.last_look()).await?.ok_or_else(too_slow)
    }

    /// Deletes the source. Each request follows upon a look of its own, and is not repeated by itself: while it was not answered, or this machine slept,
    /// the new image may have come to somebody else, or have gone.
    async fn delete_source(&self) -> Result<(), JobError> {
        let Self { job, source_session, .. } = *self;
        let id = &self.source.id;
        let (mut tries, mut unanswered) = (0, false);
        let why = loop {
            tries += 1;
            let looking = job.cancel.guard(self.look_in_time()).await;
            if let Err(error) = looking.unwrap_or_else(|_| Err(self.kept())) {
                break error;
            }
            let error = match source_session.delete_image_once(id).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            unanswered |= error.may_have_been_heard();
            let again = error.is_retryable() || error.status() == Some(StatusCode::UNAUTHORIZED);
            let pause = job.options.patience.pause_after(tries, error.retry_after_s());
            if !again || tries == DELETE_TRIES || job.cancel.guard(tokio::time::sleep(pause)).await.is_err() {
                break if unanswered { error.into() } else { self.failed(refused(&error), error) };
            }
        };
        if !unanswered {
            return Err(why);
        }
        let looking = job.options.patience.to_its_end(&job.cancel, source_session.image_if_there(id));
        match looking.await {
            Some(Ok(None)) => Ok(()),
            _ => {
                let error = match why {
                    // a later look's: after a DELETE that may have been heard, neither can say that the source was kept
                    JobError::SourceKept { error, .. } => error.into(),
                    JobError::Interrupted(_) => JobError::interrupted(),
                    other => other,
                };
                Err(JobError::SourceGoing { new_id: self.new_id.to_owned(), error: Box::new(error) })
            }
        }
    }

    /// When the source is gone: is the new image as it was before? Nothing can be undone, but nobody is to be told that all is well.
    async fn look_back(&self) -> Result<(), JobError> {
        let Self { job, session, new_id, .. } = *self;
        let looking = job.options.patience.to_its_end(&job.cancel, session.image_if_there(new_id));
        match looking.await {
            Some(Ok(None)) => Err(JobError::Refused(format!(
                "the source is deleted, and its verified new image {new_id} was deleted by somebody else at that very moment: this run knows of no other copy"
            ))),
            Some(Ok(Some(new))) => {
                if refuse_overtaken(job, &new).is_err() {
                    job.notices.warn(&format!(
                        "another run ({}) has taken the new image {id} over, just when the source was deleted. Should the image still be protected when \
                         that run is over: virta image set --unprotected {id}",
                        printable(new.property(RUN).unwrap_or("unknown")),
                        id = new.shown_id()
                    ));
                } else if new.status != "active" || !carries_its_own_proof(&new) {
                    job.notices.warn(&format!(
                        "the new image {} is {} and not as it was verified any more",
                        new.shown_id(),
                        new.status
                    ));
                }
                Ok(())
            }
            // what cannot be told now, the release may
            Some(Err(_)) | None => Ok(()),
        }
    }
}

/// What a source's DELETE that was not done came to.
fn refused(error: &ApiError) -> &'static str {
    match error.status() {
        Some(StatusCode::CONFLICT) => "others still use the source",
        Some(StatusCode::FORBIDDEN) => "the source may not be deleted",
        _ => "deleting the source failed",
    }
}

/// Whose source another run cares for, this one leaves alone.
fn refuse_overtaken(job: &Job, new: &Image) -> Result<(), JobError> {
    match (&job.options.run, new.property(RUN)) {
        (Some(run), Some(other)) if run != other => Err(JobError::Refused(format!(
            "another run ({}) has taken the new image {id} over meanwhile: the source is left to it. Should the image still be protected when that run is \
             over, by this one: virta image set --unprotected {id}",
            printable(other),
            id = new.shown_id()
        ))),
        _ => Ok(()),
    }
}

/// An image that an earlier run made: nothing is known of the source but the source itself.
async fn compare_again(job: &Job, session: &Session, new_id: &str) -> Result<(), JobError> {
    job.notices.note("the image was made by an earlier run: it is compared with the source before that is deleted");
    let looking = job.cancel.guard(session.image(new_id)).await;
    let new = looking.map_err(|_| JobError::interrupted())??;
    if prove(job, session, &new).await? {
        return Ok(());
    }
    let unmarking = session.remove_property(new_id, VERIFIED);
    let unmarked = job.options.patience.to_its_end(&job.cancel, unmarking).await.ok_or_else(JobError::interrupted)?;
    unmarked?;
    Err(JobError::Verification(format!(
        "image {new_id} does not show what the source shows: nothing was deleted, and its mark is off"
    )))
}

/// Reads a source without a hash once more: what it serves now has to be what was read at first. Any other has been checked.
///
/// Returns whether it was read.
///
/// # Errors
/// [`JobError::Verification`]; the new image is then not to be trusted.
pub(super) async fn second_reading(job: &Job, survey: &Arc<Survey>) -> Result<bool, JobError> {
    let (Some(remote), None) = (job.source.remote(job), job.source.expected_hash()) else { return Ok(false) };
    job.notices.note("reading the source a second time, since it has no hash");
    let target = Target::glance(Remote { again: true, ..remote }).await?;
    against_survey(&target, survey, job.options.connections.get(), &job.progress, &job.cancel).await.map_err(|error| match error {
        JobError::Verification(_) => JobError::Verification(
            "the source, read a second time, differs from what was read at first: the new image is removed, and nothing was deleted \
             of the source"
                .to_owned(),
        ),
        error => error,
    })?;
    Ok(true)
}
