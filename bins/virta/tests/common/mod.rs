//! What the tests against mini-glance share.
#![allow(clippy::unwrap_used, dead_code, missing_docs)] // a panic is how a test fails; no test uses all of it

use std::{
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use mini_glance::{Config, Faults, MiniGlance};
use serde_json::{Value, json};
use stages::qcow2::{Qcow2, verify};
use tokio::process::{Child, Command};

pub const MIB: usize = 1 << 20;

/// A raw disk of `mib` MiB and a bit: boot sector, data in clumps, mostly zeros, an odd end.
pub fn raw_disk(mib: usize) -> Vec<u8> {
    let mut raw = vec![0_u8; mib * MIB + 1536];
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut fill = |part: &mut [u8]| {
        for word in part.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    };
    fill(&mut raw[..440]);
    raw[510..512].copy_from_slice(&[0x55, 0xaa]);
    for start in (MIB..mib * MIB).step_by(5 * MIB) {
        fill(&mut raw[start + 77..start + MIB + MIB / 2]);
    }
    let end = raw.len();
    fill(&mut raw[end - 700..]);
    raw
}

/// An image service with a snapshot in it, and a place to run in.
pub struct Cloud {
    pub service: MiniGlance,
    pub folder: tempfile::TempDir,
    pub raw: Vec<u8>,
    pub snapshot: String,
}

pub fn snapshot_record(name: &str) -> Value {
    json!({
        "name": name, "disk_format": "raw", "container_format": "bare", "visibility": "private", "min_ram": 512, "tags": ["web"],
        "image_type": "snapshot", "os_distro": "debian", "hw_disk_bus": "virtio", "img_signature": "old", "image_location": "snapshot",
    })
}

impl Cloud {
    pub async fn start_with(mib: usize, config: Config, faults: impl FnOnce(&mut Faults)) -> Self {
        let service = MiniGlance::start(config).await.unwrap();
        service.faults(faults);
        let raw = raw_disk(mib);
        let snapshot = service.add_image(&snapshot_record("snap"), |storing| storing.write(&raw)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("clouds.yaml"), service.clouds_yaml()).unwrap();
        Self { service, folder, raw, snapshot }
    }

    pub async fn start(faults: impl FnOnce(&mut Faults)) -> Self {
        Self::start_with(48, Config::default(), faults).await
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virta"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path().join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    pub async fn run(&self, arguments: &[&str]) -> Run {
        let started = Instant::now();
        let output = self.command(arguments).output().await.unwrap();
        Run::new(output, started.elapsed())
    }

    /// `virta convert glance:snap glance:compact` with a report.
    pub async fn convert(&self, flags: &[&str]) -> Run {
        let mut arguments = vec!["convert", "glance:snap", "glance:compact", "--report", "report.json"];
        arguments.extend(flags);
        self.run(&arguments).await
    }

    pub fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.path().join("report.json")).unwrap()).unwrap()
    }

    /// Images that are not the snapshot.
    pub fn others(&self) -> Vec<Value> {
        self.service.images().into_iter().filter(|image| image["id"] != self.snapshot.as_str()).collect()
    }

    /// The one new image is active, verified, and shows a guest the snapshot's bytes.
    pub fn assert_converted(&self) -> Value {
        let mut others = self.others();
        assert_eq!(others.len(), 1, "{others:?}");
        let image = others.remove(0);
        assert_eq!(image["status"], "active");
        assert!(image["virta_verified"].as_str().is_some(), "{image}");
        assert_eq!(image["virta_source_id"], self.snapshot.as_str());
        self.assert_is_the_disk(&self.service.data_path(image["id"].as_str().unwrap()).unwrap());
        assert!(self.service.images().iter().any(|image| image["id"] == self.snapshot.as_str()), "the source is still there");
        image
    }

    pub fn assert_is_the_disk(&self, path: &Path) {
        let image = Qcow2::open(std::fs::File::open(path).unwrap()).unwrap();
        let mut guest = vec![0xff; usize::try_from(image.virtual_bytes()).unwrap()];
        image.read_guest(0, &mut guest).unwrap();
        assert!(guest[..self.raw.len()] == *self.raw && guest.len() - self.raw.len() < 512, "guest bytes differ");
        assert_eq!(verify::check(&image).unwrap().leaked_clusters, 0);
    }

    pub fn assert_nothing_made(&self) {
        assert_eq!(self.others(), Vec::<Value>::new());
    }

    pub fn posts(&self) -> usize {
        self.service.requests().iter().filter(|request| request.starts_with("POST /v2/images")).count()
    }

    pub fn gets_of_data(&self) -> (usize, usize) {
        let requests = self.service.requests();
        let gets = requests.iter().filter(|request| request.starts_with("GET") && request.contains("/file"));
        let (ranged, plain): (Vec<_>, Vec<_>) = gets.partition(|request| request.contains("bytes="));
        (plain.len(), ranged.len())
    }
}

pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

impl Run {
    pub fn new(output: Output, elapsed: Duration) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            elapsed,
        }
    }

    #[track_caller]
    pub fn ends(&self, code: i32, texts: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "stderr: {}\nstdout: {}", self.stderr, self.stdout);
        for text in texts {
            assert!(self.stderr.contains(text) || self.stdout.contains(text), "no {text:?} in: {}\n{}", self.stderr, self.stdout);
        }
        self
    }
}

pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Waits until a request of this kind has been seen.
pub async fn seen(service: &MiniGlance, what: &str) {
    seen_behind(service, 0, what, 1, Duration::from_secs(15)).await;
}

/// Waits until `times` requests that start with `what` have come behind the first `since`.
pub async fn seen_behind(service: &MiniGlance, since: usize, what: &str, times: usize, within: Duration) {
    let deadline = Instant::now() + within;
    while service.requests()[since..].iter().filter(|request| request.starts_with(what)).count() < times {
        assert!(Instant::now() < deadline, "not {times} of {what} within {within:?}: {:?}", &service.requests()[since..]);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
