//! The command line of Virta.

mod batch;
mod bench;
mod clean;
mod cli;
mod complete;
mod conclusion;
mod confirm;
mod convert;
mod demo;
mod display;
mod doctor;
mod download;
mod exit;
mod flags;
mod hints;
mod image;
mod image_names;
mod in_cloud;
mod inspect;
mod leftovers;
mod location;
mod look_inside;
mod receipt;
mod report_file;
mod runs;
mod share;
mod sign_in;
mod signals;
mod snapshot;
mod status;
mod stderr;
mod table;
mod upload;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

fn main() -> ExitCode {
    let code = run();
    stderr::drain(stderr::PATIENT);
    code
}

fn run() -> ExitCode {
    complete::answer_shell(cli::Cli::command);
    let arguments = hints::reordered(std::env::args_os());
    match hints::hint(arguments.clone()) {
        Some(hint) => exit::usage(&hint),
        None => cli::dispatch(cli::Cli::parse_from(arguments)),
    }
}
