//! What a job would take, out of what was measured.
//!
//! Parts that run at the same time cost what the longest of them does; the cores' work is added up, and shared by the cores.
//!
//! ```text
//! Glance to Glance:  survey = max(fetch, zero test + compression)      sending = max(upload, its hash)
//!                    all    = max(survey + sending, hash of the source, the cores' work / cores)
//! file to file:      all    = max(read, write, zero test + compression)
//! ```
//! Left out: signing in, and what Glance does with an image behind the last byte: a second or two.

use super::record::{Job, Measure, Part, Record, Route, Way};

/// Compression as the command line has it, with the key of its figure.
const COMPRESSIONS: [(&str, Option<&str>); 3] =
    [("", None), (" --compress zlib", Some("processor.zlib.2")), (" --compress zstd", Some("processor.zstd.3"))];

#[expect(clippy::cast_precision_loss, reason = "estimates")]
const fn real(bytes: u64) -> f64 {
    bytes as f64
}

/// The job in all ways that there are figures for, the fastest of each route first.
pub fn job(record: &Record, image_bytes: u64, data_bytes: u64) -> Job {
    let data_bytes = data_bytes.min(image_bytes);
    let mut ways = Vec::new();
    for (flags, key) in COMPRESSIONS {
        ways.extend(local(record, data_bytes, flags, key));
        for hashed in [true, false] {
            ways.extend(glance(record, image_bytes, data_bytes, flags, key, hashed));
        }
    }
    ways.sort_by(|a: &Way, b: &Way| {
        (a.route == Route::Local).cmp(&(b.route == Route::Local)).then(a.seconds.total_cmp(&b.seconds))
    });
    let read_whole_s = record.rate("disk.read.buffered.1").map(|rate| real(image_bytes) / rate);
    Job { image_bytes, data_bytes, ways, hash_s: hash(record, image_bytes, data_bytes), read_whole_s }
}

/// SHA-512 of the source, seconds.
fn hash(record: &Record, image_bytes: u64, data_bytes: u64) -> Option<f64> {
    let zeros = real(image_bytes - data_bytes) / record.rate("processor.sha512.zeros")?;
    Some(zeros + real(data_bytes) / record.rate("processor.sha512.data")?)
}

/// Seconds of compression by all cores, and the bytes that are stored.
fn compression(record: &Record, data_bytes: u64, key: Option<&str>) -> Option<(f64, f64)> {
    let Some(key) = key else { return Some((0.0, real(data_bytes))) };
    let measure = record.measure(key)?;
    Some((real(data_bytes) / measure.bytes_per_s, real(data_bytes) * measure.ratio?.min(1.0)))
}

/// The best of several figures.
fn best<'a>(record: &'a Record, prefix: &str) -> Option<&'a Measure> {
    let of_them = record.measures.iter().filter(|measure| measure.key.starts_with(prefix));
    of_them.max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s))
}

fn zero_test(record: &Record) -> Option<f64> {
    best(record, "processor.zero.").map(|measure| measure.bytes_per_s)
}

fn local(record: &Record, data_bytes: u64, flags: &str, key: Option<&str>) -> Option<Way> {
    let (compress, stored) = compression(record, data_bytes, key)?;
    let read = real(data_bytes) / record.rate("disk.read.buffered.1")?;
    let (uring, pwrite) = (record.measure("disk.write.uring.buffered"), record.measure("disk.write.pwrite.buffered")?);
    // the converter takes io_uring where it works
    let by_pwrite = uring.is_some_and(|uring| pwrite.clearly_above(uring));
    let write = stored / uring.filter(|_| !by_pwrite).unwrap_or(pwrite).bytes_per_s;
    let zero = real(data_bytes) / zero_test(record)?;
    let io = if by_pwrite { " --io pwrite" } else { "" };
    let cores = zero + compress;
    let bottleneck = longest(&[("reading the disk", read), ("writing the disk", write), (named(key), cores)]);
    Some(Way {
        route: Route::Local,
        command: format!("virta convert disk.raw disk.qcow2{flags}{io}"),
        seconds: read.max(write).max(cores),
        stored_bytes: whole(stored),
        bottleneck,
        parts: parts(&[("read", read), ("zero test", zero), ("compress", compress), ("write", write)]),
    })
}

