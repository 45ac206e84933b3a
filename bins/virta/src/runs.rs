//! Runs: a record of each in the state folder, by which a live one is found again and what a dead one left is removed.
//!
//! `runs/ID.json` says what the run does and which images it made, `ID.log` is what it would show, and `ID.lock` is locked as long as it
//! lives: the kernel lets go of it however the run ends. An image's id is written down before the request that makes it leaves.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use serde::{Deserialize, Serialize};
use stages::{
    openstack::{Session, error::now_utc},
    run::{FoundServer, ThisRun},
    whole_file::write_whole,
};

/// Records of finished runs that are kept.
const KEPT_MAX: usize = 200;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It goes on, or was killed.
    Running,
    /// It ended with success.
    Done,
    /// It ended otherwise, and cleaned up.
    Failed,
    /// It was killed.
    Killed,
}

/// What is written down of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its name, and `virta_run` of the images it makes.
    pub run: String,
    /// The machine it runs on: a lock in a shared home says nothing of another's processes.
    pub host: String,
    /// The boot of that machine (`/proc/sys/kernel/random/boot_id`): what is deleted without asking is of this one.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// Its process.
    pub pid: u32,
    /// When it began, UTC.
    pub started_at: String,
    /// When it ended, UTC.
    pub finished_at: Option<String>,
    /// What it reads.
    pub source: String,
    /// What it makes.
    pub destination: String,
    /// The cloud's name in clouds.yaml, if it has one, of the images it makes.
    pub cloud: Option<String>,
    /// The project's id.
    pub project: Option<String>,
    /// Ids of images that it made or was about to make.
    pub images: Vec<String>,
    /// It was killed, and what it left half made is removed.
    #[serde(default)]
    pub cleaned: bool,
    /// A server that it has not brought back yet into the state that it was found in.
    #[serde(default)]
    pub server: Option<FoundServer>,
    /// How it stands.
    pub state: State,
    /// Its exit code.
    pub exit_code: Option<u8>,
    /// What it said at the end.
    pub message: Option<String>,
}

impl Record {
    /// Ids of images that it may have left unfinished.
    pub fn unfinished(&self) -> &[String] {
        if self.state == State::Done || self.cleaned { &[] } else { &self.images }
    }

    /// Is there anything of it to be removed or taken back?
    pub fn left_anything(&self) -> bool {
        !self.unfinished().is_empty() || self.server.is_some()
    }
}

struct Inner {
    folder: PathBuf,
    record: Record,
    log: Option<File>,
    _lock: File,
}

/// This run's record. Clones are the same; without a state folder it does nothing.
#[derive(Clone, Default)]
pub struct Run(Option<Arc<Mutex<Inner>>>);

/// The beginning of a run's id: enough for `virta status`.
pub fn short(run: &str) -> &str {
    run.get(..8).unwrap_or(run)
}

/// `$XDG_STATE_HOME/virta`, else `~/.local/state/virta`.
pub fn state_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
    Some(state.or_else(|| Some(set("HOME")?.join(".local/state")))?.join("virta"))
}

fn runs_folder() -> Option<PathBuf> {
    Some(state_folder()?.join("runs"))
}

fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Several may write at once: one that cleans up, and another.
fn write(folder: &Path, record: &Record) -> io::Result<()> {
    write_whole(&folder.join(format!("{}.json", record.run)), (serde_json::to_string_pretty(record)? + "\n").as_bytes(), true)
}

/// On a full disk: over the old record, whose place it has; else the old one goes, for it must not speak of what is not so any more.
fn write_over(folder: &Path, record: &Record) -> bool {
    let path = folder.join(format!("{}.json", record.run));
    let written = serde_json::to_string(record).is_ok_and(|text| {
        let file = OpenOptions::new().write(true).open(&path);
        file.is_ok_and(|mut file| {
            let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
            file.write_all(text.as_bytes()).and_then(|()| file.set_len(bytes)).and_then(|()| file.sync_data()).is_ok()
        })
    });
    if !written && record.server.is_none() {
        let _ = fs::remove_file(path);
    }
    written
}

