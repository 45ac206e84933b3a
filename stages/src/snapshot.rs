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

use std::time::{Duration, Instant};

use engine::CancelToken;
use reqwest::StatusCode;

use crate::{
    error::JobError,
    openstack::{
        Compute, Image, Server, Session,
        image::RUN,
        server::{Action, ServerError},
    },
    reporter::Notices,
    retry::Patience,
    run::FoundServer,
    text::{causes, printable, shell_word, size},
};

/// Tries of a call to Nova: asking twice to stop or start is asking once.
const CALL_TRIES: u32 = 4;

/// Nova cuts a guest off that has not shut down by then, unless the image says otherwise (`shutdown_timeout`).
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the answer to a request is waited for after an interrupt.
const SETTLE: Duration = Duration::from_secs(10);
/// How often a wait that changes nothing is spoken of.
const SPEAK_EVERY: Duration = Duration::from_secs(30);

/// How long what may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Between the first two looks at something; then more and more.
    pub first_look: Duration,
    /// Between two looks at most.
    pub look_every: Duration,
    /// Until a server has stopped.
    pub stop: Duration,
    /// Until an image is active: the host reads the disk, converts it, sends it.
    pub image: Duration,
    /// Until Nova's task is over, once its image was deleted.
    pub task: Duration,
    /// Until a server that was started is active.
    pub start: Duration,
    /// Until an image that is queued with no task of Nova's under way counts as given up.
    pub orphan: Duration,
}

impl Default for Waiting {
    fn default() -> Self {
        Self {
            first_look: Duration::from_millis(200),
            look_every: Duration::from_secs(3),
            stop: Duration::from_secs(600),
            image: Duration::from_secs(4 * 3600),
            task: Duration::from_secs(600),
            start: Duration::from_secs(300),
            orphan: Duration::from_secs(60),
        }
    }
}

/// What is going to be done to a server, checked before anything is.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub server: Server,
    /// What the image will be called.
    pub name: String,
    /// It is stopped first.
    pub stops: bool,
    /// What people should read before they agree.
    pub lines: Vec<String>,
    /// What they should think about.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Looks at a server. `live`: a running one stays running.
    ///
    /// # Errors
    /// [`JobError::Refused`] for a server that no image with bytes can be made of just now: its root disk is a volume, it is locked, busy, or in a
    /// state that Nova makes no images of.
    pub async fn new(compute: &Compute, server: Server, name: &str, live: bool) -> Result<Self, JobError> {
        let shown = format!("server {} ({})", server.shown(), printable(&server.id));
        if server.image_id.is_none() {
            return Err(JobError::Refused(volume_backed(&server, name, &shown)));
        }
        if server.locked == Some(true) {
            return Err(JobError::Refused(format!(
                "{shown} is locked, so nothing can be done with it: openstack server unlock {}",
                printable(&server.id)
            )));
        }
        if let Some(task) = &server.task_state {
            return Err(JobError::Refused(format!("{shown} is busy ({}): wait until that is over", printable(task))));
        }
        let stops = match server.status.as_str() {
            "ACTIVE" => !live,
            "SHUTOFF" | "PAUSED" | "SUSPENDED" => false,
            other => {
                return Err(JobError::Refused(format!(
                    "{shown} is {}: images can be made of servers that are ACTIVE, SHUTOFF, PAUSED or SUSPENDED",
                    printable(other)
                )));
            }
        };
        let mut lines = vec![match stops {
            true => {
                format!("{shown} is running: it is stopped, image {} is made of it, and it is started again", printable(name))
            }
            false => format!("{shown} is {}, and stays so while image {} is made of it", server.status, printable(name)),
        }];
        let disks = compute.disks(&server).await;
        let mut left_out = Vec::new();
        if let Some(disks) = disks {
            lines.push(format!("in the image: the root disk, {} GiB", disks.root_gib));
            if disks.ephemeral_gib > 0 {
                left_out.push(format!("the ephemeral disk of {} GiB", disks.ephemeral_gib));
            }
            if disks.swap_mib > 0 {
                left_out.push(format!("the swap disk of {} MiB", disks.swap_mib));
            }
        }
        if !server.volumes.is_empty() {
            left_out.push(format!("{} attached volumes ({})", server.volumes.len(), printable(&server.volumes.join(", "))));
        }
        let mut warnings = Vec::new();
        if !left_out.is_empty() {
            warnings.push(format!("not in the image: {}", left_out.join("; ")));
        }
        match (server.status.as_str(), live) {
            ("ACTIVE", true) => warnings.push(
                "--live: the image will look as after a power cut: file systems are not clean, databases may be in the middle of something".to_owned(),
            ),
            ("PAUSED" | "SUSPENDED", _) => warnings.push(
                "what is in the guest's memory is not in the image: its file systems are not clean. Resume it first for an image that is".to_owned(),
            ),
            _ => {}
        }
        Ok(Self { server, name: name.to_owned(), stops, lines, warnings })
    }
}

