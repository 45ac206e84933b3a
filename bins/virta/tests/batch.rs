//! `virta batch` against mini-glance: many images, faults, kills at every request, two at once, engines.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use common::{MIB, Run, seen, signal};
use jiff::{SignedDuration, Timestamp};
use mini_glance::{
    Config, Faults, MiniGlance,
    identity::{OTHER_PROJECT_ID, PROJECT_ID},
};
use serde_json::{Value, json};
use stages::{
    ownership::{Content, Family},
    qcow2::{Qcow2, verify},
};
use tokio::process::Command;

/// A snapshot of this user's, whose bytes follow from its name and size.
fn record(name: &str) -> Value {
    json!({
        "name": name, "disk_format": "raw", "container_format": "bare", "visibility": "private", "image_type": "snapshot",
        "user_id": "demo", "instance_uuid": "11111111-2222-3333-4444-555555555555",
    })
}

/// A disk of so many bytes: noise that follows from the seed in clumps, zeros between.
fn disk(seed: u64, bytes: usize) -> Vec<u8> {
    let mut raw = vec![0_u8; bytes];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for start in (0..bytes).step_by(4 * MIB) {
        let end = (start + 300_000).min(bytes);
        for word in raw[start..end].chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    }
    raw
}

struct Place {
    service: MiniGlance,
    folder: tempfile::TempDir,
    /// The disks' bytes: seed and size, by the source's id.
    disks: BTreeMap<String, (u64, usize)>,
}

impl Place {
    async fn start(config: Config, faults: impl FnOnce(&mut Faults)) -> Self {
        let service = MiniGlance::start(config).await.unwrap();
        service.faults(faults);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("clouds.yaml"), service.clouds_yaml()).unwrap();
        Self { service, folder, disks: BTreeMap::new() }
    }

    fn add(&mut self, name: &str, seed: u64, bytes: usize) -> String {
        let raw = disk(seed, bytes);
        let id = self.service.add_image(&record(name), |storing| storing.write(&raw)).unwrap();
        self.disks.insert(id.clone(), (seed, bytes));
        id
    }

    /// What a run on another machine has begun: the first of the family, `queued`, with a claim of so many seconds from now on.
    fn leave_queued(&self, source: &str, name: &str, run: &Value, claim_s: u64) -> String {
        let mut left = record(&format!("{name} (unfinished)"));
        left["id"] = json!(member(source, name, 0));
        left["disk_format"] = json!("qcow2");
        left["virta_source_id"] = json!(source);
        left["virta_run"] = run.clone();
        left["virta_claim_s"] = json!(claim_s.to_string());
        let left = self.service.add_image(&left, |storing| storing.write(b"")).unwrap();
        self.service.set(&left, "status", json!("queued"));
        self.service.set(&left, "size", Value::Null);
        left
    }

    /// `virta batch`, on a machine of this name: its state folder.
    fn command(&self, machine: &str, arguments: &[&str]) -> Command {
        let mut command = self.clean(env!("CARGO_BIN_EXE_virta"));
        command.arg("batch").args(arguments).env("XDG_STATE_HOME", self.folder.path().join(machine));
        command
    }

    /// A program that knows no other cloud than this one.
    fn clean(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.folder.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path().join("here"))
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Run {
        let started = Instant::now();
        Run::new(self.command("here", arguments).output().await.unwrap(), started.elapsed())
    }

    fn image(&self, id: &str) -> Option<Value> {
        self.service.images().into_iter().find(|image| image["id"] == id)
    }

    /// The one finished conversion of each source; everything else that names a source as its own is trash.
    fn conversions(&self) -> BTreeMap<String, Value> {
        let mut found = BTreeMap::new();
        for image in self.service.images() {
            if let Some(source) = image["virta_source_id"].as_str() {
                let twice = found.insert(source.to_owned(), image.clone());
                assert!(twice.is_none(), "two images of {source}: {twice:?} {image}");
                assert_eq!(image["status"], "active", "{image}");
                assert!(image["virta_verified"].is_string(), "{image}");
                assert!(image["virta_claim_s"].is_null() && image["protected"] == false, "a claim is left: {image}");
            }
        }
        found
    }

    /// A conversion shows a guest what its source showed.
    fn assert_shows(&self, source: &str, made: &Value) {
        let (seed, bytes) = self.disks[source];
        let image =
            Qcow2::open(std::fs::File::open(self.service.data_path(made["id"].as_str().unwrap()).unwrap()).unwrap()).unwrap();
        assert_eq!(verify::check(&image).unwrap().leaked_clusters, 0);
        assert_eq!(image.virtual_bytes(), u64::try_from(bytes.next_multiple_of(512)).unwrap());
        let raw = disk(seed, bytes);
        let mut guest = vec![0xff; 8 * MIB];
        for start in (0..bytes).step_by(guest.len()) {
            let part = &mut guest[..(bytes - start).min(8 * MIB)];
            image.read_guest(u64::try_from(start).unwrap(), part).unwrap();
            assert!(*part == raw[start..start + part.len()], "{source}: guest bytes differ");
        }
    }

    /// All sources are converted, once; `gone`: and deleted.
    fn assert_all_converted(&self, gone: bool) {
        let made = self.conversions();
        for source in self.disks.keys() {
            self.assert_shows(source, made.get(source).unwrap_or_else(|| panic!("{source} was not converted")));
            assert_eq!(self.image(source).is_none(), gone, "{source}");
        }
        assert_eq!(made.len(), self.disks.len());
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.path().join("report.json")).unwrap()).unwrap()
    }
}

/// The id of a generation of a conversion's family.
fn member(source: &str, name: &str, generation: u8) -> String {
    Family::of_image(source, PROJECT_ID, name, Content::Exact).id(generation)
}

/// A run of another machine.
const ELSEWHERE: &str = "0a0a0a0a-0000-0000-0000-000000000000";

