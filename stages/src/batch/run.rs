//! The runner.
//!
//! One task a conversion, so that one that fails, or panics, touches no other. What failed for the moment is tried again when the queue is
//! empty; what another run holds is looked at again until it is done or its claim is over.

use std::{
    num::NonZeroUsize,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use engine::CancelToken;
use serde_json::json;
use tokio::task::JoinSet;

use super::{
    Journal, Outcome, Plan, Summary, Verdict,
    attempt::{Ended, ItemReporter, convert_one},
    event::{Event, Listener},
    outcome::{Line, is_transient},
    shares::{Grant, Shares, TooSmall},
};
use crate::{
    convert::{After, Options, report::rss_peak_bytes},
    error::{FailureKind, JobError},
    openstack::Session,
    progress::Progress,
    reporter::Reporter,
    text::causes,
};

/// How often what another run holds is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Longest line of an error in the journal.
const ERROR_CHARS: usize = 2000;

/// When to stop, and what to do about what fails.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Conversions at once.
    pub jobs: NonZeroUsize,
    /// Tries of each.
    pub tries: u32,
    /// No more are begun after so many have failed.
    pub max_failures: Option<usize>,
    /// Wait until what other runs hold is done, or their claims are over.
    pub wait: bool,
    /// The pause before another try.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let jobs = NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN);
        Self { jobs, tries: 3, max_failures: None, wait: true, pause: LOOK_EVERY }
    }
}

/// A batch that is about to run. Plain data: make it, and call [`Batch::run`].
pub struct Batch {
    /// Signed in; with a rate, if there is one for all ([`Session::limited_to`]).
    pub session: Session,
    /// What is to be done.
    pub plan: Plan,
    /// The options for all; memory, connections, workers and scratch are those of all together.
    pub options: Options,
    /// When to stop.
    pub limits: Limits,
    /// Where it is written down, if anywhere.
    pub journal: Option<Journal>,
    /// Who is told.
    pub listener: Listener,
    /// Ends it.
    pub cancel: CancelToken,
}

/// What one task gives back.
struct Finished {
    index: usize,
    grant: Grant,
    tries: u32,
    started: Instant,
    result: Result<Ended, JobError>,
    warnings: Vec<String>,
}

/// An entry whose turn comes again.
struct Later {
    index: usize,
    tries: u32,
    due: Instant,
    error: String,
    failure_kind: FailureKind,
    /// How many sources had gone when it failed.
    freed: usize,
}

struct Runner {
    batch: Batch,
    shares: Shares,
    queue: std::collections::VecDeque<usize>,
    later: Vec<Later>,
    outcomes: Vec<Option<Outcome>>,
    running: JoinSet<Finished>,
    /// Of those that run: index by task, for one that panics, and whether its source goes.
    under_way: std::collections::HashMap<tokio::task::Id, (usize, Grant, bool)>,
    stopped: Option<String>,
    failures: usize,
    /// Sources that have gone: each made room.
    freed: usize,
    /// The journal could not be written.
    journal_failed: std::sync::atomic::AtomicBool,
    fetched_bytes: u64,
    uploaded_bytes: u64,
}

impl Batch {
    /// Runs to its end.
    ///
    /// # Errors
    /// [`TooSmall`] before anything is done; everything later is in the summary.
    ///
    /// # Cancel safety
    /// Cancel with the token: conversions clean up, what was not begun is marked so, and this returns. If the future is dropped instead,
    /// conversions go on until their tasks are aborted, and leave claimed images that the next run removes.
    pub async fn run(self) -> Result<Summary, TooSmall> {
        let shares = Shares::new(&self.options, self.limits.jobs)?;
        let started = Instant::now();
        let near_quota =
            self.plan.deletes() && self.session.quota_left_bytes().await.is_some_and(|left| left < self.plan.work_bytes());
        let queue = self.plan.order(near_quota).into();
        let outcomes = self.plan.entries.iter().map(|entry| match &entry.verdict {
            Verdict::Convert | Verdict::Finish { .. } => None,
            Verdict::Done { made } => Some(Outcome::Earlier { image: made.clone() }),
            Verdict::Skip { reason } => Some(Outcome::Skipped { reason: reason.clone() }),
            Verdict::Fail { reason } => Some(Outcome::Failed { error: reason.clone(), tries: 0, transient: false, exit_code: 1 }),
        });
        let outcomes: Vec<_> = outcomes.collect();
        let failures = outcomes.iter().flatten().filter(|outcome| !outcome.is_good()).count();
        let mut runner = Runner {
            batch: self,
            shares,
            queue,
            later: Vec::new(),
            outcomes,
            running: JoinSet::new(),
            under_way: std::collections::HashMap::new(),
            stopped: None,
            failures,
            freed: 0,
            journal_failed: std::sync::atomic::AtomicBool::new(false),
            fetched_bytes: 0,
            uploaded_bytes: 0,
        };
        runner.begin();
        runner.stop_at_max_failures();
        runner.until_done().await;
        Ok(runner.summary(started))
    }
}

