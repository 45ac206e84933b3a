//! What real clouds do, switched on by a test or a flag.

use std::time::Duration;

use jiff::SignedDuration;

/// How a ranged GET is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Ranges {
    /// As a file store does: 206 with the range.
    #[default]
    Served,
    /// As Ceph, Swift and S3 stores do: 400.
    Refused,
    /// As some proxies do: 200 with everything.
    Ignored,
    /// 206 with the right header and the image's first bytes.
    FirstBytes,
    /// 206 with the range one byte further on.
    WrongContentRange,
    /// 206 for the first few, then 400: a second API server with another store.
    RefusedAfter(u32),
}

/// Faults of the service. Counters are used up; switches stay.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Ranged GETs.
    pub ranges: Ranges,
    /// Images that are uploaded get no checksum and no os_hash, as after a direct Ceph snapshot.
    pub null_hashes: bool,
    /// So many GETs of data are cut off after `cut_after_bytes`.
    pub cut_gets: u32,
    /// Where they are cut.
    pub cut_after_bytes: u64,
    /// So many GETs of data get 503 first.
    pub failing_gets: u32,
    /// The identity service's clock is so far ahead, as tokens tell.
    pub clock_ahead: SignedDuration,
    /// So many POSTs of images get 503 first.
    pub failing_posts: u32,
    /// So many PATCHes get 503 first.
    pub failing_patches: u32,
    /// The next PATCH that speaks of this property is answered with 503, acted upon (`true`) or not.
    pub lost_patch_of: Option<(String, bool)>,
    /// So many DELETEs of images get 503 first.
    pub failing_deletes: u32,
    /// The next DELETE of an image is acted upon, and answered with 503.
    pub lost_delete: bool,
    /// So many GETs of data get a body with one byte flipped.
    pub corrupt_gets: u32,
    /// So many GETs of data stall for `stall` after `cut_after_bytes`.
    pub stalling_gets: u32,
    /// For how long.
    pub stall: Duration,
    /// So many requests with a token get 401, as if it had expired.
    pub expired_tokens: u32,
    /// Uploads are refused with 413 when half of the body has come, and the connection is reset.
    pub quota_hit_mid_body: bool,
    /// Uploads are refused with 415 after the whole body.
    pub refuse_format: bool,
    /// Uploaded images stay `saving` for good.
    pub stuck_saving: bool,
    /// Uploads flip one byte before they store and hash it.
    pub corrupt_puts: bool,
    /// So many PUTs of data are cut off after `cut_after_bytes`.
    pub cut_puts: u32,
    /// So many PUTs of data get 503 first.
    pub failing_puts: u32,
    /// So many PUTs end as if their worker was killed halfway: no answer, and the image stays `saving`.
    pub dying_puts: u32,
    /// So many PUTs end with a 500 when all is sent, and the image stays `saving`, as when Glance's database refuses to make it `active`.
    pub erring_puts: u32,
    /// In so many PUTs the image is deleted halfway: 410.
    pub vanishing_puts: u32,
    /// So many PUTs stop reading for `stall` after `cut_after_bytes`.
    pub stalling_puts: u32,
    /// So many GETs of data get a body that goes on past its end. Their length is not announced.
    pub overlong_gets: u32,
    /// After so many GETs of data, the byte at three quarters of the image is another one.
    pub changed_after_gets: Option<u32>,
    /// GETs of data so far.
    pub gets_of_data: u32,
    /// Properties that a POST refuses, as other policies do.
    pub refused_properties: Vec<String>,
    /// Bytes that `/v2/info/usage` says are left; `None` for no such limit.
    pub quota_left_bytes: Option<u64>,
    /// Bytes of data that the project may have in all: usage says what is left of them, and an upload beyond gets 413.
    pub quota_bytes: Option<u64>,
    /// Each so manieth transfer of data, in either direction, is cut off after `cut_after_bytes`; 0 for none.
    pub cut_one_in: u32,
    /// Each so manieth request with a token gets 503; 0 for none.
    pub fail_one_in: u32,
    /// Transfers and requests so far, for these.
    pub counted: (u32, u32),
    /// The request after so many others is never answered: neither done (`false`), or done (`true`). For tests that kill a client at a
    /// place that they choose.
    pub hold_at: Option<(usize, bool)>,
    /// That request has come.
    pub held: bool,
    /// A pause before each answer.
    pub latency: Duration,
}

impl Faults {
    /// Is this the request that is never answered? Is it done?
    pub(crate) fn holds_this_one(&mut self) -> Option<bool> {
        let (left, done) = self.hold_at.as_mut()?;
        let done = *done;
        if let Some(fewer) = left.checked_sub(1) {
            *left = fewer;
            return None;
        }
        self.hold_at = None;
        Some(done)
    }
    /// Is this one of the transfers that are cut?
    pub(crate) fn cuts_this_one(&mut self) -> bool {
        self.counted.0 += 1;
        self.cut_one_in > 0 && self.counted.0.is_multiple_of(self.cut_one_in)
    }

    /// Is this one of the requests that fail?
    pub(crate) fn fails_this_one(&mut self) -> bool {
        self.counted.1 += 1;
        self.fail_one_in > 0 && self.counted.1.is_multiple_of(self.fail_one_in)
    }

    /// Uses up one of a counter.
    pub(crate) fn take(counter: &mut u32) -> bool {
        let any = *counter > 0;
        *counter = counter.saturating_sub(1);
        any
    }
}
