//! What can be typed, and which command does it.

use clap::{CommandFactory, Parser, Subcommand};

use std::process::ExitCode;

use crate::{
    batch,
    batch::BatchArgs,
    bench,
    bench::BenchArgs,
    clean,
    clean::CleanArgs,
    complete,
    complete::{CompletionsArgs, ManArgs},
    convert,
    convert::ConvertArgs,
    demo,
    demo::DemoArgs,
    doctor,
    doctor::DoctorArgs,
    download,
    download::DownloadArgs,
    exit, image,
    image::ImageCommand,
    inspect,
    inspect::InspectArgs,
    share,
    share::{AnswerArgs, MembersArgs, ShareArgs, UnshareArgs},
    snapshot,
    snapshot::SnapshotArgs,
    status,
    status::StatusArgs,
    upload,
    upload::UploadArgs,
    verify,
    verify::VerifyArgs,
};

/// Converts OpenStack snapshot images to compact qcow2 while they stream past: no scratch disk, nothing done twice.
#[derive(Parser)]
#[command(name = "virta", version, max_term_width = 110)]
#[command(after_help = "Try it without a cloud: virta demo\nHelp on a command: virta help convert")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// A first look that changes nothing: cloud, quota, ranges, raw images, and what to type next
    Doctor(DoctorArgs),
    /// Convert a raw image to qcow2: from Glance, a file or a pipe, to Glance, a file or a pipe
    Convert(Box<ConvertArgs>),
    /// Convert many: a list, or all snapshots; the same command goes on after a kill
    Batch(Box<BatchArgs>),
    /// Make an image of a server: stop it, take the snapshot, start it again; --convert goes on to qcow2
    Snapshot(Box<SnapshotArgs>),
    /// Put a disk image or an ISO into Glance: checked first, a raw one becomes qcow2 on the way
    Upload(Box<UploadArgs>),
    /// Get an image as it is: hash checked, zeros as holes, --resume
    Download(Box<DownloadArgs>),
    /// What is in an image: format, partitions, file systems, used and free, and whether it is ready for a cloud
    Inspect(InspectArgs),
    /// Do two images show a guest the same bytes? Files or images in Glance, raw or qcow2
    Verify(VerifyArgs),
    /// Look after images: list, show, set, delete
    #[command(subcommand)]
    Image(ImageCommand),
    /// Share an image with other projects, by their ids
    Share(ShareArgs),
    /// Take the sharing back
    Unshare(UnshareArgs),
    /// Projects that an image is shared with, and what they answered
    Members(MembersArgs),
    /// Accept an image that another project shares with this one
    Accept(AnswerArgs),
    /// Turn down an image that another project shares with this one
    Reject(AnswerArgs),
    /// What this machine, this disk and this Glance can do, and what a conversion here would take
    Bench(Box<BenchArgs>),
    /// Runs of this user on this machine, running and past; --follow finds one again whose terminal went away
    Status(StatusArgs),
    /// Take back what killed runs of this machine left: half-made images, stopped servers
    Clean(CleanArgs),
    /// A script by which a shell completes commands, flags, files and names of images
    Completions(CompletionsArgs),
    /// Manual pages
    Man(ManArgs),
    /// See it work: the main job against an image service inside this process; no cloud, nothing left behind
    Demo(DemoArgs),
}

/// Does what was typed.
pub fn dispatch(cli: Cli) -> ExitCode {
    let command = match cli.command {
        Command::Completions(arguments) => return complete::completions(&arguments),
        Command::Man(arguments) => return complete::man(&arguments, Cli::command()),
        command => command,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failure(&error, 1),
    };
    let outcome = runtime.block_on(async {
        match command {
            // done above, without a runtime
            Command::Completions(_) | Command::Man(_) => ExitCode::SUCCESS,
            Command::Convert(arguments) => convert::run(*arguments).await,
            Command::Verify(arguments) => verify::run(arguments).await,
            Command::Batch(arguments) => batch::run(*arguments).await,
            Command::Bench(arguments) => bench::run(*arguments).await,
            Command::Snapshot(arguments) => snapshot::run(*arguments).await,
            Command::Upload(arguments) => upload::run(*arguments).await,
            Command::Download(arguments) => download::run(*arguments).await,
            Command::Inspect(arguments) => inspect::run(arguments).await,
            Command::Doctor(arguments) => doctor::run(arguments).await,
            Command::Image(command) => image::run(command).await,
            Command::Share(arguments) => share::share(arguments).await,
            Command::Unshare(arguments) => share::unshare(arguments).await,
            Command::Members(arguments) => share::members(arguments).await,
            Command::Accept(arguments) => share::answer(arguments, "accepted").await,
            Command::Reject(arguments) => share::answer(arguments, "rejected").await,
            Command::Status(arguments) => status::status(arguments).await,
            Command::Clean(arguments) => clean::clean(arguments).await,
            Command::Demo(arguments) => demo::run(arguments).await,
        }
    });
    // A name lookup or a connection that is still closing must not hold the exit up.
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
