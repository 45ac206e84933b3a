//! Back-pressure is an exact number (I2), and every lease returns (I3).
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use engine::{
    BufferPool, CancelToken, Cause, Pipeline, RunError, TokioLocal,
    testing::{CountingSource, FailAt, StallingSink, assert_conserves},
};
use tokio::{runtime::Handle, sync::oneshot};

/// Waits until the counter has stood still for a while.
async fn settled(counter: &AtomicU64) -> u64 {
    let mut last = counter.load(SeqCst);
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let now = counter.load(SeqCst);
        if now == last && now > 0 {
            return now;
        }
        last = now;
    }
    panic!("the counter never settled");
}

/// How many blocks leave the source while the sink stalls, and what becomes of them afterwards.
async fn stalled_run(leases: Option<usize>, port_items: usize, workers: usize) -> u64 {
    let cancel = CancelToken::new();
    let pool = leases.map(|count| BufferPool::new(count, 4096, 4096, &cancel));
    let (emitted, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (go, gate) = oneshot::channel();
    let source = CountingSource { blocks: 500, pool: pool.clone(), emitted: Arc::clone(&emitted) };
    let sink = StallingSink { gate, received: Arc::clone(&received) };
    let running = Pipeline::new(&cancel)
        .network("source", source)
        .port(port_items)
        .cpu("pass", workers, || FailAt { number: None, text: "", panics: false })
        .port(port_items)
        .ring("sink", TokioLocal, || Ok(sink))
        .start(&Handle::current());
    let stopped_at = settled(&emitted).await;
    go.send(()).unwrap();
    let metrics = running.join().await.unwrap();
    assert_eq!((emitted.load(SeqCst), received.load(SeqCst)), (500, 500), "I1");
    assert!(metrics.iter().all(|stage| stage.items == 500), "{metrics:?}");
    assert!(metrics[0].blocked_on_output_s + metrics[1].blocked_on_output_s > 0.05, "{metrics:?}");
    assert!(metrics[2].bytes == if leases.is_some() { 500 * 4096 } else { 0 });
    if let Some(pool) = pool {
        assert_conserves(&pool);
        assert!(pool.leased_peak() <= pool.count());
    }
    stopped_at
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_stalled_sink_the_source_emits_exactly_the_pools_leases() {
    assert_eq!(stalled_run(Some(7), 16, 2).await, 7);
    assert_eq!(stalled_run(Some(1), 1, 1).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_leases_it_emits_exactly_what_ports_and_workers_hold() {
    // two ports of 3, and one block in the hand of each of two workers
    assert_eq!(stalled_run(None, 3, 2).await, 3 + 2 + 3);
    assert_eq!(stalled_run(None, 1, 1).await, 1 + 1 + 1);
}

#[test]
fn what_was_used_last_is_used_first() {
    let pool = BufferPool::new(8, 4096, 4096, &CancelToken::new());
    let write = |mark: u8| {
        let mut lease = pool.acquire_blocking().unwrap();
        let before = lease[0];
        lease[0] = mark;
        (before, lease)
    };
    let (first, second) = (write(1), write(2));
    assert_eq!((first.0, second.0), (0, 0), "both are new");
    drop(first);
    drop(second);
    assert_eq!(write(3).0, 2, "and returns with the 3");
    let (third, fourth, fifth) = (write(4), write(5), write(6));
    assert_eq!((third.0, fourth.0, fifth.0), (3, 1, 0), "a third one at once is made anew");
    drop((third.1, fourth.1, fifth.1));
    assert_conserves(&pool);
}

#[test]
fn a_cancelled_pool_takes_nothing_back() {
    let cancel = CancelToken::new();
    let pool = BufferPool::new(2, 4096, 4096, &cancel);
    let (one, other) = (pool.acquire_blocking().unwrap(), pool.acquire_blocking().unwrap());
    drop(one);
    cancel.cancel(Cause::Requested("interrupted".to_owned()));
    drop(other);
    assert_conserves(&pool);
    assert!(pool.acquire_blocking().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_run_can_be_cancelled_and_loses_no_lease() {
    let cancel = CancelToken::new();
    let pool = BufferPool::new(5, 4096, 4096, &cancel);
    let (emitted, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (_go, gate) = oneshot::channel();
    let running = Pipeline::new(&cancel)
        .network("source", CountingSource { blocks: 500, pool: Some(pool.clone()), emitted: Arc::clone(&emitted) })
        .ring("sink", TokioLocal, || Ok(StallingSink { gate, received }))
        .start(&Handle::current());
    settled(&emitted).await;
    cancel.cancel(Cause::Requested("interrupted".to_owned()));
    let error = running.join().await.unwrap_err();
    assert!(matches!(&error, RunError::Cancelled(why) if why == "interrupted"), "{error:?}");
    // What a closed port still held is dropped with the port.
    assert_conserves(&pool);
}
