//! How far a disk has been dealt with, and how far ahead of that a source may read.
//!
//! Where the cluster store is full, extents that nothing keeps have to stay in memory until the hash lane has passed them. The
//! source therefore never reads further than a window ahead of the first byte that is not dealt with yet.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::Notify;

struct Inner {
    position: AtomicU64,
    moved: Notify,
    threads: (Mutex<()>, Condvar),
    window_bytes: u64,
}

/// Clones are the same mark.
#[derive(Clone)]
pub struct Watermark(Arc<Inner>);

impl Watermark {
    /// At the disk's start, with this window.
    #[must_use]
    pub fn new(window_bytes: u64) -> Self {
        Self(Arc::new(Inner { position: AtomicU64::new(0), moved: Notify::new(), threads: Default::default(), window_bytes }))
    }

    /// The window, bytes.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        self.0.window_bytes
    }

    /// Everything below `guest_offset` is dealt with. Never blocks; any thread.
    pub fn advance(&self, guest_offset: u64) {
        self.0.position.fetch_max(guest_offset, SeqCst);
        self.0.moved.notify_waiters();
        drop(self.0.threads.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.threads.1.notify_all();
    }

    /// Are the bytes up to `guest_offset` inside the window?
    #[must_use]
    pub fn admits(&self, guest_offset: u64) -> bool {
        guest_offset.saturating_sub(self.0.position.load(SeqCst)) <= self.0.window_bytes
    }

    /// Waits until the bytes up to `guest_offset` are inside the window, or for a tenth of a second: then the caller looks whether
    /// its run was cancelled.
    pub fn wait_blocking(&self, guest_offset: u64) {
        let guard = self.0.threads.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.admits(guest_offset) {
            drop(self.0.threads.1.wait_timeout(guard, Duration::from_millis(100)));
        }
    }

    /// Waits until the bytes up to `guest_offset` are inside the window.
    ///
    /// # Cancel safety
    /// Safe. The wait ends only with the mark or with its future: guard it with the run's token.
    pub async fn admit(&self, guest_offset: u64) {
        loop {
            let moved = self.0.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable(); // what moves between the look and the wait is not missed
            if self.admits(guest_offset) {
                return;
            }
            moved.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_gets_further_ahead_than_the_window() {
        let mark = Watermark::new(10);
        mark.admit(10).await;
        let early = tokio::time::timeout(Duration::from_millis(20), mark.admit(11)).await;
        assert!(early.is_err());
        let waiting = tokio::spawn({
            let mark = mark.clone();
            async move { mark.admit(15).await }
        });
        mark.advance(3);
        mark.advance(5);
        waiting.await.unwrap();
    }
}
