//! A server becomes an image: stop, `createImage`, start again.
//!
//! ```text
//! ACTIVE ──os-stop──> SHUTOFF ──createImage──> (task) ──> task is over ──os-start──> ACTIVE
//!                                                image: queued ── saving ───────────────────── active
//! ```
//! A snapshot of a running server has a file system that looks as after a power cut, so the server is stopped for it, unless told
//! otherwise. It goes back to the state that it was found in as soon as Nova is done with it, which may be long before
//! the image is active; and also after an error or an interrupt. `os-start` needs a server with no task under way: the unfinished image is deleted
//! first, which ends Nova's task.
//!
//! A snapshot that fails on Nova's side takes its image with it (nova/compute/manager.py, `delete_image_on_error`): an image that is gone
//! means that Nova gave up, and can leave the server suspended (libvirt's cold snapshot).
//!
//! The image carries `virta_run`: an image whose id was lost with an answer, or with a killed run, is found by it.

mod plan;
mod restore;
mod watch;

use std::time::{Duration, Instant};

use engine::CancelToken;
use reqwest::StatusCode;

use crate::{
    error::JobError,
    openstack::{
        Compute, Image, Session,
        marks::RUN,
        server::{Action, ServerError},
    },
    reporter::Reporter,
    run::{FoundServer, ThisRun},
    text::{causes, printable, size},
};
use plan::SHUTDOWN_TIMEOUT;
pub use plan::SnapshotPlan;
use restore::{bring_back, images_of_run};
pub use restore::{by_hand, restore};
pub use watch::Waiting;
use watch::Watch;

/// How long the answer to a request is waited for after an interrupt.
const SETTLE: Duration = Duration::from_secs(10);

/// A snapshot under way.
pub struct Snapshot<'a> {
    /// Signed in.
    pub session: &'a Session,
    /// Nova.
    pub compute: &'a Compute,
    /// What is to be done.
    pub plan: &'a SnapshotPlan,
    /// The run's name, in the image that it makes.
    pub run: &'a ThisRun,
    /// How long what may take.
    pub waiting: Waiting,
    /// Who is told.
    pub reporter: &'a dyn Reporter,
    /// Ends it; the server is brought back all the same.
    pub cancel: &'a CancelToken,
}

