//! `virta convert`.

use std::{io::IsTerminal, path::Path, process::ExitCode, sync::Arc};

use engine::{CancelToken, Cause};
use stages::{
    convert::{
        self, After, Conversion, Job, Options, Report, Source, Verify,
        names::{conversion_of_gone, has_replaced},
        retire, source,
        to_file::same_file,
        to_glance::to_glance,
    },
    disk::output::partial_of,
    error::JobError,
    openstack::{Session, config::Surroundings, image::ImageError},
    progress::Progress,
    reporter::Notices,
    text::{causes, printable, shell_word, size},
};

use crate::{
    care::{asked, warn_without_record},
    cli::{CloudArgs, ConversionArgs, ConvertArgs, FormatChoice, OutputArgs, Tuning, VerifyChoice},
    display::{Display, Held},
    exit, receipt,
    runs::{self, Run},
    sign_in::sign_in,
    status, stderr,
};

/// Where an image is.
pub enum End {
    /// A local file.
    Path(String),
    /// An image in Glance.
    Glance(String),
    /// stdin or stdout.
    Stdio,
}

impl End {
    /// As it was typed.
    pub fn parse(text: &str) -> Self {
        match text.strip_prefix("glance:") {
            Some(name) => Self::Glance(name.to_owned()),
            None if text == "-" => Self::Stdio,
            None => Self::Path(text.to_owned()),
        }
    }
}

/// What a run came to.
pub enum Outcome {
    /// A new image.
    Made(Box<Report>),
    /// It was there already.
    AlreadyDone(String),
}

/// The options that the flags say.
pub fn options(tuning: &Tuning) -> Options {
    let mut options = Options {
        cluster_bits: tuning.cluster_size,
        all_connections: tuning.connections.is_some(),
        io: tuning.io.into(),
        sync: !tuning.no_sync,
        ..Options::default()
    };
    if let Some(connections) = tuning.connections {
        options.connections = connections;
    }
    if let Some(workers) = tuning.workers {
        options.workers = workers;
    }
    if let Some(memory) = tuning.memory {
        options.memory_bytes = memory;
    }
    options.scratch.clone_from(&tuning.scratch);
    if let Some(limit) = tuning.scratch_limit {
        options.scratch_limit_bytes = limit;
    }
    options
}

/// The options that the flags of a conversion say.
///
/// # Errors
/// The text of a usage error.
pub fn job_options(conversion: &ConversionArgs) -> Result<Options, String> {
    let compression = conversion.compress.with_level(conversion.compress_level)?;
    let verify = conversion.verify.map_or(Verify::Hash, Into::into);
    Ok(Options { properties: conversion.property.clone(), compression, verify, ..options(&conversion.tuning) })
}

/// Cancels on SIGINT and SIGTERM; a second one ends the process at once. A terminal that goes away (SIGHUP) stops
/// nothing.
pub fn watch_signals(cancel: &CancelToken, held: Held) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return;
    };
    // a file that reaches the limit for its size is an error to whoever writes it, not a death
    let _ = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()));
    let cancel = cancel.clone();
    tokio::spawn(async move {
        let mut asked: Option<std::time::Instant> = None;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => continue,
            }
            match asked {
                // `timeout` and a terminal may signal process and group: that is one wish, not two
                Some(first) if first.elapsed() < std::time::Duration::from_secs(1) => continue,
                Some(_) => {
                    let held = held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
                    match held {
                        Some(server) => exit::say(&format!(
                            "virta: stopped at once. Server {} was {} and may not be so now; {}",
                            printable(&server.name),
                            server.status,
                            stages::snapshot::by_hand(&server)
                        )),
                        None => exit::say(
                            "virta: stopped at once. A half-made image may be left: the same command, or virta clean, removes it",
                        ),
                    }
                    stderr::drain(stderr::BRIEFLY);
                    std::process::exit(130);
                }
                None => asked = Some(std::time::Instant::now()),
            }
            if let Some(server) = held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_ref() {
                exit::say(&format!(
                    "virta: interrupted; server {} is brought back to {} (a second interrupt leaves it as it is)",
                    printable(&server.name),
                    server.status
                ));
            }
            cancel.cancel(Cause::Requested("interrupted".to_owned()));
        }
    });
}