impl Runner {
    fn tell(&self, line: &str) {
        (self.batch.listener)(&Event::Told { line });
    }

    /// A journal that cannot be written is worth a line, and no reason to stop. It is not tried again: that may take time, each time.
    fn write(&self, event: &str, fields: &serde_json::Value) {
        if let Some(journal) = self.batch.journal.as_ref().filter(|_| !self.journal_failed.load(Relaxed))
            && let Err(error) = journal.write(event, fields)
        {
            self.journal_failed.store(true, Relaxed);
            self.tell(&format!("warning: {}: what is not written down is known to Glance alone", causes(&error)));
        }
    }

    fn begin(&self) {
        self.write("begin", &json!({ "images": self.batch.plan.entries.len(), "bytes": self.batch.plan.work_bytes() }));
        for entry in &self.batch.plan.entries {
            if let Some(image) = &entry.image {
                let verdict = match &entry.verdict {
                    Verdict::Convert => "convert",
                    Verdict::Finish { .. } => "finish",
                    Verdict::Done { .. } => "done earlier",
                    Verdict::Skip { .. } => "skip",
                    Verdict::Fail { .. } => "fail",
                };
                let fields = json!({ "id": image.id, "word": entry.request.image, "name": image.name, "bytes": image.size, "new_name": entry.new_name, "verdict": verdict });
                self.write("planned", &fields);
            }
        }
        self.tell(&self.shares.describe());
    }

    async fn until_done(&mut self) {
        loop {
            let blocked = self.fill();
            let worth_it = self.later.iter().filter(|later| self.is_worth_it(later)).map(|later| later.due);
            let due = worth_it.min().filter(|_| self.stopped.is_none() && self.queue.is_empty() && !blocked);
            if self.running.is_empty() && due.is_none() {
                if self.stopped.is_none() && self.later.iter().any(|later| later.failure_kind == FailureKind::Quota) {
                    self.stop("the quota for images is full");
                }
                return;
            }
            let cancel = self.batch.cancel.clone();
            let stopping = self.stopped.is_some();
            tokio::select! {
                Some(finished) = self.running.join_next_with_id() => self.finished(finished),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() && self.shares.has_slot() => {}
                () = cancel.cancelled(), if !stopping => self.stopped = Some("interrupted".to_owned()),
            }
        }
    }

    /// May another try go better? For what did not fit: has a source gone since?
    fn is_worth_it(&self, later: &Later) -> bool {
        later.failure_kind != FailureKind::Quota || self.freed > later.freed
    }

    /// Begins as many as there are slots. `true`: there is one that waits for a part of the budgets.
    fn fill(&mut self) -> bool {
        while self.stopped.is_none() && self.shares.has_slot() {
            let (index, tries, again) = if let Some(index) = self.queue.front() {
                (*index, 0, false)
            } else {
                let now = Instant::now();
                let ready = |later: &Later| later.due <= now && self.is_worth_it(later);
                let Some(at) = self.later.iter().position(ready) else { return false };
                (self.later[at].index, self.later[at].tries, true)
            };
            let waiting = (self.queue.len() + self.later.len()).saturating_sub(1);
            let Some(grant) = self.shares.grant(self.batch.plan.entries[index].bytes(), waiting) else { return true };
            if self.queue.front() == Some(&index) {
                self.queue.pop_front();
            } else {
                self.later.retain(|later| later.index != index);
            }
            self.start(index, tries + 1, again, grant);
        }
        false
    }

