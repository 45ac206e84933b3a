//! How long others leave an unmarked image alone.
//!
//! A claim is written in the POST, as seconds from the image's `updated_at` on, in the time of the cloud ([`Session::now`](crate::openstack::Session::now)). It is never
//! renewed: Glance's PATCH reads the whole record and writes it all back, so a late renewal would erase a mark. Claims only save work: whoever passes a good
//! one by makes a second image and harms nobody.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::openstack::{
    Image,
    marks::{CLAIM_S, CLAIM_UNTIL},
};

/// What a line moves at least, bytes a second.
const LINE_BYTES_PER_S: u64 = 32 << 20;
/// A claim is so many times as long as the time that is predicted.
const TIMES: u32 = 4;
/// The shortest claim.
const LEAST: Duration = Duration::from_secs(3600);

/// What a conversion moves, as far as it is known when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moves {
    /// The source's size, bytes.
    pub source_bytes: u64,
    /// How often it may be read.
    pub readings: u64,
    /// The new image is read back.
    pub read_back: bool,
    /// The limit for image data, bytes a second.
    pub rate_limit: Option<u64>,
    /// Conversions that share the line.
    pub jobs: u64,
}

impl Moves {
    /// How long a claim on such a conversion is good.
    #[must_use]
    pub fn claim(self) -> Duration {
        let times = self.readings.saturating_add(1 + u64::from(self.read_back));
        let bytes = self.source_bytes.saturating_mul(times).saturating_mul(self.jobs.max(1));
        let rate = self.rate_limit.unwrap_or(u64::MAX).clamp(1, LINE_BYTES_PER_S);
        (Duration::from_secs(bytes / rate).saturating_mul(TIMES)).max(LEAST)
    }
}

/// Until when the claim on an image is good, over or not; `None` for an image without one.
#[must_use]
pub fn end(image: &Image) -> Option<Timestamp> {
    if let Some(seconds) = image.property(CLAIM_S) {
        let from: Timestamp = image.property("updated_at")?.parse().ok()?;
        let seconds = SignedDuration::from_secs(seconds.parse().ok()?);
        return Some(from.checked_add(seconds).unwrap_or(Timestamp::MAX));
    }
    // as releases before these rules wrote it
    image.property(CLAIM_UNTIL)?.parse().ok()
}

/// Until when the claim on an image is good; `None` where it has none, or one that is over.
#[must_use]
pub fn good_until(image: &Image, now: Timestamp) -> Option<Timestamp> {
    end(image).filter(|end| *end > now)
}

/// Does an image have a claim, over or not? Unmarked images with one belong to their maker (R1).
#[must_use]
pub fn is_claimed(image: &Image) -> bool {
    image.property(CLAIM_S).or(image.property(CLAIM_UNTIL)).is_some()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image(key: &str, value: &str) -> Image {
        serde_json::from_value(json!({ "id": "i", "status": "queued", "updated_at": "2026-01-01T00:00:00Z", key: value }))
            .unwrap()
    }

    #[test]
    fn a_claim_counts_from_the_last_change_in_the_clouds_time() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let claimed = image(CLAIM_S, "3600");
        assert_eq!(good_until(&claimed, at("2026-01-01T00:59:59Z")), Some(at("2026-01-01T01:00:00Z")));
        assert_eq!(good_until(&claimed, at("2026-01-01T01:00:00Z")), None);
        let old = image(CLAIM_UNTIL, "2026-01-01T00:10:00Z");
        assert_eq!(good_until(&old, at("2026-01-01T00:09:59Z")), Some(at("2026-01-01T00:10:00Z")));
        assert_eq!(good_until(&old, at("2026-01-01T00:11:00Z")), None);
        for (key, value) in [(CLAIM_S, "soon"), (CLAIM_UNTIL, "soon"), ("x", "3600")] {
            assert_eq!(end(&image(key, value)), None, "{key} {value}");
        }
        assert!(is_claimed(&claimed) && is_claimed(&old) && !is_claimed(&image("x", "y")));
    }

    #[test]
    fn a_claim_is_four_times_what_is_predicted_and_an_hour_at_least() {
        let moves = Moves { source_bytes: 80 << 30, readings: 1, read_back: false, rate_limit: None, jobs: 1 };
        // read and sent at 32 MiB/s: 5120 s
        assert_eq!(moves.claim(), Duration::from_secs(4 * 5120));
        assert_eq!(Moves { readings: 2, read_back: true, ..moves }.claim(), Duration::from_secs(4 * 10_240));
        assert_eq!(Moves { rate_limit: Some(16 << 20), jobs: 4, ..moves }.claim(), Duration::from_secs(4 * 40_960));
        assert_eq!(Moves { source_bytes: 1 << 30, ..moves }.claim(), LEAST);
        assert!(Moves { source_bytes: u64::MAX, rate_limit: Some(0), ..moves }.claim() > LEAST, "no overflow");
    }
}
