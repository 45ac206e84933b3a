//! `virta doctor`: a first look that changes nothing.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use engine::CancelToken;
use serde_json::{Value, json};
use stages::{
    budget,
    disk::{IoMode, choose_backend},
    error::JobError,
    glance::ImageFile,
    openstack::{Compute, Image, Session, config::Environment},
    ownership::{Proof, is_conversion},
    progress::Progress,
    text::{causes, counted, printable, shell_word, size},
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, InspectFormat, ProgressChoice, chosen_cloud},
    look_inside::{in_glance, quiet_remote},
    runs::{self, Run},
    sign_in::sign_in,
    signals::watch_signals,
};

/// All of it takes less than 5 s: what has not answered by then is said not to have.
const PATIENCE: Duration = Duration::from_millis(4500);

/// Images from which on ranges make a difference, and can be told from a sequential reading.
const PROBE_BYTES_MIN: u64 = 64 << 10;

/// Snapshots that are listed.
const LISTED_MAX: usize = 10;

#[derive(Args)]
#[command(after_help = "\
Changes nothing, and takes less than 5 seconds. The first command after signing in: what is here, what is in the cloud, what to type next.
Exit status: 0 signed in, 1 could not, 2 the configuration does not say where.")]
pub struct DoctorArgs {
    /// What is printed on stdout
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: InspectFormat,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

/// What was found, for people and for programs at once.
#[derive(Default)]
struct Findings {
    lines: Vec<String>,
    json: serde_json::Map<String, Value>,
}

impl Findings {
    fn say(&mut self, what: &str, line: impl AsRef<str>) {
        self.lines.push(format!("{what:<14} {}", printable(line.as_ref())));
    }

