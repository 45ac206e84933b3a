//! A source that goes, kills at any moment, runs that are found again, two clouds, pipes: against mini-glance.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use common::{Cloud, Run, raw_disk, seen, signal, snapshot_record};
use mini_glance::{Config, Ranges};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

impl Cloud {
    fn image(&self, id: &str) -> Option<Value> {
        self.service.images().into_iter().find(|image| image["id"] == id)
    }

    fn named(&self, name: &str) -> Vec<Value> {
        self.service.images().into_iter().filter(|image| image["name"] == name).collect()
    }

    fn is_gone(&self, id: &str) -> bool {
        self.image(id).is_none()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_deleted_only_after_it_was_read_back_and_only_when_asked() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.convert(&["--delete-source"]).await.ends(2, &["would be deleted after verification", "add --yes"]);
    cloud.convert(&["--delete-source", "--yes", "--verify", "none"]).await.ends(2, &["only after verification"]);
    cloud.run(&["convert", "glance:snap", "x.qcow2", "--delete-source", "--yes"]).await.ends(2, &["need a new image in Glance"]);
    assert_eq!(cloud.gets_of_data(), (0, 0));
    cloud.assert_nothing_made();
    let run = cloud.convert(&["--delete-source", "--yes"]).await;
    run.ends(
        0,
        &[
            "proven: what Glance serves of the new image",
            "deleted the source image",
            "after verification will be deleted: image snap",
        ],
    );
    assert!(cloud.is_gone(&cloud.snapshot));
    let made = cloud.others().remove(0);
    cloud.assert_is_the_disk(&cloud.service.data_path(made["id"].as_str().unwrap()).unwrap());
    let requests = cloud.service.requests();
    let at = |what: &str| requests.iter().position(|request| request.starts_with(what)).unwrap();
    let read_back = format!("GET /v2/images/{}/file", made["id"].as_str().unwrap());
    assert!(at(&read_back) < at("PATCH") && at("PATCH") < at(&format!("DELETE /v2/images/{}", cloud.snapshot)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_the_way_of_a_deletion_is_seen_before_a_byte_is_read() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.set(&cloud.snapshot, "protected", json!(true));
    cloud.convert(&["--delete-source", "--yes"]).await.ends(1, &["is protected", "virta image set --unprotected"]);
    cloud.service.set(&cloud.snapshot, "protected", json!(false));
    cloud.service.add_server("web-1", &cloud.snapshot);
    cloud.convert(&["--delete-source", "--yes"]).await.ends(1, &["1 servers were built from", "web-1", "--force"]);
    cloud.service.set(&cloud.snapshot, "visibility", json!("shared"));
    cloud.service.add_member(&cloud.snapshot, "another-project");
    cloud
        .convert(&["--delete-source", "--yes", "--force"])
        .await
        .ends(1, &["is shared with 1 project,", "another-project", "--copy-members"]);
    assert_eq!(cloud.gets_of_data(), (0, 0));
    cloud.assert_nothing_made();
    cloud.convert(&["--delete-source", "--yes", "--force", "--copy-members"]).await.ends(0, &["shared with 1 project"]);
    let made = cloud.others().remove(0);
    assert_eq!(made["visibility"], "shared");
    assert_eq!(cloud.service.members(made["id"].as_str().unwrap()), ["another-project"]);
    assert!(cloud.is_gone(&cloud.snapshot));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_others_use_stays_and_so_does_the_new_image() {
    for flag in ["--delete-source", "--replace"] {
        let cloud = Cloud::start(|_| {}).await;
        cloud.service.set_in_use(&cloud.snapshot);
        cloud.convert(&[flag, "--yes"]).await.ends(1, &["409", "in use", "is there and verified"]);
        // a replacement has the name at once
        let names = (cloud.named("snap").len(), cloud.named("compact").len());
        assert_eq!(names, if flag == "--replace" { (2, 0) } else { (1, 1) });
        cloud.assert_converted();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_without_a_hash_is_read_twice_before_it_goes() {
    let cloud = Cloud::start(|faults| faults.null_hashes = true).await;
    cloud.service.faults(|faults| faults.null_hashes = false);
    let run = cloud.convert(&["--delete-source", "--yes", "--verify", "hash"]).await;
    run.ends(0, &["it is read a second time and compared", "reading the source a second time"]);
    assert!(cloud.is_gone(&cloud.snapshot));
    assert!(cloud.report()["reread_bytes"].as_u64().unwrap() >= u64::try_from(cloud.raw.len()).unwrap() / 4);
    // and what differs then stops everything
    let cloud = Cloud::start(|faults| {
        faults.null_hashes = true;
        faults.ranges = Ranges::Refused;
    })
    .await;
    cloud.service.faults(|faults| faults.null_hashes = false);
    cloud.service.faults(|faults| faults.changed_after_gets = Some(2));
    let run = cloud.convert(&["--delete-source", "--yes", "--verify", "hash"]).await;
    run.ends(3, &["read a second time, differs", "nothing was deleted"]);
    assert!(!cloud.is_gone(&cloud.snapshot));
    // and leaves no image that a later run could take for a finished one
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_without_a_hash_does_not_go_on_the_word_of_an_earlier_run() {
    let cloud = Cloud::start_with(8, Config::default(), |faults| faults.null_hashes = true).await;
    cloud.service.faults(|faults| faults.null_hashes = false);
    cloud.convert(&["--verify", "readback"]).await.ends(0, &[]);
    // it was read once, and marked as read back: that proves the image, not what was read
    cloud.convert(&["--delete-source", "--yes"]).await.ends(0, &["it is read and compared with the source", "already done"]);
    assert!(cloud.is_gone(&cloud.snapshot));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_takes_name_and_visibility() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.set(&cloud.snapshot, "visibility", json!("shared"));
    cloud
        .run(&["convert", "glance:snap", "glance:snap", "--replace", "--yes"])
        .await
        .ends(0, &["deleted the source image snap", "its id has changed"]);
    assert!(cloud.is_gone(&cloud.snapshot));
    let images = cloud.named("snap");
    assert_eq!(images.len(), 1);
    assert_eq!((&images[0]["visibility"], &images[0]["disk_format"]), (&json!("shared"), &json!("qcow2")));
    assert_eq!(images[0]["virta_replaces"], cloud.snapshot.as_str());
    // once more: it is done
    cloud.run(&["convert", "glance:snap", "glance:snap", "--replace", "--yes"]).await.ends(0, &["already done"]);
}

/// A conversion, killed at each request of its way, before it was done and after: the same command ends it. `gone`: the source goes.
async fn killed_at_every_request(command: impl Fn(&Cloud) -> Vec<String>, name: &str, gone: bool) {
    let mut kills = 0;
    for at in 0.. {
        let mut over = false;
        for done in [false, true] {
            let cloud = Cloud::start_with(8, Config::default(), |faults| faults.hold_at = Some((at, done))).await;
            let arguments = command(&cloud);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut child = cloud.command(&arguments).spawn().unwrap();
            while !cloud.service.held() && child.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            over |= !cloud.service.held();
            let _ = child.start_kill();
            let _ = child.wait().await;
            cloud.service.faults(|faults| faults.hold_at = None);
            let told = format!("request {at} ({done}), {}", cloud.service.requests().last().cloned().unwrap_or_default());
            let complete = |image: &Value| image["status"] == "active" && image["virta_verified"].is_string();
            assert!(!cloud.is_gone(&cloud.snapshot) || cloud.others().iter().any(complete), "{told}: neither is there");
            let again = cloud.run(&arguments).await;
            assert_eq!(again.code, Some(0), "{told}: {}\n{}", again.stderr, again.stdout);
            assert_eq!(cloud.is_gone(&cloud.snapshot), gone, "{told}");
            let images = cloud.others();
            assert_eq!(images.len(), 1, "{told}: {images:?}");
            let image = &images[0];
            assert_eq!((&image["name"], &image["protected"]), (&json!(name), &json!(false)), "{told}");
            for mark in ["virta_replaces_name", "virta_claim_s", "virta_claim_until"] {
                assert!(image.get(mark).is_none(), "{told}: {image}");
            }
            cloud.assert_is_the_disk(&cloud.service.data_path(image["id"].as_str().unwrap()).unwrap());
            kills += 1;
        }
        if over {
            break;
        }
    }
    assert!(kills > 20, "{kills}");
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_under_its_own_name_that_is_killed_anywhere_is_finished_by_the_same_command() {
    killed_at_every_request(|_| words(&["convert", "glance:snap", "glance:snap", "--replace", "--yes"]), "snap", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_by_id_that_is_killed_anywhere_is_finished_by_the_same_command() {
    let by_id = |cloud: &Cloud| words(&["convert", &format!("glance:{}", cloud.snapshot), "glance:new", "--replace", "--yes"]);
    killed_at_every_request(by_id, "snap", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_that_is_killed_anywhere_is_made_by_the_same_command_and_leaves_nothing_else() {
    killed_at_every_request(|_| words(&["convert", "glance:snap", "glance:new"]), "new", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_is_killed_anywhere_is_finished_by_the_same_command() {
    killed_at_every_request(|_| words(&["convert", "glance:snap", "glance:new", "--delete-source", "--yes"]), "new", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_an_earlier_run_deleted_is_known_by_its_id_and_a_wrong_name_is_an_error() {
    let cloud = Cloud::start_with(8, Config::default(), |_| {}).await;
    cloud.convert(&["--delete-source", "--yes"]).await.ends(0, &[]);
    // as somebody else's run, on a machine that knows nothing of it
    std::fs::remove_dir_all(cloud.folder.path().join("state")).unwrap();
    let by_id = format!("glance:{}", cloud.snapshot);
    cloud
        .run(&["convert", &by_id, "glance:compact"])
        .await
        .ends(0, &["is gone: an earlier run converted and deleted it", "already done"]);
    cloud.run(&["convert", &by_id, "glance:another"]).await.ends(2, &["there is no image"]);
    cloud.run(&["convert", "glance:snapp", "glance:compact"]).await.ends(2, &["there is no image snapp"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmarked_image_of_the_wanted_name_is_in_the_way() {
    let cloud = Cloud::start_with(8, Config::default(), |_| {}).await;
    cloud.convert(&[]).await.ends(0, &[]);
    let made = cloud.assert_converted();
    // the same marks, and another disk
    let mut record = made.as_object().unwrap().clone();
    record.retain(|key, _| key.starts_with("virta_") && key != "virta_verified");
    for (key, value) in [("name", "other"), ("disk_format", "qcow2"), ("container_format", "bare"), ("visibility", "private")] {
        record.insert(key.to_owned(), json!(value));
    }
    let mut bytes = std::fs::read(cloud.service.data_path(made["id"].as_str().unwrap()).unwrap()).unwrap();
    let last = bytes.len() - 70_000;
    bytes[last] ^= 1;
    let other = cloud.service.add_image(&Value::Object(record), |storing| storing.write(&bytes)).unwrap();
    let run = cloud.run(&["convert", "glance:snap", "glance:other", "--delete-source", "--yes"]).await;
    // unmarked, it is an image of that name like any other
    run.ends(2, &["an image called other is there already", &other]);
    assert!(!cloud.is_gone(&cloud.snapshot));
    cloud.run(&["image", "delete", "--yes", &other]).await.ends(0, &[]);
    assert!(cloud.is_gone(&other));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_try_that_failed_is_removed_later_when_it_could_not_be_at_once() {
    let spoiled = |faults: &mut mini_glance::Faults| {
        faults.erring_puts = 1;
        faults.failing_deletes = 1000;
    };
    let cloud = Cloud::start_with(8, Config::default(), spoiled).await;
    cloud.convert(&[]).await.ends(0, &["is an unfinished conversion of the same source, and deleting it failed", "virta clean"]);
    assert_eq!(cloud.others().len(), 2);
    cloud.service.faults(|faults| faults.failing_deletes = 0);
    cloud
        .run(&["clean", "--os-cloud", "mini"])
        .await
        .ends(0, &["removed image compact (unfinished)", "no unfinished image is left"]);
    cloud.assert_converted();
    cloud.run(&["clean"]).await.ends(0, &["nothing to clean"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_of_other_bytes_under_the_same_ids_is_none_of_this_source() {
    let cloud = Cloud::start_with(8, Config::default(), |_| {}).await;
    cloud.convert(&[]).await.ends(0, &[]);
    let made = cloud.assert_converted()["id"].as_str().unwrap().to_owned();
    // one image id may be in two clouds, and mean two disks
    cloud.service.set(&made, "virta_source_hash", json!("sha512:00"));
    let deletes = ["--delete-source", "--yes"];
    cloud.convert(&deletes).await.ends(2, &["an image called compact is there already"]);
    cloud.run(&["batch", "snap", "--delete-source", "--yes"]).await.ends(0, &["1 converted"]);
    assert!(cloud.image(&cloud.snapshot).is_none() && cloud.image(&made).is_some() && cloud.named("snap-qcow2").len() == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_person_took_for_something_else_is_nobodys_leftover() {
    let cloud = Cloud::start_with(8, Config::default(), |_| {}).await;
    cloud.convert(&[]).await.ends(0, &[]);
    let made = cloud.assert_converted()["id"].as_str().unwrap().to_owned();
    cloud.service.set(&made, "name", json!("prod-web"));
    for key in ["virta_verified", "virta_run", "virta_source_id"] {
        cloud.service.set(&made, key, json!(""));
    }
    cloud.convert(&[]).await.ends(0, &[]);
    assert!(cloud.image(&made).is_some());
    assert_eq!((cloud.named("prod-web").len(), cloud.named("compact").len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_with_a_colon_is_a_name() {
    let cloud = Cloud::start_with(8, Config::default(), |_| {}).await;
    for name in ["web:22.04", "in:a,b", "eq:a"] {
        cloud.run(&["convert", "glance:snap", &format!("glance:{name}")]).await.ends(0, &[]);
        cloud.run(&["image", "show", name]).await.ends(0, &[name]);
        cloud.run(&["convert", &format!("glance:{name}"), "glance:x"]).await.ends(1, &["is qcow2 already"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_lock_was_swept_away_may_live() {
    let cloud = Cloud::start(|faults| faults.stuck_saving = true).await;
    let run = cloud.command(&["convert", "glance:snap", "glance:compact"]).spawn().unwrap();
    seen(&cloud.service, "PUT ").await;
    let runs = cloud.folder.path().join("state/virta/runs");
    let locks = std::fs::read_dir(runs).unwrap().map(|entry| entry.unwrap().path());
    let locks: Vec<_> = locks.filter(|path| path.extension().is_some_and(|end| end == "lock")).collect();
    assert_eq!(locks.len(), 1);
    std::fs::remove_file(&locks[0]).unwrap();
    cloud.run(&["clean", "--os-cloud", "mini"]).await.ends(0, &["compact (unfinished)", "of this machine is making it"]);
    assert_eq!(cloud.named("compact (unfinished)").len(), 1);
    signal(&run, Signal::INT);
    Run::new(run.wait_with_output().await.unwrap(), Duration::ZERO).ends(130, &["interrupted"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_image_is_changed_by_nobody_else() {
    let cloud = Cloud::start(|faults| faults.stuck_saving = true).await;
    let mut run = cloud.command(&["convert", "glance:snap", "glance:compact"]).spawn().unwrap();
    seen(&cloud.service, "PUT ").await;
    let made = cloud.others()[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(cloud.others()[0]["name"], "compact (unfinished)");
    cloud.run(&["image", "set", &made, "--name", "mine"]).await.ends(1, &["is unfinished: a run is making it"]);
    cloud.run(&["share", &made, "0123456789abcdef0123456789abcdef"]).await.ends(1, &["is unfinished"]);
    let _ = run.start_kill();
    let _ = run.wait().await;
    // what was on its way when it died has come to its end
    tokio::time::sleep(Duration::from_millis(300)).await;
    // nor is it anybody's source to delete, whatever it looks like
    cloud.service.set(&made, "status", json!("active"));
    cloud.service.set(&made, "disk_format", json!("raw"));
    cloud.service.set(&made, "size", json!(8 << 20));
    let from = format!("glance:{made}");
    cloud.run(&["convert", &from, "glance:x", "--delete-source", "--yes"]).await.ends(1, &["is unfinished: a run is making it"]);
    cloud.run(&["batch", &made, "--delete-source", "--yes"]).await.ends(0, &["is unfinished: a run is making it"]);
    cloud.run(&["image", "delete", "--yes", &made]).await.ends(0, &["a run may be making it until"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_at_any_moment_the_same_command_finishes_with_one_image_and_no_trash() {
    let states = ["POST /v3", "GET /v2/images?", "GET /v2/images/", "POST /v2/images", "PUT ", "PATCH"];
    for step in 0..56_u64 {
        let cloud = Cloud::start_with(24, Config::default(), |faults| faults.latency = Duration::from_millis(8)).await;
        let scratch = ["--memory", "32M", "--scratch", "."];
        let command = [&["convert", "glance:snap", "glance:compact"][..], &scratch].concat();
        let mut child = cloud.command(&command).spawn().unwrap();
        match usize::try_from(step).ok().and_then(|step| states.get(step)) {
            Some(state) => seen(&cloud.service, state.trim_end_matches('?')).await,
            // a fixed sequence that looks random: 0 to 900 ms
            None => tokio::time::sleep(Duration::from_millis(step * 7919 % 900)).await,
        }
        let _ = child.start_kill();
        let _ = child.wait().await;
        assert!(cloud.image(&cloud.snapshot).is_some());
        cloud.run(&command).await.ends(0, &[]);
        cloud.assert_converted();
        let left: Vec<_> = std::fs::read_dir(cloud.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "clouds.yaml" || name == "state"), "step {step}: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_run_left_is_cleaned_and_what_a_live_one_holds_is_not() {
    let cloud = Cloud::start(|faults| faults.stuck_saving = true).await;
    let live = cloud.command(&["convert", "glance:snap", "glance:live"]).spawn().unwrap();
    seen(&cloud.service, "PUT ").await;
    let mut dead = cloud.command(&["convert", "glance:snap", "glance:dead"]).spawn().unwrap();
    for _ in 0..400 {
        if cloud.named("dead (unfinished)").iter().any(|image| image["status"] == "saving") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let _ = dead.start_kill();
    let _ = dead.wait().await;
    let status = cloud.run(&["status"]).await;
    status.ends(0, &["running", "killed", "glance:snap -> glance:dead"]);
    // somebody else's image of the same name and state is nobody's business
    let foreign = cloud.service.add_image(&snapshot_record("dead"), |storing| storing.write(b"x")).unwrap();
    cloud.service.set(&foreign, "status", json!("queued"));
    cloud
        .run(&["clean"])
        .await
        .ends(0, &["removed image dead (unfinished)", "live (unfinished)", "of this machine is making it"]);
    assert_eq!((cloud.named("dead").len(), cloud.named("dead (unfinished)").len()), (1, 0));
    assert_eq!(cloud.named("live (unfinished)").len(), 1, "a live run holds it");
    cloud.run(&["clean"]).await.ends(0, &["nothing to clean"]);
    // the same conversion a second time, while one runs: it is told who has it
    cloud.run(&["convert", "glance:snap", "glance:live"]).await.ends(75, &["is converting this source"]);
    let asked = Instant::now();
    signal(&live, Signal::INT);
    Run::new(live.wait_with_output().await.unwrap(), asked.elapsed()).ends(130, &["interrupted"]);
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(cloud.named("live (unfinished)").len(), 0);
    let runs: Value = serde_json::from_str(&cloud.run(&["status", "-f", "json"]).await.stdout).unwrap();
    let mut states: Vec<&str> = runs.as_array().unwrap().iter().map(|run| run["state"].as_str().unwrap()).collect();
    states.sort_unstable(); // they began within a second
    assert_eq!(states, ["failed", "failed", "killed"], "{runs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_terminal_does_not_end_the_run_and_status_finds_it_again() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let cloud = Cloud::start(|faults| {
        faults.stalling_gets = 1;
        faults.cut_after_bytes = 3 << 20;
        faults.stall = Duration::from_secs(4);
    })
    .await;
    // a real terminal: the run's session leader has it as its controlling terminal, and it is hung up when the other end closes
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let open = || std::fs::File::options().read(true).write(true).open(&name).unwrap();
    let mut command = cloud.command(&[]);
    let mut setsid = tokio::process::Command::new("setsid");
    setsid.args(["--ctty", env!("CARGO_BIN_EXE_virta"), "convert", "glance:snap", "glance:compact", "--connections", "1"]);
    setsid.current_dir(cloud.folder.path()).env_clear();
    for (key, value) in command.as_std_mut().get_envs() {
        setsid.env(key, value.unwrap());
    }
    let mut child = setsid.stdin(open()).stdout(open()).stderr(open()).spawn().unwrap();
    drop(setsid);
    seen(&cloud.service, "GET /v2/images/").await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(master);
    let followed = cloud.run(&["status", "--follow"]).await;
    followed.ends(0, &["glance:snap -> glance:compact", "running", "the image will be", "made glance:"]);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_cloud_streams_into_another_with_its_own_sign_in() {
    let cloud = Cloud::start(|_| {}).await;
    let other = Cloud::start(|faults| faults.refused_properties = vec!["hw_disk_bus".to_owned()]).await;
    let both = format!("{}{}", cloud.service.clouds_yaml(), other.service.clouds_yaml().replace("clouds:\n  mini:", "  other:"));
    std::fs::write(cloud.folder.path().join("clouds.yaml"), both).unwrap();
    cloud.service.set(&cloud.snapshot, "instance_uuid", json!("here"));
    let mut arguments = vec!["convert", "glance:snap", "glance:there", "--os-cloud", "mini", "--to-os-cloud", "other"];
    arguments.extend(["--verify", "readback"]);
    cloud.run(&arguments).await.ends(0, &["destination: cloud other", "property hw_disk_bus was not taken over"]);
    cloud.assert_nothing_made();
    let made = other.others().remove(0);
    assert_eq!((&made["name"], &made["os_distro"]), (&json!("there"), &json!("debian")));
    assert!(made.get("instance_uuid").is_none() && made.get("hw_disk_bus").is_none());
    cloud.assert_is_the_disk(&other.service.data_path(made["id"].as_str().unwrap()).unwrap());
    // again: it is there already, read back; the source may go
    cloud.run(&arguments).await.ends(0, &["already done"]);
    arguments.extend(["--delete-source", "--yes"]);
    cloud.run(&arguments).await.ends(0, &["deleted the source image", "already done"]);
    assert!(cloud.is_gone(&cloud.snapshot));
    cloud.run(&["convert", "x", "y.qcow2", "--to-os-cloud", "other"]).await.ends(2, &["has to be glance:NAME"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pipes_in_and_out_carry_the_image_and_nothing_else() {
    let cloud = Cloud::start(|_| {}).await;
    // from Glance to stdout, and the report to stderr
    let run = cloud.command(&["convert", "glance:snap", "-", "--compress", "zstd"]).output().await.unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    std::fs::write(cloud.folder.path().join("out.qcow2"), &run.stdout).unwrap();
    cloud.assert_is_the_disk(&cloud.folder.path().join("out.qcow2"));
    assert!(String::from_utf8_lossy(&run.stderr).contains("proven: what was read has the source's sha512"));
    // from a pipe to a file, to Glance, to a pipe
    let feed = |arguments: &[&str]| {
        let mut command = cloud.command(arguments);
        let raw = cloud.raw.clone();
        async move {
            let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            let feeding = tokio::spawn(async move { stdin.write_all(&raw).await });
            let output = child.wait_with_output().await.unwrap();
            let _ = feeding.await.unwrap();
            output
        }
    };
    let output = feed(&["convert", "-", "piped.qcow2", "--verify", "readback"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cloud.assert_is_the_disk(&cloud.folder.path().join("piped.qcow2"));
    let output = feed(&["convert", "-", "glance:piped", "--compress", "zlib", "--verify", "readback"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let made = cloud.named("piped").remove(0);
    cloud.assert_is_the_disk(&cloud.service.data_path(made["id"].as_str().unwrap()).unwrap());
    let output = feed(&["convert", "-", "-"]).await;
    std::fs::write(cloud.folder.path().join("through.qcow2"), &output.stdout).unwrap();
    cloud.assert_is_the_disk(&cloud.folder.path().join("through.qcow2"));
    // a file as stdin is a file: read at any offset, twice if need be
    let path = cloud.folder.path().join("disk.raw");
    std::fs::write(&path, &cloud.raw).unwrap();
    let mut command = cloud.command(&["convert", "-", "glance:redirected", "--memory", "32M", "--report", "report.json"]);
    let output = command.stdin(std::fs::File::open(&path).unwrap()).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(cloud.report()["access"], "random");
    // a reader that goes away, a source that is empty, a pipe that does not fit
    let mut command = cloud.command(&["convert", "glance:snap", "-"]);
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(1, &["writing to -", "Broken pipe"]);
    let run = cloud.run(&["convert", "-", "empty.qcow2"]).await;
    run.ends(1, &["stdin is empty"]);
    // a connection that broke, where somebody knows how much there has to be
    let output = feed(&["convert", "-", "short.qcow2", "--source-size", "1G"]).await;
    let run = Run::new(output, Duration::ZERO);
    run.ends(1, &["but --source-size says 1073741824"]);
    assert!(!cloud.folder.path().join("short.qcow2").exists());
    // nobody would have what goes to a stdout that is closed
    let mut command = cloud.command(&["convert", "disk.raw", "-"]);
    let child = command.stdout(Stdio::null()).spawn().unwrap();
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(2, &["closed or /dev/null"]);
    let big = Cloud::start_with(200, Config::default(), |_| {}).await;
    let mut child = big.command(&["convert", "-", "glance:big", "--memory", "32M"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let raw = big.raw.clone();
    let feeding = tokio::spawn(async move { stdin.write_all(&raw).await });
    let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
    run.ends(1, &["cannot be read again", "Raise --memory (now 32.0 MiB)", "--scratch DIR", "ends the run"]);
    let _ = feeding.await.unwrap();
    big.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_image_without_a_hash_is_read_back_before_the_source_goes() {
    // a source with a hash, a service that computes none for what is uploaded
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.faults(|faults| faults.null_hashes = true);
    let run = cloud.convert(&["--delete-source", "--yes", "--verify", "hash"]).await;
    // a size proves nothing: it is read back, and the mark says so
    run.ends(0, &["reading", "back and comparing it", "deleted the source image"]);
    assert!(cloud.is_gone(&cloud.snapshot));
    let made = cloud.others().remove(0);
    assert_eq!(made["virta_verified"], format!("readback:id:{}", made["id"].as_str().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifo_that_nobody_reads_can_be_interrupted() {
    let cloud = Cloud::start(|_| {}).await;
    std::fs::write(cloud.folder.path().join("disk.raw"), &cloud.raw).unwrap();
    let fifo = cloud.folder.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let child = cloud.command(&["convert", "disk.raw", "fifo"]).spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    signal(&child, Signal::TERM);
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(130, &["waiting until somebody reads fifo"]);
    cloud.run(&["verify", "fifo", "disk.raw"]).await.ends(1, &["a FIFO"]);
    let child = cloud.command(&["convert", "disk.raw", "fifo"]).spawn().unwrap();
    let (from, to) = (fifo, cloud.folder.path().join("through.qcow2"));
    let copying = tokio::spawn(async move { tokio::fs::write(to, tokio::fs::read(from).await?).await });
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(0, &[]);
    copying.await.unwrap().unwrap();
    cloud.assert_is_the_disk(&cloud.folder.path().join("through.qcow2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_neither_memory_nor_scratch_holds_ends_at_once() {
    let cloud = Cloud::start_with(200, Config::default(), |_| {}).await;
    let arguments = ["convert", "-", "glance:big", "--memory", "32M", "--scratch", ".", "--scratch-limit", "10M"];
    let mut child = cloud.command(&arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let raw = cloud.raw.clone();
    let feeding = tokio::spawn(async move { stdin.write_all(&raw).await });
    let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
    run.ends(1, &["cannot be read again", "full at guest offset 0x", "--scratch-limit"]);
    assert!(feeding.await.unwrap().is_err(), "it did not read to the end");
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_that_disagrees_cuts_the_pipe_short() {
    let cloud = Cloud::start(|faults| faults.corrupt_gets = 1).await;
    let output = cloud.command(&["convert", "glance:snap", "-"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let whole: usize = stderr.split("exactly ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(output.stdout.len() < whole, "the last bytes never leave");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_compares_any_two_and_names_the_first_difference() {
    for ranges in [Ranges::Served, Ranges::Refused] {
        let cloud = Cloud::start(|faults| faults.ranges = ranges).await;
        std::fs::write(cloud.folder.path().join("disk.raw"), &cloud.raw).unwrap();
        cloud.run(&["convert", "glance:snap", "glance:compact", "--compress", "zstd"]).await.ends(0, &[]);
        cloud.run(&["convert", "disk.raw", "disk.qcow2", "--compress", "zlib"]).await.ends(0, &[]);
        let all = ["glance:snap", "glance:compact", "disk.raw", "disk.qcow2"];
        for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))).filter(|(a, b)| a < b) {
            cloud.run(&["verify", a, b]).await.ends(0, &["the same: both show a guest the same"]);
        }
        let mut other = cloud.raw.clone();
        for at in [20 << 20, (35 << 20) + 4711, 45 << 20] {
            other[at] ^= 1;
        }
        std::fs::write(cloud.folder.path().join("other.raw"), &other).unwrap();
        for whole in all {
            let run = cloud.run(&["verify", whole, "other.raw"]).await;
            run.ends(3, &["the images differ: first at guest offset 0x1400000"]);
        }
        std::fs::write(cloud.folder.path().join("short.raw"), &cloud.raw[..40 << 20]).unwrap();
        cloud.run(&["verify", "disk.qcow2", "short.raw"]).await.ends(3, &["one disk has"]);
        cloud.run(&["verify", "disk.qcow2", "nothing.raw"]).await.ends(1, &["nothing.raw"]);
    }
    let _ = raw_disk(1);
}
