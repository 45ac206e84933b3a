//! `virta clean`.

use std::process::ExitCode;

use clap::Args;
use engine::CancelToken;
use stages::{
    batch::Listing,
    error::JobError,
    openstack::{Compute, config::Environment},
    text::counted,
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, ProgressChoice},
    leftovers::{remove_leftovers, restore_server},
    runs::{self, RecordedRun},
    sign_in::sign_in,
    signals::{interruptible, watch_signals},
};

#[derive(Args)]
#[command(after_help = "\
Deletes images that are queued or saving and whose run died on this machine since it was booted, and unfinished ones that a finished conversion of the \
same source has overtaken. All other unfinished images are listed with their age and a command: whether a run elsewhere is making them, only you can know. \
A server that a killed `virta snapshot` had stopped is started again.")]
pub struct CleanArgs {
    #[command(flatten)]
    pub cloud: CloudArgs,
}

/// `virta clean`.
pub async fn clean(arguments: CleanArgs) -> ExitCode {
    let display = Display::start(ProgressChoice::Plain, &stages::progress::Progress::default(), runs::Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let mut dead = runs::dead();
    let environment = Environment::current();
    // the cloud that is chosen, and those that dead runs worked in
    let chosen = arguments.cloud.os_cloud.is_some() || environment.names_a_cloud();
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
        let (here, elsewhere): (Vec<RecordedRun>, Vec<RecordedRun>) =
            dead.into_iter().partition(|found| found.record.cloud == cloud && found.record.project == project);
        dead = elsewhere;
        let flagged = arguments.cloud.os_cloud.clone().or_else(|| cloud.clone().filter(|name| name != "envvars"));
        let flags = CloudArgs { os_cloud: flagged, ..arguments.cloud.clone() };
        let result = async {
            let session = sign_in("cloud", &flags, &environment, &display, &cancel).await?;
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
