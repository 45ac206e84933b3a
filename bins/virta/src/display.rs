//! Progress for people and programs: bars on a terminal, lines in a log, JSON lines on request. All on stderr.

use std::{
    fmt,
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use engine::{CancelToken, Cause};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use stages::{
    progress::{Phase, Progress},
    reporter::Reporter,
    run::{FoundServer, RunRecord, ThisRun},
    text::{printable, size},
};

use crate::{
    exit,
    flags::ProgressChoice,
    runs::{self, Run},
    stderr,
};

/// How often bars are drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);
/// How often a line is written to a log.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// How often a JSON line is written.
const JSON_EVERY: Duration = Duration::from_secs(1);

/// How a run is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bars,
    Plain,
    Json,
    None,
}

/// A server that was changed and is not brought back yet.
pub type Held = Arc<Mutex<Option<FoundServer>>>;

/// Shows a conversion. Dropping it clears the bars.
#[derive(Clone)]
pub struct Display {
    kind: Kind,
    bars: MultiProgress,
    warnings: Arc<Mutex<Vec<String>>>,
    held: Held,
    /// Wakes the drawing task, so that a run that is over ends at once.
    stop: CancelToken,
    run: Run,
    task: Arc<Mutex<Option<tokio::task::JoinHandle<()>>>>,
}

impl Display {
    /// Starts to show `progress`; `run`'s log gets the lines of a plain display, whatever is shown.
    pub fn start(choice: ProgressChoice, progress: &Progress, run: Run) -> Self {
        let kind = match choice {
            ProgressChoice::Auto if std::io::stderr().is_terminal() => Kind::Bars,
            ProgressChoice::Auto | ProgressChoice::Plain => Kind::Plain,
            ProgressChoice::Json => Kind::Json,
            ProgressChoice::None => Kind::None,
        };
        let bars = match kind {
            Kind::Bars => MultiProgress::with_draw_target(stderr::draw_target()),
            _ => MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
        };
        let stop = CancelToken::new();
        let task = {
            let (progress, stop, bars, run) = (progress.clone(), stop.clone(), bars.clone(), run.clone());
            tokio::spawn(async move {
                let mut drawing = Drawing::new(kind, &bars, run);
                drawing.draw(&progress);
                while stop.guard(tokio::time::sleep(DRAW_EVERY)).await.is_ok() {
                    drawing.draw(&progress);
                }
                drawing.finish();
            })
        };
        Self { kind, bars, warnings: Arc::default(), held: Held::default(), stop, run, task: Arc::new(Mutex::new(Some(task))) }
    }

    /// Stops drawing and clears the bars.
    pub async fn finish(&self) {
        self.stop.cancel(Cause::Requested("the run is over".to_owned()));
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            let _ = task.await;
        }
    }

    /// The server that is not in the state that it was found in, for whoever stops the process.
    pub fn held(&self) -> Held {
        Arc::clone(&self.held)
    }

    /// How it is shown.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The bars, where there are any, for whoever has more of them.
    pub fn bars(&self) -> Option<&MultiProgress> {
        (self.kind == Kind::Bars).then_some(&self.bars)
    }

    /// This run, as conversions and snapshots take it.
    pub fn this_run(&self) -> ThisRun {
        self.run.this().recorded(Arc::new(Kept { run: self.run.clone(), held: self.held() }))
    }

    /// Warnings so far.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Reporter for Display {
    fn note(&self, line: &str) {
        let line = printable(line);
        self.run.log(&line);
        match self.kind {
            Kind::Bars => {
                // `println` of the bars fills a line with spaces, which are there when it is copied
                self.bars.suspend(|| exit::say(&line));
            }
            Kind::Plain => exit::say(&line),
            Kind::Json => exit::say(&serde_json::json!({ "event": "note", "text": line }).to_string()),
            Kind::None => {}
        }
    }

    fn warn(&self, line: &str) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        self.note(&format!("warning: {line}"));
        if self.kind == Kind::None {
            exit::say(&format!("warning: {}", printable(line))); // a warning is never swallowed
        }
    }
}

