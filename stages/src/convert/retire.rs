//! The source goes, or the new image takes its place.
//!
//! # The order, and what a kill leaves
//! 1. The new image is proven; a source without a hash is read a second time and compared with what was read of it at first. Then the new
//!    image gets `virta_verified`: both are there.
//! 2. To replace: `virta_replaces` and `virta_replaces_name` on the new image; visibility and members: both are there.
//! 3. The new image is looked at once more: still active, still marked.
//! 4. DELETE of the source. Refused (403, 409): both are there, each under its own name.
//! 5. To replace: the name. A kill before it leaves the new image, whose properties tell a later run what is left to do
//!    ([`finish_replacing`]).
//!
//! At no point is neither there.

use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::json;

use super::{
    After, Job, JobError, Notices, Source, Verify,
    names::carries_its_own_proof,
    readback::{Target, against_survey, prove},
};
use crate::{
    glance::Remote,
    openstack::{
        ApiError, Image, Session,
        image::{CLAIM_UNTIL, ImageError, REPLACES, REPLACES_NAME, SOURCE_ID, VERIFIED},
    },
    store::Survey,
    text::{causes, printable, shell_word, size},
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
            "{shown} is shared with {} projects of its own cloud, which would lose it: stop sharing it first",
            members.len()
        )));
    }
    if !members.is_empty() && !options.copy_members {
        let list: Vec<String> = members.iter().map(|member| printable(member)).collect();
        return Err(JobError::Refused(format!(
            "{shown} is shared with {} projects, which would lose it; carry them over with --copy-members (each has to accept the new \
             image again):\n    {}",
            members.len(),
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
    if compare_first && after != After::Keep {
        compare_again(job, session, new_id).await?;
    }
    let preparing = prepare(job, session, source_session, source, new_id);
    job.cancel.guard(preparing).await.map_err(|_| kept(new_id))??;
    if after == After::Keep {
        return Ok(());
    }
    // From here on nothing is broken off: what is asked of Glance is asked to its end.
    if job.cancel.is_cancelled() {
        return Err(kept(new_id));
    }
    match source_session.delete_image(&source.id).await {
        Ok(()) => job.notices.note(&format!("the source image {} ({}) is deleted", source.shown(), source.shown_id())),
        Err(error) => {
            let why = match error.status() {
                Some(StatusCode::CONFLICT) => "others still use the source",
                Some(StatusCode::FORBIDDEN) => "the source may not be deleted",
                _ => "deleting the source failed",
            };
            return Err(failed(new_id, why, error));
        }
    }
    if after == After::Replace {
        rename(session, new_id, source.name.as_deref().unwrap_or_default()).await?;
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

/// Everything before the DELETE. Broken off anywhere, both images are there.
async fn prepare(job: &Job, session: &Session, source_session: &Session, source: &Image, new_id: &str) -> Result<(), JobError> {
    let after = job.options.after;
    if after == After::Replace {
        for (key, value) in [(REPLACES_NAME, source.name.clone().unwrap_or_default()), (REPLACES, source.id.clone())] {
            let value = json!(value.chars().take(255).collect::<String>());
            session.set_property(new_id, key, &value).await.map_err(|error| failed(new_id, "marking the new image", error))?;
        }
    }
    let visibility = source.visibility.as_deref().unwrap_or("private");
    if job.options.copy_members || (after == After::Replace && visibility != "private") {
        let set = session.set_property(new_id, "visibility", &json!(visibility)).await;
        set.map_err(|error| failed(new_id, &format!("making the new image {visibility}"), error))?;
    }
    // asked for again: somebody may have been added meanwhile
    let members =
        if after == After::Keep && !job.options.copy_members { Vec::new() } else { members(source_session, source).await? };
    if job.options.copy_members {
        for member in &members {
            let added = session.add_member(new_id, member).await;
            added.map_err(|error| failed(new_id, &format!("sharing the new image with {}", printable(member)), error))?;
        }
        job.notices.note(&format!("the new image is shared with {} projects, which have to accept it", members.len()));
    }
    if after == After::Keep {
        return Ok(());
    }
    if !members.is_empty() && !job.options.copy_members {
        return Err(JobError::Refused(format!(
            "the source was shared with {} projects meanwhile: it is not deleted; the new image is {new_id}. Carry them over with \
             --copy-members",
            members.len()
        )));
    }
    job.check_unchanged().await.map_err(|error| match error {
        JobError::Api(error) => {
            failed(new_id, "the source could not be looked at again (another run may have deleted it)", error)
        }
        error => error,
    })?;
    let new = session.image(new_id).await?;
    if new.status != "active" || !carries_its_own_proof(&new) {
        return Err(JobError::Refused(format!(
            "the new image {new_id} is {} and not as it was verified any more: the source is not deleted",
            new.status
        )));
    }
    Ok(())
}

/// An image that an earlier run made: nothing is known of the source but the source itself.
async fn compare_again(job: &Job, session: &Session, new_id: &str) -> Result<(), JobError> {
    job.notices.note("the image was made by an earlier run: it is compared with the source before that is deleted");
    let new = session.image(new_id).await?;
    if prove(job, session, &new).await? {
        return Ok(());
    }
    session.remove_property(new_id, VERIFIED).await?;
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

/// Takes the claim off a finished image, and the protection that kept others from deleting it while its source went.
///
/// # Errors
/// [`ApiError`].
pub async fn release(session: &Session, image_id: &str) -> Result<(), ApiError> {
    let released = async {
        session.set_property(image_id, "protected", &json!(false)).await?;
        session.remove_property(image_id, CLAIM_UNTIL).await
    };
    match released.await {
        Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => Ok(()),
        other => other,
    }
}

/// The last steps of a replacement.
async fn rename(session: &Session, new_id: &str, name: &str) -> Result<(), JobError> {
    let named = async {
        session.set_property(new_id, "name", &json!(name)).await?;
        session.remove_property(new_id, REPLACES).await?;
        session.remove_property(new_id, REPLACES_NAME).await
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

/// A run that finds the source of a replacement gone: did an earlier one get that far? Then its last steps are done now.
///
/// # Errors
/// [`JobError`] if Glance cannot be asked, or the name cannot be set.
pub async fn finish_replacing(session: &Session, name_or_id: &str, notices: &dyn Notices) -> Result<Option<Image>, JobError> {
    match session.find_image(name_or_id).await {
        // it has the name already
        Ok(image) if image.disk_format.as_deref() == Some("qcow2") && carries_its_own_proof(&image) => {
            for key in [REPLACES, REPLACES_NAME] {
                if image.property(key).is_some() {
                    session.remove_property(&image.id, key).await?;
                }
            }
            return Ok(Some(image));
        }
        Ok(_) | Err(ImageError::Ambiguous { .. }) => return Ok(None),
        Err(ImageError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    // the source's id stays in the new image when everything else is done
    for key in [REPLACES, REPLACES_NAME, SOURCE_ID] {
        let mut found = session.images_where(key, name_or_id).await?;
        found.retain(|image| image.property(key) == Some(name_or_id) && image.status == "active" && carries_its_own_proof(image));
        let [image] = found.as_slice() else { continue };
        // it may only be called otherwise by now
        let replaced = image.property(REPLACES).or(image.property(SOURCE_ID)).unwrap_or_default();
        match session.image(replaced).await {
            Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => {}
            Ok(_) => continue,
            Err(error) => return Err(error.into()),
        }
        let Some(name) = image.property(REPLACES_NAME).map(str::to_owned) else { return Ok(Some(image.clone())) };
        notices.note(&format!("the source is gone, and image {} takes its place: it gets its name now", image.shown_id()));
        rename(session, &image.id, &name).await?;
        return Ok(Some(image.clone()));
    }
    Ok(None)
}
