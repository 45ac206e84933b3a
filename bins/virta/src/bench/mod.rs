//! `virta bench`: what this machine, this disk and this Glance can do, and what a conversion here would take.
//!
//! | module | noun |
//! |---|---|
//! | [`record`] | a run: machine, figures, notes, the job that was asked about; saved as JSON |
//! | [`machine`] | this machine, and its flavor out of Nova's metadata |
//! | [`disk`] | writing and reading of a folder, io_uring against `pwrite`, buffered against direct |
//! | [`processor`] | zero test, hashes, compression by level, with the converter's own code |
//! | [`glance`] | fetching with 1, 2, 4, 8 connections, and sending |
//! | [`sample`] | the bytes that are hashed and compressed |
//! | [`predict`] | what a job would take, out of the figures |
//! | [`text`], [`page`] | a run, or several side by side, for a terminal and as one HTML page |
//!
//! A figure is a median of up to three samples with its range: on a shared machine a single one says little. Nothing is left behind: files
//! have no name, and the image that is sent is deleted, and is in the run's record until it is.

pub mod disk;
pub mod glance;
pub mod machine;
pub mod page;
pub mod predict;
pub mod processor;
pub mod record;
pub mod sample;
pub mod text;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{ArgAction, Args};
use engine::CancelToken;
use stages::{
    error::JobError,
    openstack::{config::Environment, error::now_utc},
    progress::Progress,
    reporter::Reporter,
    text::{causes, printable, size},
    whole_file::write_whole,
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, InspectFormat, ProgressChoice, parse_size},
    runs::Run,
    sign_in::sign_in,
    signals::{interruptible, watch_signals},
};
use disk::Disk;
use glance::Glance;
use processor::Processor;
use record::Record;

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct BenchArgs {
    /// Folder whose disk is measured: where images would be, or --scratch
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub folder: PathBuf,
    /// What would a disk of this SIZE take? (with --data)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    pub image_size: Option<u64>,
    /// What of that disk is data, SIZE [default: a quarter of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "image_size", allow_hyphen_values = true)]
    pub data: Option<u64>,
    /// The image to fetch, by name or id [default: the largest of the project]
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Measure no cloud, even if one is configured
    #[arg(long)]
    pub no_cloud: bool,
    /// Send nothing: no image is made
    #[arg(long)]
    pub no_upload: bool,
    /// A tenth of the time, for a first look
    #[arg(long)]
    pub quick: bool,
    /// A file with data like that of the disks to be converted, for hashing and compressing [default: files of this system]
    #[arg(long, value_name = "FILE")]
    pub sample: Option<PathBuf>,
    /// The flavor's name, where Nova's metadata service does not tell it
    #[arg(long, value_name = "NAME")]
    pub flavor: Option<String>,
    /// Where the flavor is asked for
    #[arg(long, value_name = "URL", default_value = machine::METADATA, hide = true)]
    pub metadata: String,
    /// Save the run, as JSON
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// Write it as one HTML page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Measure nothing, lay saved runs side by side (may be repeated, takes several)
    #[arg(long, value_name = "RUN.json", num_args = 1.., action = ArgAction::Append, conflicts_with_all = ["image_size", "data", "image", "save", "quick", "sample", "flavor"])]
    pub compare: Vec<PathBuf>,
    /// What is printed on stdout
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: InspectFormat,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

const EXAMPLES: &str = "\
Takes about a minute, 512 MiB of the folder's disk for a while, and with a cloud the traffic of a few seconds with 1, 2, 4 and 8 connections, and \
an image of 128 MiB that is sent and deleted again (not with --no-upload). A cloud is measured if --os-cloud, OS_CLOUD or OS_AUTH_URL names one.
SIZE is a number with K, M, G or T (powers of 1024) or kB, MB, GB, TB (of 1000).
Figures are medians; flags are only advised where a figure's slowest sample beats the other's fastest. A machine that does other work meanwhile \
measures that, too.
Examples:
  virta bench --no-cloud
      disk and processor
  virta bench --os-cloud pouta --folder /scratch --image-size 80G --data 20G
      and what a conversion of such a disk would take, what it waits for, and the flags to use
  virta bench --os-cloud pouta --save io.340GB.json --html io.340GB.html
      to keep; the flavor is in it
  virta bench --compare io.160GB.json io.340GB.json io.700GB.json --html flavors.html
      side by side

Exit status: 0 measured, 1 failed, 2 wrong usage, 130 interrupted.";

/// Bytes of the file that is written and read.
const FILE_BYTES: u64 = 512 << 20;
/// Bytes that are sent.
const UPLOAD_BYTES: u64 = 128 << 20;
/// Bytes of data to hash and compress.
const SAMPLE_BYTES: usize = 48 << 20;

/// How much of everything.
struct Amount {
    file_bytes: u64,
    upload_bytes: u64,
    sample_bytes: usize,
    /// For one figure of the disk.
    disk: Duration,
    /// For one of the processor.
    processor: Duration,
    /// For one of Glance.
    glance: Duration,
}

impl Amount {
    fn new(quick: bool) -> Self {
        let tenth = if quick { 10 } else { 1 };
        Self {
            file_bytes: (FILE_BYTES / u64::from(tenth)) >> 21 << 21,
            upload_bytes: UPLOAD_BYTES / u64::from(tenth),
            sample_bytes: if quick { SAMPLE_BYTES / 6 } else { SAMPLE_BYTES },
            disk: Duration::from_secs(4) / tenth,
            processor: Duration::from_millis(1500) / tenth,
            glance: Duration::from_secs(4) / tenth,
        }
    }
}

/// Runs the command.
pub async fn run(arguments: BenchArgs) -> ExitCode {
    let display = Display::start(ProgressChoice::Auto, &Progress::default(), Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let result = if arguments.compare.is_empty() {
        measure(&arguments, &display, &cancel).await
    } else {
        compare(&arguments, &cancel).await
    };
    display.finish().await;
    let records = match result {
        Ok(records) => records,
        Err(error) => return exit::failure(&error, error.exit_code()),
    };
    let written = match (arguments.format, records.as_slice()) {
        (InspectFormat::Json, [one]) => exit::show(&serde_json::to_string_pretty(one).unwrap_or_default()),
        (InspectFormat::Json, several) => exit::show(&serde_json::to_string_pretty(several).unwrap_or_default()),
        (InspectFormat::Table, [one]) if arguments.compare.is_empty() => exit::show(&text::one(one)),
        (InspectFormat::Table, several) => exit::show(&text::side_by_side(several)),
    };
    exit::shown(written)
}

/// A run that was saved is a few kilobytes.
const RUN_BYTES_MAX: u64 = 16 << 20;

/// Where a file is, or will be.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file whole or not at all.
fn save(path: &Path, content: &str) -> Result<(), JobError> {
    write_whole(path, content.as_bytes(), false)
        .map_err(|error| JobError::Refused(format!("{} could not be written: {error}", printable(&path.display().to_string()))))
}

/// What a file that will be written is. One that is there is replaced if an earlier run wrote it, and nothing else is.
#[derive(Clone, Copy)]
enum Written {
    Run,
    Page,
}

impl Written {
    fn is_one(self, path: &Path) -> bool {
        let content = std::fs::read(path).unwrap_or_default();
        match self {
            Self::Run => serde_json::from_slice::<Record>(&content).is_ok(),
            Self::Page => content.starts_with(b"<!DOCTYPE html>") && content.windows(11).any(|part| part == b"virta bench"),
        }
    }
}

/// A file that will be written at the end has to be possible: a minute's work is not thrown away for a folder that is not there.
fn check_writable(path: Option<&PathBuf>, what: Written) -> Result<(), JobError> {
    let Some(path) = path else { return Ok(()) };
    let shown = printable(&path.display().to_string());
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => return Err(JobError::Usage(format!("{shown} cannot be written: it is no file"))),
        Ok(there) if there.len() > 0 && (there.len() > 64 << 20 || !what.is_one(path)) => {
            return Err(JobError::Usage(format!("{shown} is there, and is nothing that virta bench wrote: choose another name")));
        }
        _ => {}
    }
    if let Err(error) = tempfile::tempfile_in(folder_of(path)) {
        let folder = printable(&folder_of(path).display().to_string());
        return Err(JobError::Usage(format!("{shown} cannot be written: nothing can be made in {folder}: {error}")));
    }
    Ok(())
}

/// A run that `--save` wrote. What comes out of a pipe may take its time, and never end.
async fn saved_run(path: &Path, cancel: &CancelToken) -> Result<Record, JobError> {
    let shown = printable(&path.display().to_string());
    let hint = "virta bench --save FILE writes what is compared";
    let (tell, told) = tokio::sync::oneshot::channel();
    let reading = {
        let path = path.to_owned();
        move || {
            let mut text = Vec::new();
            let read = std::fs::File::open(path).and_then(|file| file.take(RUN_BYTES_MAX + 1).read_to_end(&mut text));
            let _ = tell.send(read.map(|_| text)); // nobody listens after an interrupt
        }
    };
    let started = std::thread::Builder::new().name("compare".to_owned()).spawn(reading);
    started.map_err(|error| JobError::Refused(format!("no thread could be started: {error}")))?;
    let read = cancel.guard(told).await.map_err(|_| JobError::interrupted())?;
    let text = read.map_err(std::io::Error::other).flatten();
    let text = text.map_err(|error| JobError::Usage(format!("{shown} cannot be read: {error}; {hint}")))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > RUN_BYTES_MAX {
        return Err(JobError::Usage(format!("{shown} is more than {}, and so no run: {hint}", size(RUN_BYTES_MAX))));
    }
    serde_json::from_slice::<Record>(&text).map_err(|error| {
        let why: String = printable(&error.to_string()).chars().take(200).collect();
        JobError::Usage(format!("{shown} is no run ({why}): {hint}"))
    })
}

async fn compare(arguments: &BenchArgs, cancel: &CancelToken) -> Result<Vec<Record>, JobError> {
    check_writable(arguments.html.as_ref(), Written::Page)?;
    let mut records = Vec::new();
    for path in &arguments.compare {
        records.push(saved_run(path, cancel).await?);
    }
    label(&mut records, &arguments.compare);
    if let Some(path) = &arguments.html {
        save(path, &page::page(&records))?;
    }
    Ok(records)
}

/// Runs of one flavor, or of one host, are told apart by their files' names.
fn label(records: &mut [Record], paths: &[PathBuf]) {
    let titles: std::collections::HashSet<&str> = records.iter().map(Record::title).collect();
    if titles.len() < records.len() {
        for (record, path) in records.iter_mut().zip(paths) {
            record.label = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        }
    }
}

async fn measure(arguments: &BenchArgs, display: &Display, cancel: &CancelToken) -> Result<Vec<Record>, JobError> {
    match (arguments.image_size, arguments.data) {
        (Some(whole), _) if whole < 1 << 20 => {
            return Err(JobError::Usage(format!("--image-size {whole}: that is bytes, and no disk; 80G is 80 GiB")));
        }
        (Some(whole), Some(data)) if data > whole => {
            return Err(JobError::Usage(format!(
                "--data {} is more than the whole disk (--image-size {})",
                size(data),
                size(whole)
            )));
        }
        _ => {}
    }
    check_writable(arguments.save.as_ref(), Written::Run)?;
    check_writable(arguments.html.as_ref(), Written::Page)?;
    if arguments.save.is_some() && arguments.save == arguments.html {
        return Err(JobError::Usage("--save and --html name the same file".to_owned()));
    }
    let folder =
        arguments.folder.canonicalize().and_then(|folder| folder.read_dir().map(|_| folder)).map_err(|error| {
            JobError::Usage(format!("--folder {}: {error}", printable(&arguments.folder.display().to_string())))
        })?;
    let started = Instant::now();
    let mut record = Record {
        virta: env!("CARGO_PKG_VERSION").to_owned(),
        date: now_utc(),
        machine: machine::this(&folder),
        ..Record::default()
    };
    (record.machine.flavor, record.machine.flavor_from) = match &arguments.flavor {
        Some(flavor) => (Some(flavor.clone()), Some("flag".to_owned())),
        None => match machine::flavor(&arguments.metadata).await {
            Some(flavor) => (Some(flavor), Some("metadata".to_owned())),
            None => (None, None),
        },
    };
    let environment = Environment::current();
    // signed in first: who has mistyped a cloud's name need not wait for the disk
    let session = if !arguments.no_cloud && names_a_cloud(arguments, &environment) {
        let session = sign_in("cloud", &arguments.cloud, &environment, display, cancel).await?;
        // and so need not whoever has mistyped an image's
        if let Some(image) = &arguments.image {
            interruptible(cancel, async { Ok(session.find_image(image).await?) }).await?;
        }
        Some(session)
    } else {
        if !arguments.no_cloud {
            record.notes.push("no cloud was measured: --os-cloud, OS_CLOUD or OS_AUTH_URL choose one".to_owned());
        }
        None
    };
    let amount = Amount::new(arguments.quick);
    display.note(&format!("disk of {} …", printable(&record.machine.folder)));
    let (found, notes) = on_the_machine(arguments, &folder, &amount, record.machine.cores, display, cancel).await?;
    record.measures.extend(found);
    record.notes.extend(notes);
    if let Some(session) = &session {
        let who = session.whoami();
        record.machine.cloud = Some(format!("{}, project {}", who.cloud, who.project));
        let glance = Glance { session, slice: amount.glance, upload_bytes: amount.upload_bytes, cancel };
        in_the_cloud(arguments, &glance, &mut record, display).await?;
    }
    if let Some(image_bytes) = arguments.image_size {
        record.job = Some(predict::job(&record, image_bytes, arguments.data.unwrap_or(image_bytes / 4)));
    }
    record.elapsed_s = started.elapsed().as_secs_f64();
    if let Some(path) = &arguments.save {
        save(path, &(serde_json::to_string_pretty(&record).unwrap_or_default() + "\n"))?;
    }
    let records = vec![record];
    if let Some(path) = &arguments.html {
        save(path, &page::page(&records))?;
    }
    Ok(records)
}

/// Was a cloud asked for?
fn names_a_cloud(arguments: &BenchArgs, environment: &Environment) -> bool {
    let set = |name: &str| environment.env.get(name).is_some_and(|value| !value.is_empty());
    arguments.cloud.os_cloud.is_some() || arguments.image.is_some() || set("OS_CLOUD") || set("OS_AUTH_URL")
}

/// Disk and processor, on a thread of their own: both block.
async fn on_the_machine(
    arguments: &BenchArgs,
    folder: &Path,
    amount: &Amount,
    cores: usize,
    display: &Display,
    cancel: &CancelToken,
) -> Result<(Vec<record::Measure>, Vec<String>), JobError> {
    let refused = |what: &str, error: std::io::Error| match cancel.check() {
        Err(_) => JobError::interrupted(),
        Ok(()) => JobError::Refused(format!("{what}: {error}")),
    };
    let shown = printable(&folder.display().to_string());
    let room = disk::room_bytes(folder).map_err(|error| refused(&shown, error))?;
    // never more than a quarter of what is free
    let file_bytes = amount.file_bytes.min(room / 4) >> 21 << 21;
    if file_bytes < 8 << 20 {
        return Err(JobError::Refused(format!("{shown} has too little room for a measurement: choose another --folder")));
    }
    let (folder, patience, slice) = (folder.to_owned(), amount.disk, amount.processor);
    let sample = sample::of_data(arguments.sample.as_deref(), amount.sample_bytes).map_err(|error| {
        let path = arguments.sample.as_deref().unwrap_or(Path::new("files of this system")).display().to_string();
        JobError::Usage(format!("--sample {}: {error}", printable(&path)))
    })?;
    let (token, teller) = (cancel.clone(), display.clone());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("bench".to_owned()).spawn(move || {
        let (data, what) = sample;
        let mut notes = vec![format!("hashed and compressed: {} MiB, {what}", data.len() >> 20)];
        let disk = Disk { folder: &folder, file_bytes, patience, cancel: &token };
        let result = disk.measure(&mut notes).map_err(|error| ("the disk", error)).and_then(|mut found| {
            teller.note(&format!("processor, {cores} cores …"));
            let processor = Processor { cores, slice, sample: &data, cancel: &token };
            found.extend(processor.measure().map_err(|error| ("the processor", error))?);
            Ok(found)
        });
        let _ = sender.send(result.map(|found| (found, notes)));
    });
    thread.map_err(|error| refused("a thread", error))?;
    match receiver.await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err((what, error))) => Err(refused(&format!("measuring {what} ({shown})"), error)),
        Err(_) => Err(JobError::bug("the measuring thread ended without a result")),
    }
}

