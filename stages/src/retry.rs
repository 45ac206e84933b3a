//! How long to wait, how often to try, and the record of it.

use std::{
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use engine::CancelToken;

use crate::{progress::Progress, text::causes};

/// Longest wait that a service may ask for with `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);
/// Lines about retries that are kept for the report.
const RETRY_LINES_MAX: usize = 1000;

/// An error that tells whether another try may go better.
pub trait Retryable {
    /// May it?
    fn is_retryable(&self) -> bool;

    /// When the service said that it wants to be asked again, seconds.
    fn retry_after_s(&self) -> Option<u64> {
        None
    }
}

/// How patient a transfer is. The defaults suit real clouds; tests that play many failures through make it hasty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// A peer that sends nothing for so long is given up. Never a total time-out: hour-long bodies are normal. Only time spent
    /// waiting for the peer counts.
    pub silence: Duration,
    /// A connection that takes no byte for so long, while there are some, is given up.
    pub stall: Duration,
    /// Glance may work on the whole image after its last byte (flush, hash, copy between stores).
    pub answer: Duration,
    /// How long an image may stay `saving` after an upload was answered, or its connection lost, before it counts as stuck.
    pub saving: Duration,
    /// A download that nobody has read from for so long is closed, and opened again when somebody does: servers cut after 60 s.
    pub unread: Duration,
    /// An upload is never silent for longer, while there is anything left in its reserve.
    pub trickle: Duration,
    /// The first wait before another try; doubled each time.
    pub pause: Duration,
    /// Tries at one spot of a download; [`PROGRESS_BYTES`] that arrive start the count anew.
    pub tries: u32,
    /// Uploads of one image.
    pub uploads: u32,
    /// How long removing what is half made may take after an interrupt.
    pub clean_up: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(60),
            stall: Duration::from_secs(90),
            answer: Duration::from_secs(900),
            saving: Duration::from_secs(60),
            unread: Duration::from_secs(20),
            trickle: Duration::from_secs(4),
            pause: Duration::from_millis(500),
            tries: 6,
            uploads: 5,
            clean_up: Duration::from_secs(4),
        }
    }
}

/// Progress that starts the count of tries anew. A server that gives a byte and cuts is not getting better.
pub const PROGRESS_BYTES: u64 = 1 << 20;

impl Patience {
    /// A request that is not broken off; after an interrupt it has [`Self::clean_up`] left. `None`: that is over.
    ///
    /// # Cancel safety
    /// That of the request.
    pub async fn to_its_end<T>(&self, cancel: &CancelToken, request: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(request);
        tokio::select! {
            answer = &mut request => Some(answer),
            () = cancel.cancelled() => tokio::time::timeout(self.clean_up, request).await.ok(),
        }
    }

    /// [`Self::to_its_end`]: why it was not done; `None`: it was.
    ///
    /// # Cancel safety
    /// That of the request.
    pub async fn failure_of<T, E: Error>(
        &self,
        cancel: &CancelToken,
        request: impl Future<Output = Result<T, E>>,
    ) -> Option<String> {
        match self.to_its_end(cancel, request).await {
            Some(Ok(_)) => None,
            Some(Err(error)) => Some(causes(&error)),
            None => Some("interrupted".to_owned()),
        }
    }

    /// Does the work, up to `tries` times in all, as long as it fails with what another try may mend.
    ///
    /// # Errors
    /// The last try's.
    ///
    /// # Cancel safety
    /// That of the work.
    pub async fn retried<T, E, F>(&self, tries: u32, mut work: impl FnMut() -> F) -> Result<T, E>
    where
        E: Retryable,
        F: Future<Output = Result<T, E>>,
    {
        let mut tried = 0;
        loop {
            tried += 1;
            match work().await {
                Err(error) if error.is_retryable() && tried < tries => {
                    tokio::time::sleep(self.pause_after(tried, error.retry_after_s())).await;
                }
                other => return other,
            }
        }
    }

    /// The wait before try `tries + 1`: the first pause doubled each time, up to 32 times, of which a random half is taken off so
    /// that many clients do not come back at once. A service's `Retry-After` is obeyed.
    #[must_use]
    pub fn pause_after(&self, tries: u32, retry_after_s: Option<u64>) -> Duration {
        if let Some(seconds) = retry_after_s {
            return Duration::from_secs(seconds).min(RETRY_AFTER_MAX);
        }
        let full = self.pause * (1 << tries.saturating_sub(1).min(5));
        // the low bits of a fresh UUID are as random as this needs
        let random = u32::from(uuid::Uuid::new_v4().as_u128().to_le_bytes()[0]);
        full / 2 + full / 2 * random / 255
    }
}

/// The record of retries: a line each, for the report and for whoever watches. Clones are the same record.
#[derive(Clone)]
pub struct Retries {
    lines: Arc<Mutex<Vec<String>>>,
    progress: Progress,
    say: Say,
}

/// Hears of retries and decisions.
pub type Say = Arc<dyn Fn(String) + Send + Sync>;

impl Retries {
    /// An empty record; each line goes to `say`, too.
    #[must_use]
    pub fn new(progress: &Progress, say: Say) -> Self {
        Self { lines: Arc::default(), progress: progress.clone(), say }
    }

    /// Something is tried again.
    pub fn note(&self, line: String) {
        self.progress.add_retries(1);
        (self.say)(line.clone());
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() < RETRY_LINES_MAX {
            lines.push(line);
        }
    }

    /// A line for whoever watches, which is no retry.
    pub fn say(&self, line: String) {
        (self.say)(line);
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_are_bounded_and_a_services_wish_is_obeyed() {
        let patience = Patience::default();
        for tries in 1..20 {
            let ms = patience.pause_after(tries, None).as_millis();
            assert!((250..=16_000).contains(&ms), "{tries}: {ms}");
        }
        assert!(patience.pause_after(6, None) >= Duration::from_secs(8));
        assert_eq!(patience.pause_after(1, Some(7)), Duration::from_secs(7));
        assert_eq!(patience.pause_after(1, Some(1 << 40)), RETRY_AFTER_MAX);
    }
}
