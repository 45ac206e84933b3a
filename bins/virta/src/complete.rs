//! `virta completions` and `virta man`: what a shell and `man` want to know, out of the command line's own definition.
//!
//! The shell's script asks this program for each completion (`COMPLETE=bash virta -- …`), so that it is never older than the program. Names of images come
//! from Glance if it answers within [`PATIENCE`]; they are kept for [`FRESH`] in the cache folder, readable for their owner alone.

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{
    engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter},
    env::{CompleteEnv, Shells},
};
use stages::openstack::{CloudConfig, CloudFlags, Session, config::Surroundings};

use crate::{cli::Cli, exit};

/// A completion that takes longer is worse than none.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long names are believed.
const FRESH: Duration = Duration::from_secs(60);
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
pub fn answer_shell() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).bin("virta").complete();
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
pub fn man(arguments: &ManArgs) -> ExitCode {
    let mut command = Cli::command();
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

/// Completes names of images.
pub fn image_names() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| names_with(current, ""))
}

/// Completes paths, and `glance:NAME`.
pub fn path_or_image() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let text = current.to_string_lossy();
        match text.strip_prefix("glance:") {
            Some(name) => names_with(OsStr::new(name), "glance:"),
            None => {
                let mut found = PathCompleter::any().stdio().complete(current);
                if "glance:".starts_with(&*text) && !text.is_empty() {
                    found.push(CompletionCandidate::new("glance:"));
                }
                found
            }
        }
    })
}

fn names_with(current: &OsStr, prefix: &str) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    let names = names().unwrap_or_default();
    let matching = names.iter().filter(|name| name.starts_with(&*current));
    matching.map(|name| CompletionCandidate::new(format!("{prefix}{name}"))).collect()
}

/// Names of the images of the chosen cloud, if they can be had quickly and nobody has to be asked for a password.
fn names() -> Option<Vec<String>> {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let after = |flag: &str| words.iter().position(|word| word == flag).and_then(|at| words.get(at + 1).cloned());
    let flags = CloudFlags { cloud: after("--os-cloud"), region_name: after("--os-region-name"), ..CloudFlags::default() };
    let cloud = CloudConfig::resolve(&flags, &Surroundings::current()).ok()?;
    if cloud.wants_password_of().is_some() {
        return None;
    }
    let mut key = DefaultHasher::new();
    format!("{} {} {:?} {:?}", cloud.name, cloud.auth_url, cloud.project, cloud.region_name).hash(&mut key);
    let path = cache_folder()?.join(format!("names-{:016x}", key.finish()));
    if let Some(names) = kept(&path) {
        return Some(names);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let asking = async {
        let session = Session::sign_in(cloud).await.ok()?;
        let images = session.images_matching(&[("limit", "1000")]).await.ok()?;
        Some(images.into_iter().filter_map(|image| image.name).collect::<Vec<_>>())
    };
    let names = runtime.block_on(async { tokio::time::timeout(PATIENCE, asking).await }).ok().flatten();
    runtime.shutdown_background();
    let mut names = names?;
    // one with a line break is none that could be kept a line each, or typed
    names.retain(|name| !name.is_empty() && !name.contains(char::is_control));
    names.sort();
    names.dedup();
    let _ = keep(&path, &names);
    Some(names)
}

fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    Some(cache.or_else(|| Some(set("HOME")?.join(".cache")))?.join("virta"))
}

fn kept(path: &Path) -> Option<Vec<String>> {
    let age = fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()?;
    let text = fs::read_to_string(path).ok().filter(|_| age < FRESH)?;
    Some(text.lines().map(str::to_owned).collect())
}

fn keep(path: &Path, names: &[String]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let new = folder.join(format!("names-{}.new", std::process::id()));
    let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    names.iter().try_for_each(|name| writeln!(file, "{name}"))?;
    fs::rename(new, path)
}
