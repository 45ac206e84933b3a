//! How long to wait before another try.

use std::time::Duration;

/// Tries at one spot before a transfer gives up; each byte that arrives starts the count anew.
pub const TRIES_MAX: u32 = 6;
/// Longest wait that a service may ask for with `Retry-After`.
const RETRY_AFTER_MAX_S: u64 = 120;

/// The wait before try `tries + 1`: half a second doubled each time, up to 16 s, of which a random half is taken off so
/// that many clients do not come back at once. A service's `Retry-After` is obeyed.
#[must_use]
pub fn pause(tries: u32, retry_after_s: Option<u64>) -> Duration {
    if let Some(seconds) = retry_after_s {
        return Duration::from_secs(seconds.min(RETRY_AFTER_MAX_S));
    }
    let full_ms = 500_u64 << tries.saturating_sub(1).min(5);
    // the low bits of a fresh UUID are as random as this needs
    let random = u64::from(uuid::Uuid::new_v4().as_u128().to_le_bytes()[0]);
    Duration::from_millis(full_ms / 2 + full_ms / 2 * random / 255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_are_bounded_and_a_services_wish_is_obeyed() {
        for tries in 1..20 {
            let ms = pause(tries, None).as_millis();
            assert!((250..=16_000).contains(&ms), "{tries}: {ms}");
        }
        assert!(pause(6, None) >= Duration::from_secs(8));
        assert_eq!(pause(1, Some(7)), Duration::from_secs(7));
        assert_eq!(pause(1, Some(1 << 40)), Duration::from_secs(RETRY_AFTER_MAX_S));
    }
}
