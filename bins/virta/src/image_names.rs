//! Names of images, for a shell that completes them.

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter};
use stages::{
    openstack::{CloudConfig, CloudFlags, Session, config::Environment},
    whole_file::write_whole,
};

/// A completion that takes longer is worse than none.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// How long names are believed.
pub const FRESH: Duration = Duration::from_secs(60);

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

pub fn names_with(current: &OsStr, prefix: &str) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    let names = names().unwrap_or_default();
    let matching = names.iter().filter(|name| name.starts_with(&*current));
    matching.map(|name| CompletionCandidate::new(format!("{prefix}{name}"))).collect()
}

/// Names of the images of the chosen cloud, if they can be had quickly and nobody has to be asked for a password.
pub fn names() -> Option<Vec<String>> {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let after = |flag: &str| words.iter().position(|word| word == flag).and_then(|at| words.get(at + 1).cloned());
    let flags = CloudFlags { cloud: after("--os-cloud"), region_name: after("--os-region-name"), ..CloudFlags::default() };
    let cloud = CloudConfig::resolve(&flags, &Environment::current()).ok()?;
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

pub fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    Some(cache.or_else(|| Some(set("HOME")?.join(".cache")))?.join("virta"))
}

pub fn kept(path: &Path) -> Option<Vec<String>> {
    let age = fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()?;
    let text = fs::read_to_string(path).ok().filter(|_| age < FRESH)?;
    Some(text.lines().map(str::to_owned).collect())
}

pub fn keep(path: &Path, names: &[String]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    write_whole(path, names.iter().map(|name| format!("{name}\n")).collect::<String>().as_bytes(), false)
}
