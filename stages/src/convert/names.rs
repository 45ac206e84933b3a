//! Who has the new image's name already, and what that means.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use super::{
    After, Job, JobError, Source, Verify,
    claim::{self, claimed_id, held},
    finishing::{look_again_later, outlast_deletions, release, release_or_warn, stays_protected},
    readback::prove,
    retire::after_conversion,
};
use crate::{
    openstack::{
        Change, Image, Session,
        image::{CLAIM_UNTIL, RUN, SOURCE_HASH, SOURCE_ID, VERIFIED},
    },
    text::printable,
};

/// Claimed ids of a source that are recognised.
const CLAIMED_IDS_LOOKED_FOR: u32 = 256;

/// What a name in Glance means for a conversion.
#[derive(Debug)]
pub enum NameCheck {
    /// No finished image has it. Unfinished ones of this very source may: dead runs left them, or live ones make them.
    Free {
        /// `queued` or `saving`.
        unfinished: Vec<Image>,
    },
    /// This source's own finished conversion has it.
    AlreadyDone(Box<Image>),
    /// An image has it that says it was made from this source, but not that it was verified since: the run that made it may
    /// have died at the very end, or it is a snapshot that inherited the mark. To be proven, or refused.
    Unproven(Box<Image>),
}

/// Who has this name already? Asked while the source is looked up; [`check_name`] decides.
///
/// # Errors
/// [`JobError::Usage`] if the name cannot be an image's: empty, too long, or a UUID.
pub async fn images_of_name(session: &Session, name: &str) -> Result<Vec<Image>, JobError> {
    if name.is_empty() {
        return Err(JobError::Usage("glance: needs a name for the new image, as in glance:my-server-qcow2".to_owned()));
    }
    if name.chars().count() > 255 {
        return Err(JobError::Usage("the new image's name is longer than Glance's 255 characters".to_owned()));
    }
    if uuid::Uuid::parse_str(name).is_ok() {
        return Err(JobError::Usage(format!(
            "{name} is an id: a conversion always makes a new image and never writes into one that is there. Give it a name"
        )));
    }
    Ok(session.images_named(name).await?)
}

/// May an image of this name be made in the project of `session`, with `taken` having it? The source itself may have it where it is to
/// be replaced.
///
/// # Errors
/// [`JobError::Usage`] if it is taken and `force` is not given; it lists who has it.
pub fn check_name(
    session: &Session,
    taken: Vec<Image>,
    name: &str,
    source: &Source,
    force: bool,
    after: After,
) -> Result<NameCheck, JobError> {
    let mut taken = taken;
    if let (After::Replace, Source::Glance { image, .. }) = (after, source) {
        taken.retain(|taken| taken.id != image.id);
    }
    let (taken, waiting): (Vec<Image>, Vec<Image>) = taken.into_iter().partition(|image| image.status == "active");
    let mut unfinished = Vec::new();
    if let Source::Glance { image: source, .. } = source {
        let of_source = |image: &Image| image.property(SOURCE_ID) == Some(&source.id) && image.id != source.id;
        // for the source itself has the name when the new image is to replace it
        let ours = taken.iter().filter(|image| of_source(image));
        let ours: Vec<&Image> = ours.filter(|image| may_be_made_of(session, image, source)).collect();
        if let Some(done) = ours.iter().find(|image| carries_its_own_proof(image)) {
            return Ok(NameCheck::AlreadyDone(Box::new((*done).clone())));
        }
        if let Some(unproven) = ours.first().filter(|_| !force) {
            return Ok(NameCheck::Unproven(Box::new((*unproven).clone())));
        }
        if let Some(other) = taken.iter().find(|image| of_source(image)).filter(|_| !force) {
            return Err(unproven(other));
        }
        unfinished = waiting.into_iter().filter(of_source).collect();
        unfinished.retain(|image| matches!(image.status.as_str(), "queued" | "saving"));
    }
    if taken.is_empty() || force {
        return Ok(NameCheck::Free { unfinished });
    }
    let lines: Vec<String> = taken.iter().map(|image| format!("\n    {}", image.line())).collect();
    let itself = matches!(source, Source::Glance { image, .. } if taken.iter().any(|taken| taken.id == image.id));
    let replace = if itself { ", or put it in the source's place with --replace" } else { "" };
    Err(JobError::Usage(format!(
        "an image called {} is there already; choose another name{replace}, or make a second one with --force:{}",
        printable(name),
        lines.concat()
    )))
}

