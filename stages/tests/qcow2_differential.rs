//! Both writers against QEMU and against our own reader, over sizes, cluster sizes and zero patterns.
//!
//! Needs `qemu-img` for the differential half; without it that half says `skipped: …` and fails where
//! `CI_REQUIRE_TOOLS=1` is set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
};

use proptest::prelude::*;
use stages::{
    compress::{Codec, Compression, Encoder},
    extent::Record,
    qcow2::{Arrival, ClusterIndex, Geometry, Layout, Mapping, Qcow2, StreamWriter, verify},
    units::{ClusterBits, to_u64, to_usize},
    zero,
};

/// Is the tool there? Says so if not, and fails where tools are required.
fn has_tool(tool: &str) -> bool {
    if Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return true;
    }
    assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "{tool} is required here and missing");
    println!("skipped: {tool} is not installed");
    false
}

/// One guest cluster, padded with zeros past the raw image's end.
fn cluster_of(raw: &[u8], cluster: u64, cluster_bytes: u64) -> Vec<u8> {
    let start = to_usize(cluster * cluster_bytes);
    let end = raw.len().min(start + to_usize(cluster_bytes));
    let mut bytes = raw[start..end].to_vec();
    bytes.resize(to_usize(cluster_bytes), 0);
    bytes
}

/// Data clusters with their stored form.
fn stored_clusters(raw: &[u8], bits: ClusterBits, compression: Option<Compression>) -> Vec<(u64, Vec<u8>)> {
    let cluster_bytes = bits.cluster_bytes();
    let mut encoder = compression.map(Encoder::new);
    let mut clusters = Vec::new();
    for cluster in 0..bits.clusters_for(to_u64(raw.len())) {
        let bytes = cluster_of(raw, cluster, cluster_bytes);
        if zero::is_zero(&bytes) {
            continue;
        }
        let mut into = Vec::new();
        match encoder.as_mut().and_then(|encoder| encoder.append(&bytes, bytes.len() - 1, &mut into)) {
            Some(_) => clusters.push((cluster, into)),
            None => clusters.push((cluster, bytes)),
        }
    }
    clusters
}

fn codec(compression: Option<Compression>) -> Option<Codec> {
    compression.map(Compression::codec)
}

fn stream_image(raw: &[u8], bits: ClusterBits, compression: Option<Compression>) -> Vec<u8> {
    let geometry = Geometry::new(to_u64(raw.len()), bits).unwrap();
    let clusters = stored_clusters(raw, bits, compression);
    let mut index = ClusterIndex::new();
    for (cluster, stored) in &clusters {
        let stored_bytes = u32::try_from(stored.len()).unwrap();
        index.push(*cluster, Record { stored_bytes, digest: [0; 4] }, to_u64(stored.len()) == bits.cluster_bytes());
    }
    index.complete();
    let layout = Layout::plan(geometry, &index, codec(compression)).unwrap();
    let writer = StreamWriter::new(&layout, &index);
    let mut file: Vec<u8> = writer.metadata().flatten().collect();
    assert_eq!(to_u64(file.len()), layout.metadata_bytes());
    let mut data = writer.data();
    for (_, stored) in clusters {
        if to_u64(stored.len()) == bits.cluster_bytes() {
            data.push_plain(stored.into(), 1);
        } else {
            data.push_compressed(stored.into());
        }
        file.extend(std::iter::from_fn(|| data.pop()).flatten());
    }
    data.close();
    file.extend(std::iter::from_fn(|| data.pop()).flatten());
    assert_eq!(to_u64(file.len()), layout.file_bytes(), "the length is known before the first byte");
    file
}

