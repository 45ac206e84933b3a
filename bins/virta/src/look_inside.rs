//! Looking into an image in Glance without reading all of it.

use std::sync::Arc;

use engine::CancelToken;
use stages::{
    error::JobError,
    glance::{Peek, Remote, connection::ReadError},
    inspect::{InspectError, Inspection, inspect, looking::Limits},
    openstack::{Image, Session},
    progress::Progress,
    read_at::ReadAt,
    retry::{Patience, Retries},
    text::{causes, size},
};

/// An image to look at; nobody is told of retries.
pub fn quiet_remote(session: &Session, image: &Image, progress: &Progress, cancel: &CancelToken) -> Remote {
    Remote::of_image(session, image, progress, Retries::new(progress, Arc::new(|_| {})), Patience::default(), cancel)
}

/// Looks into an image in Glance.
pub async fn in_glance(
    session: &Session,
    image: &Image,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<Inspection, JobError> {
    let (shown, id) = (image.shown(), image.shown_id());
    image.size.filter(|bytes| image.status == "active" && *bytes > 0).ok_or_else(|| {
        JobError::Refused(format!(
            "image {shown} ({id}) is {}, with {}: there is nothing to look into",
            image.status,
            size(image.size.unwrap_or(0))
        ))
    })?;
    let peek = Peek::open(quiet_remote(session, image, progress, cancel)).await.map_err(|error| match error {
        ReadError::Cancelled => JobError::interrupted(),
        other => other.into(),
    })?;
    let head_only = peek.is_head_only();
    let mut found = on_a_thread(peek, Limits::remote(), None, format!("glance:{id}"), cancel).await?;
    if head_only {
        found.not_looked_at.push("what lies behind the first 16 MiB: this image store serves no ranges. Download or convert it, and look into the file".to_owned());
    }
    Ok(found)
}

/// Parsers block, and are on a thread of their own.
pub async fn on_a_thread(
    source: impl ReadAt + Send + Sync + 'static,
    limits: Limits,
    allocated: Option<u64>,
    shown: String,
    cancel: &CancelToken,
) -> Result<Inspection, JobError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("inspect".to_owned()).spawn(move || {
        let _ = sender.send(inspect(source, limits, allocated, &shown));
    });
    thread.map_err(|error| JobError::Refused(format!("a thread could not be started: {error}")))?;
    match cancel.guard(receiver).await {
        Ok(Ok(result)) => result.map_err(|error: InspectError| JobError::Refused(causes(&error))),
        Ok(Err(_)) => Err(JobError::bug("a parser gave up without a word")),
        Err(_) => Err(JobError::interrupted()),
    }
}
