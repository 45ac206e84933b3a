//! QEMU 7.2, QEMU 10 and a build with zlib-ng read what is compressed here, whose deflate window is eight times the one that they ask for.
//!
//! `.ci/qemu/fetch` puts the other builds under `target/qemu`. What is missing is said (`skipped: …`), and fails where
//! `CI_REQUIRE_TOOLS=1` is set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use engine::CancelToken;
use stages::{
    compress::{Codec, Compression},
    convert::{Job, Options, Source, to_file::to_file},
    progress::Progress,
    reporter::Reporter,
};

/// Every `qemu-img` that there is: the system's and the fetched ones.
fn readers() -> Vec<(&'static str, PathBuf)> {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/qemu");
    let all = [
        ("the system's qemu-img", PathBuf::from("qemu-img")),
        ("qemu-img 7.2", fetched.join("7.2/qemu-img")),
        ("qemu-img with zlib-ng", fetched.join("zlib-ng/qemu-img")),
    ];
    let works = |path: &Path| Command::new(path).arg("--version").output().is_ok_and(|output| output.status.success());
    let mut found = Vec::new();
    for (name, path) in all {
        if works(&path) {
            found.push((name, path));
            continue;
        }
        assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "{name} is required here and missing: .ci/qemu/fetch");
        println!("skipped: {name} is missing (.ci/qemu/fetch)");
    }
    found
}

/// Clusters whose matches reach back as far as a cluster is long: blocks that come back after 20,000, 40,000 and 60,000 bytes, with
/// random bytes, text and runs between them.
fn raw_disk() -> Vec<u8> {
    let mut raw = vec![0_u8; 12 << 20];
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[2]
    };
    for (cluster, number) in raw.chunks_mut(65536).zip(0_usize..) {
        if number % 5 == 4 {
            continue;
        }
        cluster.iter_mut().for_each(|byte| *byte = random());
        let block = cluster[..700].to_vec();
        for (start, piece) in [(20_000 + number, 600), (40_000, 700), (60_000, 300 + number % 100)] {
            cluster[start..start + piece].copy_from_slice(&block[..piece]);
        }
        let text = b"listen 443 ssl; log_level = info # line by line\n";
        cluster[5000..15_000].iter_mut().zip(text.iter().cycle()).for_each(|(byte, letter)| *byte = *letter);
        cluster[30_000..33_000].fill(b'=');
    }
    raw
}

#[tokio::test(flavor = "multi_thread")]
async fn every_qemu_reads_every_level() {
    let readers = readers();
    let folder = tempfile::tempdir().unwrap();
    let (raw, image) = (folder.path().join("disk.raw"), folder.path().join("disk.qcow2"));
    std::fs::write(&raw, raw_disk()).unwrap();
    let levels = [1, 2, 6, 9, 12].map(|level| Compression::with_level(Codec::Deflate, level).unwrap());
    for compression in levels.into_iter().chain([Compression::new(Codec::Zstd)]) {
        let options = Options { compression: Some(compression), force: true, sync: false, ..Options::default() };
        let reporter: Arc<dyn Reporter> = Arc::new(());
        let job = Job::new(Source::local(&raw).unwrap(), options, &Progress::default(), &reporter, &CancelToken::new());
        let report = to_file(&job, &image).await.unwrap();
        assert!(report.stored_bytes < report.data_bytes, "{compression:?}: something was compressed");
        for (name, reader) in &readers {
            let run = |arguments: &[&str]| {
                let output = Command::new(reader).args(arguments).args([&raw, &image]).output().unwrap();
                assert!(output.status.success(), "{name}, {compression:?}: {}", String::from_utf8_lossy(&output.stderr));
            };
            run(&["compare", "-f", "raw", "-F", "qcow2"]);
            let check = Command::new(reader).args(["check", "-f", "qcow2"]).arg(&image).output().unwrap();
            assert!(check.status.success(), "{name}, {compression:?}: {}", String::from_utf8_lossy(&check.stderr));
        }
    }
}
