//! What killed runs of this machine left: unfinished images, stopped servers.

use engine::CancelToken;
use stages::{
    batch::plan::finish_replacements,
    error::JobError,
    openstack::{Compute, Image, Session, marks::RUN},
    ownership::{
        leftover::{Leftover, leftovers},
        proof_of,
    },
    reporter::Reporter,
    run::{FoundServer, run_of},
    snapshot::{Waiting, restore},
    text::{causes, printable},
};

use crate::{
    display::Display,
    runs::{self, RecordedRun},
    signals::interruptible,
};

/// Dead runs of this machine in this session's project: what they left is removed before a new one begins.
pub async fn clean_up_before(session: &Session, display: &Display, cancel: &CancelToken) -> Result<(), JobError> {
    let mut dead = runs::dead();
    dead.retain(|found| found.record.project.is_some() && found.record.project == session.whoami().project_id);
    // a server is brought back only by who asks for that
    for held in dead.iter().filter_map(|found| found.record.server.as_ref()) {
        display.warn(&format!(
            "a killed run had found server {} {}, and nobody has looked since: virta clean brings it back",
            printable(&held.name),
            printable(&held.status)
        ));
    }
    dead.retain(|found| found.record.server.is_none());
    if dead.is_empty() {
        return Ok(());
    }
    let cleaning = async {
        let ids: Vec<&str> = dead.iter().flat_map(|found| found.record.unfinished()).map(String::as_str).collect();
        let images = session.images_of_ids(&ids).await?;
        remove_leftovers(session, &images, &dead, false, display).await
    };
    // it is no reason not to begin
    match interruptible(cancel, cleaning).await {
        Err(error @ JobError::Interrupted(_)) => Err(error),
        Err(error) => {
            display.warn(&format!("what killed runs left could not be looked at: {}", causes(&error)));
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Deletes the unfinished ones of `images` that may go, and tells of the others where `tells`. Returns how many are left.
pub async fn remove_leftovers(
    session: &Session,
    images: &[Image],
    dead: &[RecordedRun],
    tells: bool,
    reporter: &dyn Reporter,
) -> Result<usize, JobError> {
    let project = session.whoami().project_id.as_deref();
    let found = leftovers(images, project, session.now(), &|image| {
        image.property(RUN).is_some_and(|run| runs::died_here(run_of(run), &image.id))
    });
    let (mut left, mut stuck) = (0, Vec::new());
    for (image, leftover) in found {
        let (id, name) = (image.shown_id(), image.shown());
        let run = printable(image.property(RUN).map_or("unknown", run_of));
        if leftover.may_go() {
            // the list may be old: this process may have slept since
            let now = session.image_if_there(&image.id).await.map_err(JobError::from)?;
            if now.is_none_or(|now| now.status != image.status || proof_of(&now, project).is_some()) {
                continue;
            }
            match session.delete_image(&image.id).await {
                Ok(()) => reporter.note(&format!("removed image {name} ({id}, {}) of run {}", image.status, runs::short(&run))),
                Err(error) => {
                    left += 1;
                    stuck.push(image.id.as_str());
                    reporter.warn(&format!("image {id} of run {} could not be removed: {}", runs::short(&run), causes(&error)));
                }
            }
            continue;
        }
        left += 1;
        if tells {
            let since = image.property("updated_at").unwrap_or("?");
            let way = format!("If no run is making it: virta image delete {id}");
            let claim = match (image.property(RUN).and_then(|run| runs::process_of(run_of(run))), leftover) {
                (Some(process), _) => format!("process {process} of this machine is making it: virta status"),
                (None, Leftover::Claimed(until)) => format!("its run may be making it until {until}. {way}"),
                (None, _) => format!("no run claims it any more. {way}"),
            };
            reporter.note(&format!(
                "image {name} ({id}) is {} and unfinished since {}, of run {}: {claim}",
                image.status,
                printable(since),
                runs::short(&run)
            ));
        }
    }
    if tells {
        // as an earlier release may have left them
        finish_replacements(session, images).await?;
    }
    let is_clean = |found: &&RecordedRun| !found.record.unfinished().iter().any(|id| stuck.contains(&id.as_str()));
    let holds_a_server = |found: &&RecordedRun| found.again().is_some_and(|now| now.record.server.is_some());
    for found in dead.iter().filter(|found| !holds_a_server(found)).filter(is_clean) {
        if let Err(error) = found.cleaned() {
            reporter.warn(&format!("the record of run {} could not be written: {error}", runs::short(&found.record.run)));
        }
    }
    Ok(left)
}

/// Brings a server back that a killed run had stopped.
pub async fn restore_server(
    session: &Session,
    compute: &Compute,
    held: &FoundServer,
    dead: &RecordedRun,
    display: &Display,
) -> Result<(), JobError> {
    let this = display.this_run();
    display.note(&format!(
        "run {} was killed while it made a snapshot of server {}, which it had found {}",
        printable(&dead.record.run),
        printable(&held.name),
        printable(&held.status)
    ));
    // whoever interrupts hears of the server
    let _ = this.record().holding(Some(held));
    restore(session, compute, held, &dead.record.run, &Waiting::default(), display).await?;
    let _ = this.record().holding(None);
    dead.restored().map_err(|error| JobError::Refused(format!("the record of a run could not be written: {error}")))
}
