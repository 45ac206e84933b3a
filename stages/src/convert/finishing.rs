//! The last steps behind a source's deletion, done by the run that deleted it or by a later one: the new image's name, its protection, the end of its
//! claim.
//!
//! # What is taken off, and when
//! A new image is protected and claimed while its source goes ([`super::retire`]). Both come off when that is over, whatever came of it, unless somebody's
//! DELETE of the image may be on its way: then 90 s pass first (`outlast_deletions`). A run that dies in between leaves them; the next one that finds
//! the image takes them off (`finish_marks`), as soon as nothing speaks against it (`claim::protects`).

use reqwest::StatusCode;
use serde_json::json;

use super::{Job, JobError, Notices, Source, claim, names::carries_its_own_proof};
use crate::{
    openstack::{
        ApiError, Change, Image, Session,
        image::{CLAIM_UNTIL, ImageError, REPLACES, REPLACES_NAME, RUN, SOURCE_ID},
    },
    text::{causes, printable, shell_word},
};

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

/// Before [`release`], where somebody's DELETE of the image may be on its way: lets 90 s pass, if the source is gone, or `going`, by a DELETE that
/// may be heard yet. `false`: that was interrupted, and the image stays protected.
pub(super) async fn outlast_deletions(job: &Job, image_id: &str, going: bool) -> bool {
    if !going && !is_source_gone(job).await {
        return true;
    }
    let lasts = job.options.patience.deletion_lasts();
    job.notices.warn(&format!(
        "image {} stays protected for {} s: a run elsewhere may still delete it",
        printable(image_id),
        lasts.as_secs()
    ));
    let passed = job.cancel.guard(tokio::time::sleep(lasts)).await.is_ok();
    if !passed {
        job.notices.warn(&stays_protected(image_id, "interrupted while a run elsewhere might still delete it"));
    }
    passed
}

/// Where somebody's DELETE of an image that is not protected may be on its way: it is told as made only when it is still there after that.
///
/// # Errors
/// [`JobError::Lost`]; an interrupt; [`JobError::Api`].
pub(super) async fn look_again_later(job: &Job, session: &Session, image_id: &str) -> Result<(), JobError> {
    let lasts = job.options.patience.deletion_lasts();
    job.notices.warn(&format!(
        "image {} is looked at again in {} s: a run elsewhere may still delete it",
        printable(image_id),
        lasts.as_secs()
    ));
    let later = async || {
        tokio::time::sleep(lasts).await;
        session.image_if_there(image_id).await
    };
    let found = job.cancel.guard(later()).await.map_err(|_| JobError::interrupted())??;
    found.map(drop).ok_or_else(|| JobError::Lost { image: image_id.to_owned() })
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
pub(super) async fn rename(session: &Session, new_id: &str, name: &str, marks: &[&str]) -> Result<(), JobError> {
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
            Some(why) => notices.warn(&stays_protected(&image.id, &why)),
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
