//! The first failure stops all, and its error is the one shown (I5, I6).
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    error::Error,
    marker::PhantomData,
    sync::{Arc, atomic::AtomicU64},
};

use engine::{
    BlockingStage, BufferPool, CancelToken, Cause, ErrorKind, Inlet, NoInput, NoOutput, Outlet, Pipeline, RunError, StageContext,
    StageError,
    testing::{Block, CountingSink, CountingSource, FailAt, assert_conserves},
};
use tokio::runtime::Handle;

async fn run_with(first: FailAt, second: FailAt) -> (RunError, BufferPool) {
    let cancel = CancelToken::new();
    let pool = BufferPool::new(4, 512, 512, &cancel);
    let source = CountingSource { blocks: 1000, pool: Some(pool.clone()), emitted: Arc::default() };
    let (mut first, mut second) = (Some(first), Some(second));
    let error = Pipeline::new(&cancel)
        .network("source", source)
        .cpu("first", 1, || first.take().unwrap())
        .cpu("second", 1, || second.take().unwrap())
        .threads("sink", 1, || CountingSink::<Block> { received: Arc::new(AtomicU64::new(0)), item: PhantomData })
        .start(&Handle::current())
        .join()
        .await
        .unwrap_err();
    (error, pool)
}

const PASS: FailAt = FailAt { number: None, text: "", panics: false };

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_stage_stops_all_and_its_error_is_the_one_shown() {
    for number in [0, 1, 500, 999] {
        let (error, pool) = run_with(PASS, FailAt { number: Some(number), text: "block is bad", panics: false }).await;
        let RunError::Failed { error, later } = error else { panic!("{error:?}") };
        assert_eq!((error.stage.as_str(), error.kind), ("second", ErrorKind::InvalidData));
        assert_eq!(error.source().unwrap().to_string(), "block is bad");
        assert!(later.is_empty(), "{later:?}");
        assert_conserves(&pool);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_failures_the_first_is_kept() {
    let first = FailAt { number: Some(10), text: "first", panics: false };
    let second = FailAt { number: Some(900), text: "second", panics: false };
    let (error, _) = run_with(first, second).await;
    let RunError::Failed { error, .. } = error else { panic!("{error:?}") };
    assert_eq!(error.source().unwrap().to_string(), "first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_a_bug_with_its_text_and_the_stages_name() {
    let (error, pool) = run_with(PASS, FailAt { number: Some(5), text: "worker blew up", panics: true }).await;
    let RunError::Failed { error, .. } = error else { panic!("{error:?}") };
    assert_eq!((error.stage.as_str(), error.kind), ("second", ErrorKind::Bug));
    assert!(error.source().unwrap().to_string().contains("worker blew up"));
    assert_conserves(&pool);
}

/// Says "done" without having said so to its port.
struct Forgetful;

impl BlockingStage for Forgetful {
    type In = NoInput;
    type Out = Block;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Block>, _: StageContext) -> Result<(), StageError> {
        outlet.send_blocking(Block { number: 0, lease: None })?;
        Ok(())
    }
}

/// Takes one item and claims to be done.
struct Lazy;

impl BlockingStage for Lazy {
    type In = Block;
    type Out = NoOutput;
    type Report = ();

    fn run(self, inlet: Inlet<Block>, outlet: Outlet<NoOutput>, _: StageContext) -> Result<(), StageError> {
        inlet.recv_blocking()?;
        outlet.finish();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outlet_dropped_without_finish_is_no_end_of_input() {
    let cancel = CancelToken::new();
    let (pipeline, report) = Pipeline::new(&cancel)
        .threads("forgetful", 1, || Forgetful)
        .threads_reporting("sink", 1, || CountingSink::<Block> { received: Arc::default(), item: PhantomData });
    let error = pipeline.start(&Handle::current()).join().await.unwrap_err();
    assert!(error.source().unwrap().source().unwrap().to_string().contains("forgetful dropped a port"), "{error:?}");
    assert!(report.one().await.is_none(), "the sink must not believe it saw the end (I5)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_leaves_input_behind_fails_the_run() {
    let cancel = CancelToken::new();
    let error = Pipeline::new(&cancel)
        .network("source", CountingSource { blocks: 50, pool: None, emitted: Arc::default() })
        .threads("lazy", 1, || Lazy)
        .start(&Handle::current())
        .join()
        .await
        .unwrap_err();
    assert!(matches!(error, RunError::Failed { error, .. } if error.kind == ErrorKind::Bug));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_job_ends_for_the_reason_that_the_job_was_given() {
    for (before, grandchild) in [(true, false), (false, false), (true, true), (false, true)] {
        let job = CancelToken::new();
        let ask = || job.cancel(Cause::Requested("time is up".to_owned()));
        if before {
            ask();
        }
        let child = job.child();
        let part = if grandchild { child.child() } else { child.clone() };
        let pool = BufferPool::new(1, 512, 512, &part);
        let source = CountingSource { blocks: u64::MAX, pool: Some(pool), emitted: Arc::default() };
        let running = Pipeline::new(&part)
            .network("source", source)
            .threads("sink", 1, || CountingSink::<Block> { received: Arc::new(AtomicU64::new(0)), item: PhantomData })
            .start(&Handle::current());
        if !before {
            ask();
        }
        let error = running.join().await.unwrap_err();
        assert!(matches!(&error, RunError::Cancelled(why) if why == "time is up"), "{error:?}");
    }
}
