//! What `--dry-run` shows: each image's fate, and what all of it would take.

use std::{num::NonZero, sync::Arc, time::Duration};

use engine::CancelToken;
use stages::{
    batch::{Plan, Verdict},
    convert::{After, Verify},
    error::JobError,
    glance::connection::{Asking, Connection},
    hash::Hasher,
    openstack::{Image, Session},
    progress::Progress,
    reporter::Reporter,
    text::{counted, size, time},
};

use super::BatchArgs;
use crate::{
    display::Display,
    flags::FormatChoice,
    table::{Cell, Column, ListFlags, ListFormat, print_rows},
};

/// How much is read to tell how fast Glance is, and for how long.
const MEASURE_BYTES: usize = 64 << 20;
const MEASURE_FOR: Duration = Duration::from_secs(3);
/// How long is hashed to tell how fast that goes.
const HASH_FOR: Duration = Duration::from_millis(100);

const COLUMNS: [Column; 8] = [
    Column { key: "id", heading: "ID", usual: true, right: false },
    Column { key: "name", heading: "Name", usual: true, right: false },
    Column { key: "user_id", heading: "User", usual: false, right: false },
    Column { key: "bytes", heading: "Size", usual: true, right: true },
    Column { key: "new_name", heading: "New name", usual: true, right: false },
    Column { key: "plan", heading: "Plan", usual: true, right: false },
    Column { key: "reason", heading: "Why", usual: true, right: false },
    Column { key: "image", heading: "Image", usual: false, right: false },
];

/// `--dry-run`.
pub(super) async fn show_plan(
    arguments: &BatchArgs,
    session: &Session,
    plan: &Plan,
    left_out: &[String],
    display: &Display,
    cancel: &CancelToken,
) -> Result<(), JobError> {
    let row = |entry: &stages::batch::Entry| {
        let (word, reason, made) = match &entry.verdict {
            Verdict::Convert => match entry.options.after {
                After::Keep => ("convert", "", ""),
                After::Delete => ("convert", "its source is deleted then", ""),
                After::Replace => ("replace", "its source is deleted then", ""),
            },
            Verdict::Finish { made } => ("finish", "converted already; its source is still to go", made.as_str()),
            Verdict::Done { made } => ("done", "converted already", made.as_str()),
            Verdict::Skip { reason } => ("skip", reason.as_str(), ""),
            Verdict::Fail { reason } => ("cannot", reason.as_str(), ""),
        };
        let image = entry.image.as_ref();
        let text = |text: Option<&str>| Cell::plain(text.map(str::to_owned));
        vec![
            text(image.map(|image| image.id.as_str())),
            text(image.map_or(Some(entry.request.image.as_str()), |image| image.name.as_deref())),
            text(image.and_then(|image| image.property("user_id"))),
            Cell::shown(entry.bytes(), size(entry.bytes())),
            Cell::plain(match (&entry.verdict, entry.options.after) {
                (Verdict::Convert, After::Replace) => image.and_then(|image| image.name.clone()).unwrap_or_default(),
                (Verdict::Convert, _) => entry.new_name.clone(),
                _ => String::new(),
            }),
            Cell::plain(word),
            Cell::plain(reason),
            Cell::plain(made),
        ]
    };
    let rows: Vec<Vec<Cell>> = plan.entries.iter().map(row).collect();
    let format = match arguments.output.format {
        FormatChoice::Table => ListFormat::Table,
        FormatChoice::Json => ListFormat::Json,
        FormatChoice::Value => ListFormat::Value,
    };
    let mut columns = COLUMNS;
    columns.iter_mut().filter(|column| column.key == "user_id").for_each(|column| column.usual = arguments.all_users);
    print_rows(&columns, &rows, &ListFlags { format, columns: Vec::new() })?;
    left_out.iter().for_each(|line| display.note(line));
    if plan.entries.is_empty() {
        return Ok(());
    }
    let work: Vec<_> = plan.entries.iter().filter(|entry| entry.is_work()).collect();
    let going = work.iter().filter(|entry| entry.options.after != After::Keep).count();
    if going > 0 {
        display.note(&format!("{} would be deleted, each after its new image is verified", counted(going, "source")));
    }
    let (all, bytes) = (plan.entries.len(), plan.work_bytes());
    let converted = work.iter().filter(|entry| entry.verdict == Verdict::Convert).count();
    let sends = if converted > 0 { "; what is sent depends on what is in them" } else { ", nothing to send" };
    display.note(&format!("{converted} of {} would be converted: {} to read{sends}", counted(all, "image"), size(bytes)));
    if converted < work.len() {
        let finished = counted(work.len() - converted, "image");
        display.note(&format!("{finished} converted already would be compared with their sources once more before those go"));
    }
    let Some(largest) = work.iter().max_by_key(|entry| entry.bytes()).and_then(|entry| entry.image.as_ref()) else {
        return Ok(());
    };
    let measured = measure(session, largest, cancel).await?;
    let mut rate = measured;
    let mut because = "which one connection gave just now";
    if work.iter().any(|entry| entry.options.verify != Verify::None) {
        let at_once = std::thread::available_parallelism().map_or(1, NonZero::get).min(arguments.jobs.get()).min(work.len());
        let hashed = hash_rate().saturating_mul(u64::try_from(at_once).unwrap_or(1));
        if hashed < rate {
            (rate, because) = (hashed, "at which the sources are hashed here");
        }
    }
    if let Some(limit) = arguments.rate_limit.filter(|limit| *limit < rate) {
        (rate, because) = (limit, "the limit");
    }
    let rate = rate.max(1);
    display.note(&format!(
        "reading takes about {} at {}/s, {because}{}",
        time(float(bytes) / float(rate)),
        size(rate),
        match (converted > 0, work.iter().any(|entry| entry.options.verify == Verify::Readback)) {
            (true, true) => "; sending, and reading it back, comes on top",
            (true, false) => "; sending comes on top",
            (false, _) => "",
        }
    ));
    if let Some(left) = session.quota_left_bytes().await {
        display.note(&format!(
            "the quota for images has {} left; new images need room beside the old ones until those go",
            size(left)
        ));
    }
    Ok(())
}