/// Runs the command.
pub async fn run(mut arguments: ConvertArgs) -> ExitCode {
    arguments.destination = stdout_by_its_name(arguments.destination);
    let usual = match job_options(&arguments.conversion) {
        Ok(options) => options,
        Err(text) => return exit::usage(&text),
    };
    let (after, verify) = (arguments.source_after.after(), arguments.source_after.verify(arguments.conversion.verify));
    let run = Run::begin(&arguments.source, &arguments.destination);
    let options = Options {
        force: arguments.force,
        verify,
        after,
        copy_members: arguments.source_after.copy_members,
        elsewhere: arguments.to_os_cloud.is_some(),
        run: run.this(),
        take_over: arguments.take_over,
        ..usual
    };
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress, run.clone());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    warn_without_record(&run, &display);
    let result = convert(&arguments, options, &progress, &display, &run, &cancel).await;
    display.finish().await;
    match &result {
        Ok(Outcome::Made(report)) => run.end(0, &format!("made {}", printable(&report.destination))),
        Ok(Outcome::AlreadyDone(id)) => run.end(0, &format!("already done: image {}", printable(id))),
        Err(error) => {
            run.end_with(error.exit_code(), &printable(&causes(error)), error.leaves_an_image());
        }
    }
    let on_stdout = arguments.destination != "-";
    conclude(result, &display, &arguments.output, on_stdout, after != After::Keep)
}

async fn convert(
    arguments: &ConvertArgs,
    options: Options,
    progress: &Progress,
    display: &Display,
    run: &Run,
    cancel: &CancelToken,
) -> Result<Outcome, JobError> {
    let notices: Arc<dyn Notices> = Arc::new(display.clone());
    let (from, to) = (End::parse(&arguments.source), End::parse(&arguments.destination));
    check_report(arguments)?;
    check_ends(arguments, &from, &to)?;
    let needs_source_cloud = matches!(from, End::Glance(_)) || (matches!(to, End::Glance(_)) && arguments.to_os_cloud.is_none());
    let source_cloud = match needs_source_cloud {
        true => Some(sign_in("cloud", &arguments.cloud, &Surroundings::current(), display, cancel).await?),
        false => None,
    };
    let destination_cloud = match &arguments.to_os_cloud {
        Some(name) => {
            let cloud = CloudArgs { os_cloud: Some(name.clone()), ..CloudArgs::default() };
            // what the environment says is about the source's cloud: its region, its password
            let surroundings = Surroundings::current().without_a_cloud();
            Some(sign_in("destination: cloud", &cloud, &surroundings, display, cancel).await?)
        }
        None => source_cloud.clone(),
    };
    if let (End::Glance(_), Some(session)) = (&to, &destination_cloud) {
        run.in_cloud(session);
        status::clean_up_before(session, display, cancel).await?;
    }
    let signed_in =
        |session: &Option<Session>| session.clone().ok_or_else(|| JobError::bug("a cloud is needed, and nobody signed in"));
    let source = match &from {
        End::Glance(name) => {
            match find_source(arguments, name, &signed_in(&source_cloud)?, &to, &destination_cloud, cancel).await? {
                Ok(source) => source,
                Err(done) => return Ok(done),
            }
        }
        End::Path(path) => match Source::local(Path::new(path)) {
            Err(error) if !Path::new(path).exists() => return Err(did_you_mean(error, path, source_cloud.as_ref()).await),
            other => other?,
        },
        End::Stdio => Source::stdin(arguments.source_size)?,
    };
    let job = Job::new(source, options, progress, &notices, cancel);
    interruptible(cancel, retire::check(&job, arguments.force)).await?;
    confirm(&job, arguments.source_after.yes).await?;
    let report = match &to {
        End::Stdio => convert::to_stream::to_stream(&job, stdout()?, "-").await?,
        End::Path(path) if is_forward_only(path) => {
            let file = open_forward(path, display, cancel).await?;
            convert::to_stream::to_stream(&job, file, path).await?
        }
        End::Path(path) => convert::to_file::to_file(&job, Path::new(path)).await?,
        End::Glance(name) => {
            return into_glance(&job, &signed_in(&destination_cloud)?, name).await;
        }
    };
    Ok(Outcome::Made(Box::new(report)))
}

