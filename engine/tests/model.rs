//! Ports, pool and cancellation under a model checker: every schedule that the random and PCT schedulers try.
//!
//! `RUSTFLAGS="--cfg virta_model" cargo test -p virta-engine --test model --target-dir target/model`
#![cfg(virta_model)]
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::sync::Arc;

use engine::{BufferPool, CancelToken, Cause, Item, StageMetrics, port};
use shuttle::thread;

struct Number(#[allow(dead_code)] u64, Option<engine::Lease>);
impl Item for Number {}

const SCHEDULES: usize = 20_000;

fn check(body: impl Fn() + Send + Sync + Clone + 'static) {
    shuttle::check_random(body.clone(), SCHEDULES);
    shuttle::check_pct(body, SCHEDULES, 3);
}

fn counters() -> Arc<StageMetrics> {
    Arc::new(StageMetrics::for_model())
}

#[test]
fn end_of_input_is_seen_only_after_all_items_of_all_producers() {
    // I1, I5: two producers, two consumers, capacity 1
    check(|| {
        let cancel = CancelToken::new();
        let (outlet, inlet) = port::<Number>(1, &cancel, &counters(), &counters());
        let second = outlet.clone();
        let producers = [outlet, second].map(|outlet| {
            thread::spawn(move || {
                for number in 0..2 {
                    outlet.send_blocking(Number(number, None)).unwrap();
                }
                outlet.finish();
            })
        });
        let consumers = [inlet.clone(), inlet].map(|inlet| {
            thread::spawn(move || {
                let mut seen = 0;
                while inlet.recv_blocking().unwrap().is_some() {
                    seen += 1;
                }
                seen
            })
        });
        producers.map(|producer| producer.join().unwrap());
        let seen: u64 = consumers.map(|consumer| consumer.join().unwrap()).iter().sum();
        assert_eq!(seen, 4);
        assert!(!cancel.is_cancelled());
    });
}

#[test]
fn a_dropped_producer_is_never_an_end_of_input() {
    // I5: one producer finishes, the other vanishes; no schedule may show an end
    check(|| {
        let cancel = CancelToken::new();
        let (outlet, inlet) = port::<Number>(1, &cancel, &counters(), &counters());
        let vanishing = outlet.clone();
        let good = thread::spawn(move || {
            let _ = outlet.send_blocking(Number(0, None));
            outlet.finish();
        });
        let bad = thread::spawn(move || drop(vanishing));
        let consumer = thread::spawn(move || {
            loop {
                match inlet.recv_blocking() {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("an accident was taken for the end"),
                    Err(_) => break,
                }
            }
        });
        good.join().unwrap();
        bad.join().unwrap();
        consumer.join().unwrap();
    });
}

#[test]
fn cancellation_wakes_everybody_and_loses_no_lease() {
    // I3, I6: nobody hangs (the checker reports a deadlock), all leases are back
    check(|| {
        let cancel = CancelToken::new();
        let pool = BufferPool::new(1, 16, 16, &cancel);
        let (outlet, inlet) = port::<Number>(1, &cancel, &counters(), &counters());
        let source = {
            let pool = pool.clone();
            thread::spawn(move || {
                for number in 0..3 {
                    let Ok(lease) = pool.acquire_blocking() else { return };
                    if outlet.send_blocking(Number(number, Some(lease))).is_err() {
                        return;
                    }
                }
                outlet.finish();
            })
        };
        let sink = thread::spawn(move || {
            while let Ok(Some(number)) = inlet.recv_blocking() {
                drop(number.1)
            }
        });
        let canceller = {
            let cancel = cancel.clone();
            thread::spawn(move || cancel.cancel(Cause::Requested("test".to_owned())))
        };
        source.join().unwrap();
        sink.join().unwrap();
        canceller.join().unwrap();
        drop(cancel);
        assert_eq!(pool.available(), 1);
    });
}
