//! `virta batch`: many images, one command.
//!
//! | module | noun |
//! |---|---|
//! | [`display`] | what is shown of it, on a terminal, in a log, to a program |
//! | [`summary`] | what is said and written when it is over, and the command for what is left |
//! | [`engines`] | files and commands for HyperQueue and Slurm |
//! | [`planned`] | what `--dry-run` shows |
//! | [`task`] | one image, handed over by an engine |

mod display;
mod engines;
mod planned;
mod summary;
mod task;

use std::{io::Read, num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc};

use clap::Args;
use engine::CancelToken;
use jiff::SignedDuration;
use stages::{
    batch::{
        Batch, Event, Journal, Listing, Outcome, Plan, Request, Summary, list,
        plan::finish_replacements,
        run::Limits,
        select::{Filter, parse_age, snapshots},
    },
    convert::{After, Options, Verify},
    error::JobError,
    openstack::{Compute, Image, Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    text::{causes, counted, printable, size},
};

use crate::{
    conclusion::proven,
    confirm::confirm,
    display::Display,
    exit,
    flags::{CloudArgs, ConversionArgs, OutputArgs, SourceArgs, count, job_options, parse_size},
    image_names::image_names,
    in_cloud::warn_without_record,
    leftovers, receipt,
    report_file::check_report_file,
    runs::{self, Run},
    sign_in::sign_in,
    signals::watch_signals,
};
use display::BatchDisplay;
pub use engines::Engine;
use planned::show_plan;
use summary::conclude;

/// Names of images that a question lists.
const ASKED_MAX: usize = 12;
/// Longest list that is read.
const LIST_BYTES_MAX: u64 = 64 << 20;

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct BatchArgs {
    /// Images to convert: names or ids
    #[arg(add = image_names())]
    pub images: Vec<String>,
    /// A list of images, - for stdin: a name or an id a line; or CSV or JSON, with a name, properties and flags for each
    #[arg(long, value_name = "FILE")]
    pub from: Option<String>,
    /// All snapshots that this user made of this project's servers
    #[arg(long, conflicts_with_all = ["from", "images"])]
    pub all_snapshots: bool,
    /// With --all-snapshots: those of the project's other users, too
    #[arg(long)]
    pub all_users: bool,
    /// With --all-snapshots: only larger ones, SIZE
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub larger_than: Option<u64>,
    /// With --all-snapshots: only older ones: 90d, 2w, 36h
    #[arg(long, value_name = "AGE", value_parser = parse_age)]
    pub older_than: Option<SignedDuration>,
    /// With --all-snapshots: only those that have this in their name
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// With --all-snapshots: only those of this server, a name or an id
    #[arg(long, value_name = "SERVER")]
    pub instance: Option<String>,
    /// What the new images are called; {name}, {id} and {date} are the source's
    #[arg(long, value_name = "TEMPLATE", default_value = "{name}-qcow2")]
    pub name_template: String,
    /// Show the plan, and do nothing
    #[arg(long, conflicts_with = "plan")]
    pub dry_run: bool,
    /// Conversions at once. Memory, connections, workers and scratch are those of all together
    #[arg(short = 'j', long, value_name = "N", default_value = "4", value_parser = count)]
    pub jobs: NonZeroUsize,
    /// Image data a second, both ways and all together, SIZE [default: as fast as it goes]
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub rate_limit: Option<u64>,
    /// Where it is written down what happened [default: one for each command, in the state folder]
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Tries of each image; what fails for the moment comes again at the end
    #[arg(long, value_name = "N", default_value = "3", value_parser = count)]
    pub tries: NonZeroUsize,
    /// Begin no more once so many have failed
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_failures: Option<NonZeroUsize>,
    /// Begin although other runs' claims are still good: for who knows that they are dead. If one lives after all, the first image to be
    /// verified is the result
    #[arg(long)]
    pub take_over: bool,
    /// Do not wait for images that another run converts
    #[arg(long)]
    pub no_wait: bool,
    #[command(flatten)]
    pub source_after: SourceArgs,
    /// Make second images of names that others have; delete sources that servers were built from. What is converted already stays so
    #[arg(long)]
    pub force: bool,
    /// Convert the one image that an engine hands over: HQ_ENTRY, or line SLURM_ARRAY_TASK_ID (from 1) or JOB_COMPLETION_INDEX (from 0) of --from
    #[arg(long, conflicts_with_all = ["all_snapshots", "images", "dry_run", "plan"])]
    pub task_from_env: bool,
    /// Write files for an engine that runs the batch on many machines, and show the command that submits it
    #[arg(long, value_name = "ENGINE")]
    pub plan: Option<Engine>,
    /// Where these files go
    #[arg(long, value_name = "DIR", default_value = "virta-plan", requires = "plan")]
    pub plan_dir: PathBuf,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub conversion: ConversionArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

const EXAMPLES: &str = "\
Examples:
  virta batch --all-snapshots --dry-run
      what there is, what would be done with it, and about how long that takes
  virta batch --all-snapshots --larger-than 20G --compress zstd
      convert them; after anything that can happen in between, the same command goes on
  virta batch --delete-source web-1 web-2 0a1b2c3d-0000-0000-0000-000000000000
  virta batch --from images.csv --jobs 8 --memory 2G --rate-limit 200M --report report.json
      images.csv has a head line: image,name,property:os_distro,compress,verify,delete_source
  virta batch --all-snapshots --plan hyperqueue
      files and the command for many machines

What became of an image is in Glance (virta_source_id, virta_verified), so the same command on another machine, or without its journal, comes to \
the same. Each begins with its new image, called \
NAME (unfinished), which says how long other runs leave it alone (its claim): an hour at least, four times the predicted time for large ones. A run that \
died holds nothing on its own machine, nor against another try of the same task; elsewhere --take-over passes it by. An image that another run holds is waited for, \
but with --no-wait.
Exit status: 0 all done, 1 failed, 2 wrong usage, 4 some are not done (a table says why, with the command for just those; of --dry-run: some cannot be done), 130 interrupted.
With --task-from-env: 0 done, now or before, 75 try again, 64 wrong usage, 65 never worth another try.";

fn parse_rate(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < 256 << 10 {
        return Err("less than 256K a second: connections would be taken for dead".to_owned());
    }
    Ok(bytes)
}

impl BatchArgs {
    /// The options for all.
    fn options(&self) -> Result<Options, String> {
        let usual = job_options(&self.conversion)?;
        let (after, verify) = (self.source_after.after(), self.source_after.verify(self.conversion.verify));
        if after != After::Keep && verify == Verify::None {
            return Err("a source is deleted only after verification: leave --verify none out".to_owned());
        }
        Ok(Options {
            after,
            verify,
            force: self.force,
            copy_members: self.source_after.copy_members,
            take_over: self.take_over,
            ..usual
        })
    }

    fn limits(&self) -> Limits {
        Limits {
            jobs: self.jobs,
            tries: u32::try_from(self.tries.get()).unwrap_or(u32::MAX),
            max_failures: self.max_failures.map(NonZeroUsize::get),
            wait: !self.no_wait,
            ..Limits::default()
        }
    }

    /// What tells this command from another one, for the name of its journal.
    fn selection(&self, requests: &[Request]) -> String {
        if self.all_snapshots {
            let Self { all_users, larger_than, older_than, name, instance, .. } = self;
            return format!("snapshots {all_users} {larger_than:?} {older_than:?} {name:?} {instance:?} {}", self.name_template);
        }
        format!("{} {}", serde_json::to_string(requests).unwrap_or_default(), self.name_template)
    }
}

/// Reads a list of requests; `-` is stdin.
fn read_list(path: &str) -> Result<String, JobError> {
    let mut text = String::new();
    let read = match path {
        "-" => std::io::stdin().lock().take(LIST_BYTES_MAX + 1).read_to_string(&mut text),
        path => std::fs::File::open(path).and_then(|file| file.take(LIST_BYTES_MAX + 1).read_to_string(&mut text)),
    };
    let bytes = read.map_err(|error| JobError::Usage(format!("--from {}: {error}", printable(path))))?;
    if u64::try_from(bytes).unwrap_or(u64::MAX) > LIST_BYTES_MAX {
        return Err(JobError::Usage(format!(
            "--from {}: larger than {}: that is no list",
            printable(path),
            size(LIST_BYTES_MAX)
        )));
    }
    Ok(text)
}

fn requests(arguments: &BatchArgs) -> Result<Vec<Request>, JobError> {
    let filters = [
        (arguments.all_users, "--all-users"),
        (arguments.larger_than.is_some(), "--larger-than"),
        (arguments.older_than.is_some(), "--older-than"),
        (arguments.name.is_some(), "--name"),
        (arguments.instance.is_some(), "--instance"),
    ];
    if let Some((_, flag)) = filters.iter().find(|(given, _)| *given && !arguments.all_snapshots) {
        return Err(JobError::Usage(format!("{flag} chooses among snapshots: it needs --all-snapshots")));
    }
    let mut requests: Vec<Request> = arguments.images.iter().map(|word| Request::of(word)).collect();
    if arguments.task_from_env {
        requests.push(task::request(arguments.from.as_deref())?);
    } else if let Some(path) = &arguments.from {
        let listed = list::parse(&read_list(path)?);
        requests.extend(listed.map_err(|error| JobError::Usage(format!("--from {}, {error}", printable(path))))?);
    }
    if requests.is_empty()
        && let Some(path) = &arguments.from
    {
        return Err(JobError::Usage(format!("--from {}: there is no image in it", printable(path))));
    }
    if requests.is_empty() && !arguments.all_snapshots {
        return Err(JobError::Usage("which images? Name them, or give --from FILE or --all-snapshots".to_owned()));
    }
    Ok(requests)
}

/// What a batch came to.
enum Ending {
    /// It ran.
    Summary(Box<Summary>, Option<PathBuf>),
    /// There was something to show.
    Shown(ExitCode),
}

/// Runs the command.
pub async fn run(arguments: BatchArgs) -> ExitCode {
    let as_task = arguments.task_from_env;
    let requests = match requests(&arguments) {
        Ok(requests) => requests,
        Err(error) => return ended_early(&error, as_task),
    };
    if let Some(Err(error)) = arguments.output.report.as_deref().map(check_report_file) {
        return ended_early(&error, as_task);
    }
    let only_shows = arguments.dry_run || arguments.plan.is_some();
    let run = if only_shows { Run::default() } else { Run::begin(&described(&arguments, &requests), &arguments.name_template) };
    let options = match arguments.options() {
        Ok(options) => options,
        Err(text) => return ended_early(&JobError::Usage(text), as_task),
    };
    let display = Display::start(arguments.output.progress, &Progress::default(), run.clone());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    if !only_shows {
        warn_without_record(&run, &display);
    }
    let options = Options { run: display.this_run(), ..options };
    let result = batch(&arguments, requests, options, &display, &run, &cancel).await;
    display.finish().await;
    match result {
        Ok(Ending::Shown(code)) => code,
        Ok(Ending::Summary(summary, journal)) => {
            let code = summary.exit_code();
            let done = summary.count(Outcome::is_good);
            run.end_with(code, &format!("{done} of {} done", summary.items.len()), code != 0);
            if as_task { task::conclude(&summary, arguments.output.format) } else { conclude(&arguments, &summary, journal) }
        }
        Err(error) => {
            run.end(error.exit_code(), &printable(&causes(&error)));
            ended_early(&error, as_task)
        }
    }
}

fn ended_early(error: &JobError, as_task: bool) -> ExitCode {
    if as_task { task::failed(error) } else { exit::failure(error, error.exit_code()) }
}

fn described(arguments: &BatchArgs, requests: &[Request]) -> String {
    match requests {
        [request] => format!("batch of glance:{}", request.image),
        _ if arguments.all_snapshots => "batch of all snapshots".to_owned(),
        _ => format!("batch of {} images", requests.len()),
    }
}

async fn batch(
    arguments: &BatchArgs,
    requests: Vec<Request>,
    options: Options,
    display: &Display,
    run: &Run,
    cancel: &CancelToken,
) -> Result<Ending, JobError> {
    let (planned, journal) = match cancel.guard(prepare(arguments, requests, &options, display, run, cancel)).await {
        Ok(result) => result?,
        Err(_) => return Err(JobError::interrupted()),
    };
    let Prepared { session, plan, left_out } = &planned;
    plan.notes.iter().for_each(|note| display.note(note));
    if let Some(engine) = arguments.plan {
        engines::write(engine, arguments, plan, display)?;
        return Ok(Ending::Shown(ExitCode::SUCCESS));
    }
    if arguments.dry_run {
        show_plan(arguments, session, plan, left_out, display, cancel).await?;
        let lacks = plan.entries.iter().any(|entry| matches!(entry.verdict, stages::batch::Verdict::Fail { .. }));
        return Ok(Ending::Shown(if lacks { ExitCode::from(4) } else { ExitCode::SUCCESS }));
    }
    left_out.iter().for_each(|line| display.note(line));
    ask(arguments, session, plan, cancel).await?;
    let journal_path = journal.as_ref().map(|journal| journal.path().to_owned());
    if let Some(path) = &journal_path {
        display.note(&format!("journal: {}", path.display()));
    }
    let session = match arguments.rate_limit {
        Some(rate) => session.limited_to(rate),
        None => session.clone(),
    };
    let shown = BatchDisplay::start(display, &planned.plan, run.clone());
    let goes: Vec<bool> = planned.plan.entries.iter().map(|entry| entry.options.after != After::Keep).collect();
    let batch = Batch {
        session,
        plan: planned.plan,
        options,
        limits: arguments.limits(),
        journal,
        listener: {
            let (shown, display) = (shown.clone(), display.clone());
            Arc::new(move |event: &Event<'_>| {
                if let Event::Ended { index, outcome: Outcome::Done { report }, .. } = event
                    && let Err(error) = receipt::write(report, &proven(report), goes[*index])
                {
                    display.warn(&format!("a receipt could not be written: {error}"));
                }
                shown.tell(event);
            })
        },
        cancel: cancel.clone(),
    };
    let summary = batch.run().await.map_err(|error| JobError::Usage(error.to_string()));
    shown.finish().await;
    Ok(Ending::Summary(Box::new(summary?), journal_path))
}

struct Prepared {
    session: Session,
    plan: Plan,
    /// What the filters left out, a line each.
    left_out: Vec<String>,
}

/// Signs in, looks, plans.
async fn prepare(
    arguments: &BatchArgs,
    mut requests: Vec<Request>,
    options: &Options,
    display: &Display,
    run: &Run,
    cancel: &CancelToken,
) -> Result<(Prepared, Option<Journal>), JobError> {
    let session = sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?;
    let changes = !arguments.dry_run && arguments.plan.is_none();
    if changes {
        run.in_cloud(&session);
        leftovers::clean_up_before(&session, display, cancel).await?;
    }
    let mut listing = Listing::of_project(&session).await?;
    let replaces = options.after == After::Replace || requests.iter().any(|request| request.replace == Some(true));
    if changes && replaces && finish_replacements(&session, &listing.images).await? {
        listing = Listing::of_project(&session).await?;
    }
    let mut left_out = Vec::new();
    let selection = arguments.selection(&requests);
    if arguments.all_snapshots {
        let instance = match &arguments.instance {
            Some(server) => Some(Compute::connect(&session).await?.find(server).await?.id),
            None => None,
        };
        let filter = Filter {
            all_users: arguments.all_users,
            larger_than: arguments.larger_than,
            older_than: arguments.older_than,
            name: arguments.name.clone(),
            instance,
        };
        let mut selected = snapshots(&session, &listing.images, &filter);
        // grouped by user where there are several
        selected.images.sort_by(|a, b| {
            let key = |image: &Image| (image.property("user_id").map(str::to_owned), image.name.clone(), image.id.clone());
            key(a).cmp(&key(b))
        });
        if selected.of_others > 0 {
            left_out.push(format!(
                "{} of this project left out that other users made, or nobody knows who: --all-users takes them",
                counted(selected.of_others, "snapshot")
            ));
        }
        if selected.filtered > 0 {
            left_out.push(format!("{} left out by the filters", counted(selected.filtered, "snapshot")));
        }
        requests = selected.images.iter().map(|image| Request::of(&image.id)).collect();
        if requests.is_empty() {
            let own = |image: &&Image| session.owns(image) && image.disk_format.as_deref() == Some("raw");
            let raw = listing.images.iter().filter(own).count();
            let others = match raw {
                0 => String::new(),
                raw => format!(
                    "; this project has {}: virta image list shows them, and a batch can name them",
                    counted(raw, "raw image")
                ),
            };
            display.note(&format!("no snapshot to convert{others}"));
        }
    } else {
        // an image that lists do not show, for it is hidden or shared by another project, is found by its id
        for request in &requests {
            let id = request.image.strip_prefix("glance:").unwrap_or(&request.image);
            if uuid::Uuid::parse_str(id).is_ok()
                && !listing.images.iter().any(|image| image.id.eq_ignore_ascii_case(id))
                && let Ok(image) = session.image(id).await
            {
                listing.images.push(image);
            }
        }
    }
    let journal = match &arguments.journal {
        Some(path) => Some(path.clone()),
        // the engine keeps track of its tasks
        None if arguments.task_from_env => None,
        None => default_journal(&session, &selection),
    };
    // a plan that is only shown makes none, but knows what an earlier run wrote
    let journal = match journal.filter(|path| changes || path.exists()) {
        None => None,
        Some(path) => match Journal::open(
            &path,
            run.id().as_deref().unwrap_or("plan"),
            session.whoami().project_id.as_deref().unwrap_or_default(),
        ) {
            Ok(journal) => Some(journal),
            Err(error) if arguments.journal.is_some() => return Err(JobError::Usage(causes(&error))),
            Err(error) => {
                display.warn(&format!("{}: this run goes on without one", causes(&error)));
                None
            }
        },
    };
    let mut plan = Plan::make(&session, listing, requests, options, &arguments.name_template, journal.as_ref())?;
    if arguments.dry_run {
        // a run finds that out itself, image by image
        let looking = cancel.guard(plan.refuse_shared(&session)).await;
        looking.map_err(|_| JobError::interrupted())?;
    }
    Ok((Prepared { session, plan, left_out }, journal))
}

/// One journal for each command and project.
fn default_journal(session: &Session, selection: &str) -> Option<PathBuf> {
    let project = session.whoami().project_id.clone().unwrap_or_default();
    let key = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, format!("{project} {selection}").as_bytes());
    Some(runs::state_folder()?.join("batches").join(format!("{key}.jsonl")))
}

/// Whatever deletes images asks on a terminal, naming what and where.
async fn ask(arguments: &BatchArgs, session: &Session, plan: &Plan, cancel: &CancelToken) -> Result<(), JobError> {
    let going: Vec<_> = plan.entries.iter().filter(|entry| entry.is_work() && entry.options.after != After::Keep).collect();
    if going.is_empty() {
        return Ok(());
    }
    let who = session.whoami();
    let bytes = going.iter().map(|entry| entry.bytes()).sum();
    let mut names: Vec<String> = going.iter().take(ASKED_MAX).map(|entry| entry.shown()).collect();
    if going.len() > ASKED_MAX {
        names.push(format!("and {} more", going.len() - ASKED_MAX));
    }
    let what = format!(
        "After each new image is verified, delete its source: {} ({}) in cloud {}, project {}: {}",
        counted(going.len(), "image"),
        size(bytes),
        who.cloud,
        who.project,
        names.join(", ")
    );
    confirm(&what, arguments.source_after.yes, cancel).await
}
