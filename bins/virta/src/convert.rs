//! `virta convert`.

use std::{io::IsTerminal, path::Path, process::ExitCode, sync::Arc};

use clap::Args;
use engine::CancelToken;
use stages::{
    convert::{
        self, After, Job, Options, Source,
        names::{conversion_of_gone, has_replaced},
        retire, source,
        to_file::same_file,
    },
    disk::output::partial_of,
    error::JobError,
    openstack::{Session, config::Environment, image::ImageError},
    progress::Progress,
    reporter::Reporter,
    text::{causes, printable, size},
};

use crate::{
    conclusion::{Outcome, conclude, into_glance},
    confirm::asked,
    display::Display,
    exit,
    flags::{CloudArgs, ConversionArgs, OutputArgs, SourceArgs, VerifyChoice, job_options, parse_size},
    image_names::path_or_image,
    in_cloud::warn_without_record,
    leftovers,
    location::{End, did_you_mean, is_forward_only, open_forward, stdout, stdout_by_its_name},
    report_file::check_report_file,
    runs::{self, Run},
    sign_in::sign_in,
    signals::{interruptible, watch_signals},
};

#[derive(Args)]
#[command(after_long_help = CONVERT_EXAMPLES)]
pub struct ConvertArgs {
    /// What to convert: a path, glance:IMAGE (a name or an id), or - for stdin
    #[arg(add = path_or_image())]
    pub source: String,
    /// What to make: a path, glance:NAME for a new image, or - for stdout
    #[arg(add = path_or_image())]
    pub destination: String,
    #[command(flatten)]
    pub cloud: CloudArgs,
    /// The new image goes into this cloud from clouds.yaml, with its own sign-in (for clouds and regions that share no images)
    #[arg(long, value_name = "NAME")]
    pub to_os_cloud: Option<String>,
    /// Bytes that stdin has to give, SIZE: a pipe that breaks looks like one that ends
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub source_size: Option<u64>,
    #[command(flatten)]
    pub source_after: SourceArgs,
    #[command(flatten)]
    pub conversion: ConversionArgs,
    /// Replace a local file; make a second image of a name that is taken; delete a source that servers were built from. Never
    /// overwrites an image
    #[arg(long)]
    pub force: bool,
    /// Begin although another run is making this source's image of this name, and its claim is still good: for who knows that it is dead. If it lives after
    /// all, the first to be verified is the result
    #[arg(long)]
    pub take_over: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

pub const CONVERT_EXAMPLES: &str = "\
Examples:
  virta convert disk.raw disk.qcow2
      a local raw image; holes cost nothing
  virta convert glance:my-snapshot glance:my-snapshot-qcow2
      the main job: a raw snapshot in Glance becomes a compact image in Glance, through memory alone
  virta convert glance:my-snapshot my-snapshot.qcow2
      the same into a local file
  virta convert --compress zstd --verify readback glance:my-snapshot glance:my-snapshot-qcow2
      compressed, and read back before it counts as done
  ssh host 'sudo dd if=/dev/vda bs=4M' | virta convert - glance:host --source-size 80G
      a disk that comes through a pipe, whose size tells a pipe that broke from one that ended (blockdev --getsize64); its data has to fit into
      --memory, or into a file in --scratch DIR
  virta convert --replace glance:my-snapshot glance:my-snapshot
      the new image takes the old one's place, after it was read back
  virta convert --to-os-cloud epouta glance:my-snapshot glance:my-server
      from one cloud into another
  virta convert glance:my-snapshot - | ssh host 'cat > disk.qcow2'
      nothing but the image goes to stdout

The cloud is chosen as with `openstack`: --os-cloud, OS_CLOUD, clouds.yaml, or a sourced openrc file.

SIZE takes K M G T and KiB MiB GiB TiB (1024) or kB MB GB TB (1000); a bare number is bytes.
Exit status: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 75 another run is converting this source to this name, 130 interrupted.";

/// Runs the command.
pub async fn run(mut arguments: ConvertArgs) -> ExitCode {
    arguments.destination = stdout_by_its_name(arguments.destination);
    let usual = match job_options(&arguments.conversion) {
        Ok(options) => options,
        Err(text) => return exit::usage(&text),
    };
    let (after, verify) = (arguments.source_after.after(), arguments.source_after.verify(arguments.conversion.verify));
    let run = Run::begin(&arguments.source, &arguments.destination);
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress, run.clone());
    let options = Options {
        force: arguments.force,
        verify,
        after,
        copy_members: arguments.source_after.copy_members,
        elsewhere: arguments.to_os_cloud.is_some(),
        run: display.this_run(),
        take_over: arguments.take_over,
        ..usual
    };
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    warn_without_record(&run, &display);
    let result = convert(&arguments, options, &progress, &display, &run, &cancel).await;
    display.finish().await;
    match &result {
        Ok(Outcome::Made(report)) => run.end(0, &format!("made {}", printable(&report.destination))),
        Ok(Outcome::AlreadyDone(id)) => run.end(0, &format!("already done: image {}", printable(id))),
        Err(error) => {
            run.end_with(error.exit_code(), &printable(&causes(error)), error.leaves_an_image());
        }
    }
    let on_stdout = arguments.destination != "-";

