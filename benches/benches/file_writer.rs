//! A local conversion as a whole, per back end: 256 MiB with a quarter of data, page cache warm, no flush.
#![allow(missing_docs)] // criterion's macros make undocumented items

use std::{path::Path, sync::Arc};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::CancelToken;
use stages::{
    convert::{Job, Options, Source, to_file::to_file},
    disk::IoMode,
    progress::Progress,
    reporter::Reporter,
};
use virta_benches::sparse_disk;

fn convert(runtime: &tokio::runtime::Runtime, raw: &Path, image: &Path, io: IoMode) {
    let options = Options { io, sync: false, force: true, ..Options::default() };
    let source = Source::local(raw).expect("the disk opens");
    let reporter: Arc<dyn Reporter> = Arc::new(());
    let (progress, cancel) = (Progress::default(), CancelToken::new());
    let job = Job::new(source, options, &progress, &reporter, &cancel);
    runtime.block_on(to_file(&job, image)).expect("the conversion works");
}

fn file_writer(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let (raw, image) = (folder.path().join("disk.raw"), folder.path().join("disk.qcow2"));
    std::fs::write(&raw, sparse_disk(256, 4)).expect("the disk fits");
    let mut group = criterion.benchmark_group("file_writer");
    group.throughput(Throughput::Bytes(256 << 20)).sample_size(10);
    group.bench_function("pwrite", |bencher| bencher.iter(|| convert(&runtime, &raw, &image, IoMode::Pwrite)));
    if stages::disk::uring::probe(folder.path()).is_ok() {
        group.bench_function("io_uring", |bencher| bencher.iter(|| convert(&runtime, &raw, &image, IoMode::Uring)));
    } else {
        println!("skipped: io_uring is denied here");
    }
    group.finish();
}

criterion_group!(benches, file_writer);
criterion_main!(benches);