fn volume_backed(server: &Server, name: &str, shown: &str) -> String {
    let volume = server.volumes.first().map_or_else(|| "VOLUME".to_owned(), |id| printable(id));
    format!(
        "the root disk of {shown} is a volume: Nova would make an image without bytes, and a snapshot of each volume. Stop the server and make the image from its \
         volume instead: openstack server stop {}; openstack image create --volume {volume} --force --disk-format qcow2 --container-format bare {}",
        printable(&server.id),
        shell_word(name)
    )
}

/// A snapshot under way.
pub struct Snapshot<'a> {
    /// Signed in.
    pub session: &'a Session,
    /// Nova.
    pub compute: &'a Compute,
    /// What is to be done.
    pub plan: &'a Plan,
    /// The run's name, in the image that it makes.
    pub run: &'a str,
    /// How long what may take.
    pub waiting: Waiting,
    /// Who is told.
    pub notices: &'a dyn Notices,
    /// Ends it; the server is brought back all the same.
    pub cancel: &'a CancelToken,
}

/// A wait that is spoken of when something changes, and now and then.
struct Watch {
    started: Instant,
    spoke: Instant,
    last: String,
    pause: Duration,
    longest: Duration,
}

impl Watch {
    fn new(waiting: &Waiting) -> Self {
        let (pause, longest) = (waiting.first_look, waiting.look_every);
        Self { started: Instant::now(), spoke: Instant::now(), last: String::new(), pause, longest }
    }

