//! `virta download`.

use std::{io::IsTerminal, path::Path, process::ExitCode, sync::Arc};

use clap::Args;
use engine::CancelToken;
use stages::{
    convert::Options,
    download::{Download, DownloadReport},
    error::JobError,
    openstack::{Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    retry::Patience,
    text::{causes, printable, size},
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, FormatChoice, OutputArgs, count},
    image_names::image_names,
    location::{is_forward_only, open_forward, stdout, stdout_by_its_name},
    receipt,
    report_file::write_report,
    runs::Run,
    sign_in::sign_in,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct DownloadArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    /// The file to make, or - for stdout
    pub file: String,
    /// Go on with what an earlier download left
    #[arg(long)]
    pub resume: bool,
    /// Replace a file that is there; start again where a partial one is; write onto a block device
    #[arg(long)]
    pub force: bool,
    /// Parallel ranges to fetch, where the image store serves ranges [default: up to 4, as many as make it faster]
    #[arg(long, value_name = "N", value_parser = count)]
    pub connections: Option<std::num::NonZeroUsize>,
    /// Do not wait until the file is on stable storage
    #[arg(long)]
    pub no_sync: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

const EXAMPLES: &str = "\
The image as it is, byte by byte: to make a qcow2 of a raw one on the way, use virta convert glance:IMAGE FILE.qcow2.
Its hash in Glance is compared with what is in the file. Zeros become holes. The file is called FILE.partial until it is complete; a download that breaks off \
keeps it, and --resume goes on there.
Examples:
  virta download my-server my-server.qcow2
  virta download --resume my-server my-server.qcow2
  virta download my-server - | ssh host 'cat > my-server.qcow2'

Exit status: 0 done, 1 failed, 2 wrong usage, 3 the hash differs, 130 interrupted.";

/// Runs the command.
pub async fn run(mut arguments: DownloadArgs) -> ExitCode {
    arguments.file = stdout_by_its_name(arguments.file);
    let run = Run::begin(&format!("glance:{}", arguments.image.trim_start_matches("glance:")), &arguments.file);
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress, run.clone());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let result = download(&arguments, &progress, &display, &cancel).await;
    display.finish().await;
    match result {
        Ok(report) => {
            run.end(0, &format!("made {}", printable(&arguments.file)));
            tell(report, &arguments, &display)
        }
        Err(error) => {
            run.end(error.exit_code(), &printable(&causes(&error)));
            exit::failure(&error, error.exit_code())
        }
    }
}

async fn download(
    arguments: &DownloadArgs,
    progress: &Progress,
    display: &Display,
    cancel: &CancelToken,
) -> Result<DownloadReport, JobError> {
    let to_stdout = arguments.file == "-";
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(JobError::Usage(
            "`-` writes the image to stdout, and stdout is a terminal: send it into a file or a pipe".to_owned(),
        ));
    }
    if arguments.resume && (to_stdout || is_forward_only(&arguments.file)) {
        return Err(JobError::Usage("a pipe starts at the beginning: --resume is for files".to_owned()));
    }
    if arguments.file.ends_with('/') || Path::new(&arguments.file).is_dir() {
        return Err(JobError::Usage(format!("{} is a folder: add the file's name", printable(&arguments.file))));
    }
    let looking = async {
        let session = sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?;
        let image = find(&session, arguments.image.strip_prefix("glance:").unwrap_or(&arguments.image)).await?;
        Ok::<_, JobError>((session, image))
    };
    let (session, image) = cancel.guard(looking).await.unwrap_or_else(|_| Err(JobError::interrupted()))?;
    let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
    let download = Download {
        session,
        image,
        connections: arguments.connections.unwrap_or(Options::default().connections),
        all_connections: arguments.connections.is_some(),
        force: arguments.force,
        resume: arguments.resume,
        sync: !arguments.no_sync,
        patience: Patience::default(),
        progress: progress.clone(),
        reporter,
        cancel: cancel.clone(),
    };
    match arguments.file.as_str() {
        "-" => download.to_stream(stdout()?, "-").await,
        path if is_forward_only(path) => {
            let file = open_forward(path, display, cancel).await?;
            download.to_stream(file, path).await
        }
        path => download.to_file(Path::new(path)).await,
    }
}

/// An image with bytes.
async fn find(session: &Session, name: &str) -> Result<stages::openstack::Image, JobError> {
    let image = session.find_image(name).await?;
    let (shown, id) = (image.shown(), image.shown_id());
    if image.is_volume_backed() {
        return Err(JobError::Refused(format!(
            "image {shown} ({id}) is the snapshot of a volume-backed server: it has no bytes of its own, only a pointer to volume snapshots"
        )));
    }
    match (image.status.as_str(), image.size) {
        ("active", Some(_)) => Ok(image),
        ("deactivated", _) => Err(JobError::Refused(format!(
            "image {shown} ({id}) is deactivated: an administrator has closed it, and can open it again"
        ))),
        (status, _) => {
            Err(JobError::Refused(format!("image {shown} ({id}) is {}: only an active image has bytes", printable(status))))
        }
    }
}

/// What was made, and what is proven of it.
fn tell(mut report: DownloadReport, arguments: &DownloadArgs, display: &Display) -> ExitCode {
    report.warnings = display.warnings();
    let proven = match (&report.image_hash.algorithm, report.image_hash.checked) {
        (Some(algorithm), true) => format!(
            "proven: {} has the image's {algorithm} in Glance",
            if report.destination == "-" { "what was written" } else { "the file" }
        ),
        _ => "not proven: Glance has no hash of the image; only its length is right".to_owned(),
    };
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    let receipt = receipt::write_told(&serde_json::json!({ "proven": [proven], "report": report }));
    let holes = if report.zero_bytes > 0 { format!(", {} of it holes", size(report.zero_bytes)) } else { String::new() };
    let resumed =
        if report.resumed_bytes > 0 { format!("; {} were there already", size(report.resumed_bytes)) } else { String::new() };
    let text = match arguments.output.format {
        FormatChoice::Table => format!(
            "made {}: {}{holes}; fetched {}{resumed}; {:.1} s\n{proven}{}",
            printable(&report.destination),
            size(report.image_bytes),
            size(report.fetched_bytes),
            report.elapsed_s,
            receipt.as_ref().map(|path| format!("\nreceipt: {}", path.display())).unwrap_or_default()
        ),
        FormatChoice::Json => json.clone(),
        FormatChoice::Value => printable(&report.destination),
    };
    // where the image itself went to stdout, nothing else may
    let printed = if report.destination == "-" {
        exit::say(&text);
        true
    } else {
        exit::print(&text)
    };
    if let Err(error) = receipt {
        exit::say(&format!("virta: the download is done, but its receipt could not be written: {error}"));
    }
    if let Some(path) = &arguments.output.report
        && let Err(error) = write_report(path, &json)
    {
        exit::say(&format!("virta: the download is done, but its report could not be written to {}: {error}", path.display()));
        return ExitCode::from(1);
    }
    ExitCode::from(u8::from(!printed))
}
