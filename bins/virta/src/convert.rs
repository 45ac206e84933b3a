//! `virta convert`.

use std::{path::Path, process::ExitCode, sync::Arc};

use engine::{CancelToken, Cause};
use stages::{
    convert::{
        self, JobError, Notices, Options, Report, Source,
        to_file::same_file,
        to_glance::{NameCheck, check_name, images_of_name},
    },
    disk::output::partial_of,
    openstack::Session,
    progress::Progress,
    text::{printable, shell_word, size},
};

use crate::{
    cli::{ConvertArgs, FormatChoice, OutputArgs, Tuning},
    display::Display,
    exit, receipt,
    sign_in::sign_in,
};

/// Where an image is.
enum End {
    Path(String),
    Glance(String),
}

impl End {
    fn parse(text: &str) -> Self {
        match text.strip_prefix("glance:") {
            Some(name) => Self::Glance(name.to_owned()),
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
        connections: tuning.connections,
        io: tuning.io.into(),
        sync: !tuning.no_sync,
        ..Options::default()
    };
    if let Some(workers) = tuning.workers {
        options.workers = workers;
    }
    if let Some(memory) = tuning.memory {
        options.memory_bytes = memory;
    }
    options
}

/// Cancels on SIGINT and SIGTERM; a second one ends the process at once. A terminal that goes away (SIGHUP) stops
/// nothing.
pub fn watch_signals(cancel: &CancelToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return;
    };
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
                    exit::say(
                        "virta: stopped at once. A half-made image may be left: the same command warns of it and names its id",
                    );
                    std::process::exit(130);
                }
                None => asked = Some(std::time::Instant::now()),
            }
            cancel.cancel(Cause::Requested("interrupted".to_owned()));
        }
    });
}

/// Runs the command.
pub async fn run(arguments: ConvertArgs) -> ExitCode {
    let options = Options { force: arguments.force, properties: arguments.property.clone(), ..options(&arguments.tuning) };
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress);
    let cancel = CancelToken::new();
    watch_signals(&cancel);
    let result = convert(&arguments, &options, &progress, &display, &cancel).await;
    display.finish().await;
    conclude(result, &display, &arguments.output)
}

async fn convert(
    arguments: &ConvertArgs,
    options: &Options,
    progress: &Progress,
    display: &Display,
    cancel: &CancelToken,
) -> Result<Outcome, JobError> {
    let notices: Arc<dyn Notices> = Arc::new(display.clone());
    if arguments.source == "-" || arguments.destination == "-" {
        let text = "`-` (stdin, stdout) is not supported by this version; a file called - is ./-";
        return Err(JobError::Usage(text.to_owned()));
    }
    let (from, to) = (End::parse(&arguments.source), End::parse(&arguments.destination));
    check_report(arguments)?;
    let session = match (&from, &to) {
        (End::Path(_), End::Path(_)) => None,
        _ => Some(sign_in(&arguments.cloud, display, cancel).await?),
    };
    let signed_in = || session.clone().ok_or_else(|| JobError::bug("a cloud is needed, and nobody signed in"));
    let mut taken = None;
    let source = match &from {
        End::Glance(name) => {
            let session = signed_in()?;
            let looking = async {
                // two questions to Glance at once: each costs it a look-up of the token, too
                let (source, names) = tokio::join!(Source::glance(&session, name), async {
                    match &to {
                        End::Glance(name) => images_of_name(&session, name).await,
                        End::Path(_) => Ok(Vec::new()),
                    }
                });
                taken = Some(names?);
                source
            };
            interruptible(cancel, looking).await?
        }
        End::Path(path) => match Source::local(Path::new(path)) {
            Err(error) if !Path::new(path).exists() => return Err(did_you_mean(error, path, session.as_ref()).await),
            other => other?,
        },
    };
    let report = match &to {
        End::Path(path) => convert::to_file::to_file(&source, Path::new(path), options, progress, &notices, cancel).await?,
        End::Glance(name) => {
            let session = signed_in()?;
            let taken = match taken {
                Some(taken) => taken,
                None => interruptible(cancel, images_of_name(&session, name)).await?,
            };
            match check_name(taken, name, &source, options.force)? {
                NameCheck::AlreadyDone(image) => return Ok(Outcome::AlreadyDone(image.id.clone())),
                NameCheck::Free { unfinished } => {
                    for id in unfinished {
                        display.warn(&format!(
                            "image {id} of that name is an unfinished conversion of this source: another run makes it, or a killed one left it. \
                             If none runs: openstack image delete {id}"
                        ));
                    }
                }
            }
            convert::to_glance::to_glance(&source, &session, name, options, progress, &notices, cancel).await?
        }
    };
    Ok(Outcome::Made(Box::new(report)))
}