/// The source image; or what an earlier run of this command has made of it, where it is gone.
async fn find_source(
    arguments: &ConvertArgs,
    name: &str,
    session: &Session,
    to: &End,
    destination: &Option<Session>,
    cancel: &CancelToken,
) -> Result<Result<Source, Outcome>, JobError> {
    let replace = arguments.source_after.replace;
    let missing = match interruptible(cancel, async { Ok(source::find_source(session, name).await?) }).await {
        // a replacement that is done has the name already
        Ok(image) if replace && interruptible(cancel, has_replaced(session, &image)).await? => {
            return Ok(Err(Outcome::AlreadyDone(image.id)));
        }
        Ok(image) => return Source::image(session, image).map(Ok),
        Err(missing @ JobError::Image(ImageError::NotFound { .. })) => missing,
        Err(error) => return Err(error),
    };
    // an earlier run of this command may have deleted it, and been killed before it could say so
    let (End::Glance(new_name), Some(there)) = (to, destination) else { return Err(missing) };
    let made = runs::made_by(&arguments.source, &arguments.destination, there);
    let new_name = (!replace).then_some(new_name.as_str());
    let looking = async { Ok(conversion_of_gone(session, there, name, &made, new_name).await?) };
    match interruptible(cancel, looking).await? {
        Some(image) => {
            exit::say(&format!("the source ({}) is gone: an earlier run converted and deleted it", printable(name)));
            Ok(Err(Outcome::AlreadyDone(image.id)))
        }
        None => Err(missing),
    }
}

/// A job's source becomes image `name`, unless it is that already.
pub async fn into_glance(job: &Job, session: &Session, name: &str) -> Result<Outcome, JobError> {
    Ok(match to_glance(job, session, name).await? {
        Conversion::Made(report) => Outcome::Made(report),
        Conversion::Earlier(image) => Outcome::AlreadyDone(image.id),
    })
}

/// What cannot go together is refused before anything is asked of anybody.
fn check_ends(arguments: &ConvertArgs, from: &End, to: &End) -> Result<(), JobError> {
    let usage = |text: &str| Err(JobError::Usage(text.to_owned()));
    if matches!(to, End::Stdio) && std::io::stdout().is_terminal() {
        return usage("`-` writes the image to stdout, and stdout is a terminal: send it into a file or a pipe");
    }
    if !arguments.conversion.property.is_empty() && !matches!(to, End::Glance(_)) {
        return usage("--property is about a new image in Glance: the destination has to be glance:NAME");
    }
    if arguments.source_size.is_some() && !matches!(from, End::Stdio) {
        return usage("--source-size is about what comes through a pipe: the source has to be -");
    }
    if arguments.to_os_cloud.is_some() && !matches!(to, End::Glance(_)) {
        return usage("--to-os-cloud chooses the cloud of a new image: the destination has to be glance:NAME");
    }
    let after = &arguments.source_after;
    if (after.after() != After::Keep || after.copy_members) && !matches!(to, End::Glance(_)) {
        return usage("--delete-source, --replace and --copy-members need a new image in Glance: glance:NAME");
    }
    if after.copy_members && arguments.to_os_cloud.is_some() {
        return usage("--copy-members shares with projects of the source's cloud, which mean nothing in another: leave it out");
    }
    if after.replace && arguments.to_os_cloud.is_some() {
        return usage(
            "--replace puts the new image in the place of the old one, in the same cloud: use --delete-source with --to-os-cloud",
        );
    }
    if arguments.conversion.verify == Some(VerifyChoice::Readback)
        && (matches!(to, End::Stdio) || matches!(to, End::Path(path) if is_forward_only(path)))
    {
        return usage("--verify readback reads back what was made, and a pipe cannot be read back: use --verify hash");
    }
    if matches!(from, End::Path(_)) && arguments.destination == arguments.source {
        return usage("source and destination are one and the same");
    }
    Ok(())
}

