//! `virta bench`: measured here and in mini-glance, saved, compared, and shown as a page, which a real browser opens.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::path::Path;

use common::{Cloud, Run, seen, signal};
use serde_json::Value;

const CHROMIUM: &str = "/usr/bin/chromium";

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn rate(record: &Value, key: &str) -> f64 {
    let measures = record["measures"].as_array().unwrap();
    let found = measures.iter().find(|measure| measure["key"] == key).unwrap_or_else(|| panic!("no {key} in {record:#}"));
    found["bytes_per_s"].as_f64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_measured_and_nothing_is_left_behind() {
    let cloud = Cloud::start(|_| {}).await;
    let files = || std::fs::read_dir(cloud.folder.path()).unwrap().count();
    let before = files();
    let run = cloud
        .run(&[
            "bench",
            "--quick",
            "--os-cloud",
            "mini",
            "--flavor",
            "io.340GB",
            "--image-size",
            "80G",
            "--data",
            "20G",
            "--save",
            "run.json",
            "--html",
            "run.html",
        ]) // fmt
        .await;
    run.ends(
        0,
        &["io.340GB (from flag)", "fetch, 8 connections", "send, 1 connection", "80.0 GiB with 20.0 GiB of data", "waits for: "],
    );
    let record = read(&cloud.folder.path().join("run.json"));
    for key in [
        "disk.write.pwrite.buffered",
        "disk.read.buffered.1",
        "processor.sha512.zeros",
        "processor.zstd.3",
        "glance.down.1",
        "glance.up.1",
    ] {
        assert!(rate(&record, key) > 1e5, "{key}");
    }
    let ways = record["job"]["ways"].as_array().unwrap();
    assert_eq!(ways.iter().filter(|way| way["route"] == "glance").count(), 6, "{ways:#?}");
    assert!(ways.iter().all(|way| way["seconds"].as_f64().unwrap() > 0.0));
    // the image that was sent is gone, and no file is left but those that were asked for, and the state folder
    cloud.assert_nothing_made();
    assert!(cloud.service.requests().iter().any(|request| request.starts_with("DELETE /v2/images/")));
    assert_eq!(files(), before + 3);
    // said before anything is made there
    run.ends(0, &["cloud mini", "sending an image of 12 MiB, which is deleted again"]);
    // the run that sent it is over, and has nothing to clean
    cloud.run(&["status", "-f", "json"]).await.ends(0, &["deleted it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ranges_there_is_one_connection_and_a_note() {
    let cloud = Cloud::start(|faults| faults.ranges = mini_glance::faults::Ranges::Refused).await;
    let run = cloud.run(&["bench", "--quick", "--os-cloud", "mini", "--no-upload", "-f", "json"]).await;
    run.ends(0, &[]);
    let record: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(rate(&record, "glance.down.1") > 0.0);
    let keys = record["measures"].as_array().unwrap().iter().filter(|measure| measure["group"] == "glance").count();
    assert_eq!(keys, 1);
    let notes = record["notes"].to_string();
    assert!(notes.contains("serves no ranges") && notes.contains("--no-upload"), "{notes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_too_small_is_a_note_and_no_image_is_made() {
    let cloud = Cloud::start(|faults| faults.quota_bytes = Some(1 << 20)).await;
    let run = cloud.run(&["bench", "--quick", "--os-cloud", "mini"]).await;
    run.ends(0, &["sending was not measured", "the quota for images has 0 B left, and 12.8 MiB would be sent"]);
    assert_eq!(cloud.posts(), 0);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_is_a_note_and_its_image_goes() {
    let cloud = Cloud::start(|faults| (faults.cut_puts, faults.cut_after_bytes) = (1, 3 << 20)).await;
    let run = cloud.run(&["bench", "--quick", "--os-cloud", "mini"]).await;
    run.ends(0, &["sending was not measured", "the connection broke"]);
    assert_eq!(cloud.posts(), 1);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_bench_sent_is_removed_by_clean() {
    let cloud = Cloud::start(|faults| faults.latency = std::time::Duration::from_millis(700)).await;
    let mut child = cloud.command(&["bench", "--quick", "--os-cloud", "mini"]).spawn().unwrap();
    let started = std::time::Instant::now();
    // its last byte has come, and the answer is on its way
    while !cloud.others().iter().any(|image| image["status"] == "active") {
        assert!(started.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none(), "no image was sent");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    child.kill().await.unwrap();
    cloud.service.faults(|faults| faults.latency = std::time::Duration::ZERO);
    assert_eq!(cloud.others().len(), 1);
    cloud.run(&["clean", "--os-cloud", "mini"]).await.ends(0, &["removed image virta-bench-"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_a_bench_whose_requests_hang_and_names_what_may_be_left() {
    for what in ["POST /v2/images", "DELETE /v2/images"] {
        let cloud = Cloud::start(|_| {}).await;
        let arguments = ["bench", "--quick", "--os-cloud", "mini"];
        let child = cloud.command(&arguments).spawn().unwrap();
        // what comes before the upload is over: then its requests hang
        let before = if what.starts_with("POST") { "GET /v2/info/usage" } else { "PUT " };
        seen(&cloud.service, before).await;
        cloud.service.faults(|faults| faults.latency = std::time::Duration::from_secs(600));
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        let asked = std::time::Instant::now();
        signal(&child, rustix::process::Signal::INT);
        let run = Run::new(child.wait_with_output().await.unwrap(), asked.elapsed());
        run.ends(130, &["may be left behind", "virta image delete"]);
        assert!(asked.elapsed() < std::time::Duration::from_secs(30), "{what}: {:?}", asked.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_told_before_the_minute_is_spent() {
    let cloud = Cloud::start(|_| {}).await;
    for (words, texts) in [
        (&["bench", "--no-cloud", "--save", "nowhere/run.json"][..], &["nowhere/run.json cannot be written"][..]),
        (&["bench", "--no-cloud", "--folder", "nowhere"], &["folder nowhere"]),
        (&["bench", "--no-cloud", "--sample", "nowhere"], &["--sample"]),
        (&["bench", "--os-cloud", "nobody"], &["nobody"]),
        (&["bench", "--data", "1G"], &["--image-size"]),
        (&["bench", "--no-cloud", "--save", "clouds.yaml"], &["clouds.yaml is there, and is nothing that virta bench wrote"]),
        (&["bench", "--no-cloud", "--html", "/dev/null"], &["/dev/null cannot be written: it is no file"]),
        (&["bench", "--no-cloud", "--save", "x", "--html", "x"], &["name the same file"]),
        (&["bench", "--compare", "clouds.yaml"], &["clouds.yaml is no run"]),
        (&["bench", "--compare", "nowhere.json"], &["nowhere.json cannot be read"]),
    ] {
        let run = cloud.run(words).await;
        run.ends(2, texts);
        assert!(run.elapsed.as_secs() < 3, "{words:?} took {:?}", run.elapsed);
    }
    assert!(!cloud.service.requests().iter().any(|request| request.starts_with("POST /v2/images")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_before_anything_is_measured() {
    let cloud = Cloud::start(|_| {}).await;
    for (arguments, says) in [
        (&["--image-size", "0"][..], "that is bytes, and no disk"),
        (&["--image-size", "10G", "--data", "20G"], "more than the whole disk"),
        (&["--image-size", "-80G"], "cannot be negative"),
        (&["--folder", "nowhere"], "--folder nowhere: No such file"),
        (&["--html", "nowhere/page.html"], "nothing can be made in nowhere"),
        (&["--sample", "nowhere"], "--sample nowhere: No such file"),
        (&["--compare", "a.json", "--data", "1G"], "cannot be used with"),
    ] {
        cloud.run(&[&["bench", "--no-cloud"], arguments].concat()).await.ends(2, &[says]);
    }
}

/// A run with figures that are made up.
fn saved(flavor: &str, factor: f64) -> Value {
    let measure = |key: &str, group: &str, parallel: usize, rate: f64| serde_json::json!({ "key": key, "group": group, "name": key, "bytes_per_s": rate * factor, "low": rate * factor * 0.9, "high": rate * factor * 1.1, "samples": 3, "parallel": parallel, "ratio": 0.4 });
    serde_json::json!({
        "virta": "0.1.0", "date": "2026-01-01T00:00:00Z", "elapsed_s": 60.0, "notes": ["a note"],
        "machine": { "host": "a-host-with-a-name-that-is-long-enough-to-need-two-lines.example.org", "flavor": flavor, "flavor_from": "flag", "cpu": "a processor", "cores": 8,
            "memory_bytes": 1_u64 << 34, "kernel": "6.1", "folder": "/scratch", "filesystem": "xfs" },
        "measures": [
            measure("disk.write.pwrite.buffered", "disk", 1, 5e8), measure("disk.read.buffered.1", "disk", 1, 2e9), measure("processor.zero.8", "processor", 8, 8e10),
            measure("processor.sha512.data", "processor", 1, 5e8), measure("processor.sha512.zeros", "processor", 1, 7e8), measure("processor.zlib.2", "processor", 8, 1e9),
            measure("processor.zstd.3", "processor", 8, 2e9), measure("glance.down.1", "glance", 1, 3e8), measure("glance.down.2", "glance", 2, 5e8),
            measure("glance.down.4", "glance", 4, 8e8), measure("glance.down.8", "glance", 8, 9e8), measure("glance.up.1", "glance", 1, 1e8),
        ],
        "job": { "image_bytes": 80_u64 << 30, "data_bytes": 20_u64 << 30, "ways": [
            { "route": "glance", "command": "virta convert glance:IMAGE glance:NEW --compress zstd --connections 8", "seconds": 170.0 / factor, "stored_bytes": 8_u64 << 30,
              "bottleneck": "hashing the source: one chain, one core", "parts": [{ "name": "fetch", "seconds": 95.0 / factor }, { "name": "upload", "seconds": 80.0 / factor }] } ] },
    })
}

/// Asks a browser what a reader sees: widths of bars, whether anything overflows, at a desk and on a phone.
const LOOK: &str = "<script>\
    const bars = [...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width);\
    const over = [...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.className || one.tagName);\
    const hidden = [...document.querySelectorAll('.figure, h2, .name')].filter(one => one.getBoundingClientRect().height < 5).length;\
    document.body.innerHTML = '<pre id=seen>' + JSON.stringify({ bars: bars.length, narrow: bars.filter(width => width < 1).length, widest: Math.max(...bars), over, hidden, \
        points: document.querySelectorAll('polyline').length, background: getComputedStyle(document.body).backgroundColor, inside: innerWidth }) + '</pre>'; </script>";

#[tokio::test(flavor = "multi_thread")]
async fn flavors_stand_side_by_side_and_the_page_is_whole_in_a_real_browser() {
    let cloud = Cloud::start(|_| {}).await;
    let folder = cloud.folder.path();
    for (flavor, factor) in [("io.160GB", 1.0), ("io.340GB", 2.0), ("io.700GB", 3.0)] {
        std::fs::write(folder.join(format!("{flavor}.json")), saved(flavor, factor).to_string()).unwrap();
    }
    let run =
        cloud.run(&["bench", "--compare", "io.160GB.json", "io.340GB.json", "io.700GB.json", "--html", "flavors.html"]).await;
    run.ends(0, &["io.160GB", "io.700GB", "* faster than all others in its row", "hashing the source"]);
    let row = run.stdout.lines().find(|line| line.contains("disk.read.buffered.1")).unwrap();
    assert!(row.trim_end().ends_with('*'), "{row}");
    // runs of one flavor are told apart by their files
    std::fs::copy(folder.join("io.160GB.json"), folder.join("evening.json")).unwrap();
    let same = cloud.run(&["bench", "--compare", "io.160GB.json", "evening.json"]).await;
    same.ends(0, &["evening"]);
    assert!(!same.stdout.contains('*'), "none of two equals is the best: {}", same.stdout);
    cloud.run(&["bench", "--compare", "morning.json"]).await.ends(2, &["morning.json cannot be read", "virta bench --save"]);
    if !Path::new(CHROMIUM).exists() {
        assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "{CHROMIUM} is missing");
        println!("skipped: no Chromium (apt-get install chromium)");
        return;
    }
    let page = std::fs::read_to_string(folder.join("flavors.html")).unwrap();
    std::fs::write(folder.join("looked-at.html"), page.replace("</body>", &format!("{LOOK}</body>"))).unwrap();
    for (width, columns) in [("1200,900", 3), ("500,800", 1)] {
        let browser = tokio::process::Command::new(CHROMIUM)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
            ])
            .args(["--disable-component-update", "--disable-sync", "--virtual-time-budget=2000", "--dump-dom"])
            .arg(format!("--window-size={width}"))
            .arg(format!("--user-data-dir={}", folder.join("browser").display()))
            .arg(format!("file://{}", folder.join("looked-at.html").display()))
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(std::time::Duration::from_secs(120), browser).await.unwrap().unwrap();
        let dom = String::from_utf8_lossy(&output.stdout);
        let seen = dom.split_once("id=\"seen\">").unwrap_or_else(|| panic!("no answer: {dom}")).1.split_once("</pre>").unwrap().0;
        let seen: Value = serde_json::from_str(&seen.replace("&gt;", ">")).unwrap();
        // 12 figures and 2 parts of a way for each of three runs
        assert_eq!(
            (seen["bars"].as_u64(), seen["narrow"].as_u64(), seen["points"].as_u64()),
            (Some(42), Some(0), Some(3)),
            "{seen}"
        );
        assert_eq!((seen["over"].as_array().unwrap().len(), seen["hidden"].as_u64()), (0, Some(0)), "{columns} columns: {seen}");
        assert!(seen["widest"].as_f64().unwrap() > 100.0, "{seen}");
        assert_ne!(seen["background"], "rgba(0, 0, 0, 0)", "its style applies: {seen}");
    }
}
