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
use jiff::Timestamp;
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;

use super::{
    Entry, Journal, Listing, Outcome, Plan, Summary, Verdict,
    outcome::{Line, is_transient},
    shares::{Grant, Shares, TooSmall},
};
use crate::{
    convert::{
        After, FoundServer, Job, JobError, Notices, Options, Report, Source, claim,
        error::Nature,
        finishing,
        names::{NameCheck, carries_its_own_proof, check_name, finish_earlier, go_on_with_finished, images_of_name},
        report::rss_peak_bytes,
        retire,
        to_glance::to_glance,
    },
    openstack::{
        Image, Session,
        image::{CLAIM_UNTIL, RUN, SOURCE_ID},
    },
    progress::Progress,
    text::{causes, printable},
};

/// How often what another run holds is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longest line of an error in the journal.
const ERROR_CHARS: usize = 2000;

/// What happens, as it happens. Indices are those of the plan's entries.
#[derive(Debug)]
pub enum Event<'a> {
    /// A conversion begins.
    Started {
        /// Which.
        index: usize,
        /// Its part of the budgets.
        grant: Grant,
        /// Its counters, live.
        progress: &'a Progress,
        /// The first try is 1.
        tries: u32,
    },
    /// It has something to say.
    Note {
        /// Which.
        index: usize,
        /// A line.
        line: &'a str,
        /// It goes into its report's warnings.
        warning: bool,
    },
    /// It failed, or is held, and comes again later.
    Later {
        /// Which.
        index: usize,
        /// Why.
        error: &'a str,
    },
    /// It is over.
    Ended {
        /// Which.
        index: usize,
        /// What became of it.
        outcome: &'a Outcome,
        /// Seconds.
        elapsed_s: f64,
    },
    /// Something about all of it.
    Told {
        /// A line.
        line: &'a str,
    },
}

/// What is told of events.
pub type Listener = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

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
    /// Who keeps a record of runs.
    pub notices: Arc<dyn Notices>,
    /// Who is told.
    pub listener: Listener,
    /// Ends it.
    pub cancel: CancelToken,
}

/// How one try ended, if it did not fail.
enum Ended {
    Made(Box<Report>),
    Earlier(String),
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

/// A conversion's notices are the batch's, with its index.
struct ItemNotices {
    index: usize,
    listener: Listener,
    notices: Arc<dyn Notices>,
    warnings: std::sync::Mutex<Vec<String>>,
}

impl Notices for ItemNotices {
    fn note(&self, line: &str) {
        (self.listener)(&Event::Note { index: self.index, line, warning: false });
    }

    fn warn(&self, line: &str) {
        self.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line.to_owned());
        (self.listener)(&Event::Note { index: self.index, line, warning: true });
    }

    fn making(&self, image_id: &str) {
        self.notices.making(image_id);
    }

    fn deleting(&self, image_id: &str) {
        self.notices.deleting(image_id);
    }

    fn left(&self, image_id: &str) {
        self.notices.left(image_id);
    }

    fn was_deleting(&self, run: &str, image_id: &str) -> bool {
        self.notices.was_deleting(run, image_id)
    }

    fn settled(&self, image_id: &str) {
        self.notices.settled(image_id);
    }

    fn not_deleting(&self, image_id: &str) {
        self.notices.not_deleting(image_id);
    }

    fn doubted(&self, image_id: &str) {
        self.notices.doubted(image_id);
    }

    fn was_doubted(&self, run: &str, image_id: &str) -> bool {
        self.notices.was_doubted(run, image_id)
    }

    fn is_dead(&self, run: &str) -> bool {
        self.notices.is_dead(run)
    }

    fn holding(&self, server: Option<&FoundServer>) -> bool {
        self.notices.holding(server)
    }
}

