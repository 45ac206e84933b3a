//! Hundreds of seeded schedules of faults in both directions: every run ends with a verified image or with a clear error, the source there,
//! and no half-made image.
//!
//! `VIRTA_FAULT_SEED=N` plays one schedule again and says what is in it; `VIRTA_FAULT_SEEDS=N` plays N of them.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use engine::CancelToken;
use mini_glance::{Config, Faults, MiniGlance, Ranges};
use serde_json::{Value, json};
use stages::{
    compress::{Codec, Compression},
    convert::{Conversion, Job, Options, Report, Source, Verify, to_glance::to_glance},
    error::JobError,
    openstack::{CloudConfig, CloudFlags, Session, config::Environment},
    progress::Progress,
    qcow2::{Qcow2, verify},
    reporter::Reporter,
    retry::Patience,
};

const SEEDS: u64 = 500;
const MIB: usize = 1 << 20;

/// A schedule's source of chance: all of it follows from the seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Mostly none, now and then up to `most`.
    fn rarely(&mut self, most: u64) -> u32 {
        if self.below(4) > 0 { 0 } else { u32::try_from(1 + self.below(most)).unwrap() }
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(u64::try_from(all.len()).unwrap())).unwrap()].clone()
    }
}

fn faults(chance: &mut Chance) -> Faults {
    Faults {
        ranges: match chance.below(10) {
            0..=4 => Ranges::Served,
            5..=7 => Ranges::Refused,
            8 => Ranges::FirstBytes,
            _ => Ranges::RefusedAfter(u32::try_from(chance.below(6)).unwrap()),
        },
        null_hashes: chance.below(12) == 0,
        cut_gets: chance.rarely(8),
        cut_after_bytes: chance.below(6 << 20),
        failing_gets: chance.rarely(5),
        failing_patches: u32::from(chance.below(30) == 0),
        corrupt_gets: u32::from(chance.below(12) == 0),
        stalling_gets: chance.rarely(2),
        stall: Duration::from_millis(400),
        expired_tokens: chance.rarely(1),
        overlong_gets: u32::from(chance.below(12) == 0),
        changed_after_gets: (chance.below(12) == 0).then_some(3),
        quota_hit_mid_body: chance.below(20) == 0,
        refuse_format: chance.below(20) == 0,
        stuck_saving: chance.below(20) == 0,
        corrupt_puts: chance.below(20) == 0,
        cut_puts: chance.rarely(4),
        failing_puts: chance.rarely(3),
        dying_puts: chance.rarely(3),
        vanishing_puts: chance.rarely(3),
        stalling_puts: chance.rarely(2),
        erring_puts: chance.rarely(2),
        ..Faults::default()
    }
}

fn options(chance: &mut Chance) -> Options {
    Options {
        compression: chance.one_of(&[None, Some(Compression::new(Codec::Deflate)), Some(Compression::new(Codec::Zstd))]),
        verify: chance.one_of(&[Verify::None, Verify::Hash, Verify::Hash, Verify::Readback]),
        connections: chance.one_of(&[1, 2, 4].map(|count| count.try_into().unwrap())),
        all_connections: chance.one_of(&[true, true, false]),
        workers: 2.try_into().unwrap(),
        memory_bytes: chance.one_of(&[32 << 20, 32 << 20, 256 << 20]),
        scratch: chance.one_of(&[None, None, Some(std::env::temp_dir())]),
        scratch_limit_bytes: chance.one_of(&[2 << 20, u64::MAX]),
        patience: Patience {
            silence: Duration::from_millis(250),
            stall: Duration::from_millis(250),
            answer: Duration::from_millis(1500),
            saving: Duration::from_millis(400),
            unread: Duration::from_millis(100),
            trickle: Duration::from_millis(20),
            pause: Duration::from_millis(3),
            clean_up: Duration::from_secs(3),
            ..Patience::default()
        },
        ..Options::default()
    }
}

