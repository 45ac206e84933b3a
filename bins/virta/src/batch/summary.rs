//! The end of a batch: what became of it, for people and programs, and the command for what is left.

use std::{path::PathBuf, process::ExitCode};

use stages::{
    batch::{Outcome, Request, Summary, outcome::Line},
    text::{counted, printable, shell_word, size, time},
    whole_file::write_whole,
};

use super::BatchArgs;
use crate::{
    exit,
    flags::{FormatChoice, chosen_cloud},
    report_file::write_report,
};

/// Failed images that a command to retry them names; more go into a file.
const RETRY_IDS_MAX: usize = 12;
/// Lines of what is not done that are shown.
const LEFT_SHOWN_MAX: usize = 40;
/// Images that were not tried are named up to so many.
const NOT_TRIED_SHOWN_MAX: usize = 10;

/// The last lines, the report, and the exit code.
pub(super) fn conclude(arguments: &BatchArgs, summary: &Summary, journal: Option<PathBuf>) -> ExitCode {
    let json = serde_json::to_string_pretty(summary).unwrap_or_default();
    let mut code = summary.exit_code();
    let written = match arguments.output.format {
        FormatChoice::Table => exit::print(&told(arguments, summary, journal)),
        FormatChoice::Json => exit::print(&json),
        FormatChoice::Value => summary.items.iter().fold(true, |good, line| match &line.outcome {
            Outcome::Done { report } => {
                good & exit::print(&printable(report.destination.strip_prefix("glance:").unwrap_or(&report.destination)))
            }
            Outcome::Earlier { image } => good & exit::print(&printable(image)),
            _ => good,
        }),
    };
    if !written {
        exit::say("virta: the batch is over, but stdout could not be written");
        code = code.max(1);
    }
    if let Some(path) = &arguments.output.report
        && let Err(error) = write_report(path, &json)
    {
        exit::say(&format!("virta: the batch is over, but its report could not be written to {}: {error}", path.display()));
        code = code.max(1);
    }
    ExitCode::from(code)
}