/// What an earlier run made of this source, if anything: finished now, or found finished.
///
/// `made`: the images that name the source as theirs ([`SOURCE_ID`]), whatever they are called; `name`: what the new image is to be called.
///
/// # Errors
/// [`JobError::Held`] if another run is at it, [`JobError::GoneOnWith`] if one has taken the image on meanwhile; what proving it, or what is left to do with
/// the source, came to.
pub async fn finish_earlier(job: &Job, session: &Session, made: Vec<Image>, name: &str) -> Result<Option<Image>, JobError> {
    let Source::Glance { image: source, .. } = &job.source else { return Ok(None) };
    let mut ours = made;
    ours.retain(|image| image.id != source.id && image.property(SOURCE_ID) == Some(&source.id));
    ours.retain(|image| may_be_made_of(session, image, source));
    let own_run = |image: &Image| job.options.run.as_deref().is_some_and(|run| image.property(RUN) == Some(run));
    if let Some(held) = ours.iter().filter(|image| !own_run(image)).find_map(|image| held(image, session.now(), &*job.notices)) {
        return Err(held);
    }
    let active = |image: &&Image| image.status == "active";
    if let Some(done) = ours.iter().filter(active).find(|image| carries_its_own_proof(image)) {
        go_on_with_finished(job, session, done).await?;
        return Ok(Some(done.clone()));
    }
    // Nova copies marks onto the snapshots of servers that were started from a conversion: only an image under a claimed id, or under the
    // name that is wanted, is taken for one that was never proven. What an earlier try of this run was about to delete is made anew
    let claimed = |image: &Image| {
        let project = session.whoami().project_id.clone().unwrap_or_default();
        (0..CLAIMED_IDS_LOOKED_FOR).any(|generation| claimed_id(&source.id, &project, generation) == image.id)
    };
    let going =
        |image: &Image| own_run(image) && job.options.run.as_deref().is_some_and(|run| job.notices.was_deleting(run, &image.id));
    let maybe = |image: &&Image| active(image) && !going(image) && (image.name.as_deref() == Some(name) || claimed(image));
    if let Some(unproven) = ours.iter().find(maybe) {
        go_on_with_unproven(job, session, unproven).await?;
        return Ok(Some(unproven.clone()));
    }
    Ok(None)
}

/// A finished conversion is there: what is left to do with its source is done.
///
/// # Errors
/// [`JobError`].
pub async fn go_on_with_finished(job: &Job, session: &Session, image: &Image) -> Result<(), JobError> {
    if job.options.verify == Verify::Readback && job.options.after == After::Keep {
        job.notices.note("the image is there already: it is read and compared with the source");
        if !prove(job, session, image).await? {
            return Err(JobError::Verification(format!("image {} does not show what the source shows", image.shown_id())));
        }
    }
    job.notices.note(&format!(
        "made earlier, with the options of then ({}): for another one take another name, or --force",
        image.line()
    ));
    // an earlier run may have been stopped between its verification and the rest
    adopted(job, session, image, async || after_conversion(job, session, &image.id, true).await).await
}

/// An image says that it was made from this source, and was never verified: it is now.
///
/// # Errors
/// [`JobError`]; a refusal if it is not what it says.
pub async fn go_on_with_unproven(job: &Job, session: &Session, image: &Image) -> Result<(), JobError> {
    job.notices.note(&format!(
        "image {} ({}) was made from this source and never verified since: it is read and compared now",
        image.shown(),
        image.shown_id()
    ));
    adopted(job, session, image, async || {
        if !prove(job, session, image).await? {
            return Err(unproven(image));
        }
        after_conversion(job, session, &image.id, false).await
    })
    .await
}