    /// Until the next look: each wait is a quarter longer.
    async fn pause(&mut self) {
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 5 / 4).min(self.longest);
    }

    fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    fn see(&mut self, notices: &dyn Notices, now: String) {
        if now != self.last || self.spoke.elapsed() > SPEAK_EVERY {
            notices.note(&format!("{now} ({} s)", self.seconds()));
            self.spoke = Instant::now();
            self.last = now;
        }
    }
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
        if !self.notices.holding(Some(&found)) {
            self.notices.warn("the record of this run cannot be written: after a kill nothing would bring the server back");
        }
        let mut restored = false;
        let made = self.make(&mut found, &mut restored).await;
        if let Err(error) = &made {
            // an interrupt has its own words at the end
            if !matches!(error, JobError::Interrupted(_)) {
                self.notices.warn(&format!("the snapshot failed: {}", causes(error)));
            }
        }
        let back = match (&made, restored) {
            (Ok(_), true) => Ok(()),
            _ => restore(self.session, self.compute, &found, self.run, &self.waiting, self.notices).await,
        };
        match (made, back) {
            (made, Ok(())) => {
                let _ = self.notices.holding(None);
                made
            }
            (Ok(image), Err(error)) => {
                self.notices.note(&format!("the image is there all the same: {} ({})", image.shown(), image.shown_id()));
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
        self.notices.making(&id);
        self.notices.note(&format!("image {} ({id}) is being made", printable(&self.plan.name)));
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
                    self.notices.warn(&format!("server {} is gone: somebody deleted it", server.shown()));
                    *restored = true;
                    None
                }
                Err(ServerError::Api(error)) if error.is_retryable() => Some("unknown".to_owned()),
                Err(error) => return Err(error.into()),
            };
            let status = image.as_ref().map_or_else(|| "unknown".to_owned(), |image| image.status.clone());
            let bytes = image.as_ref().and_then(|image| image.size).filter(|bytes| *bytes > 0);
            watch.see(
                self.notices,
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
                bring_back(self.compute, found, &self.waiting, self.notices).await?;
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
        self.notices.note(&format!("stopping server {}", server.shown()));
        // written down before the request leaves: its answer may be lost
        found.stopped = true;
        let _ = self.notices.holding(Some(found));
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
                let _ = self.notices.holding(Some(found));
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
            watch.see(self.notices, format!("server {} is {}", server.shown(), printable(status)));
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
            self.notices.warn(&format!(
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
        let metadata = [(RUN, self.run)];
        let ask = || self.compute.create_image(&self.plan.server.id, &self.plan.name, &metadata);
        match ask().await {
            Ok(id) => Ok(id),
            Err(ServerError::Api(error)) if error.is_retryable() => {
                self.notices.note(&format!("the answer to createImage is missing ({}): looking for the image", causes(&error)));
                for _ in 0..3 {
                    tokio::time::sleep(self.waiting.look_every).await;
                    if let Some(image) = images_of_run(self.session, self.run).await?.into_iter().next() {
                        return Ok(image.id);
                    }
                }
                Ok(ask().await?)
            }
            Err(error) => Err(error.into()),
        }
    }
}

async fn images_of_run(session: &Session, run: &str) -> Result<Vec<Image>, JobError> {
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
    notices: &dyn Notices,
) -> Result<(), JobError> {
    let remove = async || -> Result<(), JobError> {
        for image in images_of_run(session, run).await? {
            if image.status == "active" && image.property("image_type") == Some("snapshot") {
                notices.note(&format!("image {} ({}) was finished before: it stays", image.shown(), image.shown_id()));
            }
            // an active one is done, and may be wanted
            if matches!(image.status.as_str(), "queued" | "saving") && image.property("image_type") == Some("snapshot") {
                session.delete_image(&image.id).await?;
                notices.note(&format!("removed the unfinished image {}", image.shown_id()));
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
                notices.warn(&format!("server {} is gone: somebody deleted it", printable(&found.name)));
                return Ok(());
            }
            Err(_) => Some("unknown".to_owned()),
        };
        let Some(task) = task else { break };
        watch.see(notices, format!("waiting until server {} has no task any more: {}", printable(&found.name), printable(&task)));
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
    bring_back(compute, found, waiting, notices).await
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
async fn bring_back(compute: &Compute, found: &FoundServer, waiting: &Waiting, notices: &dyn Notices) -> Result<(), JobError> {
    if found.status != "ACTIVE" {
        return Ok(());
    }
    let mut watch = Watch::new(waiting);
    let mut asked = false;
    loop {
        let now = Patience::default().retried(CALL_TRIES, || compute.server(&found.id)).await?;
        if now.status == "ACTIVE" && now.task_state.is_none() {
            if asked {
                notices.note(&format!("server {} is ACTIVE again", now.shown()));
            }
            return Ok(());
        }
        let action = Action::back_from(&now.status).filter(|action| found.stopped || *action != Action::Start);
        if action.is_none() && now.status == "SHUTOFF" && now.task_state.is_none() {
            notices.warn(&format!("server {} is SHUTOFF, which this run did not do: it stays so", now.shown()));
            return Ok(());
        }
        if let (Some(action), None) = (action, &now.task_state)
            && !asked
        {
            notices.note(&format!("server {} is {}, and is {} again", now.shown(), now.status, action.done()));
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
        watch.see(notices, format!("server {} is {}", now.shown(), printable(&now.status)));
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
