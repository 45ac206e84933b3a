//! `virta doctor`, `virta inspect`, completions and manual pages: what people meet first.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::time::Duration;

use common::{Cloud, MIB};
use mini_glance::{Config, Ranges};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn doctor_tells_what_is_there_changes_nothing_and_is_quick() {
    let cloud = Cloud::start_with(24, Config::default(), |faults| faults.quota_left_bytes = Some(5 << 30)).await;
    let before = cloud.service.images();
    let run = cloud.run(&["doctor", "-f", "json"]).await;
    run.ends(0, &[]);
    let told: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((told["cloud"]["project"].as_str(), told["quota_left_bytes"].as_u64()), (Some("demo"), Some(5 << 30)));
    assert_eq!((told["ranges"].as_bool(), told["compute"].as_bool()), (Some(true), Some(true)));
    assert_eq!((told["images"]["raw"].as_u64(), told["images"]["with_hash"].as_u64()), (Some(1), Some(1)));
    assert_eq!(told["next"], format!("virta convert glance:{} glance:snap-qcow2", cloud.snapshot));
    assert_eq!(cloud.service.images(), before);
    assert!(
        cloud.service.requests().iter().all(|request| request.starts_with("GET") || request.starts_with("POST /v3/auth/tokens"))
    );
    assert_eq!(std::fs::read_dir(cloud.folder.path()).unwrap().count(), 1, "clouds.yaml alone: no state folder was made");
    // the command that it says is one that works, and then it says another one
    let next = told["next"].as_str().unwrap().to_owned();
    cloud.run(&next.split(' ').skip(1).collect::<Vec<_>>()).await.ends(0, &[]);
    cloud.run(&["doctor"]).await.ends(0, &["converted: snap-qcow2", &format!("virta image delete {}", cloud.snapshot)]);

    cloud.service.faults(|faults| faults.ranges = Ranges::Refused);
    cloud.run(&["doctor"]).await.ends(0, &["not served: downloads are one stream each"]);
    cloud.service.faults(|faults| faults.latency = Duration::from_secs(3));
    let run = cloud.run(&["doctor"]).await;
    run.ends(0, &["the rest did not answer"]);
    assert!(run.elapsed < Duration::from_secs(10), "{:?}", run.elapsed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_reads_tell_what_is_in_an_image_in_glance() {
    let cloud = Cloud::start_with(3, Config::default(), |_| {}).await;
    // 64 MiB: a Linux partition with a swap header in it, and nothing else
    let mut raw = vec![0_u8; 64 * MIB];
    raw[446..462].copy_from_slice(&[0x80, 0x20, 0x21, 0, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0xf0, 1, 0]);
    raw[510..512].copy_from_slice(&[0x55, 0xaa]);
    raw[MIB + 4086..MIB + 4096].copy_from_slice(b"SWAPSPACE2");
    raw[MIB + 1028] = 200;
    raw[3 * MIB..4 * MIB].fill(9);
    let record = common::snapshot_record("disk");
    let id = cloud.service.add_image(&record, |storing| storing.write(&raw)).unwrap();
    let run = cloud.run(&["inspect", "glance:disk", "-f", "json"]).await;
    run.ends(0, &[]);
    let told: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((told["format"].as_str(), told["table"]["kind"].as_str()), (Some("raw"), Some("mbr")));
    assert_eq!(told["contents"][0]["kind"], "swap");
    assert!(told["read_bytes"].as_u64().unwrap() < 2 << 20, "{told}");
    cloud.service.faults(|faults| faults.ranges = Ranges::Refused);
    cloud
        .run(&["inspect", &format!("glance:{id}")])
        .await
        .ends(0, &["partition 1: 62.0 MiB swap", "this image store serves no ranges"]);
    cloud.service.faults(|faults| faults.ranges = Ranges::Served);
    // findings are no failure, unless they are asked to be
    raw[446] = 0x90;
    std::fs::write(cloud.folder.path().join("odd.raw"), &raw).unwrap();
    cloud.run(&["inspect", "odd.raw"]).await.ends(0, &["boot flag 0x90", "Glance refuses these bytes as raw"]);
    cloud.run(&["inspect", "--strict", "odd.raw"]).await.ends(1, &["boot flag 0x90"]);
    cloud.run(&["inspect", "--strict", "glance:disk"]).await.ends(0, &[]);
    cloud.run(&["inspect", "nothing.raw"]).await.ends(2, &["there is no file"]);
    cloud.run(&["inspect", "-"]).await.ends(2, &["give a file"]);
    cloud.run(&["inspect", "."]).await.ends(1, &["it is no file"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_complete_commands_flags_and_names_of_images() {
    let cloud = Cloud::start_with(3, Config::default(), |_| {}).await;
    let complete = async |words: &[&str]| {
        let output = cloud.command(&["--"]).args(words).env("COMPLETE", "fish").output().await.unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(complete(&["virta", "im"]).await.starts_with("image\t"));
    assert!(complete(&["virta", "convert", "--comp"]).await.contains("--compress-level\t"));
    assert_eq!(complete(&["virta", "download", "sn"]).await.trim(), "snap");
    assert_eq!(complete(&["virta", "convert", "glance:s"]).await.trim(), "glance:snap");
    // kept for a minute: the second one asks nobody
    let before = cloud.service.requests().len();
    assert_eq!(complete(&["virta", "image", "show", ""]).await.lines().next(), Some("snap"));
    assert_eq!(cloud.service.requests().len(), before);
    for (shell, sign) in [("bash", "complete -o"), ("zsh", "#compdef virta"), ("fish", "complete --keep-order")] {
        cloud.run(&["completions", shell]).await.ends(0, &[sign]);
    }
    cloud.run(&["man", "snapshot"]).await.ends(0, &[".TH virta-snapshot"]);
    cloud.run(&["man", "--dir", "man1"]).await.ends(0, &[]);
    let pages: Vec<String> = std::fs::read_dir(cloud.folder.path().join("man1"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(pages.len() > 18 && pages.iter().any(|page| page == "virta-image-list.1"), "{pages:?}");
}
