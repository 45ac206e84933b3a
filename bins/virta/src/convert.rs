//! `virta convert`.

use std::{path::Path, process::ExitCode};

use engine::{CancelToken, Cause};
use stages::{
    convert::{self, JobError, Options, Report},
    progress::Progress,
    text::{printable, size},
};

use crate::{
    cli::{ConvertArgs, FormatChoice, OutputArgs, Tuning},
    display::Display,
    exit,
};

/// Where an image is.
enum End {
    Path(String),
}

impl End {
    fn parse(text: &str) -> Self {
        Self::Path(text.to_owned())
    }
}

/// The options that the flags say.
pub fn options(tuning: &Tuning) -> Options {
    let mut options = Options {
        cluster_bits: tuning.cluster_size,
        connections: tuning.connections,
        io: tuning.io.into(),
        sync: !tuning.no_sync,
        ..Options::default()
    };
    if let Some(workers) = tuning.workers {
        options.workers = workers;
    }
    if let Some(memory) = tuning.memory {
        options.memory_bytes = memory;
    }
    options
}

/// Cancels on SIGINT and SIGTERM; a second one ends the process at once. A terminal that goes away (SIGHUP) stops
/// nothing.
pub fn watch_signals(cancel: &CancelToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return;
    };
    let cancel = cancel.clone();
    tokio::spawn(async move {
        let mut asked = false;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => continue,
            }
            if asked {
                exit::say("virta: stopped at once; what was begun may be left behind");
                std::process::exit(130);
            }
            asked = true;
            cancel.cancel(Cause::Requested("interrupted: cleaned up, nothing half-made is left".to_owned()));
        }
    });
}

/// Runs the command.
pub async fn run(arguments: ConvertArgs) -> ExitCode {
    let options = Options { force: arguments.force, properties: arguments.property, ..options(&arguments.tuning) };
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress);
    let cancel = CancelToken::new();
    watch_signals(&cancel);
    let result = match (End::parse(&arguments.source), End::parse(&arguments.destination)) {
        (End::Path(source), End::Path(destination)) => {
            convert::to_file::local_to_file(Path::new(&source), Path::new(&destination), &options, &progress, &display, &cancel)
                .await
        }
    };
    display.finish().await;
    conclude(result, &display, &arguments.output)
}

/// Prints the report, or the error, and gives the exit code.
pub fn conclude(result: Result<Report, JobError>, display: &Display, output: &OutputArgs) -> ExitCode {
    let mut report = match result {
        Ok(report) => report,
        Err(error) => return exit::failure(&error, error.exit_code()),
    };
    report.warnings.extend(display.warnings());
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    match output.format {
        FormatChoice::Table => exit::print(&summary(&report)),
        FormatChoice::Json => exit::print(&json),
        FormatChoice::Value => exit::print(report.destination.strip_prefix("glance:").unwrap_or(&report.destination)),
    }
    if let Some(path) = &output.report
        && let Err(error) = std::fs::write(path, json + "\n")
    {
        exit::say(&format!("virta: the conversion is done, but its report could not be written to {}: {error}", path.display()));
        return ExitCode::from(1);
    }
    ExitCode::SUCCESS
}

/// The last lines on the screen.
pub fn summary(report: &Report) -> String {
    let mut lines = vec![format!(
        "{}: {} of {} virtual, {} of it data, in {:.1} s",
        printable(&report.destination),
        size(report.image_bytes),
        size(report.virtual_bytes),
        size(report.data_bytes),
        report.elapsed_s
    )];
    if report.fetched_bytes > 0 {
        lines.push(format!(
            "fetched {}, uploaded {}, memory {}",
            size(report.fetched_bytes),
            size(report.uploaded_bytes),
            size(report.rss_peak_bytes)
        ));
    }
    lines.join("\n")
}