/// As the file writer does it, with clusters arriving in the order that `seed` shuffles.
fn arrival_image(raw: &[u8], bits: ClusterBits, compression: Option<Compression>, seed: u64) -> Vec<u8> {
    let geometry = Geometry::new(to_u64(raw.len()), bits).unwrap();
    let mut clusters = stored_clusters(raw, bits, compression);
    let mut state = seed | 1;
    for at in (1..clusters.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        clusters.swap(at, to_usize((state >> 33) % (to_u64(at) + 1)));
    }
    let mut arrival = Arrival::new(bits, codec(compression));
    let mut file = Vec::new();
    let mut put = |host: u64, bytes: &[u8]| {
        let end = to_usize(host) + bytes.len();
        if file.len() < end {
            file.resize(end, 0);
        }
        file[to_usize(host)..end].copy_from_slice(bytes);
    };
    for (cluster, stored) in clusters {
        let host = if to_u64(stored.len()) == bits.cluster_bytes() {
            arrival.place(cluster, 1)
        } else {
            arrival.place_compressed(cluster, u32::try_from(stored.len()).unwrap())
        };
        put(host.0, &stored);
    }
    let sealed = arrival.seal(geometry).unwrap();
    for (host, piece) in sealed.tables() {
        put(host.0, &piece);
    }
    put(0, &sealed.header_cluster());
    assert_eq!(to_u64(file.len()), sealed.sections().file_bytes());
    file
}

/// Our own reader: every guest byte, the mappings, and refcounts = reachability without a leak.
fn assert_reads_back(raw: &[u8], file: &[u8]) {
    let image = Qcow2::open(file).unwrap();
    assert_eq!(image.virtual_bytes(), to_u64(raw.len()).next_multiple_of(512));
    let mut guest = vec![0xaa; to_usize(image.virtual_bytes())];
    image.read_guest(0, &mut guest).unwrap();
    assert!(guest[..raw.len()] == *raw, "guest bytes differ");
    assert!(zero::is_zero(&guest[raw.len()..]));
    let report = verify::check(&image).unwrap();
    assert_eq!(report.leaked_clusters, 0);
    let mut at = 0;
    while let Some((range, mapping)) = image.mapping_at(at).unwrap() {
        assert_eq!(range.start.0, at);
        if mapping == Mapping::Zero {
            let end = to_usize(range.end.0).min(raw.len());
            assert!(zero::is_zero(&raw[to_usize(at).min(end)..end]));
        }
        at = range.end.0;
    }
    assert_eq!(at, image.virtual_bytes());
}

fn qemu_img(arguments: &[&str]) -> std::process::Output {
    Command::new("qemu-img").args(arguments).output().unwrap()
}

/// `qemu-img check` clean and without leaks, `compare` identical, and no larger than qemu-img's own by over 64 KiB, or a hundredth where
/// it is compressed.
fn assert_qemu_agrees(folder: &Path, raw: &[u8], file: &[u8], bits: ClusterBits, compression: Option<Compression>) {
    let raw_path = folder.join("disk.raw");
    let ours_path = folder.join("ours.qcow2");
    let theirs_path = folder.join("theirs.qcow2");
    let write_sparse = |path: &Path, bytes: &[u8]| {
        let file = File::create(path).unwrap();
        file.set_len(to_u64(bytes.len())).unwrap();
        for (chunk, index) in bytes.chunks(4096).zip(0_u64..) {
            if !zero::is_zero(chunk) {
                file.write_all_at(chunk, index * 4096).unwrap();
            }
        }
    };
    write_sparse(&raw_path, raw);
    File::create(&ours_path).unwrap().write_all(file).unwrap();
    let (raw_path, ours, theirs) = (raw_path.to_str().unwrap(), ours_path.to_str().unwrap(), theirs_path.to_str().unwrap());

    let check = qemu_img(&["check", "-f", "qcow2", "--output=json", ours]);
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success(), "check: {text} {}", String::from_utf8_lossy(&check.stderr));
    for finding in ["\"leaks\"", "\"corruptions\"", "\"check-errors\": 1"] {
        assert!(!text.contains(finding), "check: {text}");
    }
    let compare = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw_path, ours]);
    assert!(compare.status.success(), "compare: {}", String::from_utf8_lossy(&compare.stdout));

    let cluster_size = format!("cluster_size={}", bits.cluster_bytes());
    let compression_type = format!("{cluster_size},compression_type={}", codec(compression).unwrap_or(Codec::Deflate).name());
    let sparse = bits.cluster_bytes().min(65536).to_string();
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-S", &sparse, "-o", &compression_type];
    arguments.extend(compression.map(|_| "-c"));
    arguments.extend([raw_path, theirs]);
    let convert = qemu_img(&arguments);
    assert!(convert.status.success(), "{}", String::from_utf8_lossy(&convert.stderr));
    let theirs = std::fs::metadata(&theirs_path).unwrap().len();
    let slack = (64 << 10).max(bits.cluster_bytes()) + if compression.is_some() { theirs / 100 } else { 0 };
    let shuffled = compression.is_some() && file.len() != stream_image(raw, bits, compression).len();
    assert!(shuffled || to_u64(file.len()) <= theirs + slack, "ours {} theirs {theirs} {bits:?} {compression:?}", file.len());
    // and the other way round: what qemu-img writes, our reader reads
    let mut theirs_bytes = Vec::new();
    File::open(&theirs_path).unwrap().read_to_end(&mut theirs_bytes).unwrap();
    let image = Qcow2::open(theirs_bytes).unwrap();
    let mut guest = vec![0; to_usize(image.virtual_bytes())];
    image.read_guest(0, &mut guest).unwrap();
    assert!(guest[..raw.len()] == *raw);
    verify::check(&image).unwrap();
}