impl Run {
    /// Begins a record. Where it cannot be kept, the run goes on without.
    pub fn begin(source: &str, destination: &str) -> Self {
        Self(
            runs_folder()
                .and_then(|folder| Self::begin_in(folder, source, destination).ok())
                .map(|inner| Arc::new(Mutex::new(inner))),
        )
    }

    fn begin_in(folder: PathBuf, source: &str, destination: &str) -> io::Result<Inner> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let record = Record {
            run: uuid::Uuid::new_v4().hyphenated().to_string(),
            host: host(),
            boot_id: boot_id(),
            pid: std::process::id(),
            started_at: now_utc(),
            finished_at: None,
            source: source.to_owned(),
            destination: destination.to_owned(),
            cloud: None,
            project: None,
            images: Vec::new(),
            cleaned: false,
            server: None,
            state: State::Running,
            exit_code: None,
            message: None,
        };
        // locked before the record exists: nobody can take a run that begins for a dead one
        let lock = private(&folder.join(format!("{}.lock", record.run)))?;
        lock.lock()?;
        write(&folder, &record)?;
        let log = private(&folder.join(format!("{}.log", record.run))).ok();
        forget_old(&folder);
        Ok(Inner { folder, record, log, _lock: lock })
    }

    /// Changes the record; `false`: that could not be written.
    fn change(&self, change: impl FnOnce(&mut Record)) -> bool {
        let Some(inner) = &self.0 else { return false };
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut inner.record);
        write(&inner.folder, &inner.record).is_ok() || write_over(&inner.folder, &inner.record)
    }

    /// The name that its record has, if there is one.
    pub fn id(&self) -> Option<String> {
        let inner = self.0.as_ref()?;
        Some(inner.lock().unwrap_or_else(PoisonError::into_inner).record.run.clone())
    }

    /// The name that its images carry. Without a record it has one, too: each of its tries has to know what the one before made.
    pub fn name(&self) -> String {
        static WITHOUT_RECORD: OnceLock<String> = OnceLock::new();
        self.id().unwrap_or_else(|| WITHOUT_RECORD.get_or_init(|| uuid::Uuid::new_v4().hyphenated().to_string()).clone())
    }

    /// The same, as conversions take it.
    pub fn this(&self) -> ThisRun {
        ThisRun::named(&self.name()).of_task(task())
    }

    /// Where it makes images.
    pub fn in_cloud(&self, session: &Session) {
        let who = session.whoami();
        self.change(|record| {
            record.cloud = Some(who.cloud.clone());
            record.project.clone_from(&who.project_id);
        });
    }

    /// It is about to make this image.
    pub fn making(&self, image_id: &str) {
        self.change(|record| {
            if record.images.iter().all(|known| known != image_id) {
                record.images.push(image_id.to_owned());
            }
        });
    }

    /// It is about to change this server, or has brought it back.
    pub fn holding(&self, server: Option<FoundServer>) -> bool {
        self.change(|record| record.server = server)
    }

    /// A line that it shows.
    pub fn log(&self, line: &str) {
        let Some(inner) = &self.0 else { return };
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = inner.log.as_mut() {
            let _ = writeln!(log, "{} {line}", now_utc());
        }
    }

    /// It is over, and nothing half made is left of it.
    pub fn end(&self, exit_code: u8, message: &str) {
        self.end_with(exit_code, message, false);
    }

    /// It is over; `left`: an image may be left that could not be removed.
    pub fn end_with(&self, exit_code: u8, message: &str, left: bool) {
        self.log(message);
        self.change(|record| {
            if exit_code != 0 && !left {
                record.images.clear();
            }
            record.finished_at = Some(now_utc());
            record.state = if exit_code == 0 { State::Done } else { State::Failed };
            record.exit_code = Some(exit_code);
            record.message = Some(message.to_owned());
        });
    }
}

