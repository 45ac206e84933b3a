//! The command line against an image service that answers as a real Glance does, and as other clouds do.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::{
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use common::{Cloud, Run, seen, signal, snapshot_record};
use mini_glance::{Config, Faults, Ranges};
use serde_json::{Value, json};
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn the_main_job_makes_an_exact_image_with_the_sources_properties() {
    let cloud = Cloud::start(|_| {}).await;
    let run = cloud.convert(&["--property", "os_distro=alpine", "--connections", "4"]).await;
    run.ends(
        0,
        &[
            "proven: what was read has the source's sha512",
            "proven: size and sha512 of the new image",
            "cloud mini",
            "project demo, user demo",
        ],
    );
    let image = cloud.assert_converted();
    for (key, value) in [
        ("disk_format", json!("qcow2")),
        ("visibility", json!("private")),
        ("min_disk", json!(1)),
        ("min_ram", json!(512)),
        ("tags", json!(["web"])),
        ("hw_disk_bus", json!("virtio")),
        ("os_distro", json!("alpine")),
    ] {
        assert_eq!(image[key], value, "{key}");
    }
    assert!(image.get("img_signature").is_none() && image.get("image_location").is_none());
    let report = cloud.report();
    assert_eq!(report["access"], "random");
    assert_eq!(report["virtual_bytes"], cloud.raw.len().next_multiple_of(512));
    assert_eq!(report["fetched_bytes"], cloud.raw.len(), "no byte is fetched twice");
    assert_eq!(report["source_hash"]["checked"], true);
    assert_eq!(report["image_hash"]["checked"], true);
    assert_eq!(report["image_bytes"], image["size"]);
    assert_eq!(report["uploaded_bytes"], image["size"]);
    let sum = report["zero_bytes"].as_u64().unwrap() + report["data_bytes"].as_u64().unwrap();
    assert_eq!(sum, u64::try_from(cloud.raw.len()).unwrap());
    assert_eq!(report["scratch_peak_bytes"], 0);
    assert!(report["stages"].as_array().unwrap().len() >= 6);
    let (plain, ranged) = cloud.gets_of_data();
    assert!(plain == 1 && ranged > 1, "one GET, a probe, then ranges: {plain} {ranged}");
    // the receipt is its owner's alone
    let receipts: Vec<PathBuf> =
        std::fs::read_dir(cloud.folder.path().join("state/virta/receipts")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(receipts.len(), 1);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&receipts[0]).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    // again: it is done already, and nothing is fetched
    let before = cloud.gets_of_data();
    cloud.convert(&[]).await.ends(0, &["already done"]);
    assert_eq!(cloud.gets_of_data(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_ranges_are_not_really_served_one_stream_does_it() {
    let kinds = [
        (Ranges::Refused, "answered 400 to a range"),
        (Ranges::Ignored, "answered 200 to a range"),
        (Ranges::FirstBytes, "other bytes than the image"),
        (Ranges::WrongContentRange, "wrong Content-Range"),
    ];
    for (ranges, why) in kinds {
        let cloud = Cloud::start(|faults| faults.ranges = ranges).await;
        cloud.convert(&[]).await.ends(0, &[why]);
        cloud.assert_converted();
        assert_eq!(cloud.report()["access"], "sequential");
        assert_eq!(cloud.gets_of_data(), (1, 1), "{ranges:?}: one GET and the probe");
    }
    let cloud = Cloud::start(|_| {}).await;
    cloud.convert(&["--connections", "1"]).await.ends(0, &[]);
    assert_eq!(cloud.gets_of_data(), (1, 0), "with one connection nobody probes");
    // where one is fast enough, the GET that it began with goes on to the end
    let cloud = Cloud::start(|_| {}).await;
    cloud.convert(&[]).await.ends(0, &["ranges are served: up to 4 connections"]);
    assert_eq!((cloud.gets_of_data(), &cloud.report()["access"]), ((1, 1), &json!("random")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stops_serving_ranges_fails_the_run_with_its_own_words() {
    let cloud = Cloud::start(|faults| faults.ranges = Ranges::RefusedAfter(2)).await;
    cloud
        .convert(&["--connections", "4"])
        .await
        .ends(1, &["400 Bad Request", "Getting images randomly from this store is not supported", "request req-"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_bodies_errors_and_expired_tokens_are_tried_again_and_nothing_is_lost() {
    for connections in ["1", "4"] {
        let cloud = Cloud::start(|faults| {
            faults.cut_gets = 6;
            faults.cut_after_bytes = 5_000_001;
            faults.failing_gets = 1;
        })
        .await;
        cloud.convert(&["--connections", connections]).await.ends(0, &["tried again"]);
        cloud.assert_converted();
        let report = cloud.report();
        assert!(report["retries"].as_array().unwrap().len() >= 2, "{report}");
        let retried = report["retried_bytes"].as_u64().unwrap();
        assert_eq!(report["fetched_bytes"].as_u64().unwrap() - retried, u64::try_from(cloud.raw.len()).unwrap());
        if connections == "1" {
            assert!(retried > 0, "a second GET discards what was there");
        }
    }
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.faults(|faults| faults.expired_tokens = 1);
    cloud.convert(&[]).await.ends(0, &[]);
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_end_in_the_middle_are_renewed() {
    // shorter than the two minutes of life that a token has to have: each use signs in again
    let config = Config { token_life: Duration::from_secs(1), ..Config::default() };
    let cloud = Cloud::start_with(48, config, |faults| faults.latency = Duration::from_millis(60)).await;
    cloud.convert(&[]).await.ends(0, &[]);
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_gets_better_is_given_up_with_its_status() {
    let cloud = Cloud::start(|faults| faults.failing_gets = 1000).await;
    let run = cloud.convert(&[]).await;
    run.ends(1, &["gave up after", "503 Service Unavailable", "file offset 0x0"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_on_the_way_in_is_found_and_no_image_is_left() {
    for flags in [&["--connections", "1"][..], &[]] {
        let cloud = Cloud::start(|faults| faults.corrupt_gets = 1).await;
        cloud.convert(flags).await.ends(3, &["sha512", "is not what was stored"]);
        cloud.assert_nothing_made();
        // the same into a file: none is left either
        cloud.service.faults(|faults| faults.corrupt_gets = 1);
        cloud.run(&[&["convert", "glance:snap", "disk.qcow2"], flags].concat()).await.ends(3, &["sha512"]);
        let left: Vec<_> = std::fs::read_dir(cloud.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("disk")), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_on_the_way_out_is_found_and_the_image_removed() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.faults(|faults| faults.corrupt_puts = true);
    cloud.convert(&[]).await.ends(3, &["verification failed", "did not arrive as it was sent"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_hashes_the_job_is_done_and_says_what_is_not_proven() {
    let cloud = Cloud::start(|faults| faults.null_hashes = true).await;
    cloud
        .convert(&[])
        .await
        .ends(0, &["warning: Glance has no hash of the source", "not proven: Glance has no hash", "not proven: its content"]);
    cloud.assert_converted();
    let report = cloud.report();
    assert_eq!((&report["source_hash"]["checked"], &report["image_hash"]["checked"]), (&json!(false), &json!(false)));
    assert_eq!(report["warnings"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_uploads_show_glances_words_what_to_do_and_leave_nothing() {
    type Change = fn(&mut Faults);
    let cases: [(Change, &[&str]); 2] = [
        (|faults| faults.quota_hit_mid_body = true, &["413", "exceeds the storage quota", "convert to a local file"]),
        (|faults| faults.refuse_format = true, &["415", "Image failed safety checks"]),
    ];
    for (change, texts) in cases {
        let cloud = Cloud::start(|_| {}).await;
        cloud.service.faults(change);
        cloud.convert(&[]).await.ends(1, texts);
        cloud.assert_nothing_made();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_fail_are_sent_again_from_the_store() {
    // cut halfway, the image is queued again and takes the bytes; an expired token is renewed
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.faults(|faults| {
        faults.cut_puts = 2;
        faults.cut_after_bytes = 3 << 20;
    });
    cloud.convert(&[]).await.ends(0, &["upload tried again (1 of 5)", "upload tried again (2 of 5)"]);
    cloud.assert_converted();
    let report = cloud.report();
    assert_eq!(report["fetched_bytes"], cloud.raw.len(), "the source is not fetched again");
    assert_eq!(report["retries"].as_array().unwrap().len(), 2);
    assert_eq!(cloud.posts(), 1, "the image that there is takes them");
    // a worker that dies leaves the image saving for good: it is deleted and a new one made
    let cloud = Cloud::start(|faults| faults.dying_puts = 1).await;
    cloud.convert(&[]).await.ends(0, &["upload tried again", "a new one is made"]);
    cloud.assert_converted();
    assert_eq!(cloud.posts(), 2);
    // gone in the middle: somebody deleted it
    let cloud = Cloud::start(|faults| faults.vanishing_puts = 1).await;
    cloud.convert(&[]).await.ends(0, &["upload tried again", "a new one is made"]);
    cloud.assert_converted();
    // a service that never takes it is given up after five, and nothing is left
    let cloud = Cloud::start(|faults| faults.failing_puts = 100).await;
    cloud.convert(&[]).await.ends(1, &["upload tried again (4 of 5)", "503 Service Unavailable"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_always_break_at_the_same_place_are_gone_on_with_by_ranges() {
    // in the middle of the second extent, before anybody asked for a range
    let cloud = Cloud::start(|faults| {
        faults.cut_gets = 1000;
        faults.cut_after_bytes = 3_000_000;
    })
    .await;
    cloud.run(&["convert", "glance:snap", "disk.qcow2"]).await.ends(0, &["ranges are served"]);
    cloud.assert_is_the_disk(&cloud.folder.path().join("disk.qcow2"));
}

/// Bytes of the disk's data clusters.
fn data_bytes(raw: &[u8]) -> usize {
    raw.chunks(65536).filter(|cluster| cluster.iter().any(|&byte| byte != 0)).count() * 65536
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_does_not_hold_is_read_again_or_goes_to_the_scratch_file() {
    for (ranges, access) in [(Ranges::Served, "random"), (Ranges::Refused, "sequential")] {
        for compress in ["none", "zstd", "zlib"] {
            let cloud = Cloud::start_with(200, Config::default(), |faults| faults.ranges = ranges).await;
            let run = cloud.convert(&["--memory", "32M", "--compress", compress, "--verify", "readback"]).await;
            run.ends(
                0,
                &["stored data: up to", "no scratch file", "did not fit and will be read again", "proven: what Glance serves"],
            );
            cloud.assert_converted();
            let report = cloud.report();
            assert_eq!((&report["access"], &report["compression"]), (&json!(access), &json!(compress)));
            assert_eq!(report["scratch_peak_bytes"], 0);
            let (reread, again) = (report["reread_bytes"].as_u64().unwrap(), report["source_tier_bytes"].as_u64().unwrap());
            assert!(again > 10 << 20 && reread > again, "{reread} {again}");
            let parts = reread + report["retried_bytes"].as_u64().unwrap();
            assert_eq!(report["fetched_bytes"].as_u64().unwrap() - parts, u64::try_from(cloud.raw.len()).unwrap());
            let rss = report["rss_peak_bytes"].as_u64().unwrap();
            assert!(rss < 150 << 20, "{rss} bytes resident with --memory 32M");

            // a scratch file takes what it may
            let mut flags = vec!["convert", "glance:snap", "glance:scratched", "--memory", "32M", "--compress", compress];
            flags.extend(["--scratch", ".", "--report", "report.json"]);
            cloud.run(&flags).await.ends(0, &["then a scratch file in ."]);
            let report = cloud.report();
            assert_eq!((&report["source_tier_bytes"], &report["reread_bytes"]), (&json!(0), &json!(0)));
            assert!(report["scratch_peak_bytes"].as_u64().unwrap() > 10 << 20);
            let image = cloud.service.images().into_iter().find(|image| image["name"] == "scratched").unwrap();
            cloud.assert_is_the_disk(&cloud.service.data_path(image["id"].as_str().unwrap()).unwrap());
            flags[2] = "glance:limited";
            flags.extend(["--scratch-limit", "10M"]);
            cloud.run(&flags).await.ends(0, &["reached its limit of 10.0 MiB", "read again"]);
            let report = cloud.report();
            assert!(report["scratch_peak_bytes"].as_u64().unwrap() <= 10 << 20);
            assert!(report["source_tier_bytes"].as_u64().unwrap() > 0);
            let image = cloud.service.images().into_iter().find(|image| image["name"] == "limited").unwrap();
            cloud.assert_is_the_disk(&cloud.service.data_path(image["id"].as_str().unwrap()).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_changes_between_two_readings_is_never_half_uploaded() {
    let cloud = Cloud::start_with(200, Config::default(), |faults| faults.ranges = Ranges::Refused).await;
    // the second GET of the whole gets another byte, where memory did not reach
    cloud.service.faults(|faults| faults.changed_after_gets = Some(2));
    cloud.convert(&["--memory", "32M"]).await.ends(3, &["the source has changed since it was first read", "guest offset 0x"]);
    cloud.assert_nothing_made();
    // another image under the old id: its record tells
    let cloud = Cloud::start_with(200, Config::default(), |_| {}).await;
    cloud.service.faults(|faults| faults.latency = Duration::from_millis(300));
    let child = cloud.command(&["convert", "glance:snap", "glance:compact", "--memory", "32M"]).spawn().unwrap();
    seen(&cloud.service, &format!("GET /v2/images/{}/file", cloud.snapshot)).await;
    cloud.service.set(&cloud.snapshot, "os_hash_value", json!("another"));
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(3, &["is not what it was", "its hash differs"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_images_are_smaller_and_exact() {
    let cloud = Cloud::start(|_| {}).await;
    for (compress, flags) in [("zlib", &["--compress-level", "1"][..]), ("zstd", &[]), ("zstd", &["--compress-level", "19"])] {
        let mut arguments =
            vec!["convert", "glance:snap", "disk.qcow2", "--force", "--compress", compress, "--verify", "readback"];
        arguments.extend(["--report", "report.json"]);
        arguments.extend(flags);
        cloud.run(&arguments).await.ends(0, &["proven: the file, read back"]);
        cloud.assert_is_the_disk(&cloud.folder.path().join("disk.qcow2"));
        let report = cloud.report();
        assert!(report["stored_bytes"].as_u64().unwrap() < u64::try_from(data_bytes(&cloud.raw)).unwrap());
    }
    cloud
        .run(&["convert", "glance:snap", "x", "--compress", "zlib", "--compress-level", "13"])
        .await
        .ends(2, &["levels 1 to 12"]);
    cloud.run(&["convert", "glance:snap", "x", "--compress-level", "3"]).await.ends(2, &["needs --compress"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_cannot_hold_the_new_image_is_seen_before_a_byte_is_sent() {
    let cloud = Cloud::start(|faults| faults.quota_left_bytes = Some(4 << 20)).await;
    cloud.convert(&[]).await.ends(1, &["the quota for images has 4.0 MiB left", "convert to a local file"]);
    cloud.assert_nothing_made();
    assert!(!cloud.service.requests().iter().any(|request| request.starts_with("PUT /v2/images")));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_taken_and_ids_are_refused_before_a_byte_is_fetched() {
    let cloud = Cloud::start(|_| {}).await;
    let other = cloud.service.add_image(&snapshot_record("compact"), |storing| storing.write(b"other")).unwrap();
    cloud.convert(&[]).await.ends(2, &["an image called compact is there already", &other, "--force"]);
    cloud.run(&["convert", "glance:snap", &format!("glance:{}", uuid())]).await.ends(2, &["is an id"]);
    cloud.run(&["convert", "glance:nobody", "glance:x"]).await.ends(2, &["there is no image nobody"]);
    cloud.run(&["convert", "snap", "glance:x"]).await.ends(2, &["did you mean glance:snap"]);
    let second = cloud.service.add_image(&snapshot_record("snap"), |storing| storing.write(b"x")).unwrap();
    cloud.convert(&[]).await.ends(2, &["2 images called snap", &cloud.snapshot, &second]);
    assert_eq!(cloud.gets_of_data(), (0, 0));
    // by id, and with --force, a second one of that name is made
    let source = format!("glance:{}", cloud.snapshot);
    cloud.run(&["convert", &source, "glance:compact", "--force", "-f", "value"]).await.ends(0, &[]);
    let named = cloud.service.images().into_iter().filter(|image| image["name"] == "compact").count();
    assert_eq!(named, 2);
}

fn uuid() -> &'static str {
    "0a1b2c3d-0a1b-4a1b-8a1b-0a1b2c3d4e5f"
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_raw_disk_is_refused_with_the_right_command() {
    let cloud = Cloud::start(|_| {}).await;
    let add = |name: &str, change: &[(&str, Value)], bytes: &[u8]| {
        let mut record = snapshot_record(name);
        for (key, value) in change {
            record[*key] = value.clone();
        }
        cloud.service.add_image(&record, |storing| storing.write(bytes)).unwrap()
    };
    add("q", &[("disk_format", json!("qcow2"))], b"QFI\xfb");
    add("v", &[("disk_format", json!("vmdk"))], b"KDMV");
    let liar = [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 2000]].concat();
    add("liar", &[], &liar);
    let volume = add("volume", &[("block_device_mapping", json!("[{\"snapshot_id\": \"s\"}]"))], b"");
    cloud.service.set(&volume, "size", json!(0));
    let off = add("off", &[], b"x");
    cloud.service.set(&off, "status", json!("deactivated"));
    let waiting = add("waiting", &[], b"x");
    cloud.service.set(&waiting, "status", json!("queued"));
    for (name, texts) in [
        ("q", &["disk_format qcow2", "needs no conversion"][..]),
        ("v", &["qemu-img convert -f vmdk"]),
        ("liar", &["is not a raw disk image but qcow2"]),
        ("volume", &["volume-backed", "openstack image create --volume"]),
        ("off", &["deactivated"]),
        ("waiting", &["still queued"]),
    ] {
        cloud.run(&["convert", &format!("glance:{name}"), "glance:new"]).await.ends(1, texts);
    }
    assert!(!cloud.service.images().iter().any(|image| image["name"] == "new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_bounded_and_too_little_is_refused() {
    let cloud = Cloud::start_with(160, Config::default(), |_| {}).await;
    cloud.convert(&["--memory", "1M"]).await.ends(2, &["--memory 1.0 MiB is too small"]);
    // into a file no store is needed
    cloud.run(&["convert", "glance:snap", "disk.qcow2", "--memory", "32M", "--report", "report.json"]).await.ends(0, &[]);
    cloud.assert_is_the_disk(&cloud.folder.path().join("disk.qcow2"));
    let rss = cloud.report()["rss_peak_bytes"].as_u64().unwrap();
    assert!(rss < (32 + 64) << 20, "{rss} bytes resident");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_file_goes_up_as_qcow2() {
    let cloud = Cloud::start(|_| {}).await;
    std::fs::write(cloud.folder.path().join("disk.raw"), &cloud.raw).unwrap();
    cloud.run(&["convert", "disk.raw", "glance:compact", "--os-cloud", "mini"]).await.ends(0, &[]);
    let image = cloud.others().remove(0);
    cloud.assert_is_the_disk(&cloud.service.data_path(image["id"].as_str().unwrap()).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_at_any_stage_cleans_up_within_seconds() {
    type Change = fn(&mut Faults);
    let stall: Change = |faults| {
        faults.stalling_gets = 1000;
        faults.cut_after_bytes = 3 << 20;
        faults.stall = Duration::from_secs(600);
    };
    let stuck: Change = |faults| faults.stuck_saving = true;
    let slow: Change = |faults| faults.latency = Duration::from_secs(3);
    for (change, after, how) in [
        (slow, "POST /v3", rustix::process::Signal::INT),
        (stall, "GET /v2/images/", rustix::process::Signal::TERM),
        (stuck, "PUT", rustix::process::Signal::INT),
        (stuck, "PUT", rustix::process::Signal::TERM),
    ] {
        let cloud = Cloud::start(change).await;
        let child = cloud.command(&["convert", "glance:snap", "glance:compact"]).spawn().unwrap();
        seen(&cloud.service, after).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let asked = Instant::now();
        signal(&child, how);
        let run = Run::new(child.wait_with_output().await.unwrap(), asked.elapsed());
        run.ends(130, &["interrupted"]);
        assert!(run.elapsed < Duration::from_secs(5), "{:?}", run.elapsed);
        cloud.assert_nothing_made();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_that_goes_away_does_not_end_the_run() {
    let cloud = Cloud::start(|faults| {
        faults.stalling_gets = 1;
        faults.cut_after_bytes = 3 << 20;
        faults.stall = Duration::from_secs(2);
    })
    .await;
    let mut child = cloud.command(&["convert", "glance:snap", "glance:compact", "--connections", "1"]).spawn().unwrap();
    seen(&cloud.service, "GET /v2/images/").await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(child.stdout.take());
    drop(child.stderr.take());
    signal(&child, rustix::process::Signal::HUP);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_never_verified_is_not_taken_as_done() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.convert(&[]).await.ends(0, &[]);
    let id = cloud.assert_converted()["id"].as_str().unwrap().to_owned();
    cloud.service.set(&id, "virta_verified", Value::Null);
    // who took its mark off made it something else, which has the name
    cloud.convert(&[]).await.ends(2, &["an image called compact is there already"]);
    cloud.service.set(&id, "virta_claim_s", json!("0"));
    // another one is made, and the one that is not proven goes, whatever it shows
    cloud.convert(&[]).await.ends(0, &["deleted image", "made glance:"]);
    assert_ne!(cloud.assert_converted()["id"], id.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_in_fails_with_what_to_do() {
    let cloud = Cloud::start(|_| {}).await;
    let yaml = cloud.service.clouds_yaml();
    let clouds = |text: &str| std::fs::write(cloud.folder.path().join("clouds.yaml"), text).unwrap();
    clouds(&yaml.replace("password: demo", "password: wrong"));
    cloud.convert(&[]).await.ends(1, &["signing in to mini as demo was refused", "401 Unauthorized"]);
    clouds(&yaml.replace("      password: demo\n", ""));
    cloud.convert(&[]).await.ends(2, &["OS_PASSWORD", "secure.yaml"]);
    clouds("clouds: {}\n");
    cloud.convert(&[]).await.ends(2, &["Did you `source` the openrc file in this shell?"]);
    let credential = mini_glance::identity::APPLICATION_CREDENTIAL;
    clouds(&format!(
        "clouds: {{c: {{auth_type: v3applicationcredential, auth: {{auth_url: '{}', application_credential_id: {}, application_credential_secret: {}}}}}}}",
        cloud.service.base(),
        credential.0,
        credential.1
    ));
    cloud.convert(&[]).await.ends(0, &[]);
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_runs_verifies_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_virta"))
        .args(["demo", "--progress", "plain"])
        .env_clear()
        .env("HOME", folder.path())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    Run::new(output, Duration::ZERO).ends(0, &["proven: read back", "where the time went", "fetch", "upload"]);
    let cache = folder.path().join(".cache/virta");
    assert_eq!(std::fs::read_dir(cache).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the empty cache folder");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_inherited_the_marks_of_a_conversion_is_not_taken_for_one() {
    // Nova copies an image's properties onto the snapshots of servers that boot from it
    let cloud = Cloud::start(|_| {}).await;
    cloud.convert(&[]).await.ends(0, &[]);
    let converted = cloud.assert_converted();
    let id = converted["id"].as_str().unwrap().to_owned();
    let marks = ["virta_source_id", "virta_source_hash", "virta_verified", "virta_run"];
    for format in ["raw", "qcow2"] {
        let mut record = snapshot_record("web");
        for key in marks {
            record[key] = converted[key].clone();
        }
        record["disk_format"] = json!(format);
        let heir = cloud.service.add_image(&record, |storing| storing.write(b"QFI\xfb something else")).unwrap();
        cloud.run(&["convert", "glance:snap", "glance:web"]).await.ends(2, &["is there already", &heir]);
        cloud.service.set(&heir, "name", json!("elsewhere"));
    }
    // an image of another project under this family's first id: it is passed by
    cloud.service.set(&id, "owner", json!("another-project"));
    cloud.service.set(&id, "visibility", json!("public")); // else it would not be seen at all
    cloud.convert(&[]).await.ends(0, &["made glance:"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_that_disagrees_while_the_image_is_being_made_is_told_as_what_it_is() {
    // the lane ends while the POST is under way
    let cloud = Cloud::start_with(3, Config::default(), |faults| faults.latency = Duration::from_millis(400)).await;
    cloud.service.faults(|faults| faults.corrupt_gets = 1);
    cloud.convert(&[]).await.ends(3, &["sha512"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn properties_that_would_undo_the_jobs_safety_are_refused() {
    let cloud = Cloud::start(|_| {}).await;
    for property in ["disk_format=raw", "id=0a1b2c3d-0a1b-4a1b-8a1b-0a1b2c3d4e5f", "virta_verified=x", "min_disk=1", "owner=me"] {
        cloud.convert(&["--property", property]).await.ends(2, &["--property"]);
    }
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stumbles_at_the_very_end_costs_no_image() {
    let cloud = Cloud::start(|_| {}).await;
    cloud.service.faults(|faults| faults.failing_patches = 2);
    cloud.convert(&[]).await.ends(0, &[]);
    cloud.assert_converted();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_at_any_moment_ends_with_130_or_with_the_finished_image() {
    for step in 0..24_u64 {
        let cloud = Cloud::start_with(40, Config::default(), |_| {}).await;
        let child = cloud.command(&["convert", "glance:snap", "glance:compact"]).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(25 + 30 * step)).await;
        signal(&child, if step % 2 == 0 { rustix::process::Signal::INT } else { rustix::process::Signal::TERM });
        let run = Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO);
        // after the mark, it says that the image is there
        if run.code == Some(0) || run.stderr.contains("is there and verified") {
            cloud.assert_converted();
        } else {
            // before the handlers are there, the signal itself ends the process
            assert!(matches!(run.code, Some(130) | None), "{:?}: {}", run.code, run.stderr);
            cloud.assert_nothing_made();
        }
    }
}
