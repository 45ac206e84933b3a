//! What is shown of a batch: bars on a terminal, a line at start and end of each elsewhere, JSON lines for programs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use engine::{CancelToken, Cause};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use stages::{
    batch::{Event, Outcome, Plan},
    progress::{Phase, Progress},
    reporter::Reporter,
    text::{printable, size},
};

use crate::{
    display::{Display, Kind, bar_characters},
    exit,
    runs::Run,
    stderr,
};

const DRAW_EVERY: Duration = Duration::from_millis(200);
/// How often a log gets a line about all of it.
const LINE_EVERY: Duration = Duration::from_secs(60);
const JSON_EVERY: Duration = Duration::from_secs(1);
/// Longest name on a line.
const NAME_CHARS: usize = 28;

/// One that runs.
struct Running {
    progress: Progress,
    bar: Option<ProgressBar>,
    last: (Instant, u64),
}

struct State {
    running: BTreeMap<usize, Running>,
    /// Entries that are over, their bytes, and what was saved of them.
    ended: usize,
    ended_bytes: u64,
    saved_bytes: u64,
    failed: usize,
}

struct Shared {
    display: Display,
    run: Run,
    names: Vec<String>,
    bytes: Vec<u64>,
    /// Is the source to go?
    goes: Vec<bool>,
    /// Is the new image read back?
    reads_back: Vec<bool>,
    /// Of what is to be done.
    work: usize,
    work_bytes: u64,
    started: Instant,
    state: Mutex<State>,
    overall: Option<ProgressBar>,
    /// Wakes the drawing task, so that a batch that is over ends at once.
    stop: CancelToken,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// Shows a batch. Clones are the same.
#[derive(Clone)]
pub struct BatchDisplay(Arc<Shared>);

fn short(name: &str) -> String {
    let name = printable(name);
    if name.chars().count() <= NAME_CHARS {
        return format!("{name:<NAME_CHARS$}");
    }
    // names of one service differ at their end
    let half = NAME_CHARS / 2;
    let head: String = name.chars().take(half).collect();
    let tail: Vec<char> = name.chars().rev().take(NAME_CHARS - half - 1).collect();
    format!("{head}~{}", tail.into_iter().rev().collect::<String>())
}

impl BatchDisplay {
    /// Starts to show what becomes of a plan.
    pub fn start(display: &Display, plan: &Plan, run: Run) -> Self {
        let work: Vec<_> = plan.entries.iter().filter(|entry| entry.is_work()).collect();
        let overall = display.bars().map(|bars| {
            let bar = bars.add(ProgressBar::new(plan.work_bytes()));
            if let Ok(style) = ProgressStyle::with_template("{bar:12} {percent:>3}%  {msg}  ETA {eta}") {
                bar.set_style(style.progress_chars(bar_characters()));
            }
            bar
        });
        let shared = Shared {
            display: display.clone(),
            run,
            names: plan.entries.iter().map(stages::batch::Entry::shown).collect(),
            bytes: plan.entries.iter().map(stages::batch::Entry::bytes).collect(),
            goes: plan.entries.iter().map(|entry| entry.options.after != stages::convert::After::Keep).collect(),
            reads_back: plan.entries.iter().map(|entry| entry.options.verify == stages::convert::Verify::Readback).collect(),
            work: work.len(),
            work_bytes: plan.work_bytes(),
            started: Instant::now(),
            state: Mutex::new(State { running: BTreeMap::new(), ended: 0, ended_bytes: 0, saved_bytes: 0, failed: 0 }),
            overall,
            stop: CancelToken::new(),
            task: Mutex::default(),
        };
        let shown = Self(Arc::new(shared));
        let task = tokio::spawn({
            let shown = shown.clone();
            async move {
                let mut last_line = Instant::now();
                shown.draw(&mut last_line);
                while shown.0.stop.guard(tokio::time::sleep(DRAW_EVERY)).await.is_ok() {
                    shown.draw(&mut last_line);
                }
            }
        });
        *shown.0.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        shown
    }