/// A record found in the state folder.
pub struct RecordedRun {
    /// What it says; a run that is dead is [`State::Killed`].
    pub record: Record,
    folder: PathBuf,
}

impl RecordedRun {
    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.record.run))
    }

    /// Changes the record as it is now. Several may clean up at once: one after the other.
    fn change(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        // where nothing can be locked, nothing is written at the same time but by chance
        let turn = private(&self.folder.join(format!("{}.turn", self.record.run)))?;
        let _ = turn.lock();
        let mut record = self.again().map_or_else(|| self.record.clone(), |found| found.record);
        change(&mut record);
        write(&self.folder, &record)
    }

    /// What a dead run left is removed, and taken back: it holds nothing any more.
    pub fn cleaned(&self) -> io::Result<()> {
        self.change(|record| {
            record.server = None;
            record.cleaned = true;
        })
    }

    /// The server that a dead run held is as it was found.
    pub fn restored(&self) -> io::Result<()> {
        self.change(|record| record.server = None)
    }

    /// Is it of this machine, and over?
    fn is_dead_here(&self) -> bool {
        self.record.host == host() && self.record.state != State::Running
    }

    /// Reads the record again.
    pub fn again(&self) -> Option<Self> {
        read(&self.folder, &self.record.run)
    }
}

/// Does a living process hold this run's lock?
fn is_live(folder: &Path, run: &str) -> bool {
    // some network file systems lock what is shared only where it may be read
    match OpenOptions::new().read(true).write(true).open(folder.join(format!("{run}.lock"))) {
        // shared: two that ask at once are not in each other's way
        Ok(lock) => match lock.try_lock_shared() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            // a file system without locks: nobody can tell, and nothing of it is touched
            Err(TryLockError::Error(_)) => true,
        },
        // nor can anybody where it is not there, or cannot be opened: what sweeps old files away took the lock of a run that may live
        Err(_) => true,
    }
}

/// A record as it stands. A named pipe is none, nor is one that says it is another run's.
fn record(folder: &Path, run: &str) -> Option<Record> {
    let path = folder.join(format!("{run}.json"));
    if !fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (record.run == run).then_some(record)
}

fn read(folder: &Path, run: &str) -> Option<RecordedRun> {
    let mut record = record(folder, run)?;
    // of another machine's run nobody here can tell whether it lives
    if record.state == State::Running && record.host == host() && !is_live(folder, run) {
        // it may have ended between the two looks
        record = self::record(folder, run)?;
        if record.state == State::Running {
            record.state = State::Killed;
        }
    }
    Some(RecordedRun { record, folder: folder.to_owned() })
}

/// All runs of this user on this machine, the latest last.
pub fn all() -> Vec<RecordedRun> {
    runs_folder().map(|folder| records(&folder)).unwrap_or_default()
}

fn records(folder: &Path) -> Vec<RecordedRun> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let runs = names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned));
    let mut found: Vec<RecordedRun> = runs.filter_map(|run| read(folder, &run)).collect();
    found.sort_by(|a, b| (&a.record.started_at, &a.record.run).cmp(&(&b.record.started_at, &b.record.run)));
    found
}

/// Runs of this machine that are over and may have left images that are of no use, or a server in another state.
pub fn dead() -> Vec<RecordedRun> {
    all().into_iter().filter(|found| found.is_dead_here() && found.record.left_anything()).collect()
}

/// What is written down here of a run.
fn found(run: &str) -> Option<RecordedRun> {
    let known = uuid::Uuid::parse_str(run).is_ok(); // a name out of an image is no path before it is looked at
    read(&runs_folder().filter(|_| known)?, run)
}