/// Does what is left to do with another run's image, which may be the only copy afterwards.
///
/// Before it, this run's name is put into the image, so that the other run, should it live after all, lets it be; where the source goes, the
/// image is claimed and protected, too, against a DELETE that is on its way. Whatever `work` came to, both come off again.
async fn adopted(
    job: &Job,
    session: &Session,
    image: &Image,
    work: impl AsyncFnOnce() -> Result<(), JobError>,
) -> Result<(), JobError> {
    let Source::Glance { bytes, .. } = &job.source else { return work().await };
    let goes = job.options.after != After::Keep;
    if !goes && image.property(CLAIM_UNTIL).is_none() && carries_its_own_proof(image) {
        return work().await;
    }
    // it may have been read for hours since it was looked at, and have come to somebody else
    let looking = job.cancel.guard(session.image_if_there(&image.id)).await;
    let found = looking.map_err(|_| JobError::interrupted())??.ok_or_else(|| JobError::Lost { image: image.id.clone() })?;
    if let Some(other) = found.property(RUN)
        && image.property(RUN) != Some(other)
        && job.options.run.as_deref() != Some(other)
    {
        return Err(held(&found, session.now(), &*job.notices)
            .unwrap_or_else(|| JobError::GoneOnWith { image: image.id.clone(), run: other.to_owned() }));
    }
    let image = &found;
    let claimed = image.property(CLAIM_UNTIL).is_some();
    // somebody else's protection is not ours to take off
    let ours = claimed || (goes && image.protected != Some(true));
    let mut changes = Vec::new();
    let run = job.options.run.as_deref().or(image.property(RUN));
    if let Some(run) = &job.options.run {
        changes.push(Change::Set(RUN.to_owned(), json!(run)));
    }
    if ours {
        // it is not renewed: both are read while it lasts, unless nothing is
        let reads = goes || !carries_its_own_proof(image);
        let both = bytes + image.size.unwrap_or_default();
        let reading = if reads { claim::long_enough(session.rate_bytes_per_s(), both, 1) } else { Duration::ZERO };
        changes.push(Change::Set(
            CLAIM_UNTIL.to_owned(),
            json!(claim::ahead(session.now(), reading.max(job.options.patience.claim))),
        ));
        if goes {
            changes.push(Change::Set("protected".to_owned(), json!(true)));
        }
    }
    // The run that made it, on another machine, may live, and its DELETE be on the way for as long as a request may take; so may that of a run
    // of this machine which died when it deleted. An unproven one that carries this very run's name may have been taken on by an earlier try.
    // Only then is the protection taken off; while the source is there, at once
    let may_live = |of: &str| match job.options.run.as_deref() == Some(of) {
        true => !carries_its_own_proof(image),
        false => !job.notices.is_dead(of),
    };
    let of = image.property(RUN);
    let is_doubted = || of.into_iter().chain(job.options.run.as_deref()).any(|run| job.notices.was_doubted(run, &image.id));
    // whoever saw that a claim was over, on another machine, may be about to take it over, whatever became of the run that had it
    let was_over = claimed && !claim::lasts(image, session.now(), Duration::ZERO);
    let mut doubted = was_over || of.is_some_and(may_live) || is_doubted();
    // an earlier run may have asked for the source's deletion, which may be done yet
    let was_going = claimed && image.protected == Some(true);
    if !changes.is_empty() {
        if doubted {
            job.notices.doubted(&image.id);
        }
        job.notices.making(&image.id);
        let adopting = session.change_image(&image.id, &changes);
        let adopted = job.options.patience.to_its_end(&job.cancel, adopting).await;
        match adopted {
            Some(Ok(_)) => {}
            Some(Err(gone)) if gone.status() == Some(StatusCode::NOT_FOUND) => {
                return Err(JobError::Lost { image: image.id.clone() });
            }
            Some(Err(error)) if !error.may_have_been_heard() => return Err(error.into()),
            // it may have been heard, or be yet: nobody is to be kept away for nothing
            unheard => {
                if ours && (doubted || is_doubted()) {
                    let stays = stays_protected(
                        &image.id,
                        "whether it was taken on was not answered, and a run elsewhere might still delete it",
                    );
                    job.notices.warn(&stays);
                } else if ours {
                    let released = job.options.patience.to_its_end(&job.cancel, release(session, &image.id, run)).await;
                    if unheard.is_none() || !matches!(released, Some(Ok(true))) {
                        let stays = match goes {
                            true => stays_protected(&image.id, "whether it was protected was not answered"),
                            false => format!("image {} is claimed by this run for a while", image.shown_id()),
                        };
                        job.notices.warn(&format!("it may be that {stays}"));
                    }
                }
                return Err(unheard.and_then(Result::err).map_or_else(JobError::interrupted, JobError::from));
            }
        }
    }
    // whoever cleans up writes down what it deletes, looks at the name, and deletes: now that the name is there, one of the two has seen the other
    if !doubted && is_doubted() {
        doubted = true;
        job.notices.doubted(&image.id);
    }
    let done = match work().await {
        // what is protected is outlasted below
        Ok(()) if was_over && !goes && !was_going => look_again_later(job, session, &image.id).await,
        done => done,
    };
    if !ours {
        return done;
    }
    let going = was_going || matches!(done, Err(JobError::SourceGoing { .. }));
    if !doubted || outlast_deletions(job, &image.id, going).await {
        release_or_warn(job, session, &image.id, run).await;
    }
    done
}

