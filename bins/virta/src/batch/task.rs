//! One image, handed over by an engine through the environment; exit codes and error text that the engine can act on.

use std::process::ExitCode;

use stages::{
    batch::{Outcome, Request, Summary, list, outcome::task_exit_code},
    error::{FailureKind, JobError},
    text::{chain, printable},
};

use crate::{exit, flags::FormatChoice};

/// HyperQueue shows so much of an error (`HQ_ERROR_FILENAME`).
const ERROR_BYTES_MAX: usize = 2048;

/// The request that the environment names.
pub fn request(from: Option<&str>) -> Result<Request, JobError> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let usage = |text: String| JobError::Usage(text);
    if let Some(entry) = set("HQ_ENTRY") {
        return list::parse_one(&entry).map_err(|error| usage(format!("HQ_ENTRY, {error}")));
    }
    let number = |name: &str, value: &str, first: usize| {
        let number = value.trim().parse::<usize>().ok().and_then(|number| number.checked_sub(first));
        number.ok_or_else(|| usage(format!("{name} is {}, where a number from {first} on was expected", printable(value))))
    };
    let (name, at) = if let Some(value) = set("SLURM_ARRAY_TASK_ID") {
        ("SLURM_ARRAY_TASK_ID", number("SLURM_ARRAY_TASK_ID", &value, 1)?)
    } else if let Some(value) = set("JOB_COMPLETION_INDEX") {
        ("JOB_COMPLETION_INDEX", number("JOB_COMPLETION_INDEX", &value, 0)?)
    } else {
        return Err(usage(
            "--task-from-env is for tasks of an engine: none of HQ_ENTRY, SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX is set"
                .to_owned(),
        ));
    };
    let Some(from) = from else {
        return Err(usage(format!("{name} is the number of an image in a list: give the list with --from FILE")));
    };
    let listed = list::parse(&super::read_list(from)?).map_err(|error| usage(format!("--from {}, {error}", printable(from))))?;
    let images = listed.len();
    listed
        .into_iter()
        .nth(at)
        .ok_or_else(|| usage(format!("{name} asks for an image beyond the {images} of {}", printable(from))))
}

/// What the engine shows of a failure.
fn write_error(text: &str) {
    let Some(path) = std::env::var_os("HQ_ERROR_FILENAME").filter(|path| !path.is_empty()) else { return };
    let mut end = text.len().min(ERROR_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    if let Err(error) = std::fs::write(&path, &text[..end]) {
        exit::say(&format!("virta: HQ_ERROR_FILENAME could not be written: {error}"));
    }
}

/// A task that ended before its image was looked at.
pub fn failed(error: &JobError) -> ExitCode {
    let code = match error.failure_kind() {
        FailureKind::Interrupted => 130,
        _ if error.exit_code() == 2 => 64,
        // a password that is wrong is wrong the next time, too, and locks the account
        FailureKind::Permanent | FailureKind::Credentials => 65,
        _ => 75,
    };
    write_error(&chain(error).iter().map(|line| printable(line)).collect::<Vec<_>>().join(": "));
    exit::failure(error, code)
}

/// A task that ran.
pub fn conclude(summary: &Summary, format: FormatChoice) -> ExitCode {
    let Some(line) = summary.items.first() else {
        return failed(&JobError::bug("a task without an image"));
    };
    let text = match &line.outcome {
        Outcome::Done { report } => format!("made {}", printable(&report.destination)),
        Outcome::Earlier { image } => format!("already done: image {}", printable(image)),
        other => format!("{}: {}", other.word(), printable(other.why().unwrap_or_default())),
    };
    let image = match &line.outcome {
        Outcome::Done { report } => report.destination.strip_prefix("glance:").unwrap_or(&report.destination),
        Outcome::Earlier { image } => image,
        _ => "",
    };
    match format {
        FormatChoice::Json => _ = exit::print(&serde_json::to_string_pretty(line).unwrap_or_default()),
        FormatChoice::Value if !image.is_empty() => _ = exit::print(&printable(image)),
        FormatChoice::Table if line.outcome.is_good() => _ = exit::print(&text),
        FormatChoice::Value | FormatChoice::Table => {}
    }
    if line.outcome.is_good() {
        return ExitCode::SUCCESS;
    }
    let text = format!("{}: {text}", printable(line.name.as_deref().unwrap_or(&line.word)));
    write_error(&text);
    exit::say(&format!("virta: {text}"));
    ExitCode::from(if summary.interrupted { 130 } else { task_exit_code(&line.outcome) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_contract() {
        assert_eq!(task_exit_code(&Outcome::Skipped { reason: String::new() }), 0);
        assert_eq!(task_exit_code(&Outcome::Held { error: String::new() }), 75);
        let failed = |transient, exit_code| Outcome::Failed { error: String::new(), tries: 1, transient, exit_code };
        assert_eq!(task_exit_code(&failed(true, 1)), 75);
        assert_eq!(task_exit_code(&failed(false, 3)), 65);
        assert_eq!(task_exit_code(&failed(false, 2)), 64);
    }
}
