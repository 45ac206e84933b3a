//! The writer stage over all three back ends of the device seam: the same tests for io_uring and `pwrite`, and every
//! unkindness of the simulated disk.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod sim;

use std::{
    error::Error,
    fs::File,
    path::Path,
    sync::{Arc, Mutex},
};

use engine::{
    BlockingStage, BufferPool, CancelToken, Cause, Inlet, LocalStage, NoInput, NoOutput, Outlet, Pipeline, RunError,
    StageContext, StageError, TokioLocal, testing::assert_conserves,
};
use sim::{Behaviour, Disk, SimQueue};
use stages::{
    compress::{Codec, Compression, EncodeClusters},
    disk::{
        pwrite::PwriteQueue,
        queue::WriteQueue,
        uring::{self, UringExecutor, UringQueue},
        write::{WriteImage, WriteReport},
    },
    extent::{Classified, Extent, Payload, StoredExtent},
    hash::{ExpectedHash, HashLane, Hasher},
    progress::Progress,
    qcow2::{Qcow2, verify},
    store::Collect,
    units::{ClusterBits, GuestRange, to_u64, to_usize},
    zero::classify::classify,
};

const BITS: u32 = 16;
const CODEC: Codec = Codec::Zstd;

/// A source of extents out of memory, 256 KiB each, in the order given.
struct Memory {
    raw: Arc<Vec<u8>>,
    pool: BufferPool,
    backwards: bool,
    /// Cancels the run after so many extents.
    cancel_after: Option<u64>,
}

impl BlockingStage for Memory {
    type In = NoInput;
    type Out = Classified;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Classified>, cx: StageContext) -> Result<(), StageError> {
        let extent_bytes = 256 << 10;
        let mut starts: Vec<usize> = (0..self.raw.len()).step_by(extent_bytes).collect();
        if self.backwards {
            starts.reverse();
        }
        for (start, number) in starts.into_iter().zip(0_u64..) {
            if self.cancel_after == Some(number) {
                cx.cancel.cancel(Cause::Requested("test".to_owned()));
            }
            let end = self.raw.len().min(start + extent_bytes);
            let mut lease = self.pool.acquire_blocking()?;
            lease[..end - start].copy_from_slice(&self.raw[start..end]);
            let guest = GuestRange::new(to_u64(start), to_u64(end - start));
            let extent = Extent { guest, payload: Payload::Bytes(lease) };
            let bits = ClusterBits::from_bits(BITS).unwrap();
            // every other extent compressed: both kinds of clusters meet in one file
            let mut encoder = EncodeClusters::new(bits, (number % 2 == 0).then(|| Compression::new(CODEC)), Progress::default());
            outlet.send_blocking(encoder.encode(classify(extent, bits)))?;
        }
        outlet.finish();
        Ok(())
    }
}

/// 3 MiB and a bit: data, zeros, alternating clusters, an odd end.
fn raw() -> Arc<Vec<u8>> {
    let mut raw = vec![0_u8; (3 << 20) + 777];
    let mut fill = |start: usize, end: usize| {
        for (at, byte) in raw[start..end].iter_mut().enumerate() {
            *byte = u8::try_from((at * 7 + start) % 251).unwrap() | 1;
        }
    };
    fill(0, 300_000);
    for cluster in (16..40).step_by(2) {
        fill(cluster << 16, (cluster << 16) + 5);
    }
    fill((3 << 20) + 700, (3 << 20) + 777);
    Arc::new(raw)
}

struct Outcome {
    result: Result<WriteReport, RunError>,
    pool: BufferPool,
}

/// Runs source, writer, collector and hash lane.
async fn run<S>(
    executor: impl engine::LocalExecutor,
    build: impl FnOnce() -> S + Send + 'static,
    backwards: bool,
    cancel_after: Option<u64>,
    file: Option<File>,
) -> Outcome
where
    S: LocalStage<In = Classified, Out = StoredExtent, Report = WriteReport>,
{
    let raw = raw();
    let cancel = CancelToken::new();
    let pool = BufferPool::new(6, 1 << 20, 4096, &cancel);
    let mut hasher = Hasher::new("sha256").unwrap();
    hasher.update(&raw);
    let expected = file.is_some().then(|| ExpectedHash { algorithm: "sha256".to_owned(), value: hasher.finish() });
    let source_bytes = to_u64(raw.len());
    let mut source = Some(Memory { raw, pool: pool.clone(), backwards, cancel_after });
    let mut collect = Some(Collect {
        cluster_bits: ClusterBits::DEFAULT,
        source_bytes: Some(source_bytes),
        index_limit_bytes: 1 << 20,
        survey: false,
        watermark: None,
    });
    let mut lane = Some(HashLane {
        expected,
        file,
        cluster_bits: ClusterBits::DEFAULT,
        codec: Some(CODEC),
        progress: Progress::default(),
        watermark: None,
    });
    let pipeline = Pipeline::new(&cancel).threads("source", 1, || source.take().unwrap());
    let (pipeline, report) = pipeline.ring_reporting("write", executor, move || Ok(build()));
    let pipeline: Pipeline<NoOutput> =
        pipeline.threads("collect", 1, || collect.take().unwrap()).port(100).threads("hash", 1, || lane.take().unwrap());
    let result = pipeline.start(&tokio::runtime::Handle::current()).join().await;
    let result = match result {
        Ok(_) => Ok(report.one().await.unwrap()),
        Err(error) => Err(error),
    };
    Outcome { result, pool }
}

