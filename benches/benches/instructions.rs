//! How many instructions the converter's core takes, one thread, fixed inputs, compared with `benches/instructions.json`.
//!
//! ```text
//! cargo bench -p virta-benches --bench instructions              count, compare, exit 1 beyond 5 %
//! cargo bench -p virta-benches --bench instructions -- --bless   make what was counted the baseline: commit it, and say why
//! ```
//! Each case runs in a process of its own under `valgrind --tool=callgrind`, which counts nothing but [`measured_region`]. As a test (without
//! `--bench`) each case runs once, uncounted. Own code and not gungraun, because that keeps its baselines in the target folder,
//! and this one has to be in the repository.

use std::{env, fs, hint::black_box, path::PathBuf, process::Command};

use bytes::Bytes;
use engine::{BufferPool, CancelToken};
use stages::{
    compress::{Codec, Compression, EncodeClusters},
    extent::{Classified, EXTENT_BYTES, Extent, Payload, Record},
    progress::Progress,
    qcow2::{Arrival, ClusterIndex, Geometry, Layout, Qcow2, StreamWriter, packing::InFileOrder, verify},
    store::{MemoryStore, keep::Overflow},
    units::{ClusterBits, GuestRange},
    zero::{classify::classify, is_zero},
};
use virta_benches::{
    instructions::{Counts, collected, compare},
    noise, text,
};

const BITS: ClusterBits = ClusterBits::DEFAULT;
const CLUSTER: usize = 64 << 10;
const EXTENT: usize = 2 << 20;
/// 80 GiB, the disk of an ordinary flavor.
const DISK_BYTES: u64 = 80 << 30;

/// The C library copies in another way on each processor, and valgrind counts every byte of a `rep movsb`: one way for all.
const LIBC: &str = "glibc.cpu.hwcaps=-ERMS,-FSRM,-AVX512F,-AVX512VL,-AVX512BW:glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824";