impl Snapshot<'_> {
    /// Makes the image and brings the server back. Returns the image, which is active.
    ///
    /// # Errors
    /// [`JobError`]; no unfinished image is left then and the server is as it was found, or the error says which command does that.
    ///
    /// # Cancel safety
    /// Cancel with the token: what was begun is taken back before this returns, which can take as long as Nova's task. If the future is dropped instead, the
    /// server stays as it is.
    pub async fn run(&self) -> Result<Image, JobError> {
        let server = &self.plan.server;
        // the question whether to stop it may have been open for hours
        let now = self.guard(self.compute.server(&server.id)).await??;
        if now.status != server.status || now.task_state.is_some() {
            return Err(JobError::Refused(format!(
                "server {} was {} and is {}{} by now: start again",
                server.shown(),
                server.status,
                printable(&now.status),
                now.task_state.map(|task| format!(" ({})", printable(&task))).unwrap_or_default()
            )));
        }
        let mut found =
            FoundServer { id: server.id.clone(), name: server.name.clone(), status: server.status.clone(), stopped: false };
        if !self.run.record().holding(Some(&found)) {
            self.reporter.warn("the record of this run cannot be written: after a kill nothing would bring the server back");
        }
        let mut restored = false;
        let made = self.make(&mut found, &mut restored).await;
        if let Err(error) = &made {
            // an interrupt has its own words at the end
            if !matches!(error, JobError::Interrupted(_)) {
                self.reporter.warn(&format!("the snapshot failed: {}", causes(error)));
            }
        }
        let back = match (&made, restored) {
            (Ok(_), true) => Ok(()),
            _ => restore(self.session, self.compute, &found, &self.run.text(), &self.waiting, self.reporter).await,
        };
        match (made, back) {
            (made, Ok(())) => {
                let _ = self.run.record().holding(None);
                made
            }
            (Ok(image), Err(error)) => {
                self.reporter.note(&format!("the image is there all the same: {} ({})", image.shown(), image.shown_id()));
                Err(error)
            }
            (Err(_), Err(error)) => Err(error),
        }
    }

    async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T, JobError> {
        self.cancel.guard(work).await.map_err(|_| JobError::interrupted())
    }

    /// A request that changes something: when the run is cancelled meanwhile, its answer is still waited for, for a while. What it did can only
    /// be taken back once it is done.
    async fn settle<T>(&self, request: impl Future<Output = T>) -> Result<T, JobError> {
        tokio::pin!(request);
        tokio::select! {
            result = &mut request => Ok(result),
            () = self.cancel.cancelled() => {
                let _ = tokio::time::timeout(SETTLE, request).await;
                Err(JobError::interrupted())
            }
        }
    }

    async fn make(&self, found: &mut FoundServer, restored: &mut bool) -> Result<Image, JobError> {
        let server = &self.plan.server;
        if self.plan.stops {
            self.stop(found).await?;
        }
        if self.plan.stops {
            // somebody may have started it in between: the image would look as after a power cut, and nobody would know
            let now = self.guard(self.compute.server(&server.id)).await??;
            if now.status != "SHUTOFF" {
                return Err(JobError::Refused(format!(
                    "server {} was stopped, and is {} again: somebody else started it",
                    server.shown(),
                    printable(&now.status)
                )));
            }
        }
        let id = self.settle(self.create()).await??;
        self.run.record().making(&id);
        self.reporter.note(&format!("image {} ({id}) is being made", printable(&self.plan.name)));
        let mut watch = Watch::new(&self.waiting);
        let mut given_up: Option<Instant> = None;
        loop {
            let (image, now) = tokio::join!(self.session.image(&id), self.compute.server(&server.id));
            let image = match image {
                Ok(image) => Some(image),
                Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => {
                    let why = self.compute.why_it_failed(&server.id, "createImage").await;
                    let why = why.map_or_else(|| "it does not say why".to_owned(), |why| format!("it says: {why}"));
                    return Err(JobError::Refused(format!("Nova gave the snapshot up and removed image {id}; {why}")));
                }
                Err(error) if error.is_retryable() => None,
                Err(error) => return Err(error.into()),
            };
            let task = match now {
                Ok(now) => now.task_state,
                Err(ServerError::Api(error)) if error.status() == Some(StatusCode::NOT_FOUND) => {
                    self.reporter.warn(&format!("server {} is gone: somebody deleted it", server.shown()));
                    *restored = true;
                    None
                }
                Err(ServerError::Api(error)) if error.is_retryable() => Some("unknown".to_owned()),
                Err(error) => return Err(error.into()),
            };
            let status = image.as_ref().map_or_else(|| "unknown".to_owned(), |image| image.status.clone());
            let bytes = image.as_ref().and_then(|image| image.size).filter(|bytes| *bytes > 0);
            watch.see(
                self.reporter,
                format!(
                    "image {}{}, server: {}",
                    printable(&status),
                    bytes.map(|bytes| format!(", {}", size(bytes))).unwrap_or_default(),
                    task.as_deref().map_or_else(|| "no task".to_owned(), |task| format!("task {}", printable(task)))
                ),
            );
            if let Some(image) = image
                .as_ref()
                .filter(|image| matches!(image.status.as_str(), "killed" | "deleted" | "pending_delete" | "deactivated"))
            {
                return Err(JobError::Refused(format!("image {} became {} while it was made", image.shown_id(), image.status)));
            }
            // Nova's task is over: there is nothing that the server has to wait for
            if task.is_none() && !*restored {
                bring_back(self.compute, found, &self.waiting, self.reporter).await?;
                *restored = true;
            }
            match (status.as_str(), &task) {
                // an image made by a direct copy in Ceph is queued until Nova has told Glance where it is, all within the task
                ("queued", None) => {
                    let since = *given_up.get_or_insert_with(Instant::now);
                    if since.elapsed() > self.waiting.orphan {
                        return Err(JobError::Refused(format!(
                            "Nova's task is over, and image {id} has no data: the host was restarted, or gave up without a word"
                        )));
                    }
                }
                _ => given_up = None,
            }
            if let Some(image) = image.filter(|image| image.status == "active")
                && *restored
            {
                return Ok(image);
            }
            if watch.started.elapsed() > self.waiting.image {
                return Err(JobError::Refused(format!(
                    "image {id} is still {} after {} s (--timeout): the host may have died, or may need longer",
                    printable(&status),
                    watch.seconds()
                )));
            }
            self.guard(watch.pause()).await?;
        }
    }

    /// Stops the server and waits until it has stopped.
    async fn stop(&self, found: &mut FoundServer) -> Result<(), JobError> {
        let server = &self.plan.server;
        let started = Instant::now();
        self.reporter.note(&format!("stopping server {}", server.shown()));
        // written down before the request leaves: its answer may be lost
        found.stopped = true;
        let _ = self.run.record().holding(Some(found));
        let asked = self.settle(async {
            let mut stumbles = 0;
            loop {
                match self.compute.act(&server.id, Action::Stop).await {
                    Err(ServerError::Api(error)) if error.is_retryable() && stumbles < 3 => {
                        stumbles += 1;
                        tokio::time::sleep(self.waiting.first_look * stumbles * 4).await;
                    }
                    // a request before, whose answer was lost, was heard: the wait tells
                    Err(ServerError::Api(error)) if stumbles > 0 && error.status() == Some(StatusCode::CONFLICT) => return Ok(()),
                    other => return other,
                }
            }
        });
        if let Err(error) = asked.await? {
            // refused: whatever state it is in now is not this run's doing
            if matches!(&error, ServerError::Api(api) if api.status() == Some(StatusCode::CONFLICT)) {
                found.stopped = false;
                let _ = self.run.record().holding(Some(found));
            }
            return Err(error.into());
        }
        let mut watch = Watch::new(&self.waiting);
        loop {
            let now = match self.guard(self.compute.server(&server.id)).await? {
                Ok(now) => Some(now),
                Err(ServerError::Api(error)) if error.is_retryable() => None,
                Err(error) => return Err(error.into()),
            };
            let status = now.as_ref().map_or("unknown", |now| now.status.as_str());
            watch.see(self.reporter, format!("server {} is {}", server.shown(), printable(status)));
            if now.as_ref().is_some_and(|now| now.status == "SHUTOFF" && now.task_state.is_none()) {
                break;
            }
            // Nova sets the task before it answers: without one, it is over
            if now.as_ref().is_some_and(|now| now.status == "ACTIVE" && now.task_state.is_none()) {
                return Err(JobError::Refused(format!(
                    "server {} is ACTIVE although it was to be stopped: that failed, or somebody started it again",
                    server.shown()
                )));
            }
            if status == "ERROR" {
                let why = now.and_then(|now| now.fault).unwrap_or_default();
                return Err(JobError::Refused(format!(
                    "server {} went into ERROR instead of stopping: {}",
                    server.shown(),
                    printable(&why)
                )));
            }
            if started.elapsed() > self.waiting.stop {
                return Err(JobError::Refused(format!(
                    "server {} has not stopped within {} s: stop it from inside, or look at its console",
                    server.shown(),
                    self.waiting.stop.as_secs()
                )));
            }
            self.guard(watch.pause()).await?;
        }
        let allowed = self.shutdown_timeout().await;
        if started.elapsed() >= allowed {
            self.reporter.warn(&format!(
                "the guest took {} s to stop, and Nova cuts one off after {} s: its file systems may not be clean. Shut it down from inside for an image that is",
                started.elapsed().as_secs(),
                allowed.as_secs()
            ));
        }
        Ok(())
    }

    /// How long this guest may take to shut down.
    async fn shutdown_timeout(&self) -> Duration {
        let Some(image) = &self.plan.server.image_id else { return SHUTDOWN_TIMEOUT };
        let image = self.session.image(image).await.ok();
        let own = image.and_then(|image| image.property("os_shutdown_timeout")?.parse().ok());
        own.map_or(SHUTDOWN_TIMEOUT, Duration::from_secs)
    }

    /// Asks for the image. If the answer is lost, the image itself tells whether Nova heard.
    async fn create(&self) -> Result<String, JobError> {
        let run = self.run.text();
        let metadata = [(RUN, run.as_str())];
        let ask = || self.compute.create_image(&self.plan.server.id, &self.plan.name, &metadata);
        match ask().await {
            Ok(id) => Ok(id),
            Err(ServerError::Api(error)) if error.is_retryable() => {
                self.reporter.note(&format!("the answer to createImage is missing ({}): looking for the image", causes(&error)));
                for _ in 0..3 {
                    tokio::time::sleep(self.waiting.look_every).await;
                    if let Some(image) = images_of_run(self.session, &self.run.text()).await?.into_iter().next() {
                        return Ok(image.id);
                    }
                }
                Ok(ask().await?)
            }
            Err(error) => Err(error.into()),
        }
    }
}
