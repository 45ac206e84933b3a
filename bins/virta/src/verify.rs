//! `virta verify`.

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use clap::Args;
use engine::CancelToken;
use stages::{
    convert::readback::{Target, compare},
    error::JobError,
    glance::Remote,
    openstack::{Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    retry::{Patience, Retries},
    text::{printable, size},
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, ProgressChoice},
    image_names::path_or_image,
    location::{End, did_you_mean},
    runs::Run,
    sign_in::sign_in,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_help = "\
Sizes may differ by what a qcow2 rounds up to 512 bytes. What is read is decoded, never trusted: no header's word is taken for a byte.
Examples:
  virta verify disk.raw disk.qcow2
  virta verify glance:my-snapshot glance:my-snapshot-qcow2
Exit status: 0 the same, 1 failed, 2 wrong usage, 3 they differ (the first guest offset that does is printed), 130 interrupted.")]
pub struct VerifyArgs {
    /// One image: a path, or glance:IMAGE
    #[arg(add = path_or_image())]
    pub a: String,
    /// The other: a path, or glance:IMAGE
    #[arg(add = path_or_image())]
    pub b: String,
    #[command(flatten)]
    pub cloud: CloudArgs,
    /// Threads, and connections to Glance, that read at once
    #[arg(long, value_name = "N", default_value = "4", value_parser = crate::flags::count)]
    pub connections: NonZeroUsize,
    /// Progress on stderr: auto is bars on a terminal and plain lines elsewhere
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub progress: ProgressChoice,
}

/// Runs the command.
pub async fn run(arguments: VerifyArgs) -> ExitCode {
    let progress = Progress::default();
    let display = Display::start(arguments.progress, &progress, Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let started = Instant::now();
    let result = verify(&arguments, &progress, &display, &cancel).await;
    display.finish().await;
    match result {
        Ok(bytes) => {
            let seconds = started.elapsed().as_secs_f64();
            _ = exit::print(&format!("the same: both show a guest the same {bytes} bytes ({}), in {seconds:.1} s", size(bytes)));
            ExitCode::SUCCESS
        }
        Err(error) => exit::failure(&error, error.exit_code()),
    }
}

async fn verify(arguments: &VerifyArgs, progress: &Progress, display: &Display, cancel: &CancelToken) -> Result<u64, JobError> {
    let ends = [End::parse(&arguments.a), End::parse(&arguments.b)];
    let session = match ends.iter().any(|end| matches!(end, End::Glance(_))) {
        true => Some(sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?),
        false => None,
    };
    let told = display.clone();
    let retries = Retries::new(progress, Arc::new(move |line| told.note(&line)));
    let mut targets = Vec::new();
    for end in &ends {
        targets.push(match end {
            End::Path(path) if !std::path::Path::new(path).exists() => {
                let missing = JobError::Refused(format!("there is no file {}", printable(path)));
                return Err(did_you_mean(missing, path, session.as_ref()).await);
            }
            End::Path(path) => Target::Path(PathBuf::from(path)),
            End::Stdio => return Err(JobError::Usage("what comes through a pipe cannot be compared: give a file".to_owned())),
            End::Glance(name) => {
                let session = session.as_ref().ok_or_else(|| JobError::bug("nobody signed in"))?;
                let target = open(session, name, progress, &retries, cancel);
                cancel.guard(target).await.map_err(|_| JobError::interrupted())??
            }
        });
    }
    compare(&targets[0], &targets[1], arguments.connections.get(), progress, cancel).await
}

async fn open(
    session: &Session,
    name: &str,
    progress: &Progress,
    retries: &Retries,
    cancel: &CancelToken,
) -> Result<Target, JobError> {
    let image = session.find_image(name).await?;
    image.size.filter(|_| image.status == "active").ok_or_else(|| {
        JobError::Refused(format!(
            "image {} ({}) is {}: only an active image has bytes to compare",
            image.shown(),
            image.id,
            image.status
        ))
    })?;
    Target::glance(Remote::of_image(session, &image, progress, retries.clone(), Patience::default(), cancel)).await
}