fn glance(record: &Record, image_bytes: u64, data_bytes: u64, flags: &str, key: Option<&str>, hashed: bool) -> Option<Way> {
    let (compress, stored) = compression(record, data_bytes, key)?;
    let fastest = best(record, "glance.down.")?;
    // up to four are the default, and a conversion finds out by itself how many of them are worth it
    let by_itself = ["glance.down.1", "glance.down.2", "glance.down.4"].into_iter().filter_map(|key| record.measure(key));
    let usual = by_itself.max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s));
    let connections = fastest.key.rsplit('.').next().unwrap_or("4");
    let worth = usual.is_some_and(|usual| fastest.key != usual.key && fastest.clearly_above(usual));
    let down = usual.filter(|_| !worth).unwrap_or(fastest).bytes_per_s;
    let connections = if worth { format!(" --connections {connections}") } else { String::new() };
    let up = record.rate("glance.up.1")?;
    let sha_data = record.rate("processor.sha512.data")?;
    let fetch = real(image_bytes) / down;
    let zero = real(image_bytes) / zero_test(record)?;
    let hash = if hashed { hash(record, image_bytes, data_bytes)? } else { 0.0 };
    let (upload, upload_hash) = (stored / up, stored / sha_data);
    let survey = fetch.max(zero + compress);
    let sending = upload.max(upload_hash);
    #[expect(clippy::cast_precision_loss, reason = "a few cores")]
    let cores = record.machine.cores.max(1) as f64;
    // zero test and compression were measured on all cores at once
    let work = zero + compress + (hash + upload_hash) / cores;
    let (in_turn, chain) = (survey + sending, hash);
    let seconds = in_turn.max(chain).max(work);
    let bottleneck = if chain >= in_turn.max(work) {
        "hashing the source: one chain, one core".to_owned()
    } else if work > in_turn {
        "the cores".to_owned()
    } else {
        longest(&[("fetching", fetch), ("sending", upload), (named(key), zero + compress)])
    };
    let verify = if hashed { "" } else { " --verify none" };
    Some(Way {
        route: Route::Glance,
        command: format!("virta convert glance:IMAGE glance:NEW{flags}{connections}{verify}"),
        seconds,
        stored_bytes: whole(stored),
        bottleneck,
        parts: parts(&[
            ("fetch", fetch),
            ("zero test", zero),
            ("compress", compress),
            ("hash of the source", hash),
            ("upload", upload),
            ("hash of the upload", upload_hash),
        ]),
    })
}

const fn named(key: Option<&str>) -> &'static str {
    if key.is_some() { "compressing" } else { "the zero test" }
}

fn longest(of_them: &[(&str, f64)]) -> String {
    of_them.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| (*name).to_owned()).unwrap_or_default()
}