/// Bytes a second that one core hashes.
fn hash_rate() -> u64 {
    let (mut hasher, piece) = (Hasher::sha512(), vec![0x5a; 1 << 20]);
    let started = std::time::Instant::now();
    let mut hashed: u64 = 0;
    while started.elapsed() < HASH_FOR {
        hasher.update(&piece);
        hashed += 1 << 20;
    }
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    hashed * 1000 / millis
}

/// Bytes a second of one connection, by reading the beginning of an image.
async fn measure(session: &Session, image: &Image, cancel: &CancelToken) -> Result<u64, JobError> {
    let progress = Progress::default();
    let retries = stages::retry::Retries::new(&progress, Arc::new(|_| {}));
    let remote = stages::glance::Remote::of_image(session, image, &progress, retries, stages::retry::Patience::default(), cancel);
    let bytes = usize::try_from(remote.image_bytes).unwrap_or(usize::MAX).min(MEASURE_BYTES);
    let mut connection = Connection::new(remote, Asking::Whole);
    let mut buffer = vec![0; 1 << 20];
    let started = std::time::Instant::now();
    let mut read = 0;
    while read < bytes && started.elapsed() < MEASURE_FOR {
        let part = (bytes - read).min(buffer.len());
        let at = u64::try_from(read).unwrap_or(u64::MAX);
        connection.read(at, at + u64::try_from(part).unwrap_or(0), &mut buffer[..part]).await?;
        read += part;
    }
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    Ok(u64::try_from(read).unwrap_or(0).saturating_mul(1000) / millis)
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
const fn float(bytes: u64) -> f64 {
    bytes as f64
}
