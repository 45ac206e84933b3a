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
//!    ([`finish_replacing`]).
//!
//! At no point is neither there.

use std::{sync::Arc, time::Duration};

use reqwest::{Method, StatusCode};
use serde_json::json;

use super::{
    After, Job, JobError, Notices, Source, Verify, claim,
    names::carries_its_own_proof,
    readback::{Target, against_survey, prove},
};
use crate::{
    clock::Moment,
    glance::Remote,
    openstack::{
        ApiError, Change, Image, Session,
        image::{CLAIM_UNTIL, ImageError, REPLACES, REPLACES_NAME, RUN, SOURCE_ID, VERIFIED},
    },
    store::Survey,
    text::{causes, counted, printable, shell_word, size},
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
    let preparing = prepare(job, session, source_session, source, new_id);
    let prepared = job.cancel.guard(preparing).await.map_err(|_| kept(new_id))??;
    if after == After::Keep {
        return Ok(());
    }
    delete_source(job, session, source_session, &prepared, new_id).await?;
    let source = &prepared.source;
    job.notices.note(&format!("the source image {} ({}) is deleted", source.shown(), source.shown_id()));
    look_back(job, session, new_id).await?;
    if after == After::Replace {
        rename(session, new_id, source.name.as_deref().unwrap_or_default(), &[REPLACES, REPLACES_NAME]).await?;
        job.notices.note(&format!(
            "the new image is called {} now; its id is {new_id}: what names the old id has to be changed",
            source.shown()
        ));
    }
    Ok(())
}

fn failed(new_id: &str, what: &str, error: ApiError) -> JobError {
    JobError::SourceKept { new_id: new_id.to_owned(), what: what.to_owned(), error }
}

fn kept(new_id: &str) -> JobError {
    JobError::Interrupted(format!(
        "interrupted before the source was deleted: both images are there, and the new one ({new_id}) is verified"
    ))
}

/// How long what the last look has seen is believed.
const LOOK_LASTS: Duration = Duration::from_secs(30);
/// Looks for one that is so quick.
const LOOKS: u32 = 4;
/// DELETEs, each after a look.
const DELETE_TRIES: u32 = 4;

/// What a source that is not there, or cannot be asked for, leads to.
const SOURCE_NOT_SEEN: &str = "the source could not be looked at again (another run may have deleted it)";

/// A source that may go.
struct Prepared {
    /// As it is now: it may have been shared or renamed since it was looked at.
    source: Image,
    /// The projects that the new image was shared with in its place.
    carried: Vec<String>,
}

/// Everything before the last look. Broken off anywhere, both images are there.
async fn prepare(
    job: &Job,
    session: &Session,
    source_session: &Session,
    source: &Image,
    new_id: &str,
) -> Result<Prepared, JobError> {
    let after = job.options.after;
    let (mut source, mut gone) = (source.clone(), false);
    if after != After::Keep {
        let new = session.image_if_there(new_id).await?;
        refuse_overtaken(job, &new.ok_or_else(|| JobError::Lost { image: new_id.to_owned() })?)?;
        let found = source_session.image_if_there(&source.id).await.map_err(|error| failed(new_id, SOURCE_NOT_SEEN, error))?;
        // the last look says so, when all else is done
        gone = found.is_none();
        source = found.unwrap_or(source);
    }
    if after == After::Replace {
        let marks = [(REPLACES_NAME, source.name.clone().unwrap_or_default()), (REPLACES, source.id.clone())];
        let set = |(key, value): (&str, String)| Change::Set(key.to_owned(), json!(value.chars().take(255).collect::<String>()));
        let marking = session.change_image(new_id, &marks.map(set)).await;
        marking.map_err(|error| failed(new_id, "marking the new image", error))?;
    }
    let visibility = source.visibility.as_deref().unwrap_or("private");
    if job.options.copy_members || (after == After::Replace && visibility != "private") {
        let set = session.set_property(new_id, "visibility", &json!(visibility)).await;
        set.map_err(|error| failed(new_id, &format!("making the new image {visibility}"), error))?;
    }
    let mut carried = Vec::new();
    if job.options.copy_members && !gone {
        // asked for again: somebody may have been added meanwhile
        carried = members(source_session, &source).await?;
        for member in &carried {
            let added = session.add_member(new_id, member).await;
            added.map_err(|error| failed(new_id, &format!("sharing the new image with {}", printable(member)), error))?;
        }
        job.notices
            .note(&format!("the new image is shared with {}, which has to be accepted there", counted(carried.len(), "project")));
    }
    Ok(Prepared { source, carried })
}