    conclude(result, &display, &arguments.output, on_stdout, after != After::Keep)
}

async fn convert(
    arguments: &ConvertArgs,
    options: Options,
    progress: &Progress,
    display: &Display,
    run: &Run,
    cancel: &CancelToken,
) -> Result<Outcome, JobError> {
    let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
    let (from, to) = (End::parse(&arguments.source), End::parse(&arguments.destination));
    check_report(arguments)?;
    check_ends(arguments, &from, &to)?;
    let needs_source_cloud = matches!(from, End::Glance(_)) || (matches!(to, End::Glance(_)) && arguments.to_os_cloud.is_none());
    let source_cloud = match needs_source_cloud {
        true => Some(sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?),
        false => None,
    };
    let destination_cloud = match &arguments.to_os_cloud {
        Some(name) => {
            let cloud = CloudArgs { os_cloud: Some(name.clone()), ..CloudArgs::default() };
            // what the environment says is about the source's cloud: its region, its password
            let environment = Environment::current().without_a_cloud();
            Some(sign_in("destination: cloud", &cloud, &environment, display, cancel).await?)
        }
        None => source_cloud.clone(),
    };
    if let (End::Glance(_), Some(session)) = (&to, &destination_cloud) {
        run.in_cloud(session);
        leftovers::clean_up_before(session, display, cancel).await?;
    }
    let signed_in =
        |session: &Option<Session>| session.clone().ok_or_else(|| JobError::bug("a cloud is needed, and nobody signed in"));
    let source = match &from {
        End::Glance(name) => {
            match find_source(arguments, name, &signed_in(&source_cloud)?, &to, &destination_cloud, cancel).await? {
                Ok(source) => source,
                Err(done) => return Ok(done),
            }
        }
        End::Path(path) => match Source::local(Path::new(path)) {
            Err(error) if !Path::new(path).exists() => return Err(did_you_mean(error, path, source_cloud.as_ref()).await),
            other => other?,
        },
        End::Stdio => Source::stdin(arguments.source_size)?,
    };
    let job = Job::new(source, options, progress, &reporter, cancel);
    interruptible(cancel, retire::check(&job, arguments.force)).await?;
    confirm(&job, arguments.source_after.yes).await?;
    let report = match &to {
        End::Stdio => convert::to_stream::to_stream(&job, stdout()?, "-").await?,
        End::Path(path) if is_forward_only(path) => {
            let file = open_forward(path, display, cancel).await?;
            convert::to_stream::to_stream(&job, file, path).await?
        }
        End::Path(path) => convert::to_file::to_file(&job, Path::new(path)).await?,
        End::Glance(name) => {
            return into_glance(&job, &signed_in(&destination_cloud)?, name).await;
        }
    };
    Ok(Outcome::Made(Box::new(report)))
}