fn outcomes(report: &Value) -> BTreeMap<String, String> {
    let items = report["items"].as_array().unwrap().iter();
    items.map(|item| (item["word"].as_str().unwrap().to_owned(), item["outcome"].as_str().unwrap().to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_image_gets_its_answer_and_the_same_command_again_does_nothing_twice() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    for (seed, name) in [(1, "web"), (2, "db"), (3, "mail")] {
        place.add(name, seed, 9 * MIB + 512);
    }
    let qcow2 = place
        .service
        .add_image(&json!({ "name": "done", "disk_format": "qcow2", "container_format": "bare" }), |s| s.write(b"QFI\xfb"))
        .unwrap();
    let empty = place
        .service
        .add_image(&json!({ "name": "empty", "disk_format": "raw", "container_format": "bare" }), |_| Ok(()))
        .unwrap();
    let volume =
        json!({ "name": "volume", "disk_format": "raw", "container_format": "bare", "block_device_mapping": "[{\"x\":1}]" });
    place.service.add_image(&volume, |_| Ok(())).unwrap();
    let words = ["web", "db", "mail", "done", "empty", "volume", "nothing-of-that-name", "web"];
    let mut arguments = words.to_vec();
    arguments.extend(["--report", "report.json"]);
    let run = place.run(&arguments).await;
    run.ends(4, &["3 converted, 4 skipped, 1 failed", "nothing-of-that-name", "just these again: virta batch", "journal:"]);
    let report = place.report();
    let outcomes = |word: &str| -> Vec<String> {
        let items = report["items"].as_array().unwrap().iter().filter(|item| item["word"] == word);
        items
            .map(|item| format!("{} {}", item["outcome"].as_str().unwrap(), item["reason"].as_str().unwrap_or_default()))
            .collect()
    };
    assert_eq!(outcomes("web"), ["done ", "skipped it is in the list twice"]);
    assert_eq!(outcomes("done"), ["skipped already qcow2"]);
    assert_eq!(outcomes("empty"), ["skipped it is empty"]);
    assert!(outcomes("volume")[0].contains("volume-backed"));
    assert_eq!(report["items"][0]["report"]["virtual_bytes"], 9 * MIB + 512);
    place.assert_all_converted(false);
    assert!(place.image(&qcow2).is_some() && place.image(&empty).is_some());
    let made: Vec<_> = place.conversions().into_values().map(|image| image["name"].as_str().unwrap().to_owned()).collect();
    assert!(made.contains(&"web-qcow2".to_owned()), "{made:?}");

    // what the line says, typed
    let line = run.stdout.lines().find_map(|line| line.strip_prefix("just these again: virta batch ")).unwrap();
    let again: Vec<&str> = line.split(' ').collect();
    assert!(line.ends_with(" nothing-of-that-name"), "{line}");
    place.run(&again).await.ends(4, &["1 failed"]);
    // words behind -- are no flags, and none come of them
    let dashed = place.run(&["--jobs", "2", "--", "--delete-source"]).await;
    let line = dashed.stdout.lines().find(|line| line.starts_with("just these again: ")).unwrap();
    assert!(line.contains("--jobs 2 --from ") && !line.contains("--delete-source"), "{line}");
    // what a list says of an image is in the list of those that are left
    let list = "image,delete_source,compress\nnothing,,\nvanished,no,zstd\n";
    std::fs::write(place.folder.path().join("list"), list).unwrap();
    let listed = place.run(&["--from", "list", "--delete-source", "--yes", "--journal", "j"]).await;
    listed.ends(4, &["just these again: virta batch --delete-source --yes --journal j --from j.retry"]);
    let retry = std::fs::read_to_string(place.folder.path().join("j.retry")).unwrap();
    assert!(retry.contains("{\"image\":\"vanished\",\"compress\":\"zstd\",\"delete_source\":false}"), "{retry}");

    let before = place.service.requests().len();
    place.run(&["web", "db", "mail"]).await.ends(0, &["3 done before"]);
    let requests = place.service.requests();
    assert!(
        requests[before..].iter().all(|request| request.starts_with("GET") || request.contains("/v3/")),
        "{:?}",
        &requests[before..]
    );

    // another machine has no journal and comes to the same
    let output = place.command("elsewhere", &["web", "db", "mail"]).output().await.unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["3 done before"]);
    place.assert_all_converted(false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_shown_and_nothing_is_done() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 5 * MIB);
    place.add("db", 2, 2 * MIB);
    let other = record("of-another");
    let other = place.service.add_image(&other, |storing| storing.write(&disk(3, MIB))).unwrap();
    place.service.set(&other, "user_id", json!("somebody"));
    let run = place.run(&["--all-snapshots", "--dry-run", "--larger-than", "3M", "--name-template", "{date}-{name}"]).await;
    run.ends(
        0,
        &[
            "-web",
            "convert",
            "5.0 MiB to read",
            "1 snapshot of this project left out that other users made",
            "1 snapshot left out by the filters",
            "reading takes about",
        ],
    );
    place.run(&["--all-snapshots", "--all-users", "--dry-run"]).await.ends(0, &["somebody", "3 of 3 images"]);
    let json = place.run(&["--all-snapshots", "--dry-run", "-f", "json"]).await;
    let plan: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(plan.as_array().unwrap().len(), 2);
    assert!(plan.as_array().unwrap().iter().all(|entry| entry["plan"] == "convert" && entry["new_name"].is_string()));
    assert!(place.conversions().is_empty());
    let writes = |request: &String| !request.starts_with("GET") && !request.contains("/v3/");
    assert!(!place.service.requests().iter().any(writes));
    place.run(&["--all-snapshots", "--dry-run", "--name-template", "{nmae}"]).await.ends(2, &["{nmae}"]);
    place.run(&["--all-snapshots", "--delete-source"]).await.ends(2, &["add --yes", "2 images", "web", "db"]);
    place.run(&["--all-snapshots", "--delete-source", "--dry-run"]).await.ends(0, &["2 sources would be deleted"]);
    // what would be refused is seen now
    place.service.set(&web, "visibility", json!("shared"));
    place.service.add_member(&web, "another-project");
    let run = place.run(&["--all-snapshots", "--delete-source", "--dry-run"]).await;
    run.ends(4, &["cannot", "shared with 1 project,", "--copy-members", "1 source would be deleted", "1 of 2 images"]);
    let run = place.run(&["--all-snapshots", "--delete-source", "--copy-members", "--dry-run"]).await;
    run.ends(0, &["2 sources would be deleted"]);
    place.run(&["web", "--larger-than", "1G"]).await.ends(2, &["it needs --all-snapshots"]);
    place.run(&["web", "--dry-run", "--plan", "slurm"]).await.ends(2, &["cannot be used with"]);
    place.run(&["--all-snapshots", "--name-template", "same"]).await.ends(4, &["its new name, same, is also that of"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_gives_each_image_its_own_name_properties_and_flags() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 5 * MIB);
    let db = place.add("db", 2, 5 * MIB);
    let list = "image,name,property:os_distro,compress,delete_source\nweb,web-small,debian,zstd,yes\ndb,,,,\n";
    std::fs::write(place.folder.path().join("list.csv"), list).unwrap();
    place.run(&["--from", "list.csv"]).await.ends(2, &["add --yes"]);
    place.run(&["--from", "list.csv", "--yes"]).await.ends(0, &["2 converted"]);
    let made = place.conversions();
    assert_eq!((&made[&web]["name"], &made[&web]["os_distro"]), (&json!("web-small"), &json!("debian")));
    assert_eq!((&made[&db]["name"], &made[&db]["os_distro"]), (&json!("db-qcow2"), &Value::Null));
    assert!(place.image(&web).is_none() && place.image(&db).is_some());
    place.assert_shows(&web, &made[&web]);
    place.assert_shows(&db, &made[&db]);
    // the source of one is gone: the journal, or its conversion, says why
    place.run(&["--from", "list.csv", "--yes"]).await.ends(0, &["2 done before"]);
    let output = place.command("elsewhere", &["--from", "list.csv", "--yes"]).output().await.unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["2 done before"]);
    std::fs::write(place.folder.path().join("bad.csv"), "image,colour\nweb,red\n").unwrap();
    place.run(&["--from", "bad.csv"]).await.ends(2, &["bad.csv, line 1", "colour", "property:KEY"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn renamed_and_vanished_sources_are_told() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 3 * MIB);
    let db = place.add("db", 2, 3 * MIB);
    // a first run that could not convert anything
    place.service.faults(|faults| faults.refuse_format = true);
    let arguments = ["web", "db", "--journal", "journal.jsonl"];
    place.run(&arguments).await.ends(4, &["2 failed", "Glance does not accept"]);
    place.service.faults(|faults| faults.refuse_format = false);
    place.service.set(&web, "name", json!("web-old"));
    let deleted = place.clean(env!("CARGO_BIN_EXE_virta")).args(["image", "delete", "--yes", &db]).output().await.unwrap();
    assert!(deleted.status.success(), "{deleted:?}");
    place.disks.remove(&db);
    place.run(&arguments).await.ends(
        4,
        &[
            "is called web-old now; it was web when this batch began",
            "1 converted",
            "it is gone; when this batch began it was called db",
        ],
    );
    place.assert_all_converted(false);
    let journal = std::fs::read_to_string(place.folder.path().join("journal.jsonl")).unwrap();
    let events: Vec<Value> = journal.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|event| event["at"].is_string() && event["run"].is_string()));
    let count = |event: &str| events.iter().filter(|line| line["event"] == event).count();
    assert_eq!((count("begin"), count("failed"), count("done"), count("end")), (2, 2, 1, 2), "{journal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_quota_stops_the_batch_and_deleted_sources_make_room_for_the_next() {
    let size = 8 * MIB;
    let mut place = Place::start(Config::default(), |_| {}).await;
    for seed in 1..=6 {
        place.add(&format!("vm{seed}"), seed, size);
    }
    // room for one and a half of what is made
    let quota = |extra: usize| Some(u64::try_from(6 * size + extra).unwrap());
    place.service.faults(|faults| faults.quota_bytes = quota(MIB / 2));
    let words = ["vm1", "vm2", "vm3", "vm4", "vm5", "vm6", "--jobs", "2"];
    place.run(&words).await.ends(4, &["the quota for images is full", "not tried"]);
    assert!(place.conversions().is_empty(), "what did not fit is not left behind");
    place.service.faults(|faults| faults.quota_bytes = quota(2 * MIB));
    let mut deleting = words.to_vec();
    deleting.extend(["--delete-source", "--yes"]);
    place.run(&deleting).await.ends(0, &["6 converted"]);
    place.assert_all_converted(true);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_another_run_has_claimed_is_left_alone_until_the_claim_is_over() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 3 * MIB);
    let held = place.leave_queued(&web, "web-qcow2", &json!(ELSEWHERE), 3600);
    let run = place.run(&["web", "--no-wait", "--report", "report.json"]).await;
    run.ends(4, &["held by", "0a0a0a0a", "--take-over"]);
    assert_eq!(outcomes(&place.report())["web"], "held");
    assert!(place.image(&held).is_some(), "it is not ours to remove");
    // convert respects it, too
    let convert =
        place.clean(env!("CARGO_BIN_EXE_virta")).args(["convert", "glance:web", "glance:web-qcow2"]).output().await.unwrap();
    Run::new(convert, Duration::ZERO).ends(75, &["is converting this source", &held]);
    // to another name: another image, as asked
    let other = place.clean(env!("CARGO_BIN_EXE_virta")).args(["convert", "glance:web", "glance:other"]).output().await.unwrap();
    Run::new(other, Duration::ZERO).ends(0, &["made glance:"]);
    place.service.remove(&member(&web, "other", 0));
    // the claim runs out: who waited begins, and removes what it has overtaken
    let mut waiting = place.command("here", &["web"]).spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(waiting.try_wait().unwrap().is_none(), "it waits");
    place.service.set(&held, "virta_claim_s", json!("0"));
    let output = tokio::time::timeout(Duration::from_secs(60), waiting.wait_with_output()).await.unwrap().unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["1 converted"]);
    assert!(place.image(&held).is_none(), "what was overtaken is deleted");
    place.assert_all_converted(false);
    assert_eq!(place.conversions()[&web]["id"], member(&web, "web-qcow2", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_release_made_or_claims_is_known() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 3 * MIB);
    let hash = format!("sha512:{}", place.image(&web).unwrap()["os_hash_value"].as_str().unwrap());
    let mut old = record("web-qcow2");
    old["disk_format"] = json!("qcow2");
    old["virta_source_id"] = json!(web);
    old["virta_source_hash"] = json!(hash);
    old["virta_run"] = json!(ELSEWHERE);
    old["virta_claim_until"] = json!("2099-01-01T00:00:00Z");
    let old = place.service.add_image(&old, |storing| storing.write(b"QFI\xfb")).unwrap();
    place.service.set(&old, "status", json!("saving"));
    place.run(&["web", "--no-wait"]).await.ends(4, &["held by", "0a0a0a0a", "2099-01-01"]);
    place.run(&["web", "--name-template", "{name}-small", "--no-wait"]).await.ends(4, &["held by"]);
    // over, and never finished: it is never touched, and takes the name where it is active
    place.service.set(&old, "virta_claim_until", json!("2020-01-01T00:00:00Z"));
    place.service.set(&old, "status", json!("active"));
    place.run(&["web"]).await.ends(4, &["an image called web-qcow2 is there already", &old]);
    // marked: it is the conversion, whatever its name where none was asked for
    let own = place.image(&old).unwrap()["os_hash_value"].as_str().unwrap().to_owned();
    place.service.set(&old, "virta_verified", json!(format!("hash:sha512:{own}")));
    place.run(&["web"]).await.ends(0, &["1 done before"]);
    place.run(&["web", "--name-template", "{name}-small"]).await.ends(0, &["1 done before"]);
    let convert =
        place.clean(env!("CARGO_BIN_EXE_virta")).args(["convert", "glance:web", "glance:web-qcow2"]).output().await.unwrap();
    Run::new(convert, Duration::ZERO).ends(0, &["already done", &old]);
    assert_eq!(place.service.images().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_from_a_run_that_lives_wins_and_one_image_is_left() {
    for flags in [&[][..], &["--delete-source", "--yes"]] {
        let mut place = Place::start(Config::default(), |faults| {
            faults.stalling_puts = 1;
            faults.stall = Duration::from_secs(4);
        })
        .await;
        let web = place.add("web", 1, 12 * MIB);
        let slow = place.command("one", &[&["web", "--tries", "1"], flags].concat()).spawn().unwrap();
        seen(&place.service, "PUT /v2/images").await;
        place.run(&[&["web", "--no-wait"], flags].concat()).await.ends(4, &["held by"]);
        place.run(&[&["web", "--take-over"], flags].concat()).await.ends(0, &["1 converted"]);
        let output = tokio::time::timeout(Duration::from_secs(60), slow.wait_with_output()).await.unwrap().unwrap();
        Run::new(output, Duration::ZERO).ends(0, &["1 done before"]);
        place.assert_all_converted(!flags.is_empty());
        assert_eq!(place.conversions()[&web]["id"], member(&web, "web-qcow2", 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_was_set_meanwhile_is_what_a_slow_run_reports() {
    let mut place = Place::start(Config::default(), |faults| faults.latency = Duration::from_millis(150)).await;
    let web = place.add("web", 1, 3 * MIB);
    let made = member(&web, "web-qcow2", 0);
    let slow = place.command("one", &["web", "--verify", "readback"]).spawn().unwrap();
    while place.image(&made).is_none_or(|image| image["status"] != "active") {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    signal(&slow, rustix::process::Signal::STOP);
    place.service.faults(|faults| faults.latency = Duration::ZERO);
    place.run(&["web", "--take-over", "--delete-source", "--yes"]).await.ends(0, &["1 converted"]);
    assert!(place.image(&web).is_none() && place.image(&made).is_none(), "overtaken, and deleted");
    signal(&slow, rustix::process::Signal::CONT);
    let output = tokio::time::timeout(Duration::from_secs(60), slow.wait_with_output()).await.unwrap().unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["1 done before"]);
    place.assert_all_converted(true);
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_in_the_time_of_the_cloud_whatever_a_machines_clock_says() {
    let mut place = Place::start(Config::default(), |faults| faults.clock_ahead = SignedDuration::from_mins(-75)).await;
    let web = place.add("web", 1, 3 * MIB);
    // made 80 minutes ago by this clock, five by the cloud's
    let theirs = place.leave_queued(&web, "web-qcow2", &json!(ELSEWHERE), 3600);
    let ago = (Timestamp::now() - SignedDuration::from_mins(80)).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    place.service.set(&theirs, "updated_at", json!(ago));
    place.run(&["web", "--no-wait"]).await.ends(4, &["held by", "0a0a0a0a"]);
    assert!(place.image(&theirs).is_some());
    // made ten minutes ago by this clock, 85 by the cloud's
    place.service.faults(|faults| faults.clock_ahead = SignedDuration::from_mins(75));
    let ago = (Timestamp::now() - SignedDuration::from_mins(10)).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    place.service.set(&theirs, "updated_at", json!(ago));
    place.run(&["web", "--no-wait"]).await.ends(0, &["1 converted"]);
    place.assert_all_converted(false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_not_heard_is_repeated_after_another_look_only() {
    // both are there; before the DELETE is sent again, the source was shared, or protected
    for shared in [false, true] {
        let mut place = Place::start(Config::default(), |faults| faults.failing_deletes = 1).await;
        let web = place.add("web", 1, 3 * MIB);
        place.service.set(&web, "visibility", json!("shared"));
        let run = place.command("here", &["web", "--delete-source", "--yes", "--tries", "1"]).spawn().unwrap();
        seen(&place.service, "DELETE /v2/images").await;
        if shared {
            place.service.add_member(&web, "late");
        } else {
            place.service.set(&web, "protected", json!(true));
        }
        let why = if shared { "shared with 1 project meanwhile" } else { "protection has changed" };
        Run::new(run.wait_with_output().await.unwrap(), Duration::ZERO).ends(4, &[why, "is there and verified"]);
        assert!(place.image(&web).is_some() && place.image(&member(&web, "web-qcow2", 0)).is_some(), "{why}: both are there");
        let deletions = place.service.requests().iter().filter(|request| request.starts_with("DELETE")).count();
        assert_eq!(deletions, 1, "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_heard_and_not_answered_is_gone_on_with() {
    let mut place = Place::start(Config::default(), |faults| faults.lost_delete = true).await;
    let web = place.add("web", 1, 3 * MIB);
    place.run(&["web", "--replace", "--yes"]).await.ends(0, &["1 converted"]);
    place.service.faults(|faults| assert!(!faults.lost_delete, "it was not answered"));
    assert!(place.image(&web).is_none());
    let made = place.conversions().remove(&web).unwrap();
    assert_eq!(made["name"], "web", "{made}");
    place.assert_shows(&web, &made);
    let receipts = std::fs::read_dir(place.folder.path().join("here/virta/receipts")).unwrap();
    let receipts: Vec<Value> =
        receipts.map(|entry| serde_json::from_slice(&std::fs::read(entry.unwrap().path()).unwrap()).unwrap()).collect();
    assert_eq!(receipts.len(), 1);
    assert_eq!(receipts[0]["source_deleted"], true, "{}", receipts[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_was_not_answered_is_looked_for_and_sent_again() {
    let mut place = Place::start(Config::default(), |faults| faults.failing_posts = 3).await;
    let web = place.add("web", 1, 3 * MIB);
    place.run(&["web", "--tries", "1"]).await.ends(0, &["1 converted"]);
    place.service.faults(|faults| assert_eq!(faults.failing_posts, 0));
    place.assert_all_converted(false);
    assert_eq!(place.conversions()[&web]["id"], member(&web, "web-qcow2", 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_proven_less_strictly_is_read_and_compared() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let source = place.add("web", 1, 3 * MIB);
    place.run(&["web", "--verify", "none"]).await.ends(0, &["1 converted"]);
    let before = place.conversions()[&source].clone();
    assert!(before["virta_verified"].as_str().unwrap().starts_with("sent:sha512:"), "{before}");
    place.run(&["web", "--verify", "none"]).await.ends(0, &["0 converted, 1 done before"]);
    let convert = ["convert", "glance:web", "glance:web-qcow2"];
    let convert = place.clean(env!("CARGO_BIN_EXE_virta")).args(convert).output().await.unwrap();
    Run::new(convert, Duration::ZERO).ends(0, &["not proven as strictly as this one asks", "already done"]);
    place.run(&["web"]).await.ends(0, &["0 converted, 1 done before"]);
    // a stronger proof is in no PATCH
    assert_eq!(place.conversions()[&source], before);
    // and where it shows something else, nothing is deleted
    let path = place.service.data_path(before["id"].as_str().unwrap()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 40_000;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    place
        .run(&["web", "--delete-source", "--yes", "--report", "report.json"])
        .await
        .ends(4, &["does not show what the source shows"]);
    assert!(place.image(&source).is_some());
    assert_eq!(place.report()["items"][0]["exit_code"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_run_made_since_the_plan_is_found_by_the_first_try() {
    let mut place = Place::start(Config::default(), |faults| {
        faults.stalling_puts = 1;
        faults.stall = Duration::from_secs(3);
    })
    .await;
    place.add("large", 1, 12 * MIB);
    place.add("small", 2, 3 * MIB);
    let one = place.command("here", &["large", "small", "--jobs", "1", "--tries", "1", "--no-wait"]).spawn().unwrap();
    seen(&place.service, "PUT /v2/images").await;
    let other = place.command("there", &["small"]).output().await.unwrap();
    Run::new(other, Duration::ZERO).ends(0, &["1 converted"]);
    let output = tokio::time::timeout(Duration::from_secs(60), one.wait_with_output()).await.unwrap().unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["1 converted, 1 done before"]);
    place.assert_all_converted(false);
}

/// A batch of one after the other, the first of which takes a while; what is changed meanwhile, the others have to meet as it is.
async fn changed_behind_the_plan(place: &mut Place, flags: &[&str], change: impl AsyncFnOnce(&Place)) -> Run {
    place.service.faults(|faults| {
        faults.stalling_puts = 1;
        faults.stall = Duration::from_secs(3);
    });
    let arguments = [&["--jobs", "1", "--tries", "1", "--no-wait"][..], flags].concat();
    let running = place.command("here", &arguments).spawn().unwrap();
    seen(&place.service, "PUT /v2/images").await;
    change(place).await;
    let output = tokio::time::timeout(Duration::from_secs(60), running.wait_with_output()).await.unwrap().unwrap();
    Run::new(output, Duration::ZERO)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_shared_since_the_plan_stays() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let large = place.add("large", 1, 12 * MIB);
    let small = place.add("small", 2, 3 * MIB);
    let share = async |place: &Place| {
        let share = place.clean(env!("CARGO_BIN_EXE_virta")).args(["share", &small, OTHER_PROJECT_ID]).output().await.unwrap();
        Run::new(share, Duration::ZERO).ends(0, &[]);
    };
    let run = changed_behind_the_plan(&mut place, &["large", "small", "--delete-source", "--yes"], share).await;
    run.ends(4, &["shared with 1 project"]);
    assert!(place.image(&large).is_none());
    assert!(place.image(&small).is_some(), "its members would lose it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_was_taken_since_the_plan_is_told() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    place.add("large", 1, 12 * MIB);
    place.add("small", 2, 3 * MIB);
    let take = async |place: &Place| {
        place.service.add_image(&record("small-qcow2"), |storing| storing.write(&[1; 512])).unwrap();
    };
    let run = changed_behind_the_plan(&mut place, &["large", "small"], take).await;
    run.ends(0, &["2 converted", "is called small-qcow2, too, since this run began"]);
    assert_eq!(place.service.images().iter().filter(|image| image["name"] == "small-qcow2").count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_renamed_meanwhile_stays_and_the_next_replacement_has_its_new_name() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    place.add("large", 1, 12 * MIB);
    let small = place.add("small", 2, 3 * MIB);
    let rename = async |place: &Place| place.service.set(&small, "name", json!("small-of-today"));
    let run = changed_behind_the_plan(&mut place, &["large", "small", "--replace", "--yes"], rename).await;
    run.ends(4, &["1 converted", "the source's name has changed", "start the same command again"]);
    assert!(place.image(&small).is_some());
    assert_eq!(place.conversions()[&small]["name"], "small");
    place.run(&[&small, "--replace", "--yes"]).await.ends(0, &["1 converted"]);
    assert!(place.image(&small).is_none());
    let named = |name: &str| place.service.images().iter().filter(|image| image["name"] == name).count();
    assert_eq!((named("small-of-today"), named("small")), (1, 1), "the first one stays: it may be wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_plan_has_seen_is_not_asked_again() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    for name in ["a", "b", "c"] {
        place.add(name, 1, 3 * MIB);
    }
    place.run(&["a", "b", "c"]).await.ends(0, &["3 converted"]);
    let requests = place.service.requests();
    assert_eq!(
        requests.iter().filter(|request| *request == "GET /v2/images").count(),
        2 + 3 * 6,
        "the project, visible and hidden; then of each image, before its mark and after: {requests:?}"
    );
    // what is there by now is looked at as it is
    place.run(&["a", "b", "c"]).await.ends(0, &["0 converted, 3 done before"]);
    place.assert_all_converted(false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_that_was_never_verified_is_known_after_its_source_has_gone() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let source = place.add("web", 1, 3 * MIB);
    place.run(&["--verify", "none", "web"]).await.ends(0, &["1 converted"]);
    let delete = place.clean(env!("CARGO_BIN_EXE_virta")).args(["image", "delete", "--yes", &source]).output().await.unwrap();
    Run::new(delete, Duration::ZERO).ends(0, &[]);
    place.run(&["--verify", "none", "web"]).await.ends(0, &["0 converted, 1 done before"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_whose_answer_was_lost_is_confirmed_and_one_that_was_not_heard_is_sent_again() {
    let patches = |place: &Place| place.service.requests().iter().filter(|request| request.starts_with("PATCH")).count();
    for acted_upon in [true, false] {
        let mut place = Place::start(Config::default(), |faults: &mut Faults| {
            faults.lost_patch_of = Some(("virta_verified".to_owned(), acted_upon));
        })
        .await;
        place.add("web", 1, 3 * MIB);
        place.run(&["web"]).await.ends(0, &["1 converted"]);
        place.assert_all_converted(false);
        assert_eq!(patches(&place), 2, "{:?}", place.service.requests());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_leaves_nothing_half_made_and_the_same_command_goes_on() {
    let mut place = Place::start(Config::default(), |faults| faults.latency = Duration::from_millis(30)).await;
    for seed in 1..=16 {
        place.add(&format!("vm{seed}"), seed, 12 * MIB);
    }
    let child = place.command("here", &["--all-snapshots", "--jobs", "3"]).spawn().unwrap();
    seen(&place.service, "PUT /v2/images").await;
    signal(&child, rustix::process::Signal::INT);
    let output = tokio::time::timeout(Duration::from_secs(20), child.wait_with_output()).await.unwrap().unwrap();
    Run::new(output, Duration::ZERO).ends(
        130,
        &["stopped before the end: interrupted", "nothing half-made is left", "not tried   1", " images: interrupted"],
    );
    let _ = place.conversions(); // what is there is whole
    place.run(&["--all-snapshots", "--jobs", "3"]).await.ends(0, &["converted"]);
    place.assert_all_converted(false);
}

/// One image, killed at each request of its way, before it was done and after: started again, every time everything is as it should be.
async fn killed_at_every_request(flags: &[&str], gone: bool) {
    let mut arguments = vec!["--all-snapshots", "--yes", "--verify", "readback"];
    arguments.extend(flags);
    let mut at = 0;
    let mut kills = 0;
    loop {
        let mut ended = false;
        for done in [false, true] {
            let mut place = Place::start(Config::default(), |faults| faults.hold_at = Some((at, done))).await;
            place.add("vm", 7, 5 * MIB + 512);
            let mut child = place.command("here", &arguments).spawn().unwrap();
            while !place.service.held() && child.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if !place.service.held() {
                ended = true;
            }
            let _ = child.start_kill();
            let _ = child.wait().await;
            place.service.faults(|faults| faults.hold_at = None);
            let told = place.service.requests().last().cloned().unwrap_or_default();
            // the source is there, or a whole conversion of it
            let whole = |image: &Value| image["virta_verified"].is_string() && image["status"] == "active";
            let source = place.disks.keys().next().unwrap().clone();
            assert!(place.image(&source).is_some() || place.service.images().iter().any(whole), "killed at request {at}, {told}");
            let again = place.run(&arguments).await;
            assert_eq!(again.code, Some(0), "killed at request {at} ({done}), {told}: {}\n{}", again.stderr, again.stdout);
            place.assert_all_converted(gone);
            let name = place.conversions()[&source]["name"].clone();
            assert_eq!(name, if flags.contains(&"--replace") { "vm" } else { "vm-qcow2" }, "killed at request {at}, {told}");
            kills += 1;
        }
        if ended {
            break;
        }
        at += 1;
    }
    assert!(kills > 20, "{kills}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_given_again_means_its_latest_image_to_the_journal() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let arguments = ["web", "--delete-source", "--yes", "--journal", "journal.jsonl"];
    place.add("web", 1, MIB);
    place.run(&arguments).await.ends(0, &["1 converted"]);
    // a year later nobody needs that one any more, and there is another
    let old = place.service.images().remove(0)["id"].as_str().unwrap().to_owned();
    let deleted = place.clean(env!("CARGO_BIN_EXE_virta")).args(["image", "delete", "--yes", &old]).output().await.unwrap();
    assert!(deleted.status.success(), "{deleted:?}");
    place.disks.clear();
    place.add("web", 2, MIB);
    place.run(&arguments).await.ends(0, &["1 converted"]);
    let again = place.run(&arguments).await;
    again.ends(0, &["1 done before"]);
    place.assert_all_converted(true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_request_of_a_conversion_loses_nothing() {
    killed_at_every_request(&[], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_request_of_a_conversion_whose_source_goes_loses_nothing() {
    killed_at_every_request(&["--delete-source"], true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_request_of_a_replacement_loses_nothing() {
    killed_at_every_request(&["--replace"], true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_batches_at_once_convert_each_image_once_and_lose_none() {
    let mut place = Place::start(Config::default(), |faults| faults.latency = Duration::from_millis(5)).await;
    for seed in 1..=24 {
        place.add(&format!("vm{seed}"), seed, 6 * MIB + 512 * usize::try_from(seed).unwrap());
    }
    let arguments = ["--all-snapshots", "--delete-source", "--yes", "--jobs", "4"];
    // two machines, and two terminals of one
    let runs = ["one", "two", "two"].map(|machine| place.command(machine, &arguments).spawn().unwrap().wait_with_output());
    for output in futures(runs).await {
        Run::new(output, Duration::ZERO).ends(0, &["24"]);
    }
    place.assert_all_converted(true);
    let puts = place
        .service
        .requests()
        .iter()
        .filter(|request| request.starts_with("PUT /v2/images") && request.ends_with("/file"))
        .count();
    assert_eq!(puts, 24, "no image was sent twice");
}

async fn futures<F: Future<Output = std::io::Result<std::process::Output>>>(runs: [F; 3]) -> [std::process::Output; 3] {
    let [a, b, c] = runs;
    let (a, b, c) = tokio::join!(a, b, c);
    [a.unwrap(), b.unwrap(), c.unwrap()]
}

/// Sizes from 0 to 4 GiB, most of them small, as projects have them.
fn mixed_sizes() -> Vec<usize> {
    let mut sizes: Vec<usize> = (0..97).map(|n| 512 * (1 + n * n * 3) + (n % 7) * MIB).collect();
    sizes.extend([0, 300 * MIB, 4096 * MIB]);
    sizes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_images_under_faults_all_come_to_the_right_end_within_the_budget() {
    // tokens that end several times meanwhile; transfers cut, requests failing
    let config = Config { token_life: Duration::from_secs(8), ..Config::default() };
    let mut place = Place::start(config, |_| {}).await;
    let mut ids = Vec::new();
    for (seed, bytes) in mixed_sizes().into_iter().enumerate() {
        ids.push(place.add(&format!("vm{seed}"), u64::try_from(seed).unwrap() + 1, bytes));
    }
    let (empty, deleted, corrupt) = (ids[97].clone(), ids[60].clone(), [ids[20].clone(), ids[40].clone()]);
    for id in &corrupt {
        // what is stored is not what was hashed
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(place.service.data_path(id).unwrap()).unwrap();
        file.write_at(b"rot", 1000).unwrap();
    }
    place.service.faults(|faults| {
        faults.cut_one_in = 20;
        faults.cut_after_bytes = 200_000;
        faults.fail_one_in = 40;
    });
    let memory = ["--memory", "200M", "--jobs", "4"];
    let mut arguments = vec!["--all-snapshots", "--report", "report.json", "--progress", "json"];
    arguments.extend(memory);
    let mut child = place.command("here", &arguments).spawn().unwrap();
    let pid = child.id().unwrap();
    // memory is looked at all the way; one image is deleted before its turn
    let mut peaks: Vec<u64> = Vec::new();
    let mut stderr = child.stderr.take().unwrap();
    let reading = tokio::spawn(async move {
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stderr, &mut text).await.unwrap();
        text
    });
    seen(&place.service, "POST /v2/images").await;
    // it may meet one of the failing requests
    let mut was_deleted = false;
    for _ in 0..5 {
        let delete = place.clean(env!("CARGO_BIN_EXE_virta")).args(["image", "delete", "--yes", &deleted]).output();
        was_deleted |= delete.await.unwrap().status.success();
        if was_deleted {
            break;
        }
    }
    assert!(was_deleted);
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let rss =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        peaks.extend(rss.map(|kib| kib * 1024));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let output = child.wait_with_output().await.unwrap();
    let stderr = reading.await.unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(4), "{stdout}\n{stderr}");
    let report = place.report();
    let outcomes = outcomes(&report);
    let made = place.conversions();
    let wrong: Vec<String> = ids
        .iter()
        .filter_map(|id| {
            let expected = if corrupt.contains(id) || (*id == deleted && !made.contains_key(id)) {
                "failed"
            } else if *id == empty {
                "skipped"
            } else {
                "done"
            };
            (outcomes[id] != expected).then(|| format!("{id}: {} instead of {expected}", outcomes[id]))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}\n{stdout}");
    for (id, image) in &made {
        assert!(!corrupt.contains(id));
        place.assert_shows(id, image);
    }
    for item in report["items"].as_array().unwrap().iter().filter(|item| corrupt.iter().any(|id| item["id"] == id.as_str())) {
        assert!(item["error"].as_str().unwrap().contains("what was read is not what was stored"), "{item}");
        assert_eq!(item["exit_code"], 3);
    }
    // 200 MiB of budget and 100 MiB of program, first to last
    let limit = 300 << 20;
    let peak = report["rss_peak_bytes"].as_u64().unwrap();
    let thirds: Vec<u64> = peaks.chunks(peaks.len().div_ceil(3)).map(|part| *part.iter().max().unwrap()).collect();
    println!("{:.1} s; resident at most {} MiB, in thirds of the time {thirds:?}", report["elapsed_s"], peak >> 20);
    assert!(peak < limit, "{} MiB resident", peak >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_at_random_moments_it_gets_through() {
    let mut place = Place::start(Config::default(), |faults| {
        faults.latency = Duration::from_millis(10);
        (faults.cut_one_in, faults.cut_after_bytes, faults.fail_one_in) = (20, 200_000, 60);
    })
    .await;
    for seed in 1..=100 {
        place.add(&format!("vm{seed}"), seed, MIB + usize::try_from(seed * 7 % 12).unwrap() * MIB);
    }
    let arguments = ["--all-snapshots", "--delete-source", "--yes", "--jobs", "3"];
    // the slowest one alone tells the mean interval: a whole run's time for it
    let started = Instant::now();
    let alone = place.add("slowest", 999, 24 * MIB);
    place.run(&[&alone]).await.ends(0, &["1 converted"]);
    let slowest = started.elapsed();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut kills = 0;
    for _ in 0..400 {
        let mut child = place.command("here", &arguments).spawn().unwrap();
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let part = f64::from(u32::try_from(random >> 32).unwrap()) / f64::from(u32::MAX);
        // exponential, with that mean, as accidents come
        let life = slowest.mul_f64((3.0 * -(1.0 - part * 0.999).ln()).clamp(0.02, 9.0) / 3.0);
        match tokio::time::timeout(life, child.wait()).await {
            Ok(status) => {
                assert_eq!(status.unwrap().code(), Some(0));
                println!("through after {kills} kills");
                place.assert_all_converted(true);
                assert!(kills > 2, "{kills} kills show little");
                return;
            }
            Err(_) => {
                child.start_kill().unwrap();
                child.wait().await.unwrap();
                kills += 1;
            }
        }
    }
    panic!("not through after {kills} kills");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_of_an_engine_ends_with_a_code_that_it_can_act_on() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    let web = place.add("web", 1, 3 * MIB);
    let db = place.add("db", 2, 3 * MIB);
    let task = async |env: &[(&str, &str)], flags: &[&str]| {
        let mut arguments = vec!["--task-from-env"];
        arguments.extend(flags);
        let error = place.folder.path().join("error.txt");
        let _ = std::fs::remove_file(&error);
        let mut command = place.command("here", &arguments);
        let output = command.envs(env.iter().copied()).env("HQ_ERROR_FILENAME", &error).output().await.unwrap();
        (Run::new(output, Duration::ZERO), std::fs::read_to_string(&error).unwrap_or_default())
    };
    let entry = format!("{{\"image\":\"{web}\",\"name\":\"small\",\"properties\":{{\"a\":\"b\"}}}}");
    let (run, error) = task(&[("HQ_ENTRY", &entry)], &[]).await;
    run.ends(0, &["made glance:"]);
    assert_eq!(error, "");
    assert_eq!(place.conversions()[&web]["name"], "small");
    task(&[("HQ_ENTRY", &entry)], &[]).await.0.ends(0, &["already done"]);
    let (json, _) = task(&[("HQ_ENTRY", &entry)], &["-f", "json"]).await;
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&json["outcome"], &json["id"]), (&json!("earlier"), &json!(web)));
    std::fs::write(place.folder.path().join("list"), "web\ndb\n").unwrap();
    let (run, error) = task(&[("SLURM_ARRAY_TASK_ID", "3")], &["--from", "list"]).await;
    run.ends(64, &["beyond the 2"]);
    assert!(error.contains("beyond the 2"));
    task(&[("JOB_COMPLETION_INDEX", "1")], &["--from", "list"]).await.0.ends(0, &["made glance:"]);
    assert!(place.conversions().contains_key(&db));
    task(&[], &[]).await.0.ends(64, &["none of HQ_ENTRY"]);
    let (run, error) = task(&[("HQ_ENTRY", "nothing-of-that-name")], &[]).await;
    run.ends(65, &["there is no image of that name"]);
    assert!(error.contains("nothing-of-that-name") && error.len() <= 2048, "{error}");
    // a service that is down: worth another try
    let mail = place.service.add_image(&record("mail"), |storing| storing.write(&disk(3, MIB))).unwrap();
    place.service.faults(|faults| faults.failing_puts = 1000);
    let (run, error) = task(&[("HQ_ENTRY", &mail)], &["--tries", "1"]).await;
    // the answer, 503, may be lost where the connection is reset behind it
    run.ends(75, &["uploading image"]);
    assert!(error.contains("uploading image"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slurm_gets_a_script_that_runs() {
    let mut place = Place::start(Config::default(), |_| {}).await;
    for seed in 1..=3 {
        place.add(&format!("vm{seed}"), seed, 2 * MIB);
    }
    let run =
        place.run(&["--all-snapshots", "--plan", "slurm", "--plan-dir", "a plan", "--jobs", "2", "--compress", "zlib"]).await;
    run.ends(0, &["sbatch ", "3 tasks"]);
    assert!(place.conversions().is_empty());
    let script = place.folder.path().join("a plan/virta.sbatch");
    let text = std::fs::read_to_string(&script).unwrap();
    assert!(text.contains("#SBATCH --array=1-3%2") && text.contains("--compress zlib"), "{text}");
    for task in ["1", "2", "3"] {
        // as Slurm runs it: the environment, and no arguments
        let mut command = Command::new("bash");
        command
            .arg(&script)
            .current_dir(place.folder.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", place.folder.path()).env("SLURM_ARRAY_TASK_ID", task);
        Run::new(command.output().await.unwrap(), Duration::ZERO).ends(0, &["made glance:"]);
    }
    place.assert_all_converted(false);
    place.run(&["--all-snapshots", "--plan", "slurm", "--delete-source"]).await.ends(2, &["add --yes"]);
}

/// Python with the wheel `hyperqueue`: `VIRTA_HYPERQUEUE_PYTHON`, else the usual one.
async fn python_with_hyperqueue() -> Option<String> {
    let python = std::env::var("VIRTA_HYPERQUEUE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let there = Command::new(&python).args(["-c", "import hyperqueue"]).output().await;
    if there.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "no Python with the wheel hyperqueue");
    eprintln!("SKIPPED: no Python with the wheel hyperqueue (pip install hyperqueue==0.27.0; VIRTA_HYPERQUEUE_PYTHON names it)");
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn hyperqueue_runs_a_plan_on_two_workers_and_one_that_dies_loses_nothing() {
    let Some(python) = python_with_hyperqueue().await else { return };
    let mut place = Place::start(Config::default(), |faults| faults.latency = Duration::from_millis(20)).await;
    for seed in 1..=19 {
        place.add(&format!("vm{seed}"), seed, 6 * MIB);
    }
    let corrupt = place.add("rotten", 20, 3 * MIB);
    {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(place.service.data_path(&corrupt).unwrap()).unwrap();
        file.write_at(b"rot", 1000).unwrap();
    }
    let run = place.run(&["--all-snapshots", "--plan", "hyperqueue", "--workers", "1", "--plan-dir", "plan"]).await;
    run.ends(0, &["hq submit", "--from-json", "--task-dir", "--cpus 1", "--task-from-env", "20 tasks"]);
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hyperqueue/run_plan.py");
    let mut command = place.clean(&python);
    command.arg(driver).arg(place.folder.path().join("plan"));
    let output = tokio::time::timeout(Duration::from_secs(180), command.output()).await.unwrap().unwrap();
    let run = Run::new(output, Duration::ZERO);
    let told: Value = serde_json::from_str(run.stdout.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {}\n{}", run.stdout, run.stderr));
    let failed = told["failed"].as_array().unwrap();
    assert_eq!(failed.len(), 1, "{told}");
    assert_eq!(failed[0]["image"], corrupt.as_str(), "{told}");
    assert!(failed[0]["error"].as_str().unwrap().contains("what was read is not what was stored"), "{told}");
    assert!(told["killed_a_worker"] == true && told["begun_again"].as_u64().unwrap() > 0, "{told}");
    place.disks.remove(&corrupt);
    place.assert_all_converted(false);
}