    fn start(&mut self, index: usize, tries: u32, again: bool, grant: Grant) {
        let batch = &self.batch;
        let entry = &batch.plan.entries[index];
        let progress = Progress::default();
        (batch.listener)(&Event::Started { index, grant, progress: &progress, tries });
        if let Some(image) = &entry.image {
            self.write("started", &json!({ "id": image.id, "try": tries }));
        }
        let reporter =
            Arc::new(ItemReporter { index, listener: Arc::clone(&batch.listener), warnings: std::sync::Mutex::default() });
        let jobs = batch.limits.jobs;
        let options = Options { run: batch.options.run.clone(), jobs, ..self.shares.applied(&grant, &entry.options) };
        let goes = options.after != After::Keep;
        let (session, entry, cancel) = (batch.session.clone(), entry.clone(), batch.cancel.child());
        // what failed once, or was held, is looked at again
        let untouched = entry.image.as_ref().filter(|_| !again);
        let untouched = untouched.and_then(|source| batch.plan.listing.untouched(source, &entry.new_name));
        let started = Instant::now();
        let task = async move {
            let told: Arc<dyn Reporter> = Arc::clone(&reporter) as Arc<dyn Reporter>;
            let result = convert_one(&session, &entry, untouched, options, &progress, &told, &cancel).await;
            let warnings = std::mem::take(&mut *reporter.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
            Finished { index, grant, tries, started, result, warnings }
        };
        let handle = self.running.spawn(task);
        self.under_way.insert(handle.id(), (index, grant, goes));
    }

    fn finished(&mut self, finished: Result<(tokio::task::Id, Finished), tokio::task::JoinError>) {
        let finished = match finished {
            Ok((id, finished)) => {
                if let Some((_, _, true)) = self.under_way.remove(&id)
                    && finished.result.is_ok()
                {
                    self.freed += 1;
                }
                finished
            }
            Err(error) => {
                let Some((index, grant, _)) = self.under_way.remove(&error.id()) else { return };
                let result = Err(JobError::bug(&format!("the conversion panicked: {error}")));
                Finished { index, grant, tries: u32::MAX, started: Instant::now(), result, warnings: Vec::new() }
            }
        };
        self.shares.give_back(finished.grant);
        let Finished { index, tries, started, result, warnings, .. } = finished;
        let outcome = match result {
            Ok(Ended::Made(mut report)) => {
                report.warnings.extend(warnings);
                self.fetched_bytes += report.fetched_bytes;
                self.uploaded_bytes += report.uploaded_bytes;
                Outcome::Done { report }
            }
            Ok(Ended::Earlier(image)) => Outcome::Earlier { image },
            Err(error) => match self.failed(index, tries, &error) {
                Some(outcome) => outcome,
                None => return,
            },
        };
        self.conclude(index, outcome, started.elapsed().as_secs_f64());
    }

    /// What a failure means for this entry (`None`: it comes again) and for the whole.
    fn failed(&mut self, index: usize, tries: u32, error: &JobError) -> Option<Outcome> {
        let failure_kind = error.failure_kind();
        let mut text = causes(error);
        if let Some((cut, _)) = text.char_indices().nth(ERROR_CHARS) {
            text.truncate(cut);
        }
        let limits = self.batch.limits;
        let freed_later = self.under_way.values().any(|(_, _, goes)| *goes);
        let last_try = tries >= limits.tries;
        let again = match failure_kind {
            FailureKind::Transient => !last_try,
            // room may come from what still runs and deletes its source
            FailureKind::Quota => freed_later,
            // it ends: with the other run's work, or with its claim
            FailureKind::Held => limits.wait,
            FailureKind::Permanent | FailureKind::Credentials | FailureKind::Interrupted => false,
        };
        if self.batch.cancel.is_cancelled() {
            let _ = self.stopped.get_or_insert_with(|| "interrupted".to_owned());
        }
        if again && self.stopped.is_none() {
            let pause = match failure_kind {
                FailureKind::Held => limits.pause,
                _ => limits.pause * (1 << (tries - 1).min(4)),
            };
            (self.batch.listener)(&Event::Later { index, error: &text });
            let tries = if failure_kind == FailureKind::Transient { tries } else { tries - 1 };
            // what fails for the moment counts, too: where nothing works any more, the rest is not even begun
            let failing =
                1 + self.failures + self.later.iter().filter(|later| later.failure_kind == FailureKind::Transient).count();
            if failure_kind == FailureKind::Transient && limits.max_failures.is_some_and(|most| failing >= most) {
                self.stop(&format!("{failing} have failed (--max-failures)"));
            }
            self.later.push(Later { index, tries, due: Instant::now() + pause, error: text, failure_kind, freed: self.freed });
            return None;
        }
        match failure_kind {
            FailureKind::Interrupted if text == "interrupted" => {
                return Some(Outcome::Interrupted { reason: "nothing half-made is left of it".to_owned() });
            }
            FailureKind::Interrupted => return Some(Outcome::Interrupted { reason: text }),
            FailureKind::Held => return Some(Outcome::Held { error: text }),
            FailureKind::Quota => self.stop("the quota for images is full"),
            FailureKind::Credentials => self.stop("the credentials are not good any more"),
            FailureKind::Permanent | FailureKind::Transient => {}
        }
        Some(Outcome::Failed {
            error: text,
            tries: tries.min(limits.tries),
            transient: is_transient(failure_kind),
            exit_code: error.exit_code(),
        })
    }

    fn stop(&mut self, why: &str) {
        if self.stopped.is_none() {
            self.tell(&format!("no more are begun: {why}"));
            self.stopped = Some(why.to_owned());
        }
    }

    fn conclude(&mut self, index: usize, outcome: Outcome, elapsed_s: f64) {
        let id = self.batch.plan.entries[index].image.as_ref().map(|image| image.id.clone());
        let fields = match &outcome {
            Outcome::Done { report } => {
                let image = report.destination.strip_prefix("glance:").unwrap_or(&report.destination);
                json!({ "id": id, "image": image, "image_bytes": report.image_bytes, "elapsed_s": elapsed_s })
            }
            Outcome::Earlier { image } => json!({ "id": id, "image": image, "earlier": true }),
            Outcome::Failed { error, tries, transient, exit_code } => {
                json!({ "id": id, "error": error, "tries": tries, "transient": transient, "exit_code": exit_code })
            }
            other => json!({ "id": id, "why": other.why() }),
        };
        let event = if matches!(outcome, Outcome::Earlier { .. }) { "done" } else { outcome.word() };
        self.write(event, &fields);
        (self.batch.listener)(&Event::Ended { index, outcome: &outcome, elapsed_s });
        if matches!(outcome, Outcome::Failed { .. }) {
            self.failures += 1;
        }
        self.outcomes[index] = Some(outcome);
        self.stop_at_max_failures();
    }

    fn stop_at_max_failures(&mut self) {
        if self.batch.limits.max_failures.is_some_and(|most| self.failures >= most) {
            self.stop(&format!("{} have failed (--max-failures)", self.failures));
        }
    }

    fn summary(mut self, started: Instant) -> Summary {
        let interrupted = self.batch.cancel.is_cancelled();
        let why = self.stopped.clone().unwrap_or_else(|| "the batch ended before".to_owned());
        for later in std::mem::take(&mut self.later) {
            let outcome = match later.failure_kind {
                FailureKind::Held => Outcome::Held { error: later.error },
                _ => Outcome::Failed { error: later.error, tries: later.tries.max(1), transient: true, exit_code: 1 },
            };
            self.conclude(later.index, outcome, 0.0);
        }
        let (mut converted_bytes, mut made_bytes) = (0, 0);
        let entries = std::mem::take(&mut self.batch.plan.entries);
        let outcomes = std::mem::take(&mut self.outcomes);
        let items: Vec<Line> = entries
            .into_iter()
            .zip(outcomes)
            .map(|(entry, outcome)| {
                let outcome = outcome.unwrap_or_else(|| Outcome::NotTried { reason: why.clone() });
                if let Outcome::Done { report } = &outcome {
                    converted_bytes += report.virtual_bytes;
                    made_bytes += report.image_bytes;
                }
                Line {
                    bytes: entry.image.as_ref().and_then(|image| image.size),
                    id: entry.image.as_ref().map(|image| image.id.clone()),
                    name: entry.image.as_ref().and_then(|image| image.name.clone()),
                    word: entry.request.image.clone(),
                    source_deleted: entry.is_work()
                        && entry.options.after != After::Keep
                        && matches!(outcome, Outcome::Done { .. } | Outcome::Earlier { .. }),
                    request: entry.request.clone(),
                    new_name: Some(entry.new_name).filter(|name| !name.is_empty()),
                    outcome,
                }
            })
            .collect();
        let summary = Summary {
            run: self.batch.options.run.text(),
            items,
            stopped: self.stopped.clone(),
            interrupted,
            elapsed_s: started.elapsed().as_secs_f64(),
            converted_bytes,
            made_bytes,
            fetched_bytes: self.fetched_bytes,
            uploaded_bytes: self.uploaded_bytes,
            rss_peak_bytes: rss_peak_bytes(),
        };
        let done = summary.count(|outcome| matches!(outcome, Outcome::Done { .. }));
        self.write("end", &json!({ "converted": done, "left": summary.left().count(), "stopped": summary.stopped, "elapsed_s": summary.elapsed_s }));
        summary
    }
}
