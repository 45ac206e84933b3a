//! `virta status` and `virta clean`.

use std::{
    io::{BufRead, BufReader, Seek, SeekFrom},
    process::ExitCode,
    time::Duration,
};

use engine::CancelToken;
use stages::{
    batch::{Listing, plan::finish_replacements},
    error::JobError,
    openstack::{Compute, Image, Session, config::Surroundings, image::RUN},
    ownership::leftover::{Leftover, leftovers},
    reporter::Notices,
    run::run_of,
    text::{causes, counted, printable},
};

use crate::{
    cli::{CleanArgs, CloudArgs, FormatChoice, ProgressChoice, StatusArgs},
    convert::{interruptible, watch_signals},
    display::Display,
    exit,
    runs::{self, Found, Record, State},
    sign_in::sign_in,
    snapshot::restore_server,
};

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

fn short(run: &str) -> &str {
    run.get(..8).unwrap_or(run)
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
                _ = exit::print(&format!("{:<9} {:<8} {:<21} {what}", short(&record.run), word(record), record.started_at));
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
async fn show(found: &Found, follow: bool) -> ExitCode {
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

/// `virta clean`.
pub async fn clean(arguments: CleanArgs) -> ExitCode {
    let display = Display::start(ProgressChoice::Plain, &stages::progress::Progress::default(), runs::Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let mut dead = runs::dead();
    let surroundings = Surroundings::current();
    // the cloud that is chosen, and those that dead runs worked in
    let chosen = arguments.cloud.os_cloud.is_some() || surroundings.names_a_cloud();
    if dead.is_empty() && !chosen {
        _ = exit::print(
            "nothing to clean: no killed run of this machine has left an image or a server, and no cloud is chosen to look into (--os-cloud)",
        );
        return ExitCode::SUCCESS;
    }
    let mut code = ExitCode::SUCCESS;
    let mut seen = Vec::new();
    loop {
        let first = dead.first().map(|found| (found.record.cloud.clone(), found.record.project.clone()));
        if first.is_none() && (!chosen || !seen.is_empty()) {
            break;
        }
        let (cloud, project) = first.unwrap_or_default();
        let (here, elsewhere): (Vec<Found>, Vec<Found>) =
            dead.into_iter().partition(|found| found.record.cloud == cloud && found.record.project == project);
        dead = elsewhere;
        let flagged = arguments.cloud.os_cloud.clone().or_else(|| cloud.clone().filter(|name| name != "envvars"));
        let flags = CloudArgs { os_cloud: flagged, ..arguments.cloud.clone() };
        let result = async {
            let session = sign_in("cloud", &flags, &surroundings, &display, &cancel).await?;
            if project.is_some() && session.whoami().project_id != project {
                return Err(JobError::Refused(format!(
                    "this is another project than that of the killed runs ({}): choose their cloud with --os-cloud",
                    project.clone().unwrap_or_default()
                )));
            }
            // what is held is brought back first: a server that stands still costs more than an image does
            for found in &here {
                if let Some(held) = &found.record.server {
                    let compute = Compute::connect(&session).await?;
                    restore_server(&session, &compute, held, found, &display).await?;
                }
            }
            let looking = async { Ok(Listing::of_project(&session).await?.images) };
            let images = interruptible(&cancel, looking).await?;
            interruptible(&cancel, remove_leftovers(&session, &images, &here, true, &display)).await
        };
        match result.await {
            Ok(left) => seen.push(left),
            Err(error) => {
                seen.push(0);
                code = exit::failure(&error, error.exit_code());
            }
        }
    }
    if code == ExitCode::SUCCESS {
        _ = exit::print(&match seen.iter().sum::<usize>() {
            0 => "clean: no unfinished image is left".to_owned(),
            left => format!("{} left, which only you can judge", counted(left, "unfinished image")),
        });
    }
    code
}

/// Dead runs of this machine in this session's project: what they left is removed before a new one begins.
pub async fn clean_up_before(session: &Session, display: &Display, cancel: &CancelToken) -> Result<(), JobError> {
    let mut dead = runs::dead();
    dead.retain(|found| found.record.project.is_some() && found.record.project == session.whoami().project_id);
    // a server is brought back only by who asks for that
    for held in dead.iter().filter_map(|found| found.record.server.as_ref()) {
        display.warn(&format!(
            "a killed run had found server {} {}, and nobody has looked since: virta clean brings it back",
            printable(&held.name),
            printable(&held.status)
        ));
    }
    dead.retain(|found| found.record.server.is_none());
    if dead.is_empty() {
        return Ok(());
    }
    let cleaning = async {
        let ids: Vec<&str> = dead.iter().flat_map(|found| found.record.unfinished()).map(String::as_str).collect();
        let images = session.images_of_ids(&ids).await?;
        remove_leftovers(session, &images, &dead, false, display).await
    };
    // it is no reason not to begin
    match interruptible(cancel, cleaning).await {
        Err(error @ JobError::Interrupted(_)) => Err(error),
        Err(error) => {
            display.warn(&format!("what killed runs left could not be looked at: {}", causes(&error)));
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Deletes the unfinished ones of `images` that may go, and tells of the others where `tells`. Returns how many are left.
async fn remove_leftovers(
    session: &Session,
    images: &[Image],
    dead: &[Found],
    tells: bool,
    notices: &dyn Notices,
) -> Result<usize, JobError> {
    let project = session.whoami().project_id.as_deref();
    let found = leftovers(images, project, session.now(), &|run| runs::died_here(run_of(run)));
    let (mut left, mut stuck) = (0, Vec::new());
    for (image, leftover) in found {
        let (id, name) = (image.shown_id(), image.shown());
        let run = printable(image.property(RUN).map_or("unknown", run_of));
        if leftover.may_go() {
            match session.delete_image(&image.id).await {
                Ok(()) => notices.note(&format!("removed image {name} ({id}, {}) of run {}", image.status, short(&run))),
                Err(error) => {
                    left += 1;
                    stuck.push(image.id.as_str());
                    notices.warn(&format!("image {id} of run {} could not be removed: {}", short(&run), causes(&error)));
                }
            }
            continue;
        }
        left += 1;
        if tells {
            let since = image.property("updated_at").unwrap_or("?");
            let claim = match leftover {
                Leftover::Claimed(until) => format!("its run may be making it until {until}"),
                _ => "no run claims it any more".to_owned(),
            };
            notices.note(&format!(
                "image {name} ({id}) is {} and unfinished since {}, of run {}: {claim}. If no run is making it: virta image delete {id}",
                image.status,
                printable(since),
                short(&run)
            ));
        }
    }
    if tells {
        // as an earlier release may have left them
        finish_replacements(session, images).await?;
    }
    let is_clean = |found: &&Found| !found.record.unfinished().iter().any(|id| stuck.contains(&id.as_str()));
    for found in dead.iter().filter(|found| found.record.server.is_none()).filter(is_clean) {
        if let Err(error) = found.cleaned() {
            notices.warn(&format!("the record of run {} could not be written: {error}", short(&found.record.run)));
        }
    }
    Ok(left)
}