    /// Stops drawing and clears the bars.
    pub async fn finish(&self) {
        self.0.stop.cancel(Cause::Requested("the batch is over".to_owned()));
        let task = self.0.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            let _ = task.await;
        }
        if let Some(bar) = &self.0.overall {
            bar.finish_and_clear();
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event.
    pub fn tell(&self, event: &Event<'_>) {
        let shared = &self.0;
        let name = |index: &usize| shared.names[*index].as_str();
        if shared.display.kind() == Kind::Json {
            self.tell_program(event);
        }
        let plain = matches!(shared.display.kind(), Kind::Plain | Kind::Bars);
        let say = |line: &str| if plain { shared.display.note(line) } else { shared.run.log(line) };
        match event {
            Event::Started { index, progress, tries, .. } => {
                let again = if *tries > 1 { format!(", try {tries}") } else { String::new() };
                let line = format!("started: {}, {}{again}", name(index), size(shared.bytes[*index]));
                // bars show that by themselves
                if shared.display.kind() == Kind::Plain {
                    shared.display.note(&line)
                } else {
                    shared.run.log(&line)
                }
                let bar = shared.display.bars().map(|bars: &MultiProgress| {
                    let bar = bars.add(ProgressBar::new(1));
                    if let Ok(style) = ProgressStyle::with_template("  {msg}") {
                        bar.set_style(style);
                    }
                    bar
                });
                let running = Running { progress: (*progress).clone(), bar, last: (Instant::now(), 0) };
                self.state().running.insert(*index, running);
            }
            Event::Note { index, line, warning } => {
                let line = format!("{}: {line}", name(index));
                if *warning { shared.display.warn(&line) } else { shared.run.log(&printable(&line)) }
            }
            Event::Later { index, error } => {
                self.over(*index, false, 0);
                say(&format!("later again: {}: {error}", name(index)));
            }
            Event::Ended { index, outcome, elapsed_s } => {
                let saved = match outcome {
                    Outcome::Done { report } => report.virtual_bytes.saturating_sub(report.image_bytes),
                    _ => 0,
                };
                self.over(*index, true, saved);
                if !outcome.is_good() {
                    self.state().failed += 1;
                }
                let what = match outcome {
                    Outcome::Done { report } => {
                        format!("{} as {}, {elapsed_s:.1} s", size(report.image_bytes), printable(&report.destination))
                    }
                    Outcome::Earlier { image } => printable(image),
                    other => printable(other.why().unwrap_or_default()),
                };
                let deleted = if shared.goes[*index] && matches!(outcome, Outcome::Done { .. } | Outcome::Earlier { .. }) {
                    "; source deleted"
                } else {
                    ""
                };
                say(&format!("{}: {}: {what}{deleted}", outcome.word(), name(index)));
            }
            Event::Told { line } => shared.display.note(line),
        }
    }

    fn over(&self, index: usize, for_good: bool, saved: u64) {
        let mut state = self.state();
        if let Some(running) = state.running.remove(&index)
            && let Some(bar) = running.bar
        {
            bar.finish_and_clear();
        }
        if for_good {
            state.ended += 1;
            state.ended_bytes += self.0.bytes[index];
            state.saved_bytes += saved;
        }
    }

    fn tell_program(&self, event: &Event<'_>) {
        let shared = &self.0;
        let value = match event {
            Event::Started { index, grant, tries, .. } => json!({
                "event": "started", "item": index, "name": shared.names[*index], "bytes": shared.bytes[*index], "try": tries,
                "memory_bytes": grant.memory_bytes, "connections": grant.connections, "workers": grant.workers,
            }),
            Event::Later { index, error } => {
                json!({ "event": "later", "item": index, "name": shared.names[*index], "error": error })
            }
            Event::Ended { index, outcome, elapsed_s } => {
                let mut value = json!({ "event": "ended", "item": index, "name": shared.names[*index], "elapsed_s": elapsed_s });
                value["outcome"] = json!(outcome.word());
                match outcome {
                    Outcome::Done { report } => {
                        value["image"] = json!(report.destination);
                        value["image_bytes"] = json!(report.image_bytes);
                    }
                    other => value["why"] = json!(other.why()),
                }
                value
            }
            Event::Note { .. } | Event::Told { .. } => return,
        };
        exit::say(&value.to_string());
    }

    /// Bytes that are dealt with, of all that is to be done: an image is done with when it is read, sent, and where asked for read back, and each of
    /// these counts alike.
    fn done_bytes(&self, state: &State) -> u64 {
        let share = |done: u64, all: u64, bytes: u64| {
            u64::try_from(u128::from(done.min(all)) * u128::from(bytes) / u128::from(all.max(1))).unwrap_or(bytes)
        };
        let running = state.running.iter().map(|(index, Running { progress, .. })| {
            let bytes = self.0.bytes[*index];
            let parts = [
                (progress.surveyed_bytes(), progress.virtual_bytes()),
                (progress.uploaded_bytes(), progress.image_bytes()),
                (progress.verified_bytes(), progress.virtual_bytes()),
            ];
            let counted = if self.0.reads_back[*index] { 3 } else { 2 };
            parts[..counted].iter().map(|(done, all)| share(*done, *all, bytes)).sum::<u64>()
                / u64::try_from(counted).unwrap_or(1)
        });
        (state.ended_bytes + running.sum::<u64>()).min(self.0.work_bytes)
    }

    fn draw(&self, last_line: &mut Instant) {
        // progress that nobody has read is not told once more: the next line says all that it does
        if stderr::is_behind() {
            return;
        }
        let shared = &self.0;
        let mut state = self.state();
        let done = self.done_bytes(&state);
        let told = |state: &State| {
            let failed = if state.failed > 0 { format!(", {} failed", state.failed) } else { String::new() };
            format!(
                "{} of {}{failed}, {} of {}, {} saved",
                state.ended.min(shared.work),
                shared.work,
                size(done),
                size(shared.work_bytes),
                size(state.saved_bytes)
            )
        };
        match shared.display.kind() {
            Kind::Bars => {
                if let Some(bar) = &shared.overall {
                    bar.set_position(done);
                    bar.set_message(told(&state));
                }
                for (index, running) in &mut state.running {
                    let line = format!("{} {}", short(&shared.names[*index]), line(&running.progress, &mut running.last));
                    if let Some(bar) = &running.bar {
                        bar.set_message(line);
                    }
                }
            }
            Kind::Plain if last_line.elapsed() >= LINE_EVERY => {
                *last_line = Instant::now();
                let text = told(&state);
                drop(state);
                shared.display.note(&text);
            }
            Kind::Json if last_line.elapsed() >= JSON_EVERY => {
                *last_line = Instant::now();
                let value = json!({
                    "event": "progress", "elapsed_s": shared.started.elapsed().as_secs_f64(), "items": shared.work, "ended": state.ended,
                    "failed": state.failed, "running": state.running.len(), "bytes": shared.work_bytes, "done_bytes": done,
                    "saved_bytes": state.saved_bytes,
                });
                drop(state);
                exit::say(&value.to_string());
            }
            _ => {}
        }
    }
}

/// What one is doing.
fn line(progress: &Progress, last: &mut (Instant, u64)) -> String {
    let percent = |done: u64, all: u64| done.saturating_mul(100).checked_div(all).unwrap_or(0).min(100);
    let moved = progress.fetched_bytes() + progress.sent_bytes();
    let millis = u64::try_from(last.0.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = moved.saturating_sub(last.1).saturating_mul(1000) / millis;
    if last.0.elapsed() > Duration::from_secs(2) {
        *last = (Instant::now(), moved);
    }
    let rate = format!("{}/s", size(rate));
    match progress.phase() {
        Phase::Preparing => "looking".to_owned(),
        Phase::Reading => format!("reading {:>3}%  {rate}", percent(progress.surveyed_bytes(), progress.virtual_bytes())),
        Phase::Uploading => format!("sending {:>3}%  {rate}", percent(progress.uploaded_bytes(), progress.image_bytes())),
        Phase::Finishing => "finishing".to_owned(),
        Phase::Verifying => format!("verifying {:>3}%", percent(progress.verified_bytes(), progress.virtual_bytes())),
    }
}
