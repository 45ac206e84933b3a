//! What all commands share that talk to a cloud and move no image data: signing in, asking, ending.

use std::{io::IsTerminal, process::ExitCode};

use engine::CancelToken;
use stages::{
    convert::names::images_of_name,
    error::JobError,
    openstack::{Session, config::Surroundings},
    progress::Progress,
    reporter::Notices,
    text::{printable, shell_word},
};

use crate::{
    cli::{CloudArgs, ProgressChoice},
    convert::watch_signals,
    display::Display,
    exit,
    runs::Run,
    sign_in::sign_in,
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
        let session = sign_in("cloud", cloud, &Surroundings::current(), &display, &cancel).await?;
        work(&session, &display, &cancel).await
    };
    let result = cancel.guard(working).await.unwrap_or_else(|_| Err(JobError::interrupted()));
    display.finish().await;
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::failure(&error, error.exit_code()),
    }
}

/// Asks on a terminal; elsewhere `--yes` has to be there. `what` is a whole sentence without its question mark.
///
/// # Errors
/// A usage error where nobody can be asked, [`JobError::Interrupted`] for any answer but yes.
pub async fn confirm(what: &str, yes: bool, cancel: &CancelToken) -> Result<(), JobError> {
    if yes {
        return Ok(());
    }
    match asked(what, cancel).await? {
        Some(true) => Ok(()),
        Some(false) => Err(JobError::Refused("nothing was done: the answer was not yes".to_owned())),
        None => Err(JobError::Usage(format!("{what}: nobody can be asked here, so add --yes"))),
    }
}

/// Asks a question on a terminal: was the answer yes? `None` where nobody can be asked.
///
/// # Errors
/// [`JobError::Interrupted`] instead of an answer.
pub async fn asked(question: &str, cancel: &CancelToken) -> Result<Option<bool>, JobError> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(None);
    }
    exit::ask(&format!("{question}? [y/N] "));
    let mut answer = String::new();
    let mut stdin = tokio::io::BufReader::new(tokio::io::stdin());
    let reading = tokio::io::AsyncBufReadExt::read_line(&mut stdin, &mut answer);
    let _ = cancel.guard(reading).await.map_err(|_| JobError::interrupted())?;
    Ok(Some(matches!(answer.trim(), "y" | "Y" | "yes")))
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

/// `--os-cloud NAME ` where it was given, for a command to paste.
pub fn chosen_cloud(cloud: &CloudArgs) -> String {
    cloud.os_cloud.as_ref().map(|name| format!("--os-cloud {} ", shell_word(name))).unwrap_or_default()
}

/// Is it a disk format that there is?
///
/// # Errors
/// A usage error that lists them.
pub fn check_format(word: &str) -> Result<(), JobError> {
    const FORMATS: [&str; 12] = ["raw", "qcow2", "iso", "vmdk", "vdi", "vhd", "vhdx", "ploop", "gpt", "ami", "ari", "aki"];
    if FORMATS.iter().any(|format| format.eq_ignore_ascii_case(word)) {
        return Ok(());
    }
    Err(JobError::Usage(format!("{} is no disk format; there are: {}", printable(word), FORMATS.join(", "))))
}

/// Without a record of the run, nothing takes back what a kill leaves.
pub fn warn_without_record(run: &Run, display: &Display) {
    if run.id().is_none() {
        display.warn(
            "the state folder cannot be written: no record of this run, and nothing that cleans up after it if it is killed",
        );
    }
}
