//! `virta download`: byte by byte, hash checked, holes, resumed.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::{os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use common::{Cloud, MIB, Run, signal};
use mini_glance::{Config, Ranges};
use rustix::process::Signal;
use serde_json::Value;

async fn cloud(mib: usize) -> Cloud {
    Cloud::start_with(mib, Config::default(), |_| {}).await
}

fn path(cloud: &Cloud, name: &str) -> PathBuf {
    cloud.folder.path().join(name)
}

fn files(cloud: &Cloud) -> Vec<String> {
    let names = std::fs::read_dir(cloud.folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != "clouds.yaml" && name != "state").collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_is_the_image_with_holes_by_ranges_or_in_one_stream() {
    for (ranges, access) in [(Ranges::Served, "random"), (Ranges::Refused, "sequential"), (Ranges::FirstBytes, "sequential")] {
        let cloud = cloud(80).await;
        cloud.service.faults(|faults| faults.ranges = ranges);
        let run = cloud.run(&["download", "snap", "disk.raw", "-f", "json"]).await;
        run.ends(0, &[]);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        assert!(std::fs::read(path(&cloud, "disk.raw")).unwrap() == cloud.raw, "other bytes");
        assert_eq!(
            (report["image_hash"]["checked"].as_bool(), report["image_bytes"].as_u64()),
            (Some(true), Some(cloud.raw.len() as u64))
        );
        if access == "sequential" {
            assert_eq!(report["access"], access);
        }
        let stored = std::fs::metadata(path(&cloud, "disk.raw")).unwrap().blocks() * 512;
        assert!(stored < 60 * MIB as u64, "{stored} bytes are stored of {}", cloud.raw.len());
        assert_eq!(files(&cloud), ["disk.raw"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_broke_off_is_kept_and_gone_on_with() {
    for ranges in [Ranges::Served, Ranges::Refused] {
        let cloud = cloud(160).await;
        cloud.service.faults(|faults| {
            faults.ranges = ranges;
            faults.cut_after_bytes = 100 << 20;
            faults.stalling_gets = 100;
            faults.stall = Duration::from_secs(60);
        });
        let child = cloud.command(&["download", "snap", "disk.raw", "--connections", "1"]).spawn().unwrap();
        let mut waited = 0;
        while std::fs::read_to_string(path(&cloud, "disk.raw.partial.json"))
            .map_or(true, |mark| mark.contains("\"whole_bytes\":0"))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
            waited += 1;
            assert!(waited < 1000, "no mark: {:?}", files(&cloud));
        }
        signal(&child, Signal::INT);
        let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
        run.ends(130, &["are kept as", "--resume goes on"]);
        assert_eq!(files(&cloud), ["disk.raw.partial", "disk.raw.partial.json"]);
        cloud.service.faults(|faults| faults.stalling_gets = 0);
        cloud.run(&["download", "snap", "disk.raw"]).await.ends(2, &["go on with --resume, or start again with --force"]);
        let fetched_before = cloud.gets_of_data();
        let run = cloud.run(&["download", "snap", "disk.raw", "--resume", "-f", "json"]).await;
        run.ends(0, &["going on at"]);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        assert!(report["resumed_bytes"].as_u64().unwrap() >= 64 << 20, "{report}");
        assert_eq!(report["image_hash"]["checked"], true);
        if ranges == Ranges::Served {
            let left = cloud.raw.len() as u64 - report["resumed_bytes"].as_u64().unwrap();
            assert!(
                report["fetched_bytes"].as_u64().unwrap() < left + (4 << 20),
                "only what was missing: {report} {fetched_before:?}"
            );
        }
        assert!(std::fs::read(path(&cloud, "disk.raw")).unwrap() == cloud.raw, "other bytes");
        assert_eq!(files(&cloud), ["disk.raw"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_costs_at_most_what_was_not_written_down_and_damage_is_found() {
    let cloud = cloud(160).await;
    let stall = |on: bool| {
        cloud.service.faults(|faults| {
            faults.cut_after_bytes = 120 << 20;
            faults.stalling_gets = if on { 100 } else { 0 };
            faults.stall = Duration::from_secs(60);
        });
    };
    let half = async || {
        stall(true);
        let mut child = cloud.command(&["download", "snap", "disk.raw", "--connections", "1", "--force"]).spawn().unwrap();
        while std::fs::read_to_string(path(&cloud, "disk.raw.partial.json"))
            .map_or(true, |mark| mark.contains("\"whole_bytes\":0"))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        child.kill().await.unwrap();
        stall(false);
    };
    half().await;
    cloud.run(&["download", "snap", "disk.raw", "--resume"]).await.ends(0, &["going on at", "proven"]);
    assert!(std::fs::read(path(&cloud, "disk.raw")).unwrap() == cloud.raw);
    // a byte of what was kept is lost: the hash finds it, and nothing wrong is left
    std::fs::remove_file(path(&cloud, "disk.raw")).unwrap();
    half().await;
    {
        use std::os::unix::fs::FileExt;
        let partial = std::fs::File::options().write(true).open(path(&cloud, "disk.raw.partial")).unwrap();
        partial.write_all_at(b"damage", 5 << 20).unwrap();
    }
    cloud.run(&["download", "snap", "disk.raw", "--resume"]).await.ends(3, &["sha512"]);
    assert_eq!(files(&cloud), Vec::<String>::new());
    // the image of that name is another one by now
    half().await;
    cloud.service.set(&cloud.snapshot, "name", serde_json::json!("old"));
    let record = common::snapshot_record("snap");
    cloud.service.add_image(&record, |storing| storing.write(&vec![3; 2 * MIB])).unwrap();
    cloud.run(&["download", "snap", "disk.raw", "--resume"]).await.ends(2, &["is of image", "--force"]);
    cloud.run(&["download", "snap", "disk.raw", "--force"]).await.ends(0, &["starting again", "proven"]);
    assert_eq!(std::fs::read(path(&cloud, "disk.raw")).unwrap(), vec![3; 2 * MIB]);
    assert_eq!(files(&cloud), ["disk.raw"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_is_never_taken_for_what_it_is_not() {
    let cloud = cloud(160).await;
    cloud.service.faults(|faults| faults.null_hashes = true);
    let other: Vec<u8> = cloud.raw.iter().map(|byte| !byte).collect();
    for name in ["a", "b"] {
        let bytes = if name == "a" { &cloud.raw } else { &other };
        cloud.service.add_image(&common::snapshot_record(name), |storing| storing.write(bytes)).unwrap();
    }
    // killed once the mark says so; the service stalls behind so many bytes
    let killed = async |words: &[&str], bytes: u64, mark: &dyn Fn(&str) -> bool| {
        cloud.service.faults(|faults| {
            faults.cut_after_bytes = bytes;
            faults.stalling_gets = 100;
            faults.stall = Duration::from_secs(60);
        });
        let mut child = cloud.command(words).spawn().unwrap();
        let mut waited = 0;
        while !std::fs::read_to_string(path(&cloud, "disk.raw.partial.json")).is_ok_and(|text| mark(&text)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            waited += 1;
            assert!(waited < 2000, "no such mark: {:?}", files(&cloud));
        }
        // some of what is sent lands
        tokio::time::sleep(Duration::from_millis(300)).await;
        child.kill().await.unwrap();
        cloud.service.faults(|faults| faults.stalling_gets = 0);
    };
    let ids: Vec<String> = ["a", "b"]
        .iter()
        .map(|name| {
            let images = cloud.service.images();
            images.iter().find(|image| image["name"] == *name).unwrap()["id"].as_str().unwrap().to_owned()
        })
        .collect();
    let begun = |text: &str| text.contains("\"whole_bytes\":0");
    let half = |text: &str| !text.contains("\"whole_bytes\":0");
    // no hash: nothing could tell whether what was kept is still what it was, so nothing of it is gone on with
    killed(&["download", "a", "disk.raw", "--connections", "1"], 120 << 20, &|text| text.contains(&ids[0])).await;
    killed(&["download", "b", "disk.raw", "--connections", "1", "--force"], 5 << 20, &|text| text.contains(&ids[1])).await;
    cloud.run(&["download", "a", "disk.raw", "--resume", "--force"]).await.ends(0, &["not proven"]);
    assert!(std::fs::read(path(&cloud, "disk.raw")).unwrap() == cloud.raw, "two images are mixed");
    std::fs::remove_file(path(&cloud, "disk.raw")).unwrap();
    // with one: a run that starts over forgets what was kept before it empties it
    cloud.service.faults(|faults| faults.null_hashes = false);
    killed(&["download", "snap", "disk.raw", "--connections", "1"], 120 << 20, &half).await;
    killed(&["download", "snap", "disk.raw", "--connections", "1", "--force"], 5 << 20, &begun).await;
    cloud.run(&["download", "snap", "disk.raw", "--resume"]).await.ends(0, &["proven"]);
    assert!(std::fs::read(path(&cloud, "disk.raw")).unwrap() == cloud.raw);
    // again: there is nothing to do, and that is said
    cloud.run(&["download", "snap", "disk.raw", "--resume"]).await.ends(0, &["is complete already"]);
    assert_eq!(files(&cloud), ["disk.raw"]);
    // a run that was killed early stands in nobody's way
    std::fs::remove_file(path(&cloud, "disk.raw")).unwrap();
    killed(&["download", "snap", "disk.raw", "--connections", "1"], 5 << 20, &begun).await;
    cloud.run(&["download", "snap", "disk.raw"]).await.ends(0, &["proven"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_image_that_could_not_get_its_name_is_never_emptied() {
    let cloud = cloud(60).await;
    cloud.service.faults(|faults| {
        faults.cut_after_bytes = 50 << 20;
        faults.stalling_gets = 1;
        faults.stall = Duration::from_millis(1500);
    });
    let child = cloud.command(&["download", "snap", "disk.raw", "--connections", "1"]).spawn().unwrap();
    while !path(&cloud, "disk.raw.partial.json").exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    std::fs::write(path(&cloud, "disk.raw"), "theirs").unwrap();
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO)
        .ends(1, &["was made by somebody else meanwhile", "kept as"]);
    assert_eq!(files(&cloud), ["disk.raw", "disk.raw.partial"]);
    cloud.run(&["download", "snap", "disk.raw", "--force"]).await.ends(2, &["is in the way"]);
    assert!(std::fs::read(path(&cloud, "disk.raw.partial")).unwrap() == cloud.raw, "the complete image is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn stdout_by_its_other_names_gets_the_image_alone() {
    let cloud = cloud(8).await;
    for name in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        let output = cloud.command(&["download", "snap", name]).output().await.unwrap();
        assert!(output.status.success() && output.stdout == cloud.raw, "{name}: {} bytes", output.stdout.len());
        let output = cloud.command(&["convert", "glance:snap", name]).output().await.unwrap();
        assert!(output.status.success() && output.stdout.starts_with(b"QFI\xfb") && output.stdout.len() % 65536 == 0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_gets_the_image_and_its_last_bytes_only_if_the_hash_agrees() {
    let cloud = cloud(40).await;
    let output = cloud.command(&["download", "snap", "-"]).output().await.unwrap();
    assert!(output.status.success() && output.stdout == cloud.raw, "{}", String::from_utf8_lossy(&output.stderr));
    cloud.service.faults(|faults| faults.corrupt_gets = 1);
    let output = cloud.command(&["download", "snap", "-"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.len() < cloud.raw.len());
    cloud.run(&["download", "snap", "-", "--resume"]).await.ends(2, &["a pipe starts at the beginning"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_wrong_names_and_images_without_bytes_are_refused() {
    let cloud = cloud(8).await;
    cloud.service.faults(|faults| faults.corrupt_gets = 1);
    cloud.run(&["download", "snap", "disk.raw"]).await.ends(3, &["sha512", "is not what was stored"]);
    cloud.run(&["download", "snap", "disk.qcow2"]).await.ends(2, &["is not that of a raw image"]);
    cloud.run(&["download", "snap", "."]).await.ends(2, &["is a folder"]);
    cloud.run(&["download", "nobody", "disk.raw"]).await.ends(2, &["there is no image nobody"]);
    std::fs::write(path(&cloud, "taken.raw"), "precious").unwrap();
    cloud.run(&["download", "snap", "taken.raw"]).await.ends(2, &["exists"]);
    std::fs::write(path(&cloud, "other.raw.partial"), "precious").unwrap();
    cloud.run(&["download", "snap", "other.raw", "--force"]).await.ends(2, &["is in the way"]);
    cloud.service.set(&cloud.snapshot, "status", serde_json::json!("deactivated"));
    cloud.run(&["download", "snap", "disk.raw"]).await.ends(1, &["is deactivated"]);
    cloud.service.set(&cloud.snapshot, "status", serde_json::json!("saving"));
    cloud.run(&["download", "snap", "disk.raw"]).await.ends(1, &["is saving: only an active image has bytes"]);
    assert_eq!(files(&cloud), ["other.raw.partial", "taken.raw"]);
    cloud.service.set(&cloud.snapshot, "status", serde_json::json!("active"));
    cloud.run(&["download", "snap", "taken.raw", "--force", "--no-sync"]).await.ends(0, &["proven"]);
    assert!(std::fs::read(path(&cloud, "taken.raw")).unwrap() == cloud.raw);
    cloud.service.faults(|faults| faults.null_hashes = true);
    let record = common::snapshot_record("bare");
    cloud.service.add_image(&record, |storing| storing.write(b"12345")).unwrap();
    cloud.run(&["download", "glance:bare", "bare.img"]).await.ends(0, &["not proven: Glance has no hash"]);
    assert_eq!(std::fs::read(path(&cloud, "bare.img")).unwrap(), b"12345");
}