    fn keep(&mut self, key: &str, value: Value) {
        self.json.insert(key.to_owned(), value);
    }
}

/// Runs the command.
pub async fn run(arguments: DoctorArgs) -> ExitCode {
    let display = Display::start(ProgressChoice::None, &Progress::default(), Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let mut found = Findings::default();
    here(&mut found);
    let result = cloud(&arguments, &mut found, &display, &cancel).await;
    display.finish().await;
    if let Err(error) = &result {
        found.say("cloud", "not signed in: see below");
        found.keep("error", json!(causes(error)));
    }
    let written = match arguments.format {
        InspectFormat::Table => found.lines.iter().all(|line| exit::show(line)),
        InspectFormat::Json => exit::show(&serde_json::to_string_pretty(&found.json).unwrap_or_default()),
    };
    match result {
        Ok(()) => exit::shown(written),
        Err(error) => exit::failure(&error, error.exit_code()),
    }
}

/// This machine.
fn here(found: &mut Findings) {
    found.say("virta", env!("CARGO_PKG_VERSION"));
    found.keep("version", json!(env!("CARGO_PKG_VERSION")));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = budget::default_memory_bytes();
    let available = budget::available_bytes();
    found.say(
        "this machine",
        format!(
            "{}, {} for data unless --memory says otherwise{}",
            counted(cores, "core"),
            size(memory),
            available.map(|bytes| format!(" ({} is free)", size(bytes))).unwrap_or_default()
        ),
    );
    let folder = std::env::current_dir().unwrap_or_default();
    let disk = rustix::fs::statvfs(&folder).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    // tried with a real write, which has no business in the user's folder
    let io = match choose_backend(IoMode::Auto, &std::env::temp_dir()) {
        Ok(stages::disk::Backend::Uring) => "io_uring",
        _ => "pwrite",
    };
    found.say(
        "this folder",
        format!("{} free, written with {io}; no scratch disk is needed", disk.map_or_else(|| "?".to_owned(), size)),
    );
    let state = runs::state_folder().is_some_and(|folder| {
        let there = folder.ancestors().find(|folder| folder.exists());
        there.is_some_and(|folder| rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok())
    });
    if !state {
        found.say("", "! the state folder cannot be written: no receipts, and nothing that cleans up after a kill");
    }
    found.keep(
        "machine",
        json!({ "cores": cores, "memory_bytes": memory, "available_bytes": available, "free_disk_bytes": disk, "io": io, "state_folder": state }),
    );
    let dead = runs::dead().len();
    if dead > 0 {
        found.say("", format!("! {} left something behind: virta clean", counted(dead, "killed run")));
    }
    found.keep("killed_runs", json!(dead));
}

async fn cloud(arguments: &DoctorArgs, found: &mut Findings, display: &Display, cancel: &CancelToken) -> Result<(), JobError> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let environment = Environment::current();
    let signing_in = sign_in("cloud", &arguments.cloud, &environment, display, cancel);
    let session = match tokio::time::timeout_at(deadline, signing_in).await {
        Ok(session) => session?,
        Err(_) => {
            return Err(JobError::Refused(format!(
                "signing in took longer than {} s: is the identity service reachable from here?",
                PATIENCE.as_secs_f32()
            )));
        }
    };
    let who = session.whoami();
    let region = who.region.as_ref().map(|region| format!(", region {region}")).unwrap_or_default();
    found.say("cloud", format!("{}{region}, project {}, user {}", who.cloud, who.project, who.user));
    found.keep("cloud", json!({ "name": who.cloud, "region": who.region, "project": who.project, "project_id": who.project_id, "user": who.user }));
    let looking = async {
        let (credential, quota, compute, images) = tokio::join!(
            session.credential(),
            session.quota_left_bytes(),
            Compute::connect(&session),
            session.images_matching(&[("limit", "1000")])
        );
        let (kind, end) = credential;
        found.say(
            "credential",
            match &end {
                Some(end) => format!("{kind}, good until {end}"),
                None => format!("{kind}, with no end that is told; tokens are renewed on the way"),
            },
        );
        found.keep("credential", json!({ "kind": kind, "expires_at": end }));
        found.say(
            "quota",
            match quota {
                Some(left) => format!("{} left for images", size(left)),
                None => "not told, or no limit: a full one shows when an image is sent".to_owned(),
            },
        );
        found.keep("quota_left_bytes", json!(quota));
        found.say(
            "servers",
            match &compute {
                Ok(_) => "snapshots can be made: virta snapshot SERVER NAME".to_owned(),
                Err(error) => causes(error),
            },
        );
        found.keep("compute", json!(compute.is_ok()));
        match images {
            Ok(images) => look_at_images(&session, &images, &chosen_cloud(&arguments.cloud), found, cancel).await,
            Err(error) => found.say("images", format!("! could not be listed: {}", causes(&error))),
        }
    };
    if tokio::time::timeout_at(deadline, looking).await.is_err() {
        found.say("", format!("! the rest did not answer within {} s", PATIENCE.as_secs_f32()));
        found.keep("timed_out", json!(true));
    }
    Ok(())
}

async fn look_at_images(session: &Session, images: &[Image], cloud: &str, found: &mut Findings, cancel: &CancelToken) {
    let own = session.whoami().project_id.clone();
    let mine: Vec<&Image> = images.iter().filter(|image| image.owner == own && image.status == "active").collect();
    let converted = |image: &Image| images.iter().find(|made| is_conversion(session, made, image, Proof::Hash));
    let is_raw = |image: &&&Image| image.disk_format.as_deref() == Some("raw") && image.size.unwrap_or(0) > 0;
    let mut raw: Vec<&Image> = mine.iter().filter(is_raw).copied().collect();
    raw.sort_by_key(|image| std::cmp::Reverse(image.size));
    let bytes = |images: &[&Image]| images.iter().map(|image| image.size.unwrap_or(0)).sum::<u64>();
    found.say(
        "images",
        format!(
            "{} of this project, {}; {} of them raw, {}",
            counted(mine.len(), "image"),
            size(bytes(&mine)),
            raw.len(),
            size(bytes(&raw))
        ),
    );
    let hashed = mine.iter().filter(|image| image.expected_hash().is_some()).count();
    found.say("hashes", match (mine.len(), hashed) {
        (0, _) => "nothing to tell by yet".to_owned(),
        (all, hashed) if all == hashed => "Glance has one of every image: what is read is checked against it".to_owned(),
        (all, hashed) => format!("Glance has one of {hashed} of {all}: the others cannot be checked against one (--verify readback compares them with themselves)"),
    });
    found.keep(
        "images",
        json!({ "count": mine.len(), "bytes": bytes(&mine), "raw": raw.len(), "raw_bytes": bytes(&raw), "with_hash": hashed }),
    );

    let progress = Progress::default();
    let probed = mine.iter().filter(|image| image.size.unwrap_or(0) >= PROBE_BYTES_MIN).max_by_key(|image| image.size);
    let candidate = raw.iter().find(|image| converted(image).is_none());
    let (ranges, inside) = tokio::join!(
        async {
            let image = probed?;
            ImageFile::serves_ranges(&quiet_remote(session, image, &progress, cancel)).await.ok().flatten()
        },
        async { in_glance(session, candidate?, &progress, cancel).await.ok() }
    );
    found.say(
        "ranges",
        match ranges {
            Some(true) => "served: downloads go over several connections, and can be resumed",
            Some(false) => "not served: downloads are one stream each (as on Ceph); everything works, less in parallel",
            None => "there is no image here to tell by",
        },
    );
    found.keep("ranges", json!(ranges));

    let listed: Vec<Value> = raw
        .iter()
        .take(LISTED_MAX)
        .map(|image| json!({ "id": image.id, "name": image.name, "size": image.size, "converted_to": converted(image).map(|made| &made.id) }))
        .collect();
    for image in raw.iter().take(LISTED_MAX) {
        let state = match converted(image) {
            Some(made) => format!("converted: {} ({})", made.shown(), size(made.size.unwrap_or(0))),
            None => "raw".to_owned(),
        };
        found.say("", format!("{:>10}  {}  {state}", size(image.size.unwrap_or(0)), image.shown()));
    }
    if raw.len() > LISTED_MAX {
        found.say("", format!("and {} more: virta image list --disk-format raw", raw.len() - LISTED_MAX));
    }
    found.keep("raw_images", Value::Array(listed));
    if let (Some(image), Some(inside)) = (candidate, &inside) {
        let used = inside.predicted.and_then(|predicted| predicted.without_free_bytes);
        let systems: Vec<&str> = inside.systems.iter().filter_map(|system| system.system.name.as_deref()).collect();
        found.say(
            "largest raw",
            format!(
                "{}: {}{}",
                image.shown(),
                if systems.is_empty() { "no system that is known here".to_owned() } else { systems.join(", ") },
                used.map(|used| format!("; its file systems use {} of {}", size(used), size(image.size.unwrap_or(0))))
                    .unwrap_or_default()
            ),
        );
        found.keep("largest", json!({ "id": image.id, "systems": systems, "used_bytes": used }));
    }
    let next = next(cloud, candidate.copied(), &raw, converted);
    found.say("next", &next);
    found.keep("next", json!(next));
}

/// The command to type now.
fn next<'a>(cloud: &str, candidate: Option<&Image>, raw: &[&Image], converted: impl Fn(&Image) -> Option<&'a Image>) -> String {
    let done = raw.iter().find(|image| converted(image).is_some());
    match (candidate, done) {
        (Some(image), _) => {
            let name = image.name.as_deref().filter(|name| !name.is_empty()).unwrap_or("my-image");
            format!("virta convert {cloud}glance:{} {}", image.shown_id(), shell_word(&format!("glance:{name}-qcow2")))
        }
        (None, Some(image)) => {
            format!("when you have booted from the converted one: virta image delete {cloud}{}", image.shown_id())
        }
        (None, None) => {
            "no raw image waits. To make one: virta snapshot --convert SERVER NAME; to try it without a cloud: virta demo"
                .to_owned()
        }
    }
}