/// An entry whose turn comes again.
struct Later {
    index: usize,
    tries: u32,
    due: Instant,
    error: String,
    nature: Nature,
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
        runner.tidy().await;
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
                let fields = json!({ "id": image.id, "word": entry.wish.image, "name": image.name, "bytes": image.size, "new_name": entry.new_name, "verdict": verdict });
                self.write("planned", &fields);
            }
        }
        self.tell(&self.shares.describe());
    }

    /// Finished images whose claim a dead run could not take off any more.
    async fn tidy(&self) {
        let session = &self.batch.session;
        let listed = &self.batch.plan.listing;
        let anew = match listed.is_recent() {
            true => None,
            false => match Listing::of_project(session).await {
                Ok(anew) => Some(anew),
                Err(_) => return,
            },
        };
        let images = &anew.as_ref().unwrap_or(listed).images;
        let own = |image: &&Image| image.owner == session.whoami().project_id;
        for image in images.iter().filter(own).filter(|image| image.status == "active" && image.property(CLAIM_UNTIL).is_some()) {
            // while the source is there, whoever is at it still needs the protection
            let own_claim_only = image.protected != Some(true);
            let source_there = images.iter().any(|source| image.property(SOURCE_ID) == Some(&source.id) && source.id != image.id);
            if (source_there && !own_claim_only) || !carries_its_own_proof(image) {
                continue;
            }
            if let Some(why) = claim::protects(image, session.now(), None, &*self.batch.notices) {
                // one of another run is that run's to tell
                if image.property(RUN).is_some_and(|run| self.batch.notices.is_dead(run)) {
                    let state = if own_claim_only { "claimed" } else { "protected" };
                    self.tell(&format!("image {} stays {state} for now: {why}", image.shown_id()));
                }
                continue;
            }
            // as it is now: the claim may be another run's by now, or the protection the user's
            let as_listed = |now: &Image| {
                let same = |key: &str| now.property(key) == image.property(key);
                same(CLAIM_UNTIL) && same(RUN) && now.protected == image.protected
            };
            match session.image_if_there(&image.id).await {
                Ok(Some(now)) if as_listed(&now) => {}
                _ => continue,
            }
            if let Err(error) = finishing::release(session, &image.id, image.property(RUN)).await {
                self.tell(&format!(
                    "warning: image {} keeps the mark of a run that is over: {}",
                    image.shown_id(),
                    causes(&error)
                ));
            }
        }
    }

    async fn until_done(&mut self) {
        loop {
            let blocked = self.fill();
            let worth_it = self.later.iter().filter(|later| self.is_worth_it(later)).map(|later| later.due);
            let due = worth_it.min().filter(|_| self.stopped.is_none() && self.queue.is_empty() && !blocked);
            if self.running.is_empty() && due.is_none() {
                if self.stopped.is_none() && self.later.iter().any(|later| later.nature == Nature::Quota) {
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
        later.nature != Nature::Quota || self.freed > later.freed
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
        let notices = Arc::new(ItemNotices {
            index,
            listener: Arc::clone(&batch.listener),
            notices: Arc::clone(&batch.notices),
            warnings: std::sync::Mutex::default(),
        });
        let options = Options { claim: true, run: batch.options.run.clone(), ..self.shares.applied(&grant, &entry.options) };
        let goes = options.after != After::Keep;
        let (session, entry, cancel) = (batch.session.clone(), entry.clone(), batch.cancel.child());
        // what failed once, or was held, is looked at again
        let untouched = batch.plan.listing.untouched(&entry).filter(|_| !again);
        let started = Instant::now();
        let task = async move {
            let told: Arc<dyn Notices> = Arc::clone(&notices) as Arc<dyn Notices>;
            let result = convert_one(&session, &entry, untouched, options, &progress, &told, &cancel).await;
            let warnings = std::mem::take(&mut *notices.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
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
        let nature = error.nature();
        let mut text = causes(error);
        if let Some((cut, _)) = text.char_indices().nth(ERROR_CHARS) {
            text.truncate(cut);
        }
        let limits = self.batch.limits;
        let freed_later = self.under_way.values().any(|(_, _, goes)| *goes);
        let last_try = tries >= limits.tries;
        let is_no_try = waits_for_others(error, self.batch.session.now());
        let again = match nature {
            Nature::Transient => !last_try,
            // room may come from what still runs and deletes its source
            Nature::Quota => freed_later,
            Nature::Held => limits.wait && (is_no_try || !last_try),
            Nature::Permanent | Nature::Credentials | Nature::Interrupted => false,
        };
        if self.batch.cancel.is_cancelled() {
            let _ = self.stopped.get_or_insert_with(|| "interrupted".to_owned());
        }
        if again && self.stopped.is_none() {
            let pause = match nature {
                Nature::Held => limits.pause,
                _ => limits.pause * (1 << (tries - 1).min(4)),
            };
            (self.batch.listener)(&Event::Later { index, error: &text });
            let tries = if nature == Nature::Transient || !is_no_try { tries } else { tries - 1 };
            // what fails for the moment counts, too: where nothing works any more, the rest is not even begun
            let failing = 1 + self.failures + self.later.iter().filter(|later| later.nature == Nature::Transient).count();
            if nature == Nature::Transient && limits.max_failures.is_some_and(|most| failing >= most) {
                self.stop(&format!("{failing} have failed (--max-failures)"));
            }
            self.later.push(Later { index, tries, due: Instant::now() + pause, error: text, nature, freed: self.freed });
            return None;
        }
        match nature {
            Nature::Interrupted if text == "interrupted" => {
                return Some(Outcome::Interrupted { reason: "nothing half-made is left of it".to_owned() });
            }
            Nature::Interrupted => return Some(Outcome::Interrupted { reason: text }),
            Nature::Held => return Some(Outcome::Held { error: text }),
            Nature::Quota => self.stop("the quota for images is full"),
            Nature::Credentials => self.stop("the credentials are not good any more"),
            Nature::Permanent | Nature::Transient => {}
        }
        Some(Outcome::Failed {
            error: text,
            tries: tries.min(limits.tries),
            transient: is_transient(nature),
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
            let outcome = match later.nature {
                Nature::Held => Outcome::Held { error: later.error },
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
                    word: entry.wish.image.clone(),
                    source_deleted: entry.is_work()
                        && entry.options.after != After::Keep
                        && matches!(outcome, Outcome::Done { .. } | Outcome::Earlier { .. }),
                    wish: entry.wish.clone(),
                    new_name: Some(entry.new_name).filter(|name| !name.is_empty()),
                    outcome,
                }
            })
            .collect();
        let summary = Summary {
            run: self.batch.options.run.clone().unwrap_or_default(),
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

/// Is a try that ended so none, because it waits for others, or for room? A claim that is over may be found once, when its image has just been finished.
fn waits_for_others(error: &JobError, now: Timestamp) -> bool {
    match error {
        JobError::Held { until, .. } => claim::holds(until, now),
        JobError::GoneOnWith { .. } | JobError::JustEnded { .. } => false,
        JobError::LeftBehind { error, .. } | JobError::SourceGoing { error, .. } => waits_for_others(error, now),
        _ => true,
    }
}

/// One try at one entry. `untouched`: its source, if it is known that nothing is made of it.
async fn convert_one(
    session: &Session,
    entry: &Entry,
    untouched: Option<Image>,
    options: Options,
    progress: &Progress,
    notices: &Arc<dyn Notices>,
    cancel: &CancelToken,
) -> Result<Ended, JobError> {
    let Some(image) = &entry.image else { return Err(JobError::bug("an entry without an image was begun")) };
    let converting = async |untouched: Option<Image>| {
        let found = async {
            // no claim keeps others from giving an image the new name
            if let Some(source) = untouched {
                let taken = images_of_name(session, &entry.new_name).await?;
                if taken.iter().all(|taken| taken.id == source.id) {
                    return Ok(Found { source: Source::image(session, source)?, made: Vec::new(), taken });
                }
            }
            Found::look(session, &image.id, &entry.new_name).await
        };
        let found = cancel.guard(found).await.map_err(|_| JobError::interrupted())??;
        convert_found(session, found, &entry.new_name, options.clone(), progress, notices, cancel).await
    };
    let believed = untouched.is_some();
    let result = match converting(untouched).await {
        Err(JobError::JustEnded { .. }) if believed => converting(None).await,
        other => other,
    };
    let gone = |error: &JobError| {
        error.api().is_some_and(|api| api.status() == Some(StatusCode::NOT_FOUND))
            || matches!(error, JobError::Image(crate::openstack::image::ImageError::NotFound { .. }))
    };
    match result {
        Err(error) if gone(&error) => match session.image(&image.id).await {
            Err(missing) if missing.status() == Some(StatusCode::NOT_FOUND) => {
                // another run may have converted and deleted it meanwhile
                let made = session.images_where(SOURCE_ID, &image.id).await?;
                let done = made.into_iter().find(|made| {
                    made.property(SOURCE_ID) == Some(&image.id)
                        && made.status == "active"
                        && session.owns(made)
                        && carries_its_own_proof(made)
                });
                // this run's DELETE may have been heard, and not answered: what is left is done now
                let own = options.run.as_deref();
                let is_own = |done: &Image| own.is_some() && done.property(RUN) == own;
                if let Some(done) = &done
                    && (is_own(done) || claim::held(done, session.now(), &**notices).is_none())
                {
                    finishing::finish_marks(session, done, own, &**notices).await?;
                }
                done.map(|done| Ended::Earlier(done.id)).ok_or_else(|| {
                    JobError::Refused(format!(
                        "image {} ({}) is gone: somebody deleted it meanwhile",
                        image.shown(),
                        image.shown_id()
                    ))
                })
            }
            _ => Err(error),
        },
        other => other,
    }
}

/// A source, and what has to do with it.
struct Found {
    source: Source,
    /// Images that say that they were made of it.
    made: Vec<Image>,
    /// Images that have the new name.
    taken: Vec<Image>,
}

impl Found {
    async fn look(session: &Session, id: &str, new_name: &str) -> Result<Self, JobError> {
        // three questions at once: each may wait behind somebody's transfer
        let (source, made, taken) =
            tokio::join!(Source::glance(session, id), session.images_where(SOURCE_ID, id), images_of_name(session, new_name));
        let (source, mut made, taken) = (source?, made?, taken?);
        if matches!(&source, Source::Glance { image, .. } if image.os_hidden == Some(true)) {
            // its conversion is hidden, too, and lists leave such out unless they are asked for
            made.extend(session.images_matching(&[(SOURCE_ID, id), ("os_hidden", "true")]).await?);
        }
        Ok(Self { source, made, taken })
    }
}

async fn convert_found(
    session: &Session,
    found: Found,
    new_name: &str,
    options: Options,
    progress: &Progress,
    notices: &Arc<dyn Notices>,
    cancel: &CancelToken,
) -> Result<Ended, JobError> {
    let Found { source, made, taken } = found;
    let job = Job::new(source, options, progress, notices, cancel);
    // not broken off as a whole: a source may be on its way out
    let checking = cancel.guard(retire::check(&job, job.options.force)).await;
    checking.unwrap_or_else(|_| Err(JobError::interrupted()))?;
    let run = job.options.run.as_deref();
    let is_own = |image: &Image| run.is_some() && image.property(RUN) == run;
    let looking = async {
        if let Some(done) = finish_earlier(&job, session, made, new_name).await? {
            return Ok(Some(Ended::Earlier(done.id)));
        }
        match check_name(session, taken, new_name, &job.source, job.options.force, job.options.after)? {
            NameCheck::AlreadyDone(done) => {
                if !is_own(&done)
                    && let Some(held) = claim::held(&done, session.now(), &*job.notices)
                {
                    return Err(held);
                }
                go_on_with_finished(&job, session, &done).await?;
                Ok(Some(Ended::Earlier(done.id)))
            }
            // an earlier try of this run made it, and it may be on its way out: it is made anew
            NameCheck::Unproven(image) if is_own(&image) => Ok(None),
            NameCheck::Unproven(image) => Err(crate::convert::names::unproven(&image)),
            NameCheck::Free { unfinished } => {
                for image in unfinished.iter().filter(|image| image.property(CLAIM_UNTIL).is_none()) {
                    job.notices.warn(&format!(
                        "image {} is an unfinished conversion of this source by virta convert: it runs elsewhere, or left it. If none runs: \
                         virta image delete {}",
                        image.shown_id(),
                        image.shown_id()
                    ));
                }
                Ok(None)
            }
        }
    };
    if let Some(ended) = looking.await? {
        return Ok(ended);
    }
    let report = to_glance(&job, session, new_name).await?;
    notices.note(&format!("made {}", printable(&report.destination)));
    Ok(Ended::Made(Box::new(report)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_another_runs_claim_is_not_trying() {
        let now = Timestamp::now();
        let held = |until: Timestamp| JobError::Held { image: "i".to_owned(), run: "r".to_owned(), until: until.to_string() };
        let hour = jiff::SignedDuration::from_hours(1);
        assert!(waits_for_others(&held(now + hour), now));
        assert!(!waits_for_others(&held(now - hour), now), "its image has just been finished: looked at once more");
        let left = |error| JobError::LeftBehind { id: "i".to_owned(), error: Box::new(error), left: None };
        assert!(!waits_for_others(&left(held(now - hour)), now));
        assert!(waits_for_others(&left(held(now + hour)), now));
        let other = JobError::GoneOnWith { image: "i".to_owned(), run: "r".to_owned() };
        assert!(!waits_for_others(&left(other), now));
        assert!(waits_for_others(&JobError::Quota("full".to_owned()), now), "nor is who waits for room");
    }
}