/// Fetching and sending. What does not work is a note: the rest has been measured.
async fn in_the_cloud(
    arguments: &BenchArgs,
    glance: &Glance<'_>,
    record: &mut Record,
    display: &Display,
) -> Result<(), JobError> {
    match glance.choose(arguments.image.as_deref()).await? {
        Some(image) => {
            display.note(&format!("fetching from image {} with 1 to 8 connections …", image.shown()));
            let found = glance.down(&image, &mut record.notes).await?;
            record.measures.extend(found);
        }
        None => record
            .notes
            .push("fetching was not measured: this project has no image of 16 MiB or more; name one with --image".to_owned()),
    }
    if arguments.no_upload {
        record.notes.push("sending was not measured: --no-upload".to_owned());
        return Ok(());
    }
    // asked beforehand: a service that refuses what is on its way resets the connection, and its reason can be lost with that
    if let Some(left) = glance.session.quota_left_bytes().await.filter(|left| *left < glance.upload_bytes) {
        record.notes.push(format!(
            "sending was not measured: the quota for images has {} left, and {} would be sent",
            size(left),
            size(glance.upload_bytes)
        ));
        return Ok(());
    }
    display.note(&format!("sending an image of {} MiB, which is deleted again …", glance.upload_bytes >> 20));
    // in the run's record while it is there: virta clean finds it after a kill
    let run = Run::begin("virta bench", "glance:virta-bench");
    run.in_cloud(glance.session);
    let sent = glance.up(&run).await;
    match &sent {
        Ok(_) => run.end(0, "sent an image, and deleted it"),
        Err(error) => run.end_with(error.exit_code(), &printable(&causes(error)), true),
    }
    match sent {
        Ok(measure) => record.measures.extend(measure),
        Err(error @ (JobError::Interrupted(_) | JobError::LeftBehind { .. })) => return Err(error),
        Err(error) => record.notes.push(format!("sending was not measured: {}", causes(&error))),
    }
    Ok(())
}
