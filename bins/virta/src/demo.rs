//! `virta demo`: the whole main job against an image service inside this process. No cloud, nothing left behind.

use std::{io, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use clap::Args;
use engine::CancelToken;
use mini_glance::{Config, MiniGlance, data::Storing};
use serde_json::json;
use stages::{
    convert::{
        self, Job, Options, Report, Source,
        readback::{Target, compare},
    },
    error::JobError,
    openstack::{CloudConfig, CloudFlags, Image, Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    text::size,
};

use crate::{
    conclusion::{proven, summary},
    display::Display,
    exit,
    flags::ProgressChoice,
    runs::Run,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_help = "Takes half a minute to a minute, 400 MB of memory and as much disk in the cache folder.")]
pub struct DemoArgs {
    /// Progress on stderr: auto is bars on a terminal and plain lines elsewhere
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub progress: ProgressChoice,
}

/// Size of the demo's virtual disk.
const DISK_BYTES: u64 = 2 << 30;

/// Threads that compare at the end.
const COMPARERS: usize = 2;

/// Runs the command.
pub async fn run(arguments: DemoArgs) -> ExitCode {
    let progress = Progress::default();
    let display = Display::start(arguments.progress, &progress, Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let result = demo(&progress, &display, &cancel).await;
    display.finish().await;
    match result {
        Ok((report, seconds)) => {
            _ = exit::print(&summary(&report, &proven(&report)));
            _ = exit::print(&format!(
                "proven: read back from the image service, the new image shows a guest the same {} bytes ({seconds:.1} s)",
                report.virtual_bytes
            ));
            _ = exit::print(&time_table(&report));
            _ = exit::print(
                "The image service, both images and the temporary folder are gone.\nOn a cloud: virta convert glance:SNAPSHOT glance:NEW-NAME",
            );
            ExitCode::SUCCESS
        }
        Err(error) => exit::failure(&error, error.exit_code()),
    }
}

async fn demo(progress: &Progress, display: &Display, cancel: &CancelToken) -> Result<(Report, f64), JobError> {
    let failed = |what: &str, error: &dyn std::error::Error| JobError::Refused(format!("{what}: {error}"));
    let config = Config { temporary_in: temporary_folder(), ..Config::default() };
    let service = MiniGlance::start(config).await.map_err(|error| failed("the image service did not start", &error))?;
    display.note(&format!("an image service is up at {}, for this demo alone", service.base()));
    let started = Instant::now();
    let record = json!({
        "name": "my-server-snapshot", "disk_format": "raw", "container_format": "bare", "visibility": "private",
        "image_type": "snapshot", "os_distro": "debian", "hw_disk_bus": "virtio", "min_disk": 2, "tags": ["demo"],
    });
    let stopped = cancel.clone();
    let snapshot = service.add_image(&record, |storing| write_snapshot(storing, &stopped)).map_err(|error| {
        if cancel.is_cancelled() {
            JobError::Interrupted("interrupted".to_owned())
        } else {
            failed("making the snapshot", &error)
        }
    })?;
    display.note(&format!(
        "a raw snapshot of a {} disk is in it (made in {:.1} s)",
        size(DISK_BYTES),
        started.elapsed().as_secs_f64()
    ));

    let folder = service.data_path(&snapshot).and_then(|path| path.parent().map(ToOwned::to_owned)).unwrap_or_default();
    let clouds = folder.join("clouds.yaml");
    std::fs::write(&clouds, service.clouds_yaml()).map_err(|error| failed("writing clouds.yaml", &error))?;
    let environment =
        Environment { env: [("OS_CLIENT_CONFIG_FILE".to_owned(), clouds.display().to_string())].into(), cwd: folder };
    let session = Session::sign_in(CloudConfig::resolve(&CloudFlags::default(), &environment)?).await?;
    display.note("the command on a cloud would be: virta convert glance:my-server-snapshot glance:my-server");
    let source = Source::glance(&session, "my-server-snapshot").await?;
    let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
    let job = Job::new(source, Options::default(), progress, &reporter, cancel);
    let convert::Conversion::Made(report) = convert::to_glance::to_glance(&job, &session, "my-server").await? else {
        return Err(JobError::bug("a new service has the image already"));
    };

    let id = report.destination.trim_start_matches("glance:").to_owned();
    let image = session.image(&id).await?;
    let raw = session.image(&snapshot).await?;
    let started = Instant::now();
    let target = |image: &Image| Target::glance(job.remote(&session, image));
    compare(&target(&raw).await?, &target(&image).await?, COMPARERS, progress, cancel).await?;
    Ok((*report, started.elapsed().as_secs_f64()))
}

/// Where the demo's store goes: the user's cache, which is on a disk more often than /tmp is.
fn temporary_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?.join("virta");
    std::fs::create_dir_all(&cache).ok()?;
    Some(cache)
}

/// A disk like one that a small server leaves: a partition table, a file system's worth of files in clumps, some of them
/// text, some packed, and mostly nothing.
fn write_snapshot(storing: &mut Storing, cancel: &CancelToken) -> io::Result<()> {
    const STEP: usize = 1 << 20;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let text: Vec<u8> = b"ServerName demo; listen 443 ssl; log_level = info # a line of configuration\n"
        .iter()
        .copied()
        .cycle()
        .take(STEP)
        .collect();
    let mut step = vec![0_u8; STEP];
    for number in 0..DISK_BYTES / STEP as u64 {
        if cancel.is_cancelled() {
            return Err(io::Error::other("interrupted"));
        }
        step.fill(0);
        // clumps of block groups, emptier towards the end, as ext4 fills a disk
        let clump = number % 128 < 28 && number < 1500;
        if number == 0 {
            step[..446].iter_mut().for_each(|byte| *byte = next().to_le_bytes()[0]);
            // one Linux partition from sector 2048 on
            let sectors = u32::try_from(DISK_BYTES / 512 - 2048).unwrap_or(u32::MAX);
            step[446..462].copy_from_slice(&[0x80, 0x20, 0x21, 0, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0, 0, 0]);
            step[458..462].copy_from_slice(&sectors.to_le_bytes());
            step[510..512].copy_from_slice(&[0x55, 0xaa]);
        } else if clump {
            match next() % 4 {
                0 => step.copy_from_slice(&text),
                1 => step.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&next().to_le_bytes())),
                // small files: a part of each 16 KiB
                _ => step.chunks_exact_mut(16 << 10).for_each(|file| {
                    let bytes = usize::try_from(next() % (12 << 10)).unwrap_or(0);
                    file[..bytes].copy_from_slice(&text[..bytes]);
                }),
            }
        } else if number % 97 == 0 {
            step[..4096].copy_from_slice(&text[..4096]); // a lonely block: a superblock's copy, a journal's end
        }
        storing.write(&step)?;
    }
    Ok(())
}

/// Where the time went.
fn time_table(report: &Report) -> String {
    let mut lines = vec!["where the time went (seconds of all workers together):".to_owned()];
    lines.push(format!("  {:<10}{:>10}{:>12}{:>20}{:>21}", "stage", "bytes", "busy", "waiting for input", "waiting for output"));
    for stage in &report.stages {
        lines.push(format!(
            "  {:<10}{:>10}{:>12.2}{:>20.2}{:>21.2}",
            stage.name,
            size(stage.bytes),
            stage.busy_s,
            stage.blocked_on_input_s,
            stage.blocked_on_output_s
        ));
    }
    lines.join("\n")
}