/// A case prepares its input, then has the rest measured.
type Case = (&'static str, fn());

const CASES: &[Case] = &[
    ("zero test", zero_test),
    ("classify", classify_extents),
    ("keep", keep),
    ("digest", || encode(None)),
    ("encode zlib", || encode(Some(Codec::Deflate))),
    ("encode zstd", || encode(Some(Codec::Zstd))),
    ("place and seal", place_and_seal),
    ("layout and metadata", layout_and_metadata),
    ("file order", file_order),
    ("read and check", read_and_check),
];

/// What is counted, and nothing else. Its name is what callgrind looks for.
#[inline(never)]
fn measured_region(work: &mut dyn FnMut()) {
    work();
}

fn measured<T>(work: impl FnOnce() -> T) {
    let mut work = Some(work);
    let mut result = None;
    measured_region(&mut || result = work.take().map(|work| work()));
    black_box(result);
}

fn zero_test() {
    let zeros = vec![0; 16 * CLUSTER];
    let mut late = vec![0; 16 * CLUSTER];
    late.chunks_mut(CLUSTER).for_each(|cluster| cluster[CLUSTER * 3 / 4] = 1);
    let data = noise(16 * CLUSTER, 3);
    measured(|| [&zeros, &late, &data].map(|bytes| bytes.chunks(CLUSTER).filter(|cluster| is_zero(cluster)).count()));
}

/// Extents of which every third cluster is zero, out of leases.
fn extents(pool: &BufferPool, content: &[u8]) -> Vec<Extent> {
    (0..pool.count())
        .map(|number| {
            let mut lease = pool.acquire_blocking().expect("nobody cancels");
            lease.copy_from_slice(content);
            lease.chunks_mut(CLUSTER).skip(number % 3).step_by(3).for_each(|cluster| cluster.fill(0));
            let guest = GuestRange::new(number as u64 * EXTENT_BYTES, EXTENT_BYTES);
            Extent { guest, payload: Payload::Bytes(lease) }
        })
        .collect()
}

fn pool() -> BufferPool {
    BufferPool::new(8, EXTENT, 4096, &CancelToken::new())
}

fn classify_extents() {
    let pool = pool();
    let extents = extents(&pool, &noise(EXTENT, 5));
    measured(|| extents.into_iter().map(|extent| classify(extent, BITS)).collect::<Vec<_>>());
}

fn classified(pool: &BufferPool, content: &[u8]) -> Vec<Classified> {
    extents(pool, content).into_iter().map(|extent| classify(extent, BITS)).collect()
}

fn keep() {
    let pool = pool();
    let mut encoder = EncodeClusters::new(BITS, None, Progress::default());
    let classified: Vec<_> = classified(&pool, &noise(EXTENT, 5)).into_iter().map(|extent| encoder.encode(extent)).collect();
    let store = MemoryStore::new(1 << 30, Overflow::LetGo);
    measured(|| classified.into_iter().map(|extent| store.keep(extent, BITS).expect("it fits")).collect::<Vec<_>>());
}

fn encode(codec: Option<Codec>) {
    let pool = pool();
    let classified = classified(&pool, &text(EXTENT, 9));
    let mut encoder = EncodeClusters::new(BITS, codec.map(Compression::new), Progress::default());
    measured(|| classified.into_iter().map(|extent| encoder.encode(extent)).collect::<Vec<_>>());
}

fn place_and_seal() {
    let geometry = Geometry::new(DISK_BYTES, BITS).expect("80 GiB fit");
    measured(|| {
        let mut arrival = Arrival::new(BITS, Some(Codec::Zstd));
        for cluster in (0..geometry.guest_clusters()).step_by(4) {
            arrival.place(cluster, 1);
            arrival.place_compressed(cluster + 1, 20_000);
        }
        let sealed = arrival.seal(geometry).expect("it fits");
        sealed.tables().map(|(_, piece)| piece.len()).sum::<usize>() + sealed.header_cluster().len()
    });
}

/// Every second cluster is data, and of those every second one is compressed.
fn alternating(clusters: u64) -> ClusterIndex {
    let mut index = ClusterIndex::new();
    for cluster in (0..clusters).step_by(2) {
        let whole = cluster % 4 == 0;
        index.push(cluster, Record { stored_bytes: if whole { 65536 } else { 20_000 }, digest: [0; 4] }, whole);
    }
    index.complete();
    index
}

fn layout_and_metadata() {
    let geometry = Geometry::new(DISK_BYTES, BITS).expect("80 GiB fit");
    let index = alternating(geometry.guest_clusters());
    measured(|| {
        let layout = Layout::plan(geometry, &index, Some(Codec::Deflate)).expect("it fits");
        StreamWriter::new(&layout, &index).metadata().map(|piece| piece.len()).sum::<usize>()
    });
}

fn file_order() {
    let (whole, part) = (Bytes::from(noise(CLUSTER, 1)), Bytes::from(noise(20_000, 2)));
    measured(|| {
        let mut order = InFileOrder::new(BITS, 40);
        for number in 0..100_000 {
            if number % 5 == 0 {
                order.push_plain(whole.clone(), 1)
            } else {
                order.push_compressed(part.clone())
            }
            while let Some(bytes) = order.pop() {
                black_box(bytes);
            }
        }
        order.close();
        order.written()
    });
}

fn read_and_check() {
    let geometry = Geometry::new(1 << 30, BITS).expect("1 GiB fits");
    let mut index = ClusterIndex::new();
    let record = Record { stored_bytes: 65536, digest: [0; 4] };
    (0..geometry.guest_clusters()).step_by(64).for_each(|cluster| index.push(cluster, record, true));
    index.complete();
    let layout = Layout::plan(geometry, &index, None).expect("it fits");
    let mut image: Vec<u8> = StreamWriter::new(&layout, &index).metadata().flatten().collect();
    let end = usize::try_from(layout.file_bytes()).expect("it fits into memory");
    image.resize(end, 7);
    let image = Qcow2::open(image).expect("it is an image");
    measured(|| {
        let report = verify::check(&image).expect("it can be read");
        let (mut at, mut runs) = (0, 0);
        while let Some((guest, _)) = image.mapping_at(at).expect("it can be read") {
            at = guest.end.0;
            runs += 1;
        }
        (report, runs)
    });
}

fn main() {
    let words: Vec<String> = env::args().skip(1).collect();
    if let Some(name) = words.iter().position(|word| word == "--case").and_then(|at| words.get(at + 1)) {
        return run_case(name);
    }
    if !words.iter().any(|word| word == "--bench") {
        CASES.iter().for_each(|(_, case)| case());
        return println!("{} cases ran, uncounted", CASES.len());
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(env::var_os("CI_REQUIRE_TOOLS").is_none(), "valgrind is not installed: apt-get install valgrind");
        return println!("skipped: valgrind is not installed (apt-get install valgrind)");
    }
    let counted = count_all();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
    if words.iter().any(|word| word == "--bless") {
        let text = serde_json::to_string_pretty(&counted).expect("counts are plain data");
        fs::write(&path, text + "\n").expect("the baseline can be written");
        return println!("{} holds what was counted now: commit it, and say why", path.display());
    }
    let baseline: Counts =
        serde_json::from_slice(&fs::read(&path).expect("a baseline: --bless makes one")).expect("the baseline is readable");
    for (what, before, now) in [
        ("rustc", baseline.rustc.clone(), counted.rustc.clone()),
        ("features", baseline.features.join(" "), counted.features.join(" ")),
    ] {
        if before != now {
            println!("note: the baseline was made with {what} {before:?}, this is {now:?}: make a new one with it");
        }
    }
    let lines = compare(&baseline.instructions, &counted.instructions);
    lines.iter().for_each(|line| println!("{line}"));
    if lines.iter().any(|line| line.fails()) {
        eprintln!("instruction counts differ from {}; if that is meant: --bless, and say why in the commit", path.display());
        std::process::exit(1);
    }
}

fn run_case(name: &str) {
    let (_, case) = CASES.iter().find(|(known, _)| *known == name).expect("a case of this bench");
    case();
}

/// Counts every case, each in its own process with an empty environment, so that its stack begins at the same place.
fn count_all() -> Counts {
    let own = env::current_exe().expect("this program's path");
    let count = |(name, _): &Case| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*measured_region*"])
            .arg(&own)
            .args(["--case", name])
            .env_clear()
            .env("GLIBC_TUNABLES", LIBC)
            .output()
            .expect("valgrind starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {stderr}");
        let count = collected(&stderr).filter(|count| *count > 0);
        ((*name).to_owned(), count.unwrap_or_else(|| panic!("{name}: nothing was counted: {stderr}")))
    };
    let rustc = Command::new("rustc").arg("--version").output().expect("rustc is there");
    Counts {
        rustc: String::from_utf8_lossy(&rustc.stdout).trim().to_owned(),
        features: features(),
        instructions: CASES.iter().map(count).collect(),
    }
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<String> {
    let found = [("avx2", is_x86_feature_detected!("avx2")), ("bmi2", is_x86_feature_detected!("bmi2"))];
    found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_owned()).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<String> {
    vec![env::consts::ARCH.to_owned()]
}