fn told(arguments: &BatchArgs, summary: &Summary, journal: Option<PathBuf>) -> String {
    let count = |wanted: fn(&Outcome) -> bool| summary.count(wanted);
    let done = count(|outcome| matches!(outcome, Outcome::Done { .. }));
    let mut parts = vec![format!("{done} converted")];
    for (number, word) in [
        (count(|outcome| matches!(outcome, Outcome::Earlier { .. })), "done before"),
        (count(|outcome| matches!(outcome, Outcome::Skipped { .. })), "skipped"),
        (count(|outcome| matches!(outcome, Outcome::Failed { .. })), "failed"),
        (count(|outcome| matches!(outcome, Outcome::Held { .. })), "held by other runs"),
        (count(|outcome| matches!(outcome, Outcome::Interrupted { .. })), "interrupted"),
        (count(|outcome| matches!(outcome, Outcome::NotTried { .. })), "not tried"),
    ] {
        if number > 0 {
            parts.push(format!("{number} {word}"));
        }
    }
    let mut lines = vec![format!("{} in {}", parts.join(", "), time(summary.elapsed_s))];
    if done > 0 {
        let saved = summary.converted_bytes.saturating_sub(summary.made_bytes);
        let millis = float_seconds(summary.elapsed_s * 1000.0).max(1);
        lines.push(format!(
            "{} became {}: {} saved; fetched {}, sent {}, {}/s of disk; memory at most {}",
            size(summary.converted_bytes),
            size(summary.made_bytes),
            size(saved),
            size(summary.fetched_bytes),
            size(summary.uploaded_bytes),
            size(summary.converted_bytes.saturating_mul(1000) / millis),
            size(summary.rss_peak_bytes)
        ));
    }
    if count(|outcome| matches!(outcome, Outcome::Earlier { .. })) > 0 {
        lines.push(
            "what was done before stays as it is, whatever flags it was made with; virta convert --force makes a second one"
                .to_owned(),
        );
    }
    let deleted = summary.items.iter().filter(|line| line.source_deleted).count();
    if deleted > 0 {
        lines.push(format!("{} gone, each deleted after its new image was verified", counted(deleted, "source")));
    }
    if let Some(why) = &summary.stopped {
        lines.push(format!("stopped before the end: {why}"));
    }
    for line in summary.items.iter().filter(|line| matches!(line.outcome, Outcome::Skipped { .. })) {
        lines.push(format!("skipped {}: {}", named(line), line.outcome.why().unwrap_or_default()));
    }
    let left: Vec<_> = summary.left().collect();
    if !left.is_empty() {
        lines.push(String::new());
        // whose turn never came are told as one, where they are many
        let not_tried = |line: &&&Line| matches!(line.outcome, Outcome::NotTried { .. });
        let waiting = left.iter().filter(not_tried).count();
        let as_one = waiting > NOT_TRIED_SHOWN_MAX;
        let shown: Vec<_> = left.iter().filter(|line| !as_one || !not_tried(line)).collect();
        let width = shown.iter().map(|line| named(line).chars().count()).max().unwrap_or(0).min(40);
        for line in shown.iter().take(LEFT_SHOWN_MAX) {
            let why = printable(line.outcome.why().unwrap_or_default());
            lines.push(format!("{:<11} {:<width$}  {why}", line.outcome.word(), named(line)));
        }
        if shown.len() > LEFT_SHOWN_MAX {
            lines.push(format!("and {} more: -f json, or --report FILE, has all of them", shown.len() - LEFT_SHOWN_MAX));
        }
        if let Some(first) = left.iter().find(not_tried).filter(|_| as_one) {
            let why = printable(first.outcome.why().unwrap_or_default());
            lines.push(format!("{:<11} {}: {why}", first.outcome.word(), counted(waiting, "image")));
        }
        lines.push(String::new());
        lines.push(match retry_command(arguments, &left, journal.as_deref()) {
            Ok(command) => format!("just these again: {command}"),
            Err(error) => format!("the same command goes on (the list of just these could not be written: {error})"),
        });
    }
    lines.join("\n")
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a wall time, shown to people
fn float_seconds(seconds: f64) -> u64 {
    seconds.max(0.0).round() as u64
}

fn named(line: &Line) -> String {
    let name = line.name.as_deref().filter(|name| !name.is_empty());
    match (name, &line.id) {
        (Some(name), Some(id)) => printable(&format!("{name} ({id})")),
        (None, Some(id)) => printable(id),
        _ => printable(&line.word),
    }
}

/// Flags of this command as they were typed, with their values, but for those in `without`. Words behind `--` are no flags.
pub(super) fn typed_flags(without: &[&str]) -> Vec<String> {
    let batch = <BatchArgs as clap::Args>::augment_args(clap::Command::new("batch"));
    let mut flags = Vec::new();
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let mut typed = words.skip_while(|word| word != "batch").skip(1).take_while(|word| word != "--");
    while let Some(word) = typed.next() {
        let (flag, with_value) = word.split_once('=').map_or((word.as_str(), false), |(flag, _)| (flag, true));
        let short = word.strip_prefix('-').filter(|_| !word.starts_with("--")).and_then(|rest| rest.chars().next());
        let known = batch.get_arguments().find(|argument| {
            let long = argument.get_long().is_some_and(|long| flag.strip_prefix("--") == Some(long));
            long || (short.is_some() && argument.get_short() == short)
        });
        let Some(known) = known else { continue };
        // -j4 and --jobs=4 have their value with them
        let joined = with_value || (!flag.starts_with("--") && flag.len() > 2);
        let value = if known.get_action().takes_values() && !joined { typed.next() } else { None };
        let name = known.get_long().map(|long| format!("--{long}"));
        if !name.is_some_and(|name| without.contains(&name.as_str())) {
            flags.push(word);
            flags.extend(value);
        }
    }
    flags
}

/// The command that tries just these again. Many, and those with flags of their own, go into a file beside the journal.
fn retry_command(arguments: &BatchArgs, left: &[&Line], journal: Option<&std::path::Path>) -> std::io::Result<String> {
    let selecting = ["--from", "--all-snapshots", "--all-users", "--larger-than", "--older-than", "--name", "--instance"];
    let kept: Vec<String> = typed_flags(&selecting).iter().map(|word| shell_word(word)).collect();
    let dashed = |line: &&Line| line.id.is_none() && line.word.starts_with('-');
    let plain = arguments.from.is_none() && left.len() <= RETRY_IDS_MAX && !left.iter().any(dashed);
    let which = if plain {
        left.iter().map(|line| shell_word(&printable(line.id.as_deref().unwrap_or(&line.word)))).collect::<Vec<_>>().join(" ")
    } else {
        let Some(journal) = journal else { return Err(std::io::Error::other("there is no journal to put it beside")) };
        let mut path = journal.as_os_str().to_owned();
        path.push(".retry");
        let path = PathBuf::from(path);
        // with the flags that each had
        let lines = left.iter().map(|line| {
            let image = line.id.clone().unwrap_or_else(|| line.word.clone());
            let name = line.request.name.clone().or_else(|| line.new_name.clone());
            serde_json::to_string(&Request { image, name, ..line.request.clone() }).unwrap_or_default() + "\n"
        });
        write_whole(&path, lines.collect::<String>().as_bytes(), false)?;
        format!("--from {}", shell_word(&path.display().to_string()))
    };
    let flags: String = kept.iter().map(|word| format!("{word} ")).collect();
    let cloud =
        if kept.iter().any(|word| word.starts_with("--os-cloud")) { String::new() } else { chosen_cloud(&arguments.cloud) };
    Ok(format!("virta batch {cloud}{flags}{which}"))
}
