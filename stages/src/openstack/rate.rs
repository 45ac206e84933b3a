//! A limit for bytes a second, shared by all transfers.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Hands out time: whoever takes bytes waits until those before it had theirs. Clones share it.
#[derive(Clone, Debug)]
pub struct RateLimit {
    bytes_per_s: u64,
    /// When everything that was taken so far will have been moved.
    free_at: Arc<Mutex<Instant>>,
}

impl RateLimit {
    /// A limit; at least 1 byte a second.
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), free_at: Arc::new(Mutex::new(Instant::now())) }
    }

    /// The limit.
    #[must_use]
    pub const fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// Waits until `bytes` may be moved. What nobody took in the past is not saved up.
    ///
    /// # Cancel safety
    /// Safe; the bytes count as taken.
    pub async fn take(&self, bytes: u64) {
        let cost = Duration::from_nanos(
            u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s)).unwrap_or(u64::MAX),
        );
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + cost;
            *free_at
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn takers_wait_for_their_bytes_one_behind_the_other() {
        let limit = RateLimit::new(1 << 20);
        let started = Instant::now();
        let takers = (0..4).map(|_| {
            let limit = limit.clone();
            tokio::spawn(async move { limit.take(64 << 10).await })
        });
        for taker in takers.collect::<Vec<_>>() {
            taker.await.unwrap();
        }
        // a quarter of a second's bytes; nobody may be early
        assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
    }
}
