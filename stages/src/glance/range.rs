//! Content-Range, and the window of ranges in flight.

use std::{collections::BTreeSet, ops::Range, sync::PoisonError};

use tokio::sync::Notify;

/// A parsed `Content-Range: bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// First byte.
    pub first: u64,
    /// Last byte, inclusive.
    pub last: u64,
    /// Length of the whole; `None` for `*`.
    pub total: Option<u64>,
}

impl ContentRange {
    /// Parses a header's value; `None` for anything but one satisfied byte range.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.trim().strip_prefix("bytes")?.trim_start_matches([' ', '=']);
        let (range, total) = rest.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |text: &str| {
            let text = text.trim();
            // `parse` alone would accept a sign
            if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) { None } else { text.parse::<u64>().ok() }
        };
        let total = match total.trim() {
            "*" => None,
            text => Some(number(text)?),
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last || total.is_some_and(|total| last >= total) {
            return None;
        }
        Some(Self { first, last, total })
    }

    /// Is this the answer to a request for `range` of a whole of `total` bytes?
    #[must_use]
    pub fn answers(self, range: &Range<u64>, total: u64) -> bool {
        self.first == range.start && Some(self.last) == range.end.checked_sub(1) && self.total == Some(total)
    }
}

/// Smallest and largest range that is asked for. Glance closes the connection after each, so each costs a handshake and
/// a token check; a range that is too long leaves one connection working alone at the end.
const RANGE_BYTES_MIN: u64 = 16 << 20;
const RANGE_BYTES_MAX: u64 = 64 << 20;

/// Range length for `bytes` bytes over `connections`: four ranges a connection where they are large enough; what all
/// connections fetch at once never passes `window_bytes`.
#[must_use]
pub fn range_bytes(bytes: u64, connections: u64, window_bytes: u64) -> u64 {
    let extent = crate::extent::EXTENT_BYTES;
    let even = bytes / (connections * 4).max(1);
    let wished = crate::units::round_up(even, extent).clamp(RANGE_BYTES_MIN, RANGE_BYTES_MAX);
    let fits = window_bytes / connections.max(1) / extent * extent;
    wished.min(fits).max(extent)
}

struct State {
    next: u64,
    in_flight: BTreeSet<u64>,
}

/// Hands out ranges in guest order, never further ahead of the oldest unfinished one than the window: the oldest can always
/// land, and what lands out of order stays bounded.
pub struct RangeWindow {
    state: std::sync::Mutex<State>,
    moved: Notify,
    end: u64,
    range_bytes: u64,
    window_bytes: u64,
}

impl RangeWindow {
    /// Ranges of `[start, end)`, of `range_bytes` each, within `window_bytes`.
    #[must_use]
    pub fn new(start: u64, end: u64, range_bytes: u64, window_bytes: u64) -> Self {
        let state = std::sync::Mutex::new(State { next: start, in_flight: BTreeSet::new() });
        Self { state, moved: Notify::new(), end, range_bytes, window_bytes: window_bytes.max(range_bytes) }
    }

    /// The next range, once the window allows it; `None` when all are handed out.
    ///
    /// # Cancel safety
    /// Safe: a range is either returned or still to be handed out.
    pub async fn claim(&self) -> Option<Range<u64>> {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable(); // what finishes between the look and the wait is not missed
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let start = state.next;
                if start >= self.end {
                    return None;
                }
                let end = ((start / self.range_bytes + 1) * self.range_bytes).min(self.end);
                let oldest = state.in_flight.first().copied().unwrap_or(start);
                if end - oldest <= self.window_bytes {
                    state.next = end;
                    state.in_flight.insert(start);
                    return Some(start..end);
                }
            }
            moved.await;
        }
    }

    /// The range that began at `start` has landed.
    pub fn landed(&self, start: u64) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).in_flight.remove(&start);
        self.moved.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn content_ranges_are_exact_or_refused() {
        let parsed = ContentRange::parse("bytes 0-9/2147483648").unwrap();
        assert_eq!(parsed, ContentRange { first: 0, last: 9, total: Some(2_147_483_648) });
        assert!(parsed.answers(&(0..10), 2_147_483_648));
        assert!(
            !parsed.answers(&(0..11), 2_147_483_648) && !parsed.answers(&(0..10), 10) && !parsed.answers(&(0..0), 2_147_483_648)
        );
        assert!(!ContentRange::parse("bytes 0-9/*").unwrap().answers(&(0..10), 10));
        for bad in [
            "",
            "bytes",
            "bytes */10",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes +1-2/9",
            "bytes 1-2",
            "items 0-1/2",
            "bytes 0-99999999999999999999/9",
        ] {
            assert_eq!(ContentRange::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_is_ordered(text in "(bytes)?[ =]?[0-9]{0,21}-?[0-9]{0,21}/?[0-9*]{0,21}") {
            if let Some(range) = ContentRange::parse(&text) {
                prop_assert!(range.first <= range.last);
            }
        }
    }

    #[tokio::test]
    async fn ranges_start_in_order_and_never_leave_the_window() {
        let window = RangeWindow::new(3, 100, 10, 20);
        assert_eq!(window.claim().await, Some(3..10), "the first one ends at a boundary");
        assert_eq!(window.claim().await, Some(10..20));
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), window.claim()).await;
        assert!(early.is_err(), "the oldest has not landed");
        window.landed(10);
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), window.claim()).await;
        assert!(early.is_err(), "a younger one does not move the window");
        window.landed(3);
        assert_eq!(window.claim().await, Some(20..30));
    }
}