/// Right before a DELETE of the source: is all as it has to be?
async fn last_look(
    job: &Job,
    session: &Session,
    source_session: &Session,
    prepared: &Prepared,
    new_id: &str,
) -> Result<(), JobError> {
    // two questions at once: each may wait behind somebody's transfer. The new image comes last, for it is what remains
    let (last, members) = tokio::join!(job.source_unchanged(), members(source_session, &prepared.source));
    let not_seen = |error| match error {
        JobError::Api(error) => failed(new_id, SOURCE_NOT_SEEN, error),
        error => error,
    };
    let (last, members) = (last.map_err(not_seen)?, members.map_err(not_seen)?);
    if let Some(last) = last {
        let renamed = job.options.after == After::Replace && last.name != prepared.source.name;
        if renamed || last.visibility != prepared.source.visibility {
            return Err(JobError::Refused(format!(
                "the source's {} was changed just now, so its deletion is asked for no further; the new image is {new_id}. The same command goes on",
                if renamed { "name" } else { "visibility" }
            )));
        }
    }
    let forgotten = members.iter().filter(|member| !prepared.carried.contains(member)).count();
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
            "the source is not deleted: Glance computed no hash of the new image {new_id}, so nobody could tell later that it is what was made \
             and compared just now. If that is enough: virta image delete {}",
            prepared.source.shown_id()
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

/// Deletes the source. Each request follows upon a look of its own, and is not repeated by itself: while it was not answered, or this machine slept,
/// the new image may have come to somebody else, or have gone.
async fn delete_source(
    job: &Job,
    session: &Session,
    source_session: &Session,
    prepared: &Prepared,
    new_id: &str,
) -> Result<(), JobError> {
    let id = &prepared.source.id;
    let (mut tries, mut unanswered) = (0, false);
    let why = loop {
        tries += 1;
        let looking = job.cancel.guard(look_in_time(job, session, source_session, prepared, new_id)).await;
        if let Err(error) = looking.unwrap_or_else(|_| Err(kept(new_id))) {
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
            break if unanswered { error.into() } else { failed(new_id, refused(&error), error) };
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
                JobError::SourceKept { error, .. } => error.into(),
                JobError::Interrupted(_) => JobError::interrupted(),
                other => other,
            };
            Err(JobError::SourceGoing { new_id: new_id.to_owned(), error: Box::new(error) })
        }
    }
}