/// The refusal of an image that claims to be this source's conversion and could not be proven to be.
#[must_use]
pub fn unproven(image: &Image) -> JobError {
    JobError::Usage(format!(
        "image {name} ({id}) says that it was made from this source, but it is not its verified conversion: the run that made it \
         may have died, or it is a snapshot that inherited the mark. Take another name; or, if nobody needs it, remove it and \
         start again: virta image delete {id}",
        name = image.shown(),
        id = image.shown_id()
    ))
}

/// Could it be a conversion of the source as it is now, made in this project?
fn may_be_made_of(session: &Session, image: &Image, source: &Image) -> bool {
    let hash = source.expected_hash().map(|hash| format!("{}:{}", hash.algorithm, hash.value));
    let project = session.whoami().project_id.as_ref().or(source.owner.as_ref());
    image.disk_format.as_deref() == Some("qcow2")
        && image.owner.as_ref() == project
        && image.property(SOURCE_HASH).map(str::to_owned) == hash
}

/// Is `made` the finished conversion of `source` as it is now? What carries the marks without being it is the snapshot of a server that was started from
/// the conversion.
#[must_use]
pub fn is_finished_conversion(session: &Session, made: &Image, source: &Image) -> bool {
    made.status == "active"
        && made.id != source.id
        && made.property(SOURCE_ID) == Some(&source.id)
        && may_be_made_of(session, made, source)
        && carries_its_own_proof(made)
}

/// Is the mark of verification this very image's own, so that it is somebody's finished conversion? Nova copies an image's properties onto the
/// snapshots of servers that boot from it, and so the marks, too: only the hash of the very image that carries it proves anything.
#[must_use]
pub fn carries_its_own_proof(image: &Image) -> bool {
    let own = image.expected_hash().map(|hash| format!("{}:{}", hash.algorithm, hash.value));
    own.is_some_and(|own| image.property(VERIFIED) == Some(&verified_mark(&own)))
}

/// The value of `virta_verified` for an image of this hash. Glance keeps 255 characters.
#[must_use]
pub fn verified_mark(hash: &str) -> String {
    format!("hash:{hash}").chars().take(255).collect()
}
