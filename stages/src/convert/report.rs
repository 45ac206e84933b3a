//! What is told afterwards. The JSON form is a contract: fields are added, never renamed or removed.

use std::time::Instant;

use engine::MetricsSnapshot;
use serde::Serialize;

use crate::{access::Access, hash::ExpectedHash, progress::Progress};

/// A digest and whether it was compared with one known before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HashReport {
    /// `sha512`, …; null where there is none.
    pub algorithm: Option<String>,
    /// Lower-case hexadecimal; null where there is none.
    pub value: Option<String>,
    /// Compared, and equal.
    pub checked: bool,
}

impl HashReport {
    /// The lane ran to its end, so what was expected was found.
    #[must_use]
    pub fn checked(expected: Option<ExpectedHash>) -> Self {
        match expected {
            Some(ExpectedHash { algorithm, value }) => Self { algorithm: Some(algorithm), value: Some(value), checked: true },
            None => Self::none(),
        }
    }

    /// Nothing was there to check.
    #[must_use]
    pub const fn none() -> Self {
        Self { algorithm: None, value: None, checked: false }
    }
}

/// A filesystem that was found in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FilesystemReport {
    /// `ext4`, …
    pub kind: String,
    /// Where it begins.
    pub guest_offset: u64,
    /// Its size.
    pub bytes: u64,
    /// Bytes it proves unused.
    pub free_bytes: u64,
    /// Were they skipped?
    pub skipped: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// What one stage did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// Items passed on.
    pub items: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Seconds of all its workers together.
    pub busy_s: f64,
    /// Seconds spent waiting for input.
    pub blocked_on_input_s: f64,
    /// Seconds spent waiting for room in the next port, or for a lease.
    pub blocked_on_output_s: f64,
}

impl From<MetricsSnapshot> for StageReport {
    fn from(snapshot: MetricsSnapshot) -> Self {
        let MetricsSnapshot { name, items, bytes, busy_s, blocked_on_input_s, blocked_on_output_s } = snapshot;
        Self { name, items, bytes, busy_s, blocked_on_input_s, blocked_on_output_s }
    }
}

/// The report of a conversion. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was read: a path, or `glance:` and an id.
    pub source: String,
    /// What was made: a path, or `glance:` and an id.
    pub destination: String,
    /// Size of the virtual disk.
    pub virtual_bytes: u64,
    /// Everything received from Glance.
    pub fetched_bytes: u64,
    /// Guest bytes in clusters that are all zero.
    pub zero_bytes: u64,
    /// Guest bytes that a filesystem proves unused and that were left out.
    pub free_bytes: u64,
    /// Guest bytes kept.
    pub data_bytes: u64,
    /// What they take in the file.
    pub stored_bytes: u64,
    /// Length of the file.
    pub image_bytes: u64,
    /// Sent to Glance, retries included.
    pub uploaded_bytes: u64,
    /// Scratch file at its largest.
    pub scratch_peak_bytes: u64,
    /// Resident memory of this process at its largest.
    pub rss_peak_bytes: u64,
    /// Wall time.
    pub elapsed_s: f64,
    /// How the source was read.
    pub access: Access,
    /// The source's digest.
    pub source_hash: HashReport,
    /// The image's digest.
    pub image_hash: HashReport,
    /// The new image was read back and shows a guest the bytes that were read of the source.
    pub read_back: bool,
    /// The source has no hash, and was read a second time and compared with what was read at first.
    pub source_read_twice: bool,
    /// What was asked for: `none`, `hash` or `readback`.
    pub verify: &'static str,
    /// `none`, `zlib` or `zstd`.
    pub compression: &'static str,
    /// Bytes of stored clusters in memory at the largest.
    pub memory_tier_bytes: u64,
    /// Bytes of stored clusters that no tier kept and that were read again to emit them.
    pub source_tier_bytes: u64,
    /// Part of `fetched_bytes` that was read a second time: what no tier kept, and what was read to verify.
    pub reread_bytes: u64,
    /// Part of `fetched_bytes` that was fetched again after an error.
    pub retried_bytes: u64,
    /// Filesystems found.
    pub filesystems: Vec<FilesystemReport>,
    /// What each stage did.
    pub stages: Vec<StageReport>,
    /// Requests that were tried again, one line each.
    pub retries: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Where stored clusters were.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tiers {
    pub(super) memory_bytes: u64,
    pub(super) source_bytes: u64,
}

/// What a conversion knows at its end.
pub(super) struct ReportParts<'a> {
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) virtual_bytes: u64,
    pub(super) stored_bytes: u64,
    pub(super) image_bytes: u64,
    pub(super) started: Instant,
    pub(super) access: Access,
    pub(super) read_back: bool,
    pub(super) read_twice: bool,
    pub(super) verify: &'static str,
    pub(super) compression: &'static str,
    pub(super) tiers: Tiers,
    pub(super) source_hash: HashReport,
    pub(super) image_hash: HashReport,
    pub(super) stages: Vec<MetricsSnapshot>,
    pub(super) retries: Vec<String>,
    pub(super) progress: &'a Progress,
}

impl Report {
    pub(super) fn assemble(parts: ReportParts<'_>) -> Self {
        let progress = parts.progress;
        Self {
            source: parts.source,
            destination: parts.destination,
            virtual_bytes: parts.virtual_bytes,
            fetched_bytes: progress.fetched_bytes(),
            zero_bytes: progress.zero_bytes(),
            free_bytes: 0,
            data_bytes: progress.data_bytes(),
            stored_bytes: parts.stored_bytes,
            image_bytes: parts.image_bytes,
            uploaded_bytes: progress.sent_bytes(),
            scratch_peak_bytes: progress.scratch_bytes(),
            rss_peak_bytes: rss_peak_bytes(),
            elapsed_s: parts.started.elapsed().as_secs_f64(),
            access: parts.access,
            source_hash: parts.source_hash,
            image_hash: parts.image_hash,
            read_back: parts.read_back,
            source_read_twice: parts.read_twice,
            verify: parts.verify,
            compression: parts.compression,
            memory_tier_bytes: parts.tiers.memory_bytes,
            source_tier_bytes: parts.tiers.source_bytes,
            reread_bytes: progress.reread_bytes(),
            retried_bytes: progress.retried_bytes(),
            filesystems: Vec::new(),
            stages: parts.stages.into_iter().map(Into::into).collect(),
            retries: parts.retries,
            warnings: Vec::new(),
        }
    }
}

/// Resident memory of this process at its largest, bytes.
#[must_use]
pub fn rss_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
