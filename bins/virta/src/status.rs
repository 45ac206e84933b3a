//! `virta status` and `virta clean`.

use std::{
    io::{BufRead, BufReader, Seek, SeekFrom},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use stages::text::printable;

use crate::{
    exit,
    flags::FormatChoice,
    runs::{self, Record, RecordedRun, State},
};

#[derive(Args)]
pub struct StatusArgs {
    /// A run's id, or its beginning
    pub id: Option<String>,
    /// Show what it shows, until it is over, and exit as it does. Without an id: the latest one that runs, else the latest
    #[arg(long)]
    pub follow: bool,
    /// What is printed on stdout; value is the runs' ids alone
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: FormatChoice,
}

/// Lines of a run's log that are shown when it is looked at.
const TAIL_LINES: usize = 20;

/// Runs that are listed.
const LISTED_MAX: usize = 20;

/// How often a followed run is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);

fn word(record: &Record) -> &'static str {
    match record.state {
        State::Failed if record.exit_code == Some(130) => "stopped",
        State::Running => "running",
        State::Done => "done",
        State::Failed => "failed",
        State::Killed => "killed",
    }
}

/// `virta status`.
pub async fn status(arguments: StatusArgs) -> ExitCode {
    let mut found = runs::all();
    if let Some(id) = &arguments.id {
        found.retain(|found| found.record.run.starts_with(id.as_str()));
        if found.len() != 1 {
            let what = if found.is_empty() { "no run" } else { "more than one run" };
            return exit::usage(&format!("there is {what} whose id begins with {}: `virta status` lists them", printable(id)));
        }
    } else if arguments.follow {
        // the run that somebody who comes back looks for
        let live = found.iter().rposition(|found| found.record.state == State::Running);
        let latest = live.or(found.len().checked_sub(1));
        let Some(latest) = latest else { return exit::usage("there is no run to follow") };
        found = vec![found.swap_remove(latest)];
    }
    if arguments.follow || (arguments.id.is_some() && arguments.format == FormatChoice::Table) {
        return match found.pop() {
            Some(found) => show(&found, arguments.follow).await,
            None => ExitCode::SUCCESS,
        };
    }
    match arguments.format {
        FormatChoice::Json => {
            let records: Vec<_> = found.iter().map(|found| &found.record).collect();
            _ = exit::print(&serde_json::to_string_pretty(&records).unwrap_or_default());
        }
        FormatChoice::Value => found.iter().for_each(|found| _ = exit::print(&found.record.run)),
        FormatChoice::Table if found.is_empty() => exit::say("no run yet on this machine"),
        FormatChoice::Table => {
            _ = exit::print(&format!("{:<9} {:<8} {:<21} what", "run", "state", "started (UTC)"));
            // the latest first: that is the one that somebody looks for
            for found in found.iter().rev().take(LISTED_MAX) {
                let record = &found.record;
                let what = format!("{} -> {}", printable(&record.source), printable(&record.destination));
                _ = exit::print(&format!("{:<9} {:<8} {:<21} {what}", runs::short(&record.run), word(record), record.started_at));
            }
        }
    }
    let older = found.len().saturating_sub(LISTED_MAX);
    if older > 0 && arguments.format == FormatChoice::Table {
        exit::say(&format!("and {older} older ones: virta status -f json"));
    }
    ExitCode::SUCCESS
}

/// A run's record and the end of its log; followed until it is over.
async fn show(found: &RecordedRun, follow: bool) -> ExitCode {
    let record = &found.record;
    _ = exit::print(&format!(
        "run {}, {}, process {}, started {}\n{} -> {}",
        record.run,
        word(record),
        record.pid,
        record.started_at,
        printable(&record.source),
        printable(&record.destination)
    ));
    if let Some(held) = &record.server {
        _ = exit::print(&format!("holds server {} ({}), which it found {}", printable(&held.name), held.id, held.status));
    }
    if !record.images.is_empty() {
        _ = exit::print(&format!("images made: {}", record.images.join(" ")));
    }
    let mut log = std::fs::File::open(found.log_path()).ok().map(BufReader::new);
    let mut lines: Vec<String> = Vec::new();
    if let Some(log) = &mut log {
        lines.extend(log.lines().map_while(Result::ok));
    }
    lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)).for_each(|line| _ = exit::print(&printable(line)));
    let mut state = record.state;
    let mut last = found.again();
    while follow && state == State::Running {
        tokio::time::sleep(LOOK_EVERY).await;
        // looked at before the log is read: its last lines are written before its end is
        last = found.again();
        state = last.as_ref().map_or(State::Killed, |found| found.record.state);
        if let Some(log) = &mut log {
            let mut line = String::new();
            while let Ok(1..) = log.read_line(&mut line) {
                if !line.ends_with('\n') {
                    // half a line: read it again when it is whole
                    let back = i64::try_from(line.len()).unwrap_or(0);
                    let _ = log.seek(SeekFrom::Current(-back));
                    break;
                }
                if !exit::print(&printable(line.trim_end())) {
                    return ExitCode::SUCCESS; // nobody looks any more
                }
                line.clear();
            }
        }
    }
    let code = last.as_ref().and_then(|found| found.record.exit_code);
    match (state, code) {
        (State::Running, _) => ExitCode::SUCCESS,
        (_, Some(code)) if follow => ExitCode::from(code),
        (State::Killed, _) => {
            let cleaned = last.as_ref().is_some_and(|found| found.record.cleaned);
            exit::say(if cleaned {
                "this run was killed; what it left is cleaned"
            } else {
                "this run was killed; virta clean removes what it left"
            });
            ExitCode::from(u8::from(follow))
        }
        _ => ExitCode::SUCCESS,
    }
}
