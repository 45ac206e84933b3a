//! How long a snapshot may take, and a wait that is spoken of.

use std::time::{Duration, Instant};

use crate::reporter::Reporter;

/// How often a wait that changes nothing is spoken of.
pub(super) const SPEAK_EVERY: Duration = Duration::from_secs(30);

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

/// A wait that is spoken of when something changes, and now and then.
pub(super) struct Watch {
    pub(super) started: Instant,
    pub(super) spoke: Instant,
    pub(super) last: String,
    pub(super) pause: Duration,
    pub(super) longest: Duration,
}

impl Watch {
    pub(super) fn new(waiting: &Waiting) -> Self {
        let (pause, longest) = (waiting.first_look, waiting.look_every);
        Self { started: Instant::now(), spoke: Instant::now(), last: String::new(), pause, longest }
    }

    /// Until the next look: each wait is a quarter longer.
    pub(super) async fn pause(&mut self) {
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 5 / 4).min(self.longest);
    }

    pub(super) fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    pub(super) fn see(&mut self, reporter: &dyn Reporter, now: String) {
        if now != self.last || self.spoke.elapsed() > SPEAK_EVERY {
            reporter.note(&format!("{now} ({} s)", self.seconds()));
            self.spoke = Instant::now();
            self.last = now;
        }
    }
}