/// Deterministic bytes that are never all zero in any 512.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(bytes)
    .collect()
}

/// Named patterns: which part of the disk holds data.
fn patterned(bytes: usize, pattern: &str) -> Vec<u8> {
    let mut raw = vec![0; bytes];
    let mut fill = |start: usize, end: usize| {
        let (start, end) = (start.min(bytes), end.min(bytes));
        raw[start..end].copy_from_slice(&noise(end - start, to_u64(start) + 7));
    };
    match pattern {
        "zero" => {}
        "full" => fill(0, bytes),
        "alternating" => (0..bytes).step_by(2 << 16).for_each(|start| fill(start, start + (1 << 16))),
        "first and last byte" => {
            fill(0, 1);
            fill(bytes.saturating_sub(1), bytes);
            raw[0] |= 1;
            if let Some(last) = raw.last_mut() {
                *last |= 1;
            }
        }
        "middle" => fill(bytes / 3, bytes / 2),
        // every other 64 KiB text, every other one incompressible
        "text and noise" => {
            fill(0, bytes);
            let text = b"listen 443 ssl; log_level = info # configuration of a server, line by line\n";
            for start in (0..bytes).step_by(2 << 16) {
                for (byte, at) in raw[start..bytes.min(start + (1 << 16))].iter_mut().zip(0_usize..) {
                    *byte = text[(at + start / 7) % text.len()] ^ (u8::from(at % 61 == 0) * u8::try_from(at % 200).unwrap());
                }
            }
        }
        "specks" => (0..bytes).step_by(300_007).for_each(|start| fill(start, start + 9)),
        other => panic!("no pattern {other}"),
    }
    raw
}

#[test]
fn both_writers_agree_with_qemu_img_over_sizes_cluster_sizes_and_patterns() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let patterns = ["zero", "full", "alternating", "first and last byte", "middle", "specks"];
    for bits in 9..=21 {
        let bits = ClusterBits::from_bits(bits).unwrap();
        for (bytes, index) in [1, 1000, 65536, (7 << 20) + 1536, (3 << 20) - 1].into_iter().zip(0_usize..) {
            // every pattern meets every cluster size; sizes rotate, to keep the run short
            for pattern in patterns.iter().skip(index % 2).step_by(2) {
                let raw = patterned(bytes, pattern);
                for file in [stream_image(&raw, bits, None), arrival_image(&raw, bits, None, 42)] {
                    assert_reads_back(&raw, &file);
                    assert_qemu_agrees(folder.path(), &raw, &file, bits, None);
                }
            }
        }
    }
}