/// Data in clumps, more of it than 32 MiB of memory keep.
fn raw_disk(chance: &mut Chance) -> Vec<u8> {
    let mib = chance.one_of(&[18, 40]);
    let mut raw = vec![0_u8; mib * MIB + 1536];
    let end = raw.len();
    for start in (0..end).step_by(2 * MIB) {
        let bytes = if chance.below(5) == 0 { 0 } else { MIB + MIB / 2 };
        for (word, at) in raw[start..(start + bytes).min(end)].chunks_mut(8).zip(0_u64..) {
            // half of it shrinks
            let value = if at / 8192 % 2 == 0 { chance.next() } else { at / 7 };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
    }
    raw[end - 1] = 7;
    raw
}

/// Keeps the lines that would be shown.
#[derive(Default)]
struct Lines(std::sync::Mutex<Vec<String>>);

impl Reporter for Lines {
    fn note(&self, line: &str) {
        self.0.lock().unwrap().push(line.to_owned());
    }
}

async fn convert(service: &MiniGlance, name: &str, options: Options, lines: &Arc<Lines>) -> Result<Box<Report>, JobError> {
    let folder = tempfile::tempdir().unwrap();
    let clouds = folder.path().join("clouds.yaml");
    std::fs::write(&clouds, service.clouds_yaml()).unwrap();
    let env = [("OS_CLIENT_CONFIG_FILE".to_owned(), clouds.display().to_string())].into();
    let environment = Environment { env, cwd: folder.path().to_owned() };
    let session = Session::sign_in(CloudConfig::resolve(&CloudFlags::default(), &environment)?).await?;
    let source = Source::glance(&session, name).await?;
    let reporter: Arc<dyn Reporter> = Arc::clone(lines) as Arc<dyn Reporter>;
    let job = Job::new(source, options, &Progress::default(), &reporter, &CancelToken::new());
    match to_glance(&job, &session, "new").await? {
        Conversion::Made(report) => Ok(report),
        Conversion::Earlier(image) => panic!("{image:?} was there"),
    }
}

/// Plays one schedule; returns how it ended.
async fn play(seed: u64) -> String {
    let mut chance = Chance(seed);
    let raw = raw_disk(&mut chance);
    let (options, faults) = (options(&mut chance), faults(&mut chance));
    let shown = format!("seed {seed}: {faults:?} {:?} {:?}", options.compression, options.verify);
    let service = MiniGlance::start(Config::default()).await.unwrap();
    service.faults(|faults_now| faults_now.null_hashes = faults.null_hashes);
    let record = json!({ "name": "snap", "disk_format": "raw", "container_format": "bare", "visibility": "private" });
    let source = service.add_image(&record, |storing| storing.write(&raw)).unwrap();
    let (verify_mode, null_hashes) = (options.verify, faults.null_hashes);
    let corrupts = faults.corrupt_gets > 0 || faults.changed_after_gets.is_some();
    service.faults(|faults_now| *faults_now = faults);
    let lines = Arc::new(Lines::default());
    let started = Instant::now();
    let result = tokio::time::timeout(Duration::from_secs(60), convert(&service, &source, options, &lines)).await;
    let told = || lines.0.lock().unwrap().join("\n  ");
    let result = result.unwrap_or_else(|_| panic!("{shown}: no end after a minute; {}", told()));
    assert!(started.elapsed() < Duration::from_secs(60));
    let images = service.images();
    assert!(images.iter().any(|image| image["id"] == source.as_str()), "{shown}: the source is gone");
    let others: Vec<&Value> = images.iter().filter(|image| image["id"] != source.as_str()).collect();
    match result {
        Ok(report) => {
            assert_eq!(others.len(), 1, "{shown}: {others:?}\n  {}", told());
            let image = others[0];
            assert_eq!(report.destination, format!("glance:{}", image["id"].as_str().unwrap()));
            assert!(image["status"] == "active" && image["virta_verified"].is_string(), "{shown}: {image}");
            let path = service.data_path(image["id"].as_str().unwrap()).unwrap();
            let image = Qcow2::open(std::fs::File::open(path).unwrap()).unwrap();
            let mut guest = vec![0; usize::try_from(image.virtual_bytes()).unwrap()];
            image.read_guest(0, &mut guest).unwrap();
            // without a hash to check, and without a second reading, nobody can know that a byte was flipped on the way in
            let blind = corrupts && (null_hashes || verify_mode == Verify::None);
            assert!(blind || guest[..raw.len()] == raw, "{shown}: guest bytes differ\n  {}", told());
            assert_eq!(verify::check(&image).unwrap().leaked_clusters, 0);
            "done".to_owned()
        }
        Err(error) => {
            // a maker never deletes what it has sent the mark for
            let unconfirmed = matches!(error, JobError::Unconfirmed { .. });
            assert!(others.is_empty() || unconfirmed, "{shown}: {error}; left: {others:?}\n  {}", told());
            let text = stages::text::causes(&error);
            assert!(!matches!(error, JobError::LeftBehind { .. }), "{shown}: {text}");
            assert!(text.len() > 20 && !text.contains("bug in virta") && !text.contains("interrupted"), "{shown}: {text}");
            // what kind of end it was, for the count at the end
            let word = |word: &str| {
                if word.len() > 20 || word.contains(|c: char| c.is_ascii_digit()) { "N".to_owned() } else { word.to_owned() }
            };
            text.split(' ').map(word).take(24).collect::<Vec<_>>().join(" ")
        }
    }
}

#[test]
fn every_schedule_of_faults_ends_with_a_verified_image_or_a_clear_error_and_nothing_half_made() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        if let Some(seed) = number("VIRTA_FAULT_SEED") {
            println!("seed {seed}: {}", play(seed).await);
            return;
        }
        let seeds = number("VIRTA_FAULT_SEEDS").unwrap_or(SEEDS);
        let mut ends: BTreeMap<String, u64> = BTreeMap::new();
        let mut running = tokio::task::JoinSet::new();
        for seed in 0..seeds {
            if running.len() >= 4 {
                *ends.entry(running.join_next().await.unwrap().unwrap()).or_default() += 1;
            }
            running.spawn(play(seed));
        }
        while let Some(end) = running.join_next().await {
            *ends.entry(end.unwrap()).or_default() += 1;
        }
        for (end, count) in &ends {
            println!("{count:>5}  {end}");
        }
        let done = ends.get("done").copied().unwrap_or(0);
        assert!(done > seeds / 3 && done < seeds, "{done} of {seeds}: schedules that always or never fail show nothing");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_glance_itself_gave_up_goes_into_a_new_image_without_waiting_for_the_old_one() {
    let mut chance = Chance(1);
    let raw = raw_disk(&mut chance);
    let service = MiniGlance::start(Config::default()).await.unwrap();
    let record = json!({ "name": "snap", "disk_format": "raw", "container_format": "bare", "visibility": "private" });
    let source = service.add_image(&record, |storing| storing.write(&raw)).unwrap();
    service.faults(|faults| faults.erring_puts = 1);
    let mut options = options(&mut chance);
    // an image that nobody is at stays `saving` for ever: whoever waits for it does not end here
    options.patience = Patience { saving: Duration::from_secs(3600), ..options.patience };
    let lines = Arc::new(Lines::default());
    let converting = convert(&service, &source, options, &lines);
    tokio::time::timeout(Duration::from_secs(60), converting).await.expect("it does not wait").unwrap();
    assert!(lines.0.lock().unwrap().iter().any(|line| line.contains("a new one is made")));
    assert_eq!(service.images().len(), 2, "the source, and one conversion");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_falls_silent_is_asked_for_again() {
    assert_eq!(Patience::default().silence, Duration::from_secs(60), "what a run of its own waits");
    let mut chance = Chance(1);
    let raw = raw_disk(&mut chance);
    let service = MiniGlance::start(Config::default()).await.unwrap();
    let record = json!({ "name": "snap", "disk_format": "raw", "container_format": "bare", "visibility": "private" });
    let source = service.add_image(&record, |storing| storing.write(&raw)).unwrap();
    service.faults(|faults| {
        faults.stalling_gets = 1;
        faults.cut_after_bytes = 5 << 20;
        faults.stall = Duration::from_secs(3600);
    });
    let mut options = options(&mut chance);
    options.connections = 1.try_into().unwrap();
    options.patience = Patience { silence: Duration::from_secs(1), ..Patience::default() };
    let lines = Arc::new(Lines::default());
    let started = Instant::now();
    let report = convert(&service, &source, options, &lines).await.unwrap();
    assert!(report.retries.iter().any(|line| line.contains("nothing came for 1 s")), "{:?}", report.retries);
    assert!(started.elapsed() >= Duration::from_secs(1));
}
