//! `virta completions` and `virta man`: what a shell and `man` want to know, out of the command line's own definition.
//!
//! The shell's script asks this program for each completion (`COMPLETE=bash virta -- …`), so that it is never older than the program. Names of images come
//! from Glance if it answers within a second or two; they are kept for a minute in the cache folder, readable for their owner alone.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use clap_complete::env::{CompleteEnv, Shells};

use crate::exit;

/// The variable by which the shell's script asks.
const VARIABLE: &str = "COMPLETE";

#[derive(Args)]
#[command(after_long_help = "\
Examples:
  bash: virta completions bash > ~/.local/share/bash-completion/completions/virta
  zsh:  virta completions zsh > ~/.zfunc/_virta        (with ~/.zfunc in fpath, before compinit)
  fish: virta completions fish > ~/.config/fish/completions/virta.fish
Or for this shell alone: source <(virta completions bash)")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
#[command(after_help = "Examples: virta man convert | man -l -      virta man --dir ~/.local/share/man/man1")]
pub struct ManArgs {
    /// The command whose page is written to stdout, as in `virta man image list` [default: the page of virta itself]
    pub command: Vec<String>,
    /// Write all pages into this folder instead
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub dir: Option<PathBuf>,
}

/// Answers a shell that asks for completions, and ends then.
pub fn answer_shell(command: impl Fn() -> clap::Command) {
    CompleteEnv::with_factory(command).var(VARIABLE).bin("virta").complete();
}

/// `virta completions`.
pub fn completions(arguments: &CompletionsArgs) -> ExitCode {
    let name = match arguments.shell {
        Shell::Bash => "bash",
        Shell::Zsh => "zsh",
        Shell::Fish => "fish",
    };
    let mut script = Vec::new();
    let written = Shells::builtins()
        .completer(name)
        .is_some_and(|shell| shell.write_registration(VARIABLE, "virta", "virta", "virta", &mut script).is_ok());
    if matches!(arguments.shell, Shell::Bash) {
        // bash takes a colon for the end of a word, and glance:NAME is one
        script.extend_from_slice(b"COMP_WORDBREAKS=${COMP_WORDBREAKS//:/}\n");
    }
    match written && std::io::stdout().write_all(&script).is_ok() {
        true => ExitCode::SUCCESS,
        false => exit::usage("the script could not be written to stdout"),
    }
}

/// `virta man`.
pub fn man(arguments: &ManArgs, mut command: clap::Command) -> ExitCode {
    command.build();
    if let Some(folder) = &arguments.dir {
        return match fs::create_dir_all(folder).and_then(|()| write_pages(&command, "virta", folder)) {
            Ok(()) => {
                exit::say(&format!("the pages are in {}: man -l {}", folder.display(), folder.join("virta.1").display()));
                ExitCode::SUCCESS
            }
            Err(error) => {
                exit::say(&format!("virta: the pages could not be written into {}: {error}", folder.display()));
                ExitCode::from(1)
            }
        };
    }
    // `image list`, `image-list` and `virta-image-list` are one page
    let words: Vec<String> = arguments.command.iter().flat_map(|word| word.split('-')).map(str::to_owned).collect();
    let words = words.strip_prefix(&["virta".to_owned()]).unwrap_or(&words);
    let mut page = command;
    for word in words {
        match page.find_subcommand(word) {
            Some(found) => page = found.clone(),
            None => return exit::usage(&format!("there is no command {}: virta help lists them", words.join(" "))),
        }
    }
    if !words.is_empty() {
        page = page.name(format!("virta-{}", words.join("-")));
    }
    let mut text = Vec::new();
    match clap_mangen::Man::new(page).render(&mut text).and_then(|()| std::io::stdout().write_all(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(1),
    }
}

/// A page for the command and each of its own; none for `help`.
fn write_pages(command: &clap::Command, name: &str, folder: &Path) -> std::io::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.to_owned())).render(&mut page)?;
    fs::write(folder.join(format!("{name}.1")), page)?;
    for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
        write_pages(inner, &format!("{name}-{}", inner.get_name()), folder)?;
    }
    Ok(())
}
