//! The command line of Virta.

mod batch;
mod bench;
mod care;
mod cli;
mod complete;
mod convert;
mod demo;
mod display;
mod doctor;
mod download;
mod exit;
mod habits;
mod image;
mod inspect;
mod receipt;
mod runs;
mod share;
mod sign_in;
mod snapshot;
mod status;
mod stderr;
mod table;
mod upload;
mod verify;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let code = run();
    stderr::drain(stderr::PATIENT);
    code
}

fn run() -> ExitCode {
    complete::answer_shell();
    let arguments = habits::reordered(std::env::args_os());
    if let Some(hint) = habits::hint(arguments.clone()) {
        return exit::usage(&hint);
    }
    let cli = match cli::Cli::parse_from(arguments).command {
        cli::Command::Completions(arguments) => return complete::completions(&arguments),
        cli::Command::Man(arguments) => return complete::man(&arguments),
        command => command,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failure(&error, 1),
    };
    let outcome = runtime.block_on(async {
        match cli {
            // done above, without a runtime
            cli::Command::Completions(_) | cli::Command::Man(_) => ExitCode::SUCCESS,
            cli::Command::Convert(arguments) => convert::run(*arguments).await,
            cli::Command::Verify(arguments) => verify::run(arguments).await,
            cli::Command::Batch(arguments) => batch::run(*arguments).await,
            cli::Command::Bench(arguments) => bench::run(*arguments).await,
            cli::Command::Snapshot(arguments) => snapshot::run(*arguments).await,
            cli::Command::Upload(arguments) => upload::run(*arguments).await,
            cli::Command::Download(arguments) => download::run(*arguments).await,
            cli::Command::Inspect(arguments) => inspect::run(arguments).await,
            cli::Command::Doctor(arguments) => doctor::run(arguments).await,
            cli::Command::Image(command) => image::run(command).await,
            cli::Command::Share(arguments) => share::share(arguments).await,
            cli::Command::Unshare(arguments) => share::unshare(arguments).await,
            cli::Command::Members(arguments) => share::members(arguments).await,
            cli::Command::Accept(arguments) => share::answer(arguments, "accepted").await,
            cli::Command::Reject(arguments) => share::answer(arguments, "rejected").await,
            cli::Command::Status(arguments) => status::status(arguments).await,
            cli::Command::Clean(arguments) => status::clean(arguments).await,
            cli::Command::Demo(arguments) => demo::run(arguments).await,
        }
    });
    // A name lookup or a connection that is still closing must not hold the exit up.
    runtime.shutdown_background();
    outcome
}