fn parts(of_them: &[(&str, f64)]) -> Vec<Part> {
    let there = of_them.iter().filter(|(_, seconds)| *seconds > 0.0);
    there.map(|(name, seconds)| Part { name: (*name).to_owned(), seconds: *seconds }).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate of bytes, above zero")]
const fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests {
    use super::{
        super::record::{Group, Machine},
        *,
    };

    const GB: f64 = 1e9;

    fn record(rates: &[(&str, f64)]) -> Record {
        let measures = rates
            .iter()
            .map(|(key, rate)| Measure {
                ratio: Some(0.5),
                ..Measure::new(key, Group::Processor, key, 1, vec![*rate; 3]).unwrap()
            })
            .collect();
        Record { measures, machine: Machine { cores: 8, ..Machine::default() }, ..Record::default() }
    }

    const RATES: [(&str, f64); 13] = [
        ("disk.read.buffered.1", GB),
        ("disk.write.pwrite.buffered", GB / 2.0),
        ("disk.write.uring.buffered", GB / 2.0),
        ("processor.zero.8", 100.0 * GB),
        ("processor.sha512.data", GB / 2.0),
        ("processor.sha512.zeros", GB),
        ("processor.zlib.2", GB),
        ("processor.zstd.3", 2.0 * GB),
        ("glance.down.1", GB / 2.0),
        ("glance.down.4", GB),
        ("glance.down.8", 1.05 * GB),
        ("glance.up.1", GB / 10.0),
        ("processor.zstd.9", GB / 10.0),
    ];

    #[test]
    fn a_slow_upload_asks_for_compression() {
        let found = job(&record(&RATES), 80_000_000_000, 20_000_000_000);
        assert_eq!(found.ways.len(), 9);
        let fastest = &found.ways[0];
        // the hash costs nothing here, nor does zlib, which every QEMU reads: what is as fast without them comes behind
        assert_eq!(fastest.command, "virta convert glance:IMAGE glance:NEW --compress zlib");
        // 80 GB at 1 GB/s, for eight connections are not worth a flag, then 10 GB at 0.1 GB/s
        assert!((fastest.seconds - (80.0 + 100.0)).abs() < 0.1, "{fastest:?}");
        assert_eq!(fastest.bottleneck, "sending");
        assert_eq!(fastest.stored_bytes, 10_000_000_000);
        // without compression twice as much is sent
        let exact = found.ways.iter().find(|way| way.command == "virta convert glance:IMAGE glance:NEW").unwrap();
        assert!((exact.seconds - (80.0 + 200.0)).abs() < 0.1, "{exact:?}");
        let local = found.ways.iter().find(|way| way.command == "virta convert disk.raw disk.qcow2").unwrap();
        assert_eq!((local.seconds, local.bottleneck.as_str()), (40.0, "writing the disk"));
    }

    #[test]
    fn where_the_network_is_fast_the_hash_is_what_it_waits_for() {
        let mut rates = RATES.to_vec();
        rates.retain(|(key, _)| !key.starts_with("glance."));
        rates.extend([("glance.down.4", 5.0 * GB), ("glance.down.8", 10.0 * GB), ("glance.up.1", 10.0 * GB)]);
        let found = job(&record(&rates), 80_000_000_000, 20_000_000_000);
        let hashed = found.ways.iter().find(|way| way.route == Route::Glance && !way.command.contains("none")).unwrap();
        assert!(hashed.bottleneck.starts_with("hashing the source"), "{hashed:?}");
        assert_eq!(hashed.seconds, 100.0); // 60 GB at 1 GB/s and 20 at 0.5
        assert!(hashed.command.contains("--connections 8"));
    }

    #[test]
    fn what_may_be_chance_is_no_advice() {
        let with = |pwrite: [f64; 3], down: [f64; 3]| {
            let mut record = record(&RATES);
            for (key, samples) in [("disk.write.pwrite.buffered", pwrite), ("glance.down.8", down)] {
                let at = record.measures.iter().position(|measure| measure.key == key).unwrap();
                record.measures[at] = Measure::new(key, Group::Disk, key, 1, samples.to_vec()).unwrap();
            }
            job(&record, 80_000_000_000, 20_000_000_000).ways.into_iter().map(|way| way.command).collect::<Vec<_>>().join("\n")
        };
        let clear = with([0.7 * GB, 0.8 * GB, 0.9 * GB], [1.5 * GB, 1.6 * GB, 1.7 * GB]);
        assert!(clear.contains("--io pwrite") && clear.contains("--connections 8"), "{clear}");
        // the same medians, with one sample as slow as the other's
        let chance = with([0.4 * GB, 0.8 * GB, 0.9 * GB], [0.9 * GB, 1.6 * GB, 1.7 * GB]);
        assert!(!chance.contains("--io") && !chance.contains("--connections"), "{chance}");
    }

    #[test]
    fn without_a_cloud_there_is_the_local_way_alone_and_without_figures_none() {
        let mut rates = RATES.to_vec();
        rates.retain(|(key, _)| !key.starts_with("glance."));
        let found = job(&record(&rates), 10, 20);
        assert!(found.ways.iter().all(|way| way.route == Route::Local) && found.ways.len() == 3);
        assert_eq!(found.data_bytes, 10);
        let found = job(&record(&rates), 80_000_000_000, 20_000_000_000);
        // 60 GB of zeros at 1 GB/s and 20 of data at 0.5; all of it read at 1 GB/s
        assert_eq!((found.hash_s, found.read_whole_s), (Some(100.0), Some(80.0)));
        assert!(job(&record(&[]), 10, 10).ways.is_empty());
    }
}
