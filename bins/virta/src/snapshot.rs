//! `virta snapshot`.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Args;
use engine::CancelToken;
use serde_json::json;
use stages::{
    convert::{After, Job, Options, Source, Verify},
    error::JobError,
    openstack::{Compute, Image, Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    snapshot::{Snapshot, SnapshotPlan, Waiting},
    text::{causes, printable, shell_word, size},
};

use crate::{
    conclusion::{Outcome, conclude, into_glance},
    confirm::confirm,
    display::Display,
    exit,
    flags::{CloudArgs, ConversionArgs, FormatChoice, OutputArgs, chosen_cloud, job_options},
    in_cloud::{check_free, warn_without_record},
    leftovers::restore_server,
    receipt,
    runs::{self, Run, State},
    sign_in::sign_in,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct SnapshotArgs {
    /// The server: a name or an id
    pub server: String,
    /// What the image will be called
    #[arg(value_name = "NAME", required_unless_present = "name_flag")]
    pub name: Option<String>,
    /// The same, as `openstack server image create` has it
    #[arg(long = "name", value_name = "NAME", conflicts_with = "name", id = "name_flag")]
    pub name_flag: Option<String>,
    /// Leave a running server running. The image then looks as after a power cut: file systems are not clean
    #[arg(long)]
    pub live: bool,
    /// Go on to a compact qcow2 called NAME. The raw image is called NAME-virta-raw, and is deleted when the qcow2 was read back
    #[arg(long)]
    pub convert: bool,
    /// Do not ask before the server is stopped
    #[arg(long)]
    pub yes: bool,
    /// Minutes that Nova may take for the image
    #[arg(long, value_name = "MINUTES", default_value = "240")]
    pub timeout: u64,
    /// Make a second image of a name that is taken
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub conversion: ConversionArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

const EXAMPLES: &str = "\
The server goes back to the state that it was found in as soon as Nova is done with it, after an error or Ctrl-C, too. After a kill -9, \
`virta clean` does that. Only the root disk is in the image: ephemeral disks and attached volumes are not.
Flags about compression, memory and the like are for --convert.
Examples:
  virta snapshot web web-2026-11-24
      a raw image, as Pouta makes them
  virta snapshot --convert web web-2026-11-24
      the same, and a compact qcow2 of it in its place
  virta snapshot --live web web-now
      without stopping the server

Exit status: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 130 interrupted.";

/// How long is waited to hear whether the raw image is still there when its conversion failed.
const RAW_LOOKED_FOR: Duration = Duration::from_secs(10);

/// Runs the command.
pub async fn run(arguments: SnapshotArgs) -> ExitCode {
    let name = arguments.name.clone().or_else(|| arguments.name_flag.clone()).unwrap_or_default();
    let name = name.strip_prefix("glance:").map_or(name.clone(), str::to_owned);
    if !arguments.convert
        && let Some(flag) =
            arguments.conversion.first_given().or((!arguments.conversion.property.is_empty()).then_some("--property"))
    {
        return exit::usage(&format!("{flag} is about the qcow2 that --convert goes on to: add --convert, or leave it out"));
    }
    let run = Run::begin(&format!("server:{}", arguments.server), &format!("glance:{name}"));
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress, run.clone());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let options = match job_options(&arguments.conversion) {
        Ok(options) => options,
        Err(text) => return exit::usage(&text),
    };
    warn_without_record(&run, &display);
    let result = snapshot(&arguments, &name, &run, &display, &cancel).await;
    let (session, image) = match result {
        Ok(made) => made,
        Err(error) => {
            display.finish().await;
            let held = display.held().lock().is_ok_and(|held| held.is_some());
            run.end_with(error.exit_code(), &printable(&causes(&error)), held);
            let code = exit::failure(&error, error.exit_code());
            if matches!(error, JobError::Interrupted(_)) && !held {
                exit::say("no unfinished image is left behind, and the server is as it was found");
            }
            return code;
        }
    };
    if arguments.convert {
        let (raw, raw_id) = (image.shown_id(), image.id.clone());
        let result = convert(&arguments, &name, &session, image, options, &progress, &display, &cancel).await;
        display.finish().await;
        match &result {
            Ok(_) => run.end(0, &format!("made {}", printable(&name))),
            Err(error) => run.end_with(error.exit_code(), &printable(&causes(error)), error.leaves_an_image()),
        }
        let failed = result.is_err();
        let going = matches!(&result, Err(JobError::SourceGoing { .. }));
        let code = conclude(result, &display, &arguments.output, true, true);
        if !failed {
            return code;
        }
        let is = match tokio::time::timeout(RAW_LOOKED_FOR, session.image_if_there(&raw_id)).await {
            Ok(Ok(None)) => return code,
            Ok(Ok(Some(_))) if !going => "is",
            _ => "may be",
        };
        exit::say(&format!(
            "the snapshot {is} there as raw image {raw}; to go on: virta convert --delete-source {}glance:{raw} {}",
            chosen_cloud(&arguments.cloud),
            shell_word(&format!("glance:{name}"))
        ));
        return code;
    }
    display.finish().await;
    run.end(0, &format!("made image {}", printable(&image.id)));
    tell(&arguments, &image, &display)
}

async fn snapshot(
    arguments: &SnapshotArgs,
    name: &str,
    run: &Run,
    display: &Display,
    cancel: &CancelToken,
) -> Result<(Session, Image), JobError> {
    if name.is_empty() || name.len() > 255 {
        return Err(JobError::Usage("the image needs a name of 1 to 255 bytes".to_owned()));
    }
    let signing_in = async {
        let session = sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?;
        run.in_cloud(&session);
        let compute = Compute::connect(&session).await?;
        let server = compute.find(&arguments.server).await?;
        Ok::<_, JobError>((session, compute, server))
    };
    let (session, compute, mut server) = cancel.guard(signing_in).await.unwrap_or_else(|_| Err(JobError::interrupted()))?;
    // not interruptible: a server that is being brought back is brought back
    let put_right = put_right(&session, &compute, &server.id, display).await?;
    let looking = async {
        if put_right {
            server = compute.server(&server.id).await?;
        }
        let raw_name = if arguments.convert { format!("{name}-virta-raw") } else { name.to_owned() };
        for name in [name, raw_name.as_str()] {
            check_free(&session, name, arguments.force).await?;
        }
        SnapshotPlan::new(&compute, server, &raw_name, arguments.live).await
    };
    let plan = cancel.guard(looking).await.unwrap_or_else(|_| Err(JobError::interrupted()))?;
    plan.lines.iter().for_each(|line| display.note(line));
    plan.warnings.iter().for_each(|line| display.warn(line));
    if arguments.convert {
        display.note(&format!(
            "then image {} is converted to qcow2 image {}, and deleted when that was verified",
            printable(&plan.name),
            printable(name)
        ));
    }
    if plan.stops {
        let who = session.whoami();
        let what = format!(
            "Stop server {} ({}) in cloud {}, project {}",
            plan.server.shown(),
            printable(&plan.server.id),
            who.cloud,
            who.project
        );
        confirm(&what, arguments.yes, cancel).await?;
    }
    let this = display.this_run();
    let waiting = Waiting { image: Duration::from_secs(arguments.timeout.saturating_mul(60)), ..Waiting::default() };
    let snapshot = Snapshot { session: &session, compute: &compute, plan: &plan, run: &this, waiting, reporter: display, cancel };
    let image = snapshot.run().await?;
    display.note(&format!("image {} ({}) is active, {}", image.shown(), image.shown_id(), size(image.size.unwrap_or(0))));
    Ok((session, image))
}

/// A server that another run of this machine holds: one that lives is not disturbed, what a dead one did is taken back first. Says whether
/// there was anything.
async fn put_right(session: &Session, compute: &Compute, server: &str, display: &Display) -> Result<bool, JobError> {
    let holds = |found: &runs::RecordedRun| found.record.server.as_ref().is_some_and(|held| held.id == server);
    if let Some(live) = runs::all().into_iter().find(|found| holds(found) && found.record.state == State::Running) {
        // this very run holds nothing yet
        return Err(JobError::Usage(format!(
            "run {} (process {} on {}) makes a snapshot of this server just now",
            live.record.run,
            live.record.pid,
            printable(&live.record.host)
        )));
    }
    let mut any = false;
    for dead in runs::dead().into_iter().filter(holds) {
        if let Some(held) = dead.record.server.clone() {
            restore_server(session, compute, &held, &dead, display).await?;
            any = true;
        }
    }
    Ok(any)
}

/// The raw image becomes a qcow2 one, and goes.
#[allow(clippy::too_many_arguments)] // all of one run
async fn convert(
    arguments: &SnapshotArgs,
    name: &str,
    session: &Session,
    image: Image,
    options: Options,
    progress: &Progress,
    display: &Display,
    cancel: &CancelToken,
) -> Result<Outcome, JobError> {
    let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
    let verify = arguments.conversion.verify.map_or(Verify::Readback, Into::into);
    let options = Options { after: After::Delete, verify, force: arguments.force, run: display.this_run(), ..options };
    let source = cancel.guard(Source::glance(session, &image.id)).await.map_err(|_| JobError::interrupted())??;
    let job = Job::new(source, options, progress, &reporter, cancel);
    let checking = stages::convert::retire::check(&job, arguments.force);
    cancel.guard(checking).await.map_err(|_| JobError::interrupted())??;
    into_glance(&job, session, name).await
}

/// What was made, and what to do with it.
fn tell(arguments: &SnapshotArgs, image: &Image, display: &Display) -> ExitCode {
    let told = json!({
        "snapshot": {
            "server": arguments.server, "image": image.id, "name": image.name, "bytes": image.size, "disk_format": image.disk_format,
            "warnings": display.warnings(),
        },
    });
    let receipt = receipt::write_told(&told);
    let printed = match arguments.output.format {
        FormatChoice::Table => exit::print(&format!(
            "made glance:{}: {} {}\nto make a compact qcow2 of it, and delete it when that is verified: virta convert --delete-source {}glance:{} {}{}",
            image.shown_id(),
            image.disk_format.as_deref().unwrap_or("image"),
            size(image.size.unwrap_or(0)),
            chosen_cloud(&arguments.cloud),
            image.shown_id(),
            shell_word(&format!("glance:{}-qcow2", image.name.as_deref().unwrap_or("NAME"))),
            receipt.as_ref().map(|path| format!("\nreceipt: {}", path.display())).unwrap_or_default()
        )),
        FormatChoice::Json => exit::print(&serde_json::to_string_pretty(&told["snapshot"]).unwrap_or_default()),
        FormatChoice::Value => exit::print(&printable(&image.id)),
    };
    if let Err(error) = receipt {
        exit::say(&format!("virta: the snapshot is made, but its receipt could not be written: {error}"));
    }
    match printed {
        true => ExitCode::SUCCESS,
        false => {
            exit::say(&format!("virta: made image {}, but that could not be written to stdout", image.shown_id()));
            ExitCode::from(1)
        }
    }
}
