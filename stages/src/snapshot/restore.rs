//! A server is brought back into the state that it was found in.

use reqwest::StatusCode;

use super::watch::{Waiting, Watch};
use crate::{
    error::JobError,
    openstack::{
        Compute, Image, Session,
        marks::RUN,
        server::{Action, ServerError},
    },
    reporter::Reporter,
    retry::Patience,
    run::FoundServer,
    text::{causes, printable},
};

/// Tries of a call to Nova: asking twice to stop or start is asking once.
pub(super) const CALL_TRIES: u32 = 4;

pub(super) async fn images_of_run(session: &Session, run: &str) -> Result<Vec<Image>, JobError> {
    let mut images = session.images_where(RUN, run).await?;
    images.retain(|image| image.property(RUN) == Some(run));
    Ok(images)
}

/// Takes back what a run did to a server: its unfinished image goes, Nova's task is waited for, and the server gets back into the state
/// that it was found in. Not interruptible: whoever cannot wait kills the process, and `virta clean` comes here again.
///
/// # Errors
/// [`JobError::Refused`] with the commands that do it by hand.
pub async fn restore(
    session: &Session,
    compute: &Compute,
    found: &FoundServer,
    run: &str,
    waiting: &Waiting,
    reporter: &dyn Reporter,
) -> Result<(), JobError> {
    let remove = async || -> Result<(), JobError> {
        for image in images_of_run(session, run).await? {
            if image.status == "active" && image.property("image_type") == Some("snapshot") {
                reporter.note(&format!("image {} ({}) was finished before: it stays", image.shown(), image.shown_id()));
            }
            // an active one is done, and may be wanted
            if matches!(image.status.as_str(), "queued" | "saving") && image.property("image_type") == Some("snapshot") {
                session.delete_image(&image.id).await?;
                reporter.note(&format!("removed the unfinished image {}", image.shown_id()));
            }
        }
        Ok(())
    };
    remove().await?;
    let mut watch = Watch::new(waiting);
    loop {
        let task = match compute.server(&found.id).await {
            Ok(now) => now.task_state,
            Err(ServerError::Api(error)) if error.status() == Some(StatusCode::NOT_FOUND) => {
                reporter.warn(&format!("server {} is gone: somebody deleted it", printable(&found.name)));
                return Ok(());
            }
            Err(_) => Some("unknown".to_owned()),
        };
        let Some(task) = task else { break };
        watch
            .see(reporter, format!("waiting until server {} has no task any more: {}", printable(&found.name), printable(&task)));
        if watch.started.elapsed() > waiting.task {
            return Err(JobError::Refused(format!(
                "server {} is still busy ({}) after {} s, so it cannot be brought back to {} yet: {}",
                printable(&found.name),
                printable(&task),
                watch.seconds(),
                found.status,
                by_hand(found)
            )));
        }
        watch.pause().await;
    }
    // an image whose request was still on its way when the run ended
    remove().await?;
    bring_back(compute, found, waiting, reporter).await
}

/// What does by hand what [`restore`] does.
#[must_use]
pub fn by_hand(found: &FoundServer) -> String {
    match found.status.as_str() {
        "ACTIVE" => format!("later: virta clean, or: openstack server start {}", printable(&found.id)),
        _ => "later: virta clean".to_owned(),
    }
}

/// Makes a server active again that was found so. One that was not stays as it is.
pub(super) async fn bring_back(
    compute: &Compute,
    found: &FoundServer,
    waiting: &Waiting,
    reporter: &dyn Reporter,
) -> Result<(), JobError> {
    if found.status != "ACTIVE" {
        return Ok(());
    }
    let mut watch = Watch::new(waiting);
    let mut asked = false;
    loop {
        let now = Patience::default().retried(CALL_TRIES, || compute.server(&found.id)).await?;
        if now.status == "ACTIVE" && now.task_state.is_none() {
            if asked {
                reporter.note(&format!("server {} is ACTIVE again", now.shown()));
            }
            return Ok(());
        }
        let action = Action::back_from(&now.status).filter(|action| found.stopped || *action != Action::Start);
        if action.is_none() && now.status == "SHUTOFF" && now.task_state.is_none() {
            reporter.warn(&format!("server {} is SHUTOFF, which this run did not do: it stays so", now.shown()));
            return Ok(());
        }
        if let (Some(action), None) = (action, &now.task_state)
            && !asked
        {
            reporter.note(&format!("server {} is {}, and is {} again", now.shown(), now.status, action.done()));
            match Patience::default().retried(CALL_TRIES, || compute.act(&found.id, action)).await {
                Ok(()) => asked = true,
                // somebody else is at it: the next look tells
                Err(ServerError::Api(error)) if error.status() == Some(StatusCode::CONFLICT) => {}
                Err(error) => {
                    return Err(JobError::Refused(format!(
                        "server {} could not be brought back to {}: {}; {}",
                        now.shown(),
                        found.status,
                        causes(&error),
                        by_hand(found)
                    )));
                }
            }
        }
        watch.see(reporter, format!("server {} is {}", now.shown(), printable(&now.status)));
        if watch.started.elapsed() > waiting.start || now.status == "ERROR" {
            return Err(JobError::Refused(format!(
                "server {} is {} and not {} as it was found: {}",
                now.shown(),
                printable(&now.status),
                found.status,
                by_hand(found)
            )));
        }
        watch.pause().await;
    }
}