/// The run's record, and what an interrupt has to know.
struct Kept {
    run: Run,
    held: Held,
}

impl RunRecord for Kept {
    fn making(&self, image_id: &str) {
        self.run.making(image_id);
    }

    fn holding(&self, server: Option<&FoundServer>) -> bool {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = server.cloned();
        self.run.holding(server.cloned())
    }

    fn is_dead(&self, run: &str) -> bool {
        runs::is_dead(run)
    }
}

/// What a bar is made of: blocks where the terminal knows them.
pub fn bar_characters() -> &'static str {
    let unicode = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .is_some_and(|value| value.to_ascii_lowercase().contains("utf"));
    if unicode { "█▉▊▋▌▍▎▏ " } else { "#> " }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "for people")]
const fn whole(rate: f64) -> u64 {
    rate.max(0.0) as u64
}

struct Drawing {
    kind: Kind,
    read: ProgressBar,
    hash: ProgressBar,
    upload: ProgressBar,
    verify: ProgressBar,
    phase: Option<Phase>,
    last_line: Instant,
    /// The log's last line.
    last_logged: Instant,
    run: Run,
    /// When the phase began.
    started: Instant,
}

impl Drawing {
    fn new(kind: Kind, bars: &MultiProgress, run: Run) -> Self {
        let bar = |name: &str| {
            let template =
                format!("{name:<9} {{bar:20}} {{percent:>3}}%  {{done}} of {{all}}  {{speed}}  ETA {{eta}}  {{wide_msg}}");
            let bar = if kind == Kind::Bars { bars.add(ProgressBar::hidden()) } else { ProgressBar::hidden() };
            if let Ok(style) = ProgressStyle::with_template(&template) {
                let style = style
                    .with_key("done", |state: &ProgressState, out: &mut dyn fmt::Write| _ = out.write_str(&size(state.pos())))
                    .with_key("all", |state: &ProgressState, out: &mut dyn fmt::Write| {
                        _ = out.write_str(&size(state.len().unwrap_or(0)));
                    })
                    .with_key("speed", |state: &ProgressState, out: &mut dyn fmt::Write| {
                        _ = write!(out, "{}/s", size(whole(state.per_sec())));
                    });
                bar.set_style(style.progress_chars(bar_characters()));
            }
            bar
        };
        let (read, hash, upload, verify) = (bar("reading"), bar("checking"), bar("uploading"), bar("verifying"));
        let now = Instant::now();
        Self { kind, read, hash, upload, verify, phase: None, last_line: now, last_logged: now, run, started: now }
    }