#[test]
fn compressed_images_agree_with_qemu_img_in_every_byte_and_in_size() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for bits in 9..=21 {
        let bits = ClusterBits::from_bits(bits).unwrap();
        let mut patterns = vec![((5 << 20) + 777, "text and noise")];
        patterns.push(([1000, 65536, (3 << 20) - 1][to_usize(u64::from(bits.bits()) % 3)], "specks"));
        for (bytes, pattern) in patterns {
            let raw = patterned(bytes, pattern);
            // a level at least as strong as zlib's 6: what is compared is how the clusters are packed
            for compression in [Compression::with_level(Codec::Deflate, 7).unwrap(), Compression::new(Codec::Zstd)].map(Some) {
                let stream = stream_image(&raw, bits, compression);
                // shuffled cluster by cluster, as no writer does it: plain and compressed ones meet in no order at all, and up to an
                // eighth of the packed bytes is given away
                let arrival = arrival_image(&raw, bits, compression, 42);
                assert!(arrival.len() <= stream.len() + stream.len() / 8 + (64 << 10));
                for file in [stream, arrival] {
                    assert_reads_back(&raw, &file);
                    assert_qemu_agrees(folder.path(), &raw, &file, bits, compression);
                }
            }
        }
    }
}

#[test]
fn a_file_cut_short_by_less_than_a_cluster_is_found() {
    // qemu-img check returns 0 for it
    let raw = patterned(1 << 20, "full");
    let mut file = stream_image(&raw, ClusterBits::DEFAULT, None);
    file.truncate(file.len() - 512);
    let image = Qcow2::open(file).unwrap();
    let mut guest = vec![0; raw.len()];
    assert!(image.read_guest(0, &mut guest).unwrap_err().to_string().contains("past the end of the file"));
}

#[test]
fn check_finds_what_qemu_img_check_finds() {
    let raw = patterned(1 << 20, "full");
    let whole = stream_image(&raw, ClusterBits::DEFAULT, None);
    let image = Qcow2::open(whole.clone()).unwrap();
    let header = image.header().clone();
    let l1_at = to_usize(header.l1_table.0);
    let block_at = to_usize(header.refcount_table.0) + 65536;
    let damage = |at: usize, value: u8| {
        let mut file = whole.clone();
        file[at] = value;
        verify::check(&Qcow2::open(file).unwrap()).map(|report| report.leaked_clusters)
    };
    assert!(damage(block_at + 1, 0).unwrap_err().to_string().contains("refcount is 0"));
    assert_eq!(damage(block_at + 2 * 30_000 + 1, 1).unwrap(), 0, "past the end of the file nobody minds");
    assert!(damage(block_at + 2 * 5 + 1, 2).is_err(), "refcount 2, COPIED set");
    assert!(damage(l1_at, 0).unwrap_err().to_string().contains("COPIED"));
    assert!(damage(l1_at + 7, 1).unwrap_err().to_string().contains("reserved bits"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_written_reads_back(
        bits in 9_u32..=21,
        bytes in 1_usize..(3 << 20),
        runs in prop::collection::vec((0_usize..(3 << 20), 1_usize..200_000), 0..12),
        seed in any::<u64>(),
    ) {
        let mut raw = vec![0; bytes];
        for (start, length) in runs {
            let (start, end) = (start.min(bytes), (start + length).min(bytes));
            raw[start..end].copy_from_slice(&noise(end - start, seed));
        }
        let bits = ClusterBits::from_bits(bits).unwrap();
        for compression in [None, Some(Compression::new(Codec::Deflate)), Some(Compression::new(Codec::Zstd))] {
            assert_reads_back(&raw, &stream_image(&raw, bits, compression));
            assert_reads_back(&raw, &arrival_image(&raw, bits, compression, seed));
        }
    }
}