/// Is this a run of this machine that is over? `false` for one that lives, and for one of which nothing is known here.
pub fn is_dead(run: &str) -> bool {
    found(run).is_some_and(|found| found.is_dead_here())
}

/// The process of a run that lives on this machine.
pub fn process_of(run: &str) -> Option<u32> {
    found(run).filter(|found| found.record.host == host() && found.record.state == State::Running).map(|found| found.record.pid)
}

/// The same as [`is_dead`], of this boot of the machine, and did it make this image? What such a run has sent is answered, or lost.
pub fn died_here(run: &str, image_id: &str) -> bool {
    let of_this_boot = |record: &Record| record.boot_id.is_some() && record.boot_id == boot_id();
    found(run).is_some_and(|found| {
        found.is_dead_here() && of_this_boot(&found.record) && found.record.images.iter().any(|id| id == image_id)
    })
}

/// Ids of images that runs of this machine from `source` to `destination` made, or worked on, in the project of `session`, the latest first.
pub fn made_by(source: &str, destination: &str, session: &Session) -> Vec<String> {
    let same = |found: &RecordedRun| {
        let record = &found.record;
        record.source == source && record.destination == destination && record.project == session.whoami().project_id
    };
    let runs = all().into_iter().rev().filter(same);
    runs.flat_map(|found| found.record.images).collect()
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The engine's task that this program is a try at, if it is one: job and task, out of its environment.
fn task() -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let named = |engine: &str, job: &str, task: &str| Some(format!("{engine}-{}-{}", set(job)?, set(task)?));
    named("hq", "HQ_JOB_ID", "HQ_TASK_ID").or_else(|| named("slurm", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
}

fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

/// Forgets the oldest of many runs; never one that lives, or whose images are still to be removed.
fn forget_old(folder: &Path) {
    let over: Vec<RecordedRun> = {
        let mut all = all();
        let keep = all.len().saturating_sub(KEPT_MAX);
        all.truncate(keep);
        all
    };
    for found in over {
        let record = &found.record;
        if record.state == State::Running || record.left_anything() {
            continue;
        }
        // and what a kill left of a record that was being written
        let of_run = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            name.to_str().and_then(|name| name.strip_prefix(&record.run)).is_some_and(|rest| rest.starts_with('.'))
        };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(of_run) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_has_made_is_its_leftover_until_it_is_done_or_cleaned() {
        let folder = tempfile::tempdir().unwrap();
        let begin = || Run(Some(Arc::new(Mutex::new(Run::begin_in(folder.path().to_owned(), "a", "b").unwrap()))));
        let record = |run: &Run| read(folder.path(), &run.id().unwrap()).unwrap().record;
        let (done, failed, left) = (begin(), begin(), begin());
        for run in [&done, &failed, &left] {
            run.making("one");
            run.making("one");
            assert_eq!(record(run).unfinished(), ["one"]);
        }
        done.end(0, "done");
        failed.end(1, "failed, and cleaned up");
        left.end_with(1, "failed, and could not clean up", true);
        let unfinished = [&done, &failed, &left].map(|run| record(run).unfinished().len());
        assert_eq!(unfinished, [0, 0, 1]);
        assert_eq!(record(&left).boot_id, boot_id());
        read(folder.path(), &left.id().unwrap()).unwrap().cleaned().unwrap();
        assert!(!record(&left).left_anything());
    }

    #[test]
    fn records_of_earlier_releases_are_read() {
        let old = r#"{ "run": "r", "host": "h", "pid": 1, "started_at": "x", "finished_at": null, "source": "a", "destination": "b", "cloud": null,
            "project": null, "images": ["i"], "deleting": ["i"], "unanswered": [], "doubted": ["i"], "left": ["i"], "state": "killed", "exit_code": null,
            "message": null }"#;
        let record: Record = serde_json::from_str(old).unwrap();
        assert_eq!((record.unfinished(), &record.boot_id), (["i".to_owned()].as_slice(), &None));
    }
}
