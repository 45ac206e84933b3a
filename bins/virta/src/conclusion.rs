//! The end of a conversion: report, receipt, what was proven, and what to type next.

use std::{path::Path, process::ExitCode};

use stages::{
    convert::{Conversion, Job, Report, to_glance::to_glance},
    error::JobError,
    openstack::Session,
    text::{printable, shell_word, size},
};

use crate::{
    display::Display,
    exit,
    flags::{FormatChoice, OutputArgs},
    receipt,
    report_file::write_report,
};

/// What a run came to.
pub enum Outcome {
    /// A new image.
    Made(Box<Report>),
    /// It was there already.
    AlreadyDone(String),
}

/// A job's source becomes image `name`, unless it is that already.
pub async fn into_glance(job: &Job, session: &Session, name: &str) -> Result<Outcome, JobError> {
    Ok(match to_glance(job, session, name).await? {
        Conversion::Made(report) => Outcome::Made(report),
        Conversion::Earlier(image) => Outcome::AlreadyDone(image.id),
    })
}

/// Prints the report, or the error, and gives the exit code.
pub fn conclude(
    result: Result<Outcome, JobError>,
    display: &Display,
    output: &OutputArgs,
    on_stdout: bool,
    source_is_gone: bool,
) -> ExitCode {
    // where the image itself went to stdout, nothing else may
    let print = |text: &str| {
        if on_stdout {
            return exit::print(text);
        }
        exit::say(text);
        true
    };
    let mut report = match result {
        Ok(Outcome::Made(report)) => report,
        Ok(Outcome::AlreadyDone(id)) => {
            let id = printable(&id);
            exit::say(&format!("already done: image {id} is this source's finished and verified conversion"));
            match output.format {
                FormatChoice::Value => _ = print(&id),
                FormatChoice::Json => {
                    _ = print(&serde_json::json!({ "destination": format!("glance:{id}"), "already_done": true }).to_string());
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
    let receipt = receipt::write(&report, &proven, source_is_gone);
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    match output.format {
        FormatChoice::Table => {
            _ = print(&format!(
                "{}{}",
                summary(&report, &proven),
                what_next(&report, receipt.as_ref().ok().map(std::path::PathBuf::as_path), source_is_gone)
            ))
        }
        FormatChoice::Json => {
            if !print(&json) {
                exit::say("virta: the conversion is done, but its report could not be written to stdout");
                return ExitCode::from(1);
            }
        }
        FormatChoice::Value => {
            if !print(&printable(report.destination.strip_prefix("glance:").unwrap_or(&report.destination))) {
                exit::say(&format!("virta: made {}, but that could not be written to stdout", printable(&report.destination)));
                return ExitCode::from(1);
            }
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
    } else if report.source_read_twice {
        lines.push("proven: read a second time, the source gave the same bytes (Glance has no hash of it)".to_owned());
    } else if from_glance && report.verify == "none" {
        lines.push("not proven: what was read was not compared with the source's hash (--verify none)".to_owned());
    } else if from_glance {
        lines.push("not proven: Glance has no hash of the source, so what was read could not be checked against one".to_owned());
    }
    let to_glance = report.destination.starts_with("glance:");
    if report.read_back {
        let what = if to_glance { "what Glance serves of the new image" } else { "the file, read back," };
        lines.push(format!("proven: {what} decodes to the {} bytes that were read of the source", report.virtual_bytes));
    } else if !to_glance && report.destination != "-" && report.source == "-" {
        lines.push(
            "not proven: the file, read back; what came through a pipe is gone, so only --verify readback could do it".to_owned(),
        );
    } else if !to_glance && report.destination != "-" {
        lines.push(format!(
            "not proven: the file, read back; to prove it: virta verify {} {}",
            shell_word(&printable(&report.source)),
            shell_word(&printable(&report.destination))
        ));
    }
    if report.image_hash.checked {
        let algorithm = report.image_hash.algorithm.as_deref().unwrap_or_default();
        lines.push(format!("proven: size and {algorithm} of the new image in Glance are those of what was sent"));
    } else if to_glance {
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
            "fetched {}{}, sent {}; scratch disk {}, memory at most {}",
            size(report.fetched_bytes),
            if report.reread_bytes > 0 { format!(" ({} of it a second time)", size(report.reread_bytes)) } else { String::new() },
            size(report.uploaded_bytes),
            if report.scratch_peak_bytes > 0 { size(report.scratch_peak_bytes) } else { "0".to_owned() },
            size(report.rss_peak_bytes)
        ));
    }
    lines.extend(proven.iter().cloned());
    lines.join("\n")
}

/// What is left to do, and where the receipt is; each line after a line break.
pub fn what_next(report: &Report, receipt: Option<&Path>, source_is_gone: bool) -> String {
    let mut text = String::new();
    if source_is_gone {
        text.push_str("\nthe raw image is deleted");
    } else if let Some(id) = report.source.strip_prefix("glance:")
        && !report.destination.starts_with("glance:")
    {
        text.push_str(&format!(
            "\nthe raw image ({id}) is still in Glance; keep it until this file is where it shall be, and boots"
        ));
    } else if let Some(id) = report.source.strip_prefix("glance:") {
        text.push_str(&format!("\nthe raw image is still there; when you have booted from the new one: virta image delete {id}"));
    }
    if let Some(path) = receipt {
        text.push_str(&format!("\nreceipt: {}", path.display()));
    }
    text
}