    fn draw(&mut self, progress: &Progress) {
        let phase = progress.phase();
        let changed = self.phase != Some(phase);
        if changed {
            self.started = Instant::now();
        }
        self.phase = Some(phase);
        if changed {
            self.last_logged = Instant::now();
        } else if self.last_logged.elapsed() >= LINE_EVERY {
            self.last_logged = Instant::now();
            if let Some(line) = plain_line(progress, phase, self.started.elapsed()) {
                self.run.log(&line);
            }
        }
        // progress that nobody has read is not told once more: the next line says all that it does
        let behind = stderr::is_behind();
        match self.kind {
            Kind::Bars if !behind => self.draw_bars(progress, phase),
            Kind::Plain if changed => self.last_line = Instant::now(), // nothing worth a line yet
            Kind::Plain if !behind && self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                if let Some(line) = plain_line(progress, phase, self.started.elapsed()) {
                    exit::say(&line);
                }
            }
            Kind::Json if changed || (!behind && self.last_line.elapsed() >= JSON_EVERY) => {
                self.last_line = Instant::now();
                exit::say(&json_line(progress, phase, self.started.elapsed()));
            }
            _ => {}
        }
    }

    fn draw_bars(&self, progress: &Progress, phase: Phase) {
        let show = |bar: &ProgressBar, total: u64, done: u64| {
            if total > 0 {
                let begins = bar.length().is_none();
                bar.set_length(total);
                if begins {
                    bar.reset(); // rate and ETA count from now, not from the program's start
                } else {
                    bar.set_position(done.min(total));
                }
            }
        };
        let surveyed = progress.surveyed_bytes();
        if phase != Phase::Preparing {
            show(&self.read, progress.virtual_bytes(), surveyed);
            if progress.virtual_bytes() > 0 {
                self.read.set_message(format!("{}% zeros", percent(progress.zero_bytes(), surveyed)));
            }
        }
        let hash_shown = progress.hash_expected() > 0 && phase != Phase::Preparing;
        if hash_shown {
            show(&self.hash, progress.hash_expected(), progress.hashed_bytes());
            self.hash.set_message("source hash");
        }
        show(&self.upload, progress.image_bytes(), progress.uploaded_bytes());
        if phase == Phase::Verifying {
            show(&self.verify, progress.virtual_bytes(), progress.verified_bytes());
        }
    }

    fn finish(&self) {
        for bar in [&self.read, &self.hash, &self.upload, &self.verify] {
            bar.finish_and_clear();
        }
    }
}

fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 { 0 } else { u64::try_from(u128::from(part) * 100 / u128::from(whole)).unwrap_or(100) }
}

/// A line for a log.
fn plain_line(progress: &Progress, phase: Phase, elapsed: Duration) -> Option<String> {
    let total = progress.virtual_bytes();
    let read = || {
        let surveyed = progress.surveyed_bytes();
        let rate = rate(surveyed, elapsed);
        if total == 0 {
            return format!("read {}, {rate}, {}% zeros", size(surveyed), percent(progress.zero_bytes(), surveyed));
        }
        format!(
            "{}% read: {} of {}, {rate}, {}% zeros",
            percent(surveyed, total),
            size(surveyed),
            size(total),
            percent(progress.zero_bytes(), surveyed)
        )
    };
    let hash = || match progress.hash_expected() {
        0 => String::new(),
        expected => format!("; source hash {}%", percent(progress.hashed_bytes(), expected)),
    };
    match phase {
        Phase::Preparing => None,
        Phase::Reading => Some(format!("{}{}", read(), hash())),
        Phase::Uploading => Some(format!(
            "{}% uploaded: {} of {}{}",
            percent(progress.uploaded_bytes(), progress.image_bytes()),
            size(progress.uploaded_bytes()),
            size(progress.image_bytes()),
            hash()
        )),
        Phase::Finishing => Some(format!("all sent, finishing{}", hash())),
        Phase::Verifying => Some(format!("{}% verified", percent(progress.verified_bytes(), total))),
    }
}

fn rate(bytes: u64, elapsed: Duration) -> String {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    format!("{}/s", size(bytes.saturating_mul(1000) / millis))
}

fn json_line(progress: &Progress, phase: Phase, elapsed: Duration) -> String {
    serde_json::json!({
        "event": "progress",
        "phase": format!("{phase:?}").to_lowercase(),
        "elapsed_s": elapsed.as_secs_f64(),
        "virtual_bytes": progress.virtual_bytes(),
        "surveyed_bytes": progress.surveyed_bytes(),
        "zero_bytes": progress.zero_bytes(),
        "data_bytes": progress.data_bytes(),
        "fetched_bytes": progress.fetched_bytes(),
        "hashed_bytes": progress.hashed_bytes(),
        "image_bytes": progress.image_bytes(),
        "uploaded_bytes": progress.uploaded_bytes(),
        "verified_bytes": progress.verified_bytes(),
        "stored_bytes": progress.stored_bytes(),
        "reread_bytes": progress.reread_bytes(),
        "scratch_bytes": progress.scratch_bytes(),
        "retries": progress.retries(),
    })
    .to_string()
}
