//! `virta status` and `virta clean`.

use std::{
    io::{BufRead, BufReader, Seek, SeekFrom},
    process::ExitCode,
    time::Duration,
};

use engine::CancelToken;
use stages::{
    convert::{JobError, Notices},
    openstack::{
        Compute, Image, Session,
        config::Surroundings,
        image::{BENCH, RUN, SOURCE_ID, VERIFIED},
    },
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
    if dead.is_empty() {
        _ = exit::print("nothing to clean: no killed run of this machine has left an image or a server");
        return ExitCode::SUCCESS;
    }
    let mut code = ExitCode::SUCCESS;
    let looked_at = counted(dead.len(), "run");
    while let Some(first) = dead.first() {
        let (cloud, project) = (first.record.cloud.clone(), first.record.project.clone());
        let (here, elsewhere): (Vec<Found>, Vec<Found>) =
            dead.into_iter().partition(|found| found.record.cloud == cloud && found.record.project == project);
        dead = elsewhere;
        let chosen = arguments.cloud.os_cloud.clone().or_else(|| cloud.clone().filter(|name| name != "envvars"));
        let flags = CloudArgs { os_cloud: chosen, ..arguments.cloud.clone() };
        let result = async {
            let session = sign_in("cloud", &flags, &Surroundings::current(), &display, &cancel).await?;
            if project.is_some() && session.whoami().project_id != project {
                return Err(JobError::Refused(format!(
                    "this is another project than that of the killed runs ({}): choose their cloud with --os-cloud",
                    project.unwrap_or_default()
                )));
            }
            // what is held is brought back first: a server that stands still costs somebody more than an image does
            for found in &here {
                if let Some(held) = &found.record.server {
                    let compute = Compute::connect(&session).await?;
                    restore_server(&session, &compute, held, found, &display).await?;
                }
            }
            interruptible(&cancel, remove_leftovers(&session, &here, &display)).await
        };
        if let Err(error) = result.await {
            code = exit::failure(&error, error.exit_code());
        }
    }
    if code == ExitCode::SUCCESS {
        _ = exit::print(&format!("looked after what {looked_at} of this machine may have left"));
    }
    code
}

/// Dead runs of this machine in this session's project: what they left is removed before a new one begins.
pub async fn clean_up_before(session: &Session, display: &Display, cancel: &CancelToken) -> Result<(), JobError> {
    let mut dead = runs::dead();
    dead.retain(|found| found.record.project.is_some() && found.record.project == session.whoami().project_id);
    // a server is brought back only by whoever asks for that
    for held in dead.iter().filter_map(|found| found.record.server.as_ref()) {
        display.warn(&format!(
            "a killed run had found server {} {}, and nobody has looked since: virta clean brings it back",
            printable(&held.name),
            printable(&held.status)
        ));
    }
    dead.retain(|found| found.record.server.is_none());
    // it is no reason not to begin
    match interruptible(cancel, remove_leftovers(session, &dead, display)).await {
        Err(error @ JobError::Interrupted(_)) => Err(error),
        Err(error) => {
            display.warn(&format!("what killed runs left could not be looked at: {}", causes(&error)));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Only what carries the dead run's name and is `queued` or `saving`, or the noise of a bench, is removed, and what a run that came to its end
/// could not delete: any other image that is active may be wanted.
async fn remove_leftovers(session: &Session, dead: &[Found], notices: &dyn Notices) -> Result<(), JobError> {
    for found in dead {
        let mut all_gone = true;
        let finished = found.record.state == State::Done;
        for id in found.record.to_remove() {
            let Some(image) = session.image_if_there(id).await? else { continue };
            let ours = image.property(RUN) == Some(found.record.run.as_str());
            if ours && is_of_no_use(session, &image, finished).await? {
                match remove_one(session, found, id, finished).await {
                    Ok(true) => notices.note(&format!(
                        "removed image {} ({id}, {}), which run {} {}",
                        image.shown(),
                        image.status,
                        short(&found.record.run),
                        if finished { "could not delete" } else { "left when it was killed" },
                    )),
                    Ok(false) => {}
                    Err(error) => {
                        all_gone = false;
                        notices.warn(&format!(
                            "image {id}, left by run {}, could not be removed: {}",
                            short(&found.record.run),
                            causes(&error)
                        ));
                    }
                }
            } else if finished && ours && image.property(VERIFIED).is_none() {
                notices.note(&format!(
                    "image {} ({id}), which run {} could not delete, is {} by now and is left alone; to be rid of it: virta image delete {id}",
                    image.shown(),
                    short(&found.record.run),
                    image.status
                ));
            } else if finished {
                // somebody else's by now
            } else if ours && image.property(SOURCE_ID).is_none() {
                let shown = image.shown_id();
                notices.note(&format!(
                    "image {} ({shown}) of killed run {} is {}: it is whole. To go on with it: virta convert --delete-source glance:{shown} glance:NAME; \
                     to be rid of it: virta image delete {shown}",
                    image.shown(),
                    short(&found.record.run),
                    image.status
                ));
            } else if ours && image.property(VERIFIED).is_none() {
                notices.note(&format!(
                    "image {} ({id}) of killed run {} is {}, and was not verified: start the same command again to verify it, or remove it",
                    image.shown(),
                    short(&found.record.run),
                    image.status
                ));
            }
        }
        if all_gone && let Err(error) = found.cleaned() {
            notices.warn(&format!("the record of run {} could not be written: {error}", short(&found.record.run)));
        }
    }
    Ok(())
}

/// Nobody has a use for it, whatever became of its run.
fn is_half_made(image: &Image) -> bool {
    matches!(image.status.as_str(), "queued" | "saving") || image.property(BENCH).is_some()
}

/// May it go without being asked for? Of a run that came to its end with another image even what has become whole since, as long as the source is
/// there. What carries a mark of verification, of whatever strength, somebody has finished and may want: conversions inherit none.
async fn is_of_no_use(session: &Session, image: &Image, finished: bool) -> Result<bool, JobError> {
    if is_half_made(image) {
        return Ok(true);
    }
    if !finished || image.protected == Some(true) || image.property(VERIFIED).is_some() {
        return Ok(false);
    }
    match image.property(SOURCE_ID) {
        Some(source) => Ok(session.image_if_there(source).await?.is_some()),
        None => Ok(false),
    }
}

/// Deletes an image that a dead run left, unless somebody has come to depend on it meanwhile: that is looked at last. It is written down
/// before, and asked for once: a request that lands late is what others have to reckon with.
async fn remove_one(session: &Session, found: &Found, id: &str, finished: bool) -> Result<bool, JobError> {
    let refused = |error| JobError::Refused(format!("the record of run {} cannot be written: {error}", short(&found.record.run)));
    found.deleting(id).map_err(refused)?;
    let looking = session.image_now(id).await;
    let goes = matches!(&looking, Ok(Some(image)) if image.property(RUN) == Some(found.record.run.as_str())
        && (is_half_made(image) || (finished && image.property(VERIFIED).is_none())));
    if !goes {
        found.not_deleting(id).map_err(refused)?;
        return looking.map(|_| false).map_err(JobError::from);
    }
    let deleted = session.delete_image_once(id).await;
    if deleted.as_ref().err().is_none_or(|error| !error.may_have_been_heard()) {
        found.settled(id).map_err(refused)?;
    }
    deleted?;
    Ok(true)
}
