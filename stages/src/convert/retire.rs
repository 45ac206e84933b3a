//! A source that goes once its conversion is marked: what is checked before, right before, and what goes along.
//!
//! The order, and who may delete when, is on the page of [`crate::ownership`] (R5): the new image is proven and marked; members follow; both images are looked at
//! once more; one DELETE. At each moment the source is there, or a marked image is.

use std::sync::Arc;

use serde_json::json;

use super::{
    After, Job, Source, Verify,
    drive::Both,
    readback::{Target, against_survey},
};
use crate::{
    error::JobError,
    glance::Remote,
    openstack::{Image, Session},
    ownership::{is_marked, refuse_unmarked},
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
    refuse_unmarked(session, image)?;
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
        None => job.reporter.note("this cloud has no compute service: nobody can say whether servers were built from the image"),
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
        job.reporter.note(&format!(
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

/// Visibility and members of the source go over to the result, as far as asked for. Returns the projects that it was shared with.
///
/// # Errors
/// [`JobError`].
pub(super) async fn carry_over(job: &Job, session: &Session, result: &Image) -> Result<Vec<String>, JobError> {
    let Source::Glance { session: source_session, image: source, .. } = &job.source else { return Ok(Vec::new()) };
    let copies = job.options.copy_members;
    // the new image has it from its beginning, one of an earlier run may have another
    let visibility = wanted_visibility(job);
    if (copies || job.options.after == After::Replace) && result.visibility.as_deref() != Some(visibility) {
        let visibility = json!(visibility);
        let setting = session.set_property(&result.id, "visibility", &visibility);
        job.cancel.guard(setting).await.map_err(|_| JobError::interrupted())??;
    }
    if !copies {
        return Ok(Vec::new());
    }
    let sharing = async {
        // asked for again: a project may have been added meanwhile
        let members = match source_session.image_if_there(&source.id).await? {
            Some(source) => members(source_session, &source).await?,
            None => Vec::new(),
        };
        for member in &members {
            session.add_member(&result.id, member).await?;
        }
        Ok::<_, JobError>(members)
    };
    let members = job.cancel.guard(sharing).await.map_err(|_| JobError::interrupted())??;
    job.reporter
        .note(&format!("the new image is shared with {}; each has to accept it there", counted(members.len(), "project")));
    Ok(members)
}

/// What the new image's visibility is to be.
pub(super) fn wanted_visibility(job: &Job) -> &str {
    match &job.source {
        Source::Glance { image, .. } if job.options.copy_members || job.options.after == After::Replace => {
            image.visibility.as_deref().unwrap_or("private")
        }
        _ => "private",
    }
}

/// Right before the source is deleted: are both as they have to be? `carried`: the projects that the result was shared with.
///
/// # Errors
/// [`JobError`], which says what has changed.
pub(super) async fn look_at_both(job: &Job, session: &Session, result: &Image, carried: &[String]) -> Result<Both, JobError> {
    let Source::Glance { session: source_session, image: source, .. } = &job.source else { return Ok(Both::SourceGone) };
    let looking = async {
        let now = match source_session.image_if_there(&source.id).await? {
            Some(now) if !matches!(now.status.as_str(), "deleted" | "pending_delete") => now,
            _ => return Ok(Both::SourceGone),
        };
        let refuse = |what: &str| {
            JobError::Refused(format!("the source's {what} has changed since this run began: start the same command again"))
        };
        if let Some(what) = source.differs_from(&now) {
            return Err(refuse(what));
        }
        let forgotten = members(source_session, &now).await?.iter().filter(|member| !carried.contains(member)).count();
        if forgotten > 0 {
            let way = match (job.options.copy_members, job.options.elsewhere) {
                (true, _) => "start the same command again",
                (false, true) => "stop sharing it first",
                (false, false) => "carry them over with --copy-members",
            };
            return Err(JobError::Refused(format!(
                "the source was shared with {} meanwhile: {way}",
                counted(forgotten, "project")
            )));
        }
        if let Some(what) = changed(job, source, &now) {
            return Err(refuse(what));
        }
        // the one that remains comes last
        let Some(now) = session.image_if_there(&result.id).await? else { return Ok(Both::ResultGone) };
        let project = session.whoami().project_id.as_deref();
        if !is_marked(&now, project) || result.differs_from(&now).is_some() {
            return Err(JobError::Refused(format!(
                "the new image {} is {} and not as it was verified any more",
                now.shown_id(),
                printable(&now.status)
            )));
        }
        Ok(Both::AsProven)
    };
    job.cancel.guard(looking).await.map_err(|_| JobError::interrupted())?
}

/// What of a source's record has changed that matters where it is to be deleted.
fn changed(job: &Job, before: &Image, now: &Image) -> Option<&'static str> {
    if now.protected == Some(true) {
        return Some("protection");
    }
    if before.visibility != now.visibility {
        return Some("visibility");
    }
    (job.options.after == After::Replace && before.name != now.name).then_some("name")
}

/// Reads a source without a hash once more: what it serves now has to be what was read at first. Any other has been checked.
///
/// Returns whether it was read.
///
/// # Errors
/// [`JobError::Verification`]; the new image is then not to be trusted.
pub(super) async fn second_reading(job: &Job, survey: &Arc<Survey>) -> Result<bool, JobError> {
    let (Some(remote), None) = (job.source_remote(), job.source.expected_hash()) else { return Ok(false) };
    job.reporter.note("reading the source a second time, since it has no hash");
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