/// Whatever deletes an image asks on a terminal, and needs `--yes` elsewhere.
async fn confirm(job: &Job, yes: bool) -> Result<(), JobError> {
    let (After::Delete | After::Replace, Source::Glance { session, image, bytes }) = (job.options.after, &job.source) else {
        return Ok(());
    };
    let who = session.whoami();
    let what = format!(
        "image {} ({}, {}) in cloud {}, project {}",
        image.shown(),
        image.shown_id(),
        size(*bytes),
        who.cloud,
        who.project
    );
    if yes {
        job.notices.note(&format!("after verification will be deleted: {what}"));
        return Ok(());
    }
    match asked(&format!("After the new image is verified, delete {what}"), &job.cancel).await? {
        Some(true) => Ok(()),
        Some(false) => Err(JobError::Refused("nothing was done: the answer was not yes".to_owned())),
        None => Err(JobError::Usage(format!("{what} would be deleted after verification, and nobody can be asked: add --yes"))),
    }
}

/// stdout by one of its names is `-`: nothing but the image may go there.
pub fn stdout_by_its_name(path: String) -> String {
    if matches!(path.as_str(), "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1") { "-".to_owned() } else { path }
}

/// A FIFO can only be written forward.
pub fn is_forward_only(path: impl AsRef<Path>) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Opens a FIFO when its reader is there; until then it can be interrupted.
pub async fn open_forward(path: &str, display: &Display, cancel: &CancelToken) -> Result<std::fs::File, JobError> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut told = false;
    loop {
        match std::fs::File::options().write(true).custom_flags(flags).open(path) {
            Ok(file) => return Ok(file),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
                if !std::mem::replace(&mut told, true) {
                    display.note(&format!("waiting until somebody reads {}", printable(path)));
                }
                let pause = tokio::time::sleep(std::time::Duration::from_millis(200));
                cancel.guard(pause).await.map_err(|_| JobError::interrupted())?;
            }
            Err(error) => return Err(JobError::Refused(format!("opening {}: {error}", printable(path)))),
        }
    }
}

pub fn stdout() -> Result<std::fs::File, JobError> {
    use std::os::fd::AsFd;
    let handle = std::io::stdout().as_fd().try_clone_to_owned();
    let file =
        handle.map(std::fs::File::from).map_err(|error| JobError::Refused(format!("stdout cannot be written: {error}")))?;
    let kind = file.metadata().map_err(|error| JobError::Refused(format!("stdout cannot be written: {error}")))?.file_type();
    // a closed stdout is opened as /dev/null before a program begins
    if std::os::unix::fs::FileTypeExt::is_char_device(&kind) {
        return Err(JobError::Usage(
            "`-` writes the image to stdout, which is closed or /dev/null: nobody would have it".to_owned(),
        ));
    }
    if kind.is_file() && !matches!(rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)), Ok(0)) {
        return Err(JobError::Usage(
            "`-` writes the image to stdout, which is a file that is not empty: give the file's name as destination".to_owned(),
        ));
    }
    Ok(file)
}

/// Work that an interrupt breaks off.
pub async fn interruptible<T>(cancel: &CancelToken, work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    cancel.guard(work).await.unwrap_or_else(|_| Err(JobError::Interrupted("interrupted".to_owned())))
}

/// The report's file is opened before anything is done, and it is none of the files that matter.
fn check_report(arguments: &ConvertArgs) -> Result<(), JobError> {
    let Some(report) = &arguments.output.report else { return Ok(()) };
    for end in [&arguments.source, &arguments.destination] {
        let path = Path::new(end);
        if path == report || same_file(path, report) || partial_of(path) == *report {
            return Err(JobError::Usage(format!("--report {}: that is the source or the destination", report.display())));
        }
    }
    check_report_file(report)
}