/// When the source is gone: is the new image as it was before? Nothing can be undone, but nobody is to be told that all is well.
async fn look_back(job: &Job, session: &Session, new_id: &str) -> Result<(), JobError> {
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

/// [`last_look`], over and over until one is quick enough: what a slow one, or one that the machine slept through, has seen may be over.
async fn look_in_time(
    job: &Job,
    session: &Session,
    source_session: &Session,
    prepared: &Prepared,
    new_id: &str,
) -> Result<(), JobError> {
    for _ in 0..LOOKS {
        let begun = Moment::now();
        last_look(job, session, source_session, prepared, new_id).await?;
        if begun.elapsed() < LOOK_LASTS {
            return Ok(());
        }
    }
    let path = source_session.image_url(&["images", &prepared.source.id]).path().to_owned();
    let what = format!("each of {LOOKS} looks took more than {} s", LOOK_LASTS.as_secs());
    Err(failed(new_id, "Glance is too slow to be sure of both images", ApiError::Answer { method: Method::GET, path, what }))
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

/// Takes the claim off a finished image, and the protection that kept others from deleting it while its source went; unless it has come to
/// another run than `run`, which has them now.
///
/// Returns whether they are off: `false` for an image that carries another run's name.
///
/// # Errors
/// [`ApiError`].
pub async fn release(session: &Session, image_id: &str, run: Option<&str>) -> Result<bool, ApiError> {
    let released = async {
        match session.image_if_there(image_id).await? {
            Some(image) if image.property(RUN).is_none_or(|of| Some(of) == run) => {}
            Some(_) => return Ok(false),
            None => return Ok(true),
        }
        session.set_property(image_id, "protected", &json!(false)).await?;
        session.remove_property(image_id, CLAIM_UNTIL).await.map(|()| true)
    };
    match released.await {
        Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => Ok(true),
        other => other,
    }
}

/// [`release`], and a warning where it stays as it is.
pub(super) async fn release_or_warn(job: &Job, session: &Session, image_id: &str, run: Option<&str>) {
    if let Some(cause) = job.options.patience.failure_of(&job.cancel, release(session, image_id, run)).await {
        job.notices.warn(&stays_protected(image_id, &cause));
    }
}

/// Before [`release`], where somebody's DELETE of the image may be on its way: lets a minute pass, if the source is gone. `retired` is what became of
/// that. `false`: that was interrupted, and the image stays protected.
pub(super) async fn outlast_deletions(job: &Job, image_id: &str, retired: &Result<(), JobError>) -> bool {
    let going = matches!(retired, Err(JobError::SourceGoing { .. }));
    if !going && !is_source_gone(job).await {
        return true;
    }
    job.notices.warn(&format!("image {} stays protected for a minute: a run elsewhere may still delete it", printable(image_id)));
    let passed = job.cancel.guard(tokio::time::sleep(job.options.patience.silence)).await.is_ok();
    if !passed {
        job.notices.warn(&stays_protected(image_id, "interrupted while a run elsewhere might still delete it"));
    }
    passed
}

/// What becomes of an image whose protection could not be taken off, and how it is.
pub(super) fn stays_protected(image_id: &str, why: &str) -> String {
    let id = shell_word(&printable(image_id));
    format!("image {id} stays protected ({why}); to take that off: virta image set --unprotected {id}")
}

/// Is the job's source not there any more? What cannot be told counts as gone.
async fn is_source_gone(job: &Job) -> bool {
    let Source::Glance { session, image, .. } = &job.source else { return false };
    let looking = tokio::time::timeout(job.options.patience.silence, session.image(&image.id));
    !matches!(job.options.patience.to_its_end(&job.cancel, looking).await, Some(Ok(Ok(_))))
}

/// The last step of a replacement: the new image's name, and the marks that told of it come off with it.
async fn rename(session: &Session, new_id: &str, name: &str, marks: &[&str]) -> Result<(), JobError> {
    let named = async {
        let mut changes = vec![Change::Set("name".to_owned(), json!(name))];
        changes.extend(marks.iter().map(|mark| Change::Remove((*mark).to_owned())));
        match session.change_image(new_id, &changes).await {
            // a mark that is to come off is off: somebody did the same just now
            Err(error) if error.status() == Some(StatusCode::CONFLICT) => {
                session.set_property(new_id, "name", &json!(name)).await
            }
            other => other.map(drop),
        }
    };
    named.await.map_err(|error| {
        JobError::Refused(format!(
            "the source is deleted and the new image {new_id} verified, but giving it the source's name failed ({}): start the same command \
             again, or: virta image set --name {} {new_id}",
            causes(&error),
            shell_word(&printable(name))
        ))
    })
}

/// A run that finds its source gone: did an earlier one get that far? Then its last steps are done now.
///
/// `name_or_id`: the source, as it was written; `made`: ids of images that earlier runs of the very same command made; `new_name`: what the
/// new image is to be called, unless it gets the source's name.
///
/// # Errors
/// [`JobError`] if Glance cannot be asked, or the name cannot be set.
pub async fn finish_earlier_deletion(
    source_session: &Session,
    session: &Session,
    name_or_id: &str,
    made: &[String],
    new_name: Option<&str>,
    notices: &dyn Notices,
) -> Result<Option<Image>, JobError> {
    let name_or_id = name_or_id.strip_prefix("glance:").unwrap_or(name_or_id);
    // what another project has shared with this one, that can take away again
    let is_done = |image: &Image| image.status == "active" && carries_its_own_proof(image) && session.owns(image);
    let is_called = |image: &Image| new_name.is_none_or(|name| image.name.as_deref() == Some(name));
    let mut candidates = Vec::new();
    for key in [REPLACES, REPLACES_NAME, SOURCE_ID] {
        let mut found = session.images_where(key, name_or_id).await?;
        found.retain(|image| image.property(key) == Some(name_or_id) && is_done(image) && is_called(image));
        // two that a name may mean are none
        if let [image] = found.as_slice() {
            candidates.push(image.clone());
        }
    }
    // what was deleted tells its name to nobody any more
    for id in made {
        let found = session.image_if_there(id).await?;
        candidates.extend(found.filter(|image| is_done(image) && is_called(image)));
    }
    for image in candidates {
        // it may only be called otherwise by now
        let Some(source) = image.property(REPLACES).or(image.property(SOURCE_ID)) else { continue };
        if source_session.image_if_there(source).await?.is_some() {
            continue;
        }
        finish_marks(session, &image, None, notices).await?;
        notices.note(&format!(
            "the source ({}) is gone, deleted after an earlier run had made and verified image {} ({}) of it",
            printable(source),
            image.shown(),
            image.shown_id()
        ));
        return Ok(Some(image));
    }
    Ok(None)
}

/// What a run that was killed after the source's deletion could not do any more: the name of a replacement, and the end of a claim. `own`: the run that
/// asks.
pub(crate) async fn finish_marks(
    session: &Session,
    image: &Image,
    own: Option<&str>,
    notices: &dyn Notices,
) -> Result<(), JobError> {
    let marks: Vec<&str> = [REPLACES, REPLACES_NAME].into_iter().filter(|key| image.property(key).is_some()).collect();
    match image.property(REPLACES_NAME) {
        Some(name) => rename(session, &image.id, name, &marks).await?,
        None if !marks.is_empty() => session.remove_property(&image.id, REPLACES).await?,
        None => {}
    }
    if image.property(CLAIM_UNTIL).is_some() {
        match claim::protects(image, session.now(), own, notices) {
            None => drop(release(session, &image.id, image.property(RUN)).await?),
            Some(why) => notices.warn(&format!("image {} stays protected: {why}", image.shown_id())),
        }
    }
    Ok(())
}

/// A replacement that was stopped between the source's deletion and its end: its last steps are done now. Does the name, or id, mean an image
/// that has been put in its place?
///
/// # Errors
/// [`JobError`] if Glance cannot be asked, or the name cannot be set.
pub async fn finish_replacing(session: &Session, name_or_id: &str, notices: &dyn Notices) -> Result<Option<Image>, JobError> {
    match session.find_image(name_or_id).await {
        // it has the name already
        Ok(image) if image.disk_format.as_deref() == Some("qcow2") && carries_its_own_proof(&image) => {
            if let Some(replaced) = image.property(REPLACES)
                && session.image_if_there(replaced).await?.is_some()
            {
                return Ok(None);
            }
            finish_marks(session, &image, None, notices).await?;
            Ok(Some(image))
        }
        Ok(_) | Err(ImageError::Ambiguous { .. }) => Ok(None),
        Err(ImageError::NotFound { .. }) => finish_earlier_deletion(session, session, name_or_id, &[], None, notices).await,
        Err(error) => Err(error.into()),
    }
}