/// The source image; or what an earlier run of this command has made of it, where it is gone.
async fn find_source(
    arguments: &ConvertArgs,
    name: &str,
    session: &Session,
    to: &End,
    destination: &Option<Session>,
    cancel: &CancelToken,
) -> Result<Result<Source, Outcome>, JobError> {
    let replace = arguments.source_after.replace;
    let missing = match interruptible(cancel, async { Ok(source::find_source(session, name).await?) }).await {
        // a replacement that is done has the name already
        Ok(image) if replace && interruptible(cancel, has_replaced(session, &image)).await? => {
            return Ok(Err(Outcome::AlreadyDone(image.id)));
        }
        Ok(image) => return Source::image(session, image).map(Ok),
        Err(missing @ JobError::Image(ImageError::NotFound { .. })) => missing,
        Err(error) => return Err(error),
    };
    // an earlier run of this command may have deleted it, and been killed before it could say so
    let (End::Glance(new_name), Some(there)) = (to, destination) else { return Err(missing) };
    let made = runs::made_by(&arguments.source, &arguments.destination, there);
    let new_name = (!replace).then_some(new_name.as_str());
    match interruptible(cancel, conversion_of_gone(session, there, name, &made, new_name)).await? {
        Some(image) => {
            exit::say(&format!("the source ({}) is gone: an earlier run converted and deleted it", printable(name)));
            Ok(Err(Outcome::AlreadyDone(image.id)))
        }
        None => Err(missing),
    }
}

/// What cannot go together is refused before anything is asked of anybody.
fn check_ends(arguments: &ConvertArgs, from: &End, to: &End) -> Result<(), JobError> {
    let usage = |text: &str| Err(JobError::Usage(text.to_owned()));
    if matches!(to, End::Stdio) && std::io::stdout().is_terminal() {
        return usage("`-` writes the image to stdout, and stdout is a terminal: send it into a file or a pipe");
    }
    if !arguments.conversion.property.is_empty() && !matches!(to, End::Glance(_)) {
        return usage("--property is about a new image in Glance: the destination has to be glance:NAME");
    }
    if arguments.source_size.is_some() && !matches!(from, End::Stdio) {
        return usage("--source-size is about what comes through a pipe: the source has to be -");
    }
    if arguments.to_os_cloud.is_some() && !matches!(to, End::Glance(_)) {
        return usage("--to-os-cloud chooses the cloud of a new image: the destination has to be glance:NAME");
    }
    let after = &arguments.source_after;
    if (after.after() != After::Keep || after.copy_members) && !matches!(to, End::Glance(_)) {
        return usage("--delete-source, --replace and --copy-members need a new image in Glance: glance:NAME");
    }
    if after.copy_members && arguments.to_os_cloud.is_some() {
        return usage("--copy-members shares with projects of the source's cloud, which mean nothing in another: leave it out");
    }
    if after.replace && arguments.to_os_cloud.is_some() {
        return usage(
            "--replace puts the new image in the place of the old one, in the same cloud: use --delete-source with --to-os-cloud",
        );
    }
    if arguments.conversion.verify == Some(VerifyChoice::Readback)
        && (matches!(to, End::Stdio) || matches!(to, End::Path(path) if is_forward_only(path)))
    {
        return usage("--verify readback reads back what was made, and a pipe cannot be read back: use --verify hash");
    }
    if matches!(from, End::Path(_)) && arguments.destination == arguments.source {
        return usage("source and destination are one and the same");
    }
    Ok(())
}

/// Whatever deletes an image asks on a terminal, and needs `--yes` elsewhere.
async fn confirm(job: &Job, yes: bool) -> Result<(), JobError> {
    let (After::Delete | After::Replace, Source::Glance { session, image, bytes }) = (job.options.after, &job.source) else {
        return Ok(());
    };
    let who = session.whoami();
    let what = format!(
        "image {} ({}, {}) in cloud {}, project {}",
        image.shown(),
        image.shown_id(),
        size(*bytes),
        who.cloud,
        who.project
    );
    if yes {
        job.reporter.note(&format!("after verification will be deleted: {what}"));
        return Ok(());
    }
    match asked(&format!("After the new image is verified, delete {what}"), &job.cancel).await? {
        Some(true) => Ok(()),
        Some(false) => Err(JobError::Refused("nothing was done: the answer was not yes".to_owned())),
        None => Err(JobError::Usage(format!("{what} would be deleted after verification, and nobody can be asked: add --yes"))),
    }
}

/// The report's file is opened before anything is done, and it is none of the files that matter.
fn check_report(arguments: &ConvertArgs) -> Result<(), JobError> {
    let Some(report) = &arguments.output.report else { return Ok(()) };
    for end in [&arguments.source, &arguments.destination] {
        let path = Path::new(end);
        if path == report || same_file(path, report) || partial_of(path) == *report {
            return Err(JobError::Usage(format!("--report {}: that is the source or the destination", report.display())));
        }
    }
    check_report_file(report)
}
