//! Questions before something is deleted or stopped.

use std::io::IsTerminal;

use engine::CancelToken;
use stages::error::JobError;

use crate::exit;

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
