//! Exit codes, and the one place that prints an error with its causes.

use std::{error::Error, io::Write, process::ExitCode};

use stages::text::{chain, printable};

use crate::stderr;

/// Prints an error and what caused it, a line each, and gives the exit code.
pub fn failure(error: &dyn Error, code: u8) -> ExitCode {
    let lines: Vec<String> = chain(error).iter().map(|line| printable_lines(line)).collect();
    let text = format!("virta: {}", lines.join("\n  because: "));
    say(&text);
    if lines.iter().any(|line| line.contains("invalid peer certificate")) {
        say(
            "  a cloud with an authority of its own: --os-cacert FILE, or OS_CACERT. --insecure checks nothing: whoever is in between reads the password",
        );
    }
    ExitCode::from(code)
}

/// Wrong usage: exit code 2.
pub fn usage(text: &str) -> ExitCode {
    say(&format!("virta: {text}"));
    ExitCode::from(2)
}

/// A line on stderr. Its reader may be gone, or stand still: that is no reason to stop, or to wait.
pub fn say(text: &str) {
    stderr::write(&format!("{text}\n"));
}

/// A question on stderr, with the answer behind it.
pub fn ask(text: &str) {
    stderr::write(text);
    stderr::drain(stderr::PATIENT);
}

/// A line on stdout; was it taken? The reader may be gone: that is no reason to stop.
pub fn print(text: &str) -> bool {
    stderr::drain(stderr::BRIEFLY); // both may go to one terminal
    writeln!(std::io::stdout(), "{text}").is_ok()
}

/// A line on stdout for whoever reads along; `false` only if it could not be written: a reader who has seen enough is no failure.
pub fn show(text: &str) -> bool {
    stderr::drain(stderr::BRIEFLY);
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) => error.kind() == std::io::ErrorKind::BrokenPipe,
        Ok(()) => true,
    }
}

/// What could not be shown, as an exit code.
pub fn shown(good: bool) -> ExitCode {
    if good {
        return ExitCode::SUCCESS;
    }
    say("virta: stdout could not be written (a full disk?): what is there is not complete");
    ExitCode::from(1)
}

/// Each line without control characters; the line breaks are ours.
fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n    ")
}
