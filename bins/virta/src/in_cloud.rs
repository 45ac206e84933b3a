//! A command that signs in, asks the cloud, and moves no image data.

use std::process::ExitCode;

use engine::CancelToken;
use stages::{
    convert::names::images_of_name,
    error::JobError,
    openstack::{Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    text::printable,
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, ProgressChoice},
    runs::Run,
    sign_in::sign_in,
    signals::watch_signals,
};

/// Signs in and does the work; an interrupt ends it between two requests.
pub async fn in_cloud(
    cloud: &CloudArgs,
    work: impl AsyncFnOnce(&Session, &Display, &CancelToken) -> Result<(), JobError>,
) -> ExitCode {
    let display = Display::start(ProgressChoice::Auto, &Progress::default(), Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let working = async {
        let session = sign_in("cloud", cloud, &Environment::current(), &display, &cancel).await?;
        work(&session, &display, &cancel).await
    };
    let result = cancel.guard(working).await.unwrap_or_else(|_| Err(JobError::interrupted()));
    display.finish().await;
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::failure(&error, error.exit_code()),
    }
}

/// Is there an image of this name in the project already? Two of one name are not made by accident.
pub async fn check_free(session: &Session, name: &str, force: bool) -> Result<(), JobError> {
    let taken = images_of_name(session, name).await?;
    if force || taken.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = taken.iter().map(|image| format!("  {}", image.line())).collect();
    Err(JobError::Usage(format!(
        "there is an image called {} already; choose another name, or make a second one with --force:\n{}",
        printable(name),
        lines.join("\n")
    )))
}

/// Without a record of the run, nothing takes back what a kill leaves.
pub fn warn_without_record(run: &Run, display: &Display) {
    if run.id().is_none() {
        display.warn(
            "the state folder cannot be written: no record of this run, and nothing that cleans up after it if it is killed",
        );
    }
}