async fn interruptible<T>(cancel: &CancelToken, work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    cancel.guard(work).await.unwrap_or_else(|_| Err(JobError::Interrupted("interrupted".to_owned())))
}

/// The report's file is opened before anything is done, and it is none of the files that matter.
fn check_report(arguments: &ConvertArgs) -> Result<(), JobError> {
    use std::io::Read;
    let Some(report) = &arguments.output.report else { return Ok(()) };
    let usage = |text: String| Err(JobError::Usage(format!("--report {}: {text}", report.display())));
    for end in [&arguments.source, &arguments.destination] {
        let path = Path::new(end);
        if path == report || same_file(path, report) || partial_of(path) == *report {
            return usage("that is the source or the destination".to_owned());
        }
    }
    let mut start = [0];
    match std::fs::File::open(report).map(|mut file| file.read(&mut start)) {
        Ok(Ok(1)) if start != *b"{" => {
            return usage("that file is there and is no report of an earlier run; choose another name".to_owned());
        }
        _ => {}
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

fn write_report(path: &Path, json: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = open_private(path)?;
    file.set_len(0)?;
    file.write_all(json.as_bytes())?;
    file.write_all(b"\n")
}

/// A path that is not there may be an image's name.
async fn did_you_mean(error: JobError, path: &str, session: Option<&Session>) -> JobError {
    let is_image = match session {
        Some(session) => session.find_image(path).await.is_ok(),
        None => uuid::Uuid::parse_str(path).is_ok(),
    };
    if session.is_none() && !is_image && !path.contains('/') {
        return JobError::Refused(format!(
            "{error}: there is no such file. An image in Glance is written glance:{}",
            shell_word(&printable(path))
        ));
    }
    if is_image {
        return JobError::Usage(format!("{} is no file; did you mean glance:{}?", printable(path), shell_word(&printable(path))));
    }
    error
}

/// Prints the report, or the error, and gives the exit code.
pub fn conclude(result: Result<Outcome, JobError>, display: &Display, output: &OutputArgs) -> ExitCode {
    let mut report = match result {
        Ok(Outcome::Made(report)) => report,
        Ok(Outcome::AlreadyDone(id)) => {
            let id = printable(&id);
            exit::say(&format!("already done: image {id} is this source's finished and verified conversion"));
            match output.format {
                FormatChoice::Value => _ = exit::print(&id),
                FormatChoice::Json => {
                    _ = exit::print(
                        &serde_json::json!({ "destination": format!("glance:{id}"), "already_done": true }).to_string(),
                    );
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
    let receipt = receipt::write(&report, &proven);
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    match output.format {
        FormatChoice::Table => {
            _ = exit::print(&format!(
                "{}{}",
                summary(&report, &proven),
                what_next(&report, receipt.as_ref().ok().map(std::path::PathBuf::as_path))
            ))
        }
        FormatChoice::Json => {
            if !exit::print(&json) {
                exit::say("virta: the conversion is done, but its report could not be written to stdout");
                return ExitCode::from(1);
            }
        }
        FormatChoice::Value => {
            _ = exit::print(&printable(report.destination.strip_prefix("glance:").unwrap_or(&report.destination)))
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
    } else if from_glance {
        lines.push("not proven: Glance has no hash of the source, so what was read could not be checked against one".to_owned());
    }
    if !report.destination.starts_with("glance:") {
        lines.push(
            "not proven: the file, read back; check it with: qemu-img check FILE, qemu-img compare -f raw -F qcow2 RAW FILE"
                .to_owned(),
        );
    }
    if report.image_hash.checked {
        let algorithm = report.image_hash.algorithm.as_deref().unwrap_or_default();
        lines.push(format!("proven: size and {algorithm} of the new image in Glance are those of what was sent"));
    } else if report.destination.starts_with("glance:") {
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
            "fetched {}, sent {}; scratch disk 0, memory at most {}",
            size(report.fetched_bytes),
            size(report.uploaded_bytes),
            size(report.rss_peak_bytes)
        ));
    }
    lines.extend(proven.iter().cloned());
    lines.join("\n")
}

/// What is left to do, and where the receipt is; each line after a line break.
fn what_next(report: &Report, receipt: Option<&Path>) -> String {
    let mut text = String::new();
    if let Some(id) = report.source.strip_prefix("glance:")
        && !report.destination.starts_with("glance:")
    {
        text.push_str(&format!(
            "\nthe raw image ({id}) is still in Glance; keep it until this file is where it shall be, and boots"
        ));
    } else if let Some(id) = report.source.strip_prefix("glance:") {
        text.push_str(&format!(
            "\nthe raw image is still there; when you have booted from the new one: openstack image delete {id}"
        ));
    }
    if let Some(path) = receipt {
        text.push_str(&format!("\nreceipt: {}", path.display()));
    }
    text
}
