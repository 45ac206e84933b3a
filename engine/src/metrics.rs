//! What each stage did and what it waited for.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Live counters of one stage. Cheap to update, exact when the stage has ended.
#[derive(Debug)]
pub struct StageMetrics {
    name: String,
    workers: u64,
    items: AtomicU64,
    bytes: AtomicU64,
    blocked_on_input_ns: AtomicU64,
    blocked_on_output_ns: AtomicU64,
    started: OnceLock<Instant>,
    ended_ns: AtomicU64,
    /// A sink passes nothing on, so what it takes in is counted.
    sink: AtomicBool,
}

/// A stage's counters at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsSnapshot {
    /// The stage.
    pub name: String,
    /// Items passed on; items taken in for a sink.
    pub items: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Seconds of all workers together that were spent neither waiting for input nor for output.
    pub busy_s: f64,
    /// Seconds of all workers together that were spent waiting for an item (or a lease).
    pub blocked_on_input_s: f64,
    /// Seconds of all workers together that were spent waiting for room in the next port.
    pub blocked_on_output_s: f64,
}

impl StageMetrics {
    pub(crate) fn new(name: &str, workers: usize) -> Self {
        Self {
            name: name.to_owned(),
            workers: workers as u64,
            items: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            blocked_on_input_ns: AtomicU64::new(0),
            blocked_on_output_ns: AtomicU64::new(0),
            started: OnceLock::new(),
            ended_ns: AtomicU64::new(0),
            sink: AtomicBool::new(false),
        }
    }

    /// Counters for a port without a pipeline.
    #[cfg(virta_model)]
    #[must_use]
    pub fn for_model() -> Self {
        Self::new("model", 1)
    }

    /// The stage's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn begin(&self) {
        self.started.get_or_init(Instant::now);
    }

    pub(crate) fn end(&self) {
        if let Some(started) = self.started.get() {
            self.ended_ns.fetch_max(nanos(started.elapsed()).max(1), Relaxed);
        }
    }

    pub(crate) fn mark_as_sink(&self) {
        self.sink.store(true, Relaxed);
    }

    pub(crate) fn taken_in(&self, bytes: u64) {
        if self.sink.load(Relaxed) {
            self.count(1, bytes);
        }
    }

    /// Counts items that were passed on.
    pub fn count(&self, items: u64, bytes: u64) {
        self.items.fetch_add(items, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn waited_for_input(&self, since: Instant) {
        self.blocked_on_input_ns.fetch_add(nanos(since.elapsed()), Relaxed);
    }

    pub(crate) fn waited_for_output(&self, since: Instant) {
        self.blocked_on_output_ns.fetch_add(nanos(since.elapsed()), Relaxed);
    }

    /// Bytes passed on so far: for progress displays.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// All counters now.
    #[must_use]
    pub fn snapshot(&self) -> MetricsSnapshot {
        let blocked_on_input_s = seconds(self.blocked_on_input_ns.load(Relaxed));
        let blocked_on_output_s = seconds(self.blocked_on_output_ns.load(Relaxed));
        let alive_ns = match self.ended_ns.load(Relaxed) {
            0 => self.started.get().map_or(0, |started| nanos(started.elapsed())),
            ended => ended,
        };
        let all_workers_s = seconds(alive_ns) * precise(self.workers);
        MetricsSnapshot {
            name: self.name.clone(),
            items: self.items.load(Relaxed),
            bytes: self.bytes(),
            busy_s: (all_workers_s - blocked_on_input_s - blocked_on_output_s).max(0.0),
            blocked_on_input_s,
            blocked_on_output_s,
        }
    }
}

/// All stages of a run, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry(Arc<Mutex<Vec<Arc<StageMetrics>>>>);

impl Registry {
    pub(crate) fn register(&self, name: &str, workers: usize) -> Arc<StageMetrics> {
        let metrics = Arc::new(StageMetrics::new(name, workers));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&metrics));
        metrics
    }

    pub(crate) fn all(&self) -> Vec<Arc<StageMetrics>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX) // 584 years
}

#[allow(clippy::cast_precision_loss)] // 2^53 ns are 104 days; the loss beyond is no matter for a report
fn precise(count: u64) -> f64 {
    count as f64
}

fn seconds(nanos: u64) -> f64 {
    precise(nanos) / 1e9
}