/// Can a report be written there at the end, over nothing but an earlier one?
///
/// # Errors
/// [`JobError::Usage`].
pub fn check_report_file(report: &Path) -> Result<(), JobError> {
    use std::io::Read;
    let usage = |text: String| Err(JobError::Usage(format!("--report {}: {text}", report.display())));
    if std::fs::metadata(report).is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type())) {
        return usage("that is a disk: give a file".to_owned());
    }
    // one that is open already (/dev/stdout, a shell's >(…)) has its reader; any other would be waited for
    let is_open = report.starts_with("/dev") || report.starts_with("/proc");
    if is_forward_only(report) && !is_open {
        return usage("that is a named pipe, whose reader would have to be waited for: give a file".to_owned());
    }
    let mut start = [0];
    if report.is_file()
        && matches!(std::fs::File::open(report).map(|mut file| file.read(&mut start)), Ok(Ok(1)))
        && start != *b"{"
    {
        return usage("that file is there and is no report of an earlier run; choose another name".to_owned());
    }
    match open_private(report) {
        Ok(_) => Ok(()),
        Err(error) => usage(format!("cannot be written: {error}")),
    }
}

/// Opens a file for writing, for its owner alone if it is new.
fn open_private(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

pub fn write_report(path: &Path, json: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = open_private(path)?;
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    file.write_all(json.as_bytes())?;
    file.write_all(b"\n")
}

/// A path that is not there may be an image's name.
pub async fn did_you_mean(error: JobError, path: &str, session: Option<&Session>) -> JobError {
    let is_image = match session {
        Some(session) => session.find_image(path).await.is_ok(),
        None => uuid::Uuid::parse_str(path).is_ok(),
    };
    if session.is_none() && !is_image && !path.contains('/') {
        return JobError::Refused(format!(
            "there is no file {}; an image in Glance is written glance:{}",
            printable(path),
            shell_word(&printable(path))
        ));
    }
    if is_image {
        return JobError::Usage(format!("{} is no file; did you mean glance:{}?", printable(path), shell_word(&printable(path))));
    }
    error
}

/// Prints the report, or the error, and gives the exit code.
pub fn conclude(
    result: Result<Outcome, JobError>,
    display: &Display,
    output: &OutputArgs,
    on_stdout: bool,
    source_is_gone: bool,
) -> ExitCode {
    // where the image itself went to stdout, nothing else may
    let print = |text: &str| {
        if on_stdout {
            return exit::print(text);
        }
        exit::say(text);
        true
    };
    let mut report = match result {
        Ok(Outcome::Made(report)) => report,
        Ok(Outcome::AlreadyDone(id)) => {
            let id = printable(&id);
            exit::say(&format!("already done: image {id} is this source's finished and verified conversion"));
            match output.format {
                FormatChoice::Value => _ = print(&id),
                FormatChoice::Json => {
                    _ = print(&serde_json::json!({ "destination": format!("glance:{id}"), "already_done": true }).to_string());
                }
                FormatChoice::Table => {}
            }
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let code = exit::failure(&error, error.exit_code());
            if matches!(error, JobError::Interrupted(_)) {
                exit::say("nothing half-made is left behind, and the source is as it was");
            }
            return code;
        }
    };
    report.warnings.extend(display.warnings());
    let proven = proven(&report);
    let receipt = receipt::write(&report, &proven, source_is_gone);
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    match output.format {
        FormatChoice::Table => {
            _ = print(&format!(
                "{}{}",
                summary(&report, &proven),
                what_next(&report, receipt.as_ref().ok().map(std::path::PathBuf::as_path), source_is_gone)
            ))
        }
        FormatChoice::Json => {
            if !print(&json) {
                exit::say("virta: the conversion is done, but its report could not be written to stdout");
                return ExitCode::from(1);
            }
        }
        FormatChoice::Value => {
            if !print(&printable(report.destination.strip_prefix("glance:").unwrap_or(&report.destination))) {
                exit::say(&format!("virta: made {}, but that could not be written to stdout", printable(&report.destination)));
                return ExitCode::from(1);
            }
        }
    }
    if let Err(error) = receipt {
        exit::say(&format!("virta: the conversion is done, but its receipt could not be written: {error}"));
    }
    if let Some(path) = &output.report
        && let Err(error) = write_report(path, &json)
    {
        exit::say(&format!("virta: the conversion is done, but its report could not be written to {}: {error}", path.display()));
        return ExitCode::from(1);
    }
    ExitCode::SUCCESS
}

/// What is proven about the result, and what is not, a sentence each.
pub fn proven(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    let from_glance = report.source.starts_with("glance:");
    if report.source_hash.checked {
        let algorithm = report.source_hash.algorithm.as_deref().unwrap_or_default();
        lines.push(format!("proven: what was read has the source's {algorithm} in Glance"));
    } else if report.source_read_twice {
        lines.push("proven: read a second time, the source gave the same bytes (Glance has no hash of it)".to_owned());
    } else if from_glance && report.verify == "none" {
        lines.push("not proven: what was read was not compared with the source's hash (--verify none)".to_owned());
    } else if from_glance {
        lines.push("not proven: Glance has no hash of the source, so what was read could not be checked against one".to_owned());
    }
    let to_glance = report.destination.starts_with("glance:");
    if report.read_back {
        let what = if to_glance { "what Glance serves of the new image" } else { "the file, read back," };
        lines.push(format!("proven: {what} decodes to the {} bytes that were read of the source", report.virtual_bytes));
    } else if !to_glance && report.destination != "-" && report.source == "-" {
        lines.push(
            "not proven: the file, read back; what came through a pipe is gone, so only --verify readback could do it".to_owned(),
        );
    } else if !to_glance && report.destination != "-" {
        lines.push(format!(
            "not proven: the file, read back; to prove it: virta verify {} {}",
            shell_word(&printable(&report.source)),
            shell_word(&printable(&report.destination))
        ));
    }
    if report.image_hash.checked {
        let algorithm = report.image_hash.algorithm.as_deref().unwrap_or_default();
        lines.push(format!("proven: size and {algorithm} of the new image in Glance are those of what was sent"));
    } else if to_glance {
        lines.push(
            "proven: the new image's size in Glance; not proven: its content, for Glance computed no hash of it".to_owned(),
        );
    }
    lines
}

/// The last lines on the screen.
pub fn summary(report: &Report, proven: &[String]) -> String {
    let saved = match report.virtual_bytes {
        0 => String::new(),
        all if report.image_bytes >= all => String::new(), // tables of a disk that is full, or tiny
        all => format!(", {}% smaller", 100 - (u128::from(report.image_bytes) * 100 / u128::from(all)).min(100)),
    };
    let mut lines = vec![format!(
        "made {}: {}{saved}, from {} virtual; {} data, {} zeros; {:.1} s",
        printable(&report.destination),
        size(report.image_bytes),
        size(report.virtual_bytes),
        size(report.data_bytes),
        size(report.zero_bytes),
        report.elapsed_s
    )];
    if report.fetched_bytes > 0 || report.uploaded_bytes > 0 {
        lines.push(format!(
            "fetched {}{}, sent {}; scratch disk {}, memory at most {}",
            size(report.fetched_bytes),
            if report.reread_bytes > 0 { format!(" ({} of it a second time)", size(report.reread_bytes)) } else { String::new() },
            size(report.uploaded_bytes),
            if report.scratch_peak_bytes > 0 { size(report.scratch_peak_bytes) } else { "0".to_owned() },
            size(report.rss_peak_bytes)
        ));
    }
    lines.extend(proven.iter().cloned());
    lines.join("\n")
}

/// What is left to do, and where the receipt is; each line after a line break.
fn what_next(report: &Report, receipt: Option<&Path>, source_is_gone: bool) -> String {
    let mut text = String::new();
    if source_is_gone {
        text.push_str("\nthe raw image is deleted");
    } else if let Some(id) = report.source.strip_prefix("glance:")
        && !report.destination.starts_with("glance:")
    {
        text.push_str(&format!(
            "\nthe raw image ({id}) is still in Glance; keep it until this file is where it shall be, and boots"
        ));
    } else if let Some(id) = report.source.strip_prefix("glance:") {
        text.push_str(&format!("\nthe raw image is still there; when you have booted from the new one: virta image delete {id}"));
    }
    if let Some(path) = receipt {
        text.push_str(&format!("\nreceipt: {}", path.display()));
    }
    text
}