fn writer<Q: WriteQueue>(queue: Q) -> WriteImage<Q> {
    let cluster_bits = ClusterBits::from_bits(BITS).unwrap();
    WriteImage { queue, cluster_bits, codec: Some(CODEC), sync: true, index_limit_bytes: 1 << 20 }
}

fn assert_is_the_image(file: &[u8]) {
    let image = Qcow2::open(file).unwrap();
    let mut guest = vec![0; to_usize(image.virtual_bytes())];
    image.read_guest(0, &mut guest).unwrap();
    assert!(guest[..raw().len()] == **raw());
    assert_eq!(verify::check(&image).unwrap().leaked_clusters, 0);
}

async fn on_a_real_file(folder: &Path, ring: bool) {
    for backwards in [false, true] {
        let path = folder.join("image");
        let open = || File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let file = open();
        let lane = Some(file.try_clone().unwrap());
        let outcome = if ring {
            run(UringExecutor, move || writer(UringQueue::new(file, 4).unwrap()), backwards, None, lane).await
        } else {
            run(TokioLocal, move || writer(PwriteQueue::new(file, 4, 2).unwrap()), backwards, None, lane).await
        };
        let report = outcome.result.unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(report.image_bytes, to_u64(bytes.len()));
        assert_is_the_image(&bytes);
        assert_conserves(&outcome.pool);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pwrite_writes_the_image_in_any_order_and_the_hash_is_that_of_the_source() {
    let folder = tempfile::tempdir().unwrap();
    on_a_real_file(folder.path(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn io_uring_writes_the_image_in_any_order_and_the_hash_is_that_of_the_source() {
    let folder = tempfile::tempdir().unwrap();
    if let Err(error) = uring::probe(folder.path()) {
        assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "io_uring is required here: {error}");
        println!("skipped: io_uring is denied: {error}");
        return;
    }
    on_a_real_file(folder.path(), true).await;
}

async fn on_a_simulated_disk(behaviour: Behaviour, cancel_after: Option<u64>) -> (Outcome, Arc<Mutex<Disk>>) {
    let disk = Arc::new(Mutex::new(Disk::default()));
    let for_writer = Arc::clone(&disk);
    let outcome = run(TokioLocal, move || writer(SimQueue::new(for_writer, behaviour)), false, cancel_after, None).await;
    (outcome, disk)
}

#[tokio::test(flavor = "multi_thread")]
async fn short_writes_are_continued_from_the_gap_and_order_does_not_matter() {
    for short_bytes in [0, 1000, 4096, 65_537] {
        for (depth, newest_first) in [(1, false), (3, false), (8, true)] {
            let behaviour = Behaviour { short_bytes, newest_first, depth, ..Behaviour::default() };
            let (outcome, disk) = on_a_simulated_disk(behaviour, None).await;
            outcome.result.unwrap();
            let disk = disk.lock().unwrap();
            assert_is_the_image(&disk.bytes);
            // the header is the last write, alone between two flushes: before it, the file is no image
            assert_eq!(disk.log.last(), Some(&(0, 65536)));
            assert_eq!(disk.syncs, [disk.log.len() - 1, disk.log.len()]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_at_any_point_fails_the_run_leaves_nothing_in_flight_and_no_header() {
    let (_, disk) = on_a_simulated_disk(Behaviour { depth: 3, ..Behaviour::default() }, None).await;
    let writes = to_u64(disk.lock().unwrap().log.len());
    assert!(writes > 10);
    for fail_at in 0..writes {
        let behaviour = Behaviour { fail_at: Some(fail_at), depth: 3, newest_first: fail_at % 2 == 0, ..Behaviour::default() };
        let (outcome, disk) = on_a_simulated_disk(behaviour, None).await;
        let RunError::Failed { error, .. } = outcome.result.unwrap_err() else { panic!("write {fail_at}") };
        assert_eq!(error.stage, "write");
        assert!(error.source().unwrap().to_string().starts_with("write at host offset 0x"), "{error:?}");
        assert_conserves(&outcome.pool);
        let disk = disk.lock().unwrap();
        assert_eq!(disk.in_flight, 0, "write {fail_at}");
        assert!(!disk.bytes.starts_with(b"QFI"), "write {fail_at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_flush_fails_the_run() {
    let (outcome, disk) = on_a_simulated_disk(Behaviour { sync_fails: true, depth: 2, ..Behaviour::default() }, None).await;
    assert!(outcome.result.is_err());
    assert!(!disk.lock().unwrap().bytes.starts_with(b"QFI"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_at_any_extent_nothing_is_in_flight_and_no_header_is_written() {
    for cancel_after in 0..13 {
        let (outcome, disk) = on_a_simulated_disk(Behaviour { depth: 4, ..Behaviour::default() }, Some(cancel_after)).await;
        assert!(matches!(outcome.result, Err(RunError::Cancelled(why)) if why == "test"), "extent {cancel_after}");
        assert_conserves(&outcome.pool);
        let disk = disk.lock().unwrap();
        assert_eq!(disk.in_flight, 0);
        assert!(!disk.bytes.starts_with(b"QFI"));
    }
}
