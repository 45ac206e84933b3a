//! Runs: a record of each in the state folder, by which a live one is found again and what a dead one left is removed.
//!
//! `runs/ID.json` says what the run does and which images it made, `ID.log` is what it would show, and `ID.lock` is locked as long as it
//! lives: the kernel lets go of it however the run ends. An image's id is written down before the request that makes it leaves.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use serde::{Deserialize, Serialize};
use stages::{
    convert::FoundServer,
    openstack::{Session, error::now_utc},
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
    /// Those of them that it, or whoever cleaned up after it, was about to delete; once for each request.
    #[serde(default)]
    pub deleting: Vec<String>,
    /// Those of them whose deletion may be on its way, for all that is known; once for each request.
    #[serde(default)]
    pub unanswered: Vec<String>,
    /// Those of them whose claim was over for a while: another run's DELETE may be on its way.
    #[serde(default)]
    pub doubted: Vec<String>,
    /// Those of them that are of no use, and could not be deleted.
    #[serde(default)]
    pub left: Vec<String>,
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
    /// Ids of images that may have to be removed: what a run that did not come to its end made, and what any could not delete.
    pub fn to_remove(&self) -> Vec<&String> {
        let made: &[String] = if self.state == State::Done || self.cleaned { &[] } else { &self.images };
        made.iter().chain(self.left.iter().filter(|left| !made.contains(left))).collect()
    }

    fn deletes(&mut self, image_id: &str) {
        // one note for each request: the answer to one says nothing of another
        self.deleting.push(image_id.to_owned());
        self.unanswered.push(image_id.to_owned());
    }

    fn settles(&mut self, image_id: &str) {
        remove_one(&mut self.unanswered, image_id);
    }

    fn does_not_delete(&mut self, image_id: &str) {
        self.settles(image_id);
        remove_one(&mut self.deleting, image_id);
    }

    /// Is there anything of it to be removed or taken back?
    pub fn left_anything(&self) -> bool {
        !self.to_remove().is_empty() || self.server.is_some()
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

/// Writes a record whole: a reader sees the old one or the new one.
fn write(folder: &Path, record: &Record) -> io::Result<()> {
    // whoever cleans up writes, too, and there may be two of them
    let path = folder.join(format!("{}.json.{}.new", record.run, std::process::id()));
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path)?;
    file.write_all(serde_json::to_string_pretty(record)?.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_data()?;
    fs::rename(&path, folder.join(format!("{}.json", record.run)))
}

/// On a full disk: over the old record, whose place it has; else the old one goes, for it must not speak of what is not so any more.
fn write_over(folder: &Path, record: &Record) -> bool {
    let path = folder.join(format!("{}.json", record.run));
    let _ = fs::remove_file(folder.join(format!("{}.json.{}.new", record.run, std::process::id())));
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
            pid: std::process::id(),
            started_at: now_utc(),
            finished_at: None,
            source: source.to_owned(),
            destination: destination.to_owned(),
            cloud: None,
            project: None,
            images: Vec::new(),
            deleting: Vec::new(),
            unanswered: Vec::new(),
            doubted: Vec::new(),
            left: Vec::new(),
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
            // an id that an earlier try gave up is made anew: it may become an image that is wanted
            record.left.retain(|left| left != image_id);
            push_once(&mut record.images, image_id);
        });
    }

    /// It is about to delete this image.
    pub fn deleting(&self, image_id: &str) {
        for worry in [Worry::Deleting, Worry::Unanswered] {
            *remembered().entry((worry, self.name(), image_id.to_owned())).or_default() += 1;
        }
        self.change(|record| record.deletes(image_id));
    }

    /// That was answered.
    pub fn settled(&self, image_id: &str) {
        self.forget(Worry::Unanswered, image_id);
        self.change(|record| record.settles(image_id));
    }

    /// That was not asked for.
    pub fn not_deleting(&self, image_id: &str) {
        self.forget(Worry::Unanswered, image_id);
        self.forget(Worry::Deleting, image_id);
        self.change(|record| record.does_not_delete(image_id));
    }

    fn forget(&self, worry: Worry, image_id: &str) {
        if let Some(times) = remembered().get_mut(&(worry, self.name(), image_id.to_owned())) {
            *times = times.saturating_sub(1);
        }
    }

    /// Another run's DELETE of this image may be on its way.
    pub fn doubted(&self, image_id: &str) {
        *remembered().entry((Worry::Doubted, self.name(), image_id.to_owned())).or_default() += 1;
        self.change(|record| push_once(&mut record.doubted, image_id));
    }

    /// This image of its own is of no use, and could not be deleted.
    pub fn left(&self, image_id: &str) {
        self.change(|record| push_once(&mut record.left, image_id));
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
pub struct Found {
    /// What it says; a run that is dead is [`State::Killed`].
    pub record: Record,
    folder: PathBuf,
}

impl Found {
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
            record.left.clear();
            record.server = None;
            record.cleaned = true;
        })
    }

    /// An image that a dead run left is about to be deleted.
    pub fn deleting(&self, image_id: &str) -> io::Result<()> {
        self.change(|record| record.deletes(image_id))
    }

    /// It was not asked for.
    pub fn not_deleting(&self, image_id: &str) -> io::Result<()> {
        self.change(|record| record.does_not_delete(image_id))
    }

    /// It is on its way no longer: it was answered.
    pub fn settled(&self, image_id: &str) -> io::Result<()> {
        self.change(|record| record.settles(image_id))
    }

    /// The server that a dead run held is as it was found.
    pub fn restored(&self) -> io::Result<()> {
        self.change(|record| record.server = None)
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
        // nor can anybody where it is there and cannot be opened
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

fn read(folder: &Path, run: &str) -> Option<Found> {
    let mut record: Record = serde_json::from_slice(&fs::read(folder.join(format!("{run}.json"))).ok()?).ok()?;
    // of another machine's run nobody here can tell whether it lives
    if record.state == State::Running && record.host == host() && !is_live(folder, run) {
        // it may have ended between the two looks
        record = serde_json::from_slice(&fs::read(folder.join(format!("{run}.json"))).ok()?).ok()?;
        if record.state == State::Running {
            record.state = State::Killed;
        }
    }
    Some(Found { record, folder: folder.to_owned() })
}

/// All runs of this user on this machine, the latest last.
pub fn all() -> Vec<Found> {
    runs_folder().map(|folder| records(&folder)).unwrap_or_default()
}

fn records(folder: &Path) -> Vec<Found> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let runs = names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned));
    let mut found: Vec<Found> = runs.filter_map(|run| read(folder, &run)).collect();
    found.sort_by(|a, b| (&a.record.started_at, &a.record.run).cmp(&(&b.record.started_at, &b.record.run)));
    found
}

/// Runs of this machine that are over and may have left images that are of no use, or a server in another state.
pub fn dead() -> Vec<Found> {
    let over = |found: &Found| found.record.state != State::Running && found.record.host == host();
    all().into_iter().filter(|found| over(found) && found.record.left_anything()).collect()
}

/// What is written down here of a run.
fn found(run: &str) -> Option<Found> {
    let known = uuid::Uuid::parse_str(run).is_ok(); // a name out of an image is no path before it is looked at
    read(&runs_folder().filter(|_| known)?, run)
}

/// Is this a run of this machine that is over? `false` for one that lives, and for one of which nothing is known here.
pub fn is_dead(run: &str) -> bool {
    found(run).is_some_and(|found| found.record.host == host() && found.record.state != State::Running)
}

/// Ids of images that runs of this machine from `source` to `destination` made, or worked on, in the project of `session`, the latest first.
pub fn made_by(source: &str, destination: &str, session: &Session) -> Vec<String> {
    let same = |found: &Found| {
        let record = &found.record;
        record.source == source && record.destination == destination && record.project == session.whoami().project_id
    };
    let runs = all().into_iter().rev().filter(same);
    runs.flat_map(|found| found.record.images).collect()
}

/// Why an image may go yet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worry {
    /// [`Run::deleting`]
    Deleting,
    /// The same, until it is [`Run::settled`].
    Unanswered,
    /// [`Run::doubted`]
    Doubted,
}

/// What runs of this process wrote down of an image, and how often: it is known where it could not be written down, too.
fn remembered() -> std::sync::MutexGuard<'static, BTreeMap<(Worry, String, String), u32>> {
    static REMEMBERED: Mutex<BTreeMap<(Worry, String, String), u32>> = Mutex::new(BTreeMap::new());
    REMEMBERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Did this run write that down, one of this process or the one of this record?
fn was(worry: Worry, run: &str, image_id: &str, record: Option<&Record>) -> bool {
    let written = |record: &Record| match worry {
        Worry::Deleting => record.deleting.iter().any(|id| id == image_id),
        Worry::Unanswered => record.unanswered.iter().any(|id| id == image_id),
        Worry::Doubted => record.doubted.iter().any(|id| id == image_id),
    };
    remembered().get(&(worry, run.to_owned(), image_id.to_owned())).is_some_and(|times| *times > 0) || record.is_some_and(written)
}

fn record_of(run: &str) -> Option<Record> {
    found(run).map(|found| found.record)
}

/// Was this run, one of this process or one of this machine that is over, about to delete that image? [`Run::deleting`].
pub fn was_deleting(run: &str, image_id: &str) -> bool {
    was(Worry::Deleting, run, image_id, record_of(run).as_ref())
}

/// May a DELETE of an image be on its way, as far as this machine's runs tell: did this run doubt it ([`Run::doubted`]), or was any about to delete
/// it, or whoever cleaned up after one ([`Run::deleting`]), without an answer?
pub fn was_doubted(run: &str, image_id: &str) -> bool {
    was(Worry::Doubted, run, image_id, record_of(run).as_ref())
        || remembered().iter().any(|((worry, _, id), times)| *worry == Worry::Unanswered && id == image_id && *times > 0)
        || runs_folder().is_some_and(|folder| is_any_unanswered(&folder, image_id))
}

/// Was any run of this machine about to delete that image, and had no answer? A record that cannot be read may say so.
fn is_any_unanswered(folder: &Path, image_id: &str) -> bool {
    let not_there = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return !not_there(&error),
    };
    let says_so = |entry: io::Result<fs::DirEntry>| {
        let Ok(entry) = entry else { return true };
        if entry.path().extension().is_none_or(|extension| extension != "json") {
            return false;
        }
        match fs::read(entry.path()) {
            Ok(text) => {
                serde_json::from_slice(&text).map_or(true, |record: Record| record.unanswered.iter().any(|id| id == image_id))
            }
            Err(error) => !not_there(&error),
        }
    };
    entries.into_iter().any(says_so)
}

fn remove_one(ids: &mut Vec<String>, id: &str) {
    if let Some(at) = ids.iter().position(|known| known == id) {
        ids.remove(at);
    }
}

fn push_once(ids: &mut Vec<String>, id: &str) {
    if ids.iter().all(|known| known != id) {
        ids.push(id.to_owned());
    }
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Forgets the oldest of many runs; never one that lives, or whose images are still to be removed.
fn forget_old(folder: &Path) {
    let over: Vec<Found> = {
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
    fn what_is_made_anew_is_not_to_be_removed_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let run = Run(Some(Arc::new(Mutex::new(Run::begin_in(folder.path().to_owned(), "a", "b").unwrap()))));
        let id = run.id().unwrap();
        run.making("one");
        run.left("one");
        run.left("two");
        run.making("one");
        run.end(0, "done");
        let record = read(folder.path(), &id).unwrap().record;
        assert_eq!((record.to_remove(), &record.images), (vec![&"two".to_owned()], &vec!["one".to_owned()]));
    }

    #[test]
    fn whoever_was_about_to_delete_an_image_is_asked_about() {
        let folder = tempfile::tempdir().unwrap();
        let begin = || Run(Some(Arc::new(Mutex::new(Run::begin_in(folder.path().to_owned(), "a", "b").unwrap()))));
        let (maker, cleaner) = (begin(), begin());
        let asked = |image: &str| is_any_unanswered(folder.path(), image);
        assert!(!asked("one"));
        // one that takes the image over
        cleaner.deleting("one");
        // and one that cleans up after a dead run, into whose record it writes
        read(folder.path(), &maker.id().unwrap()).unwrap().deleting("two").unwrap();
        assert!(asked("one") && asked("two") && !asked("three"));
        // what was answered is not on its way; that it was asked for is remembered all the same
        cleaner.deleting("one");
        cleaner.settled("one");
        assert!(asked("one"), "one of two was answered");
        cleaner.settled("one");
        read(folder.path(), &maker.id().unwrap()).unwrap().settled("two").unwrap();
        assert!(!asked("one") && !asked("two"));
        assert_eq!(read(folder.path(), &cleaner.id().unwrap()).unwrap().record.deleting, ["one", "one"]);
        // what was not asked for after all is not even remembered
        cleaner.deleting("four");
        cleaner.not_deleting("four");
        let record = read(folder.path(), &cleaner.id().unwrap()).unwrap().record;
        assert!(!asked("four") && !was(Worry::Deleting, &record.run, "four", Some(&record)));
        fs::write(folder.path().join("torn.json"), "{").unwrap();
        assert!(asked("one"), "nobody can tell what it said");
    }

    #[test]
    fn two_that_clean_up_at_once_lose_nothing_of_what_the_other_wrote_down() {
        let folder = tempfile::tempdir().unwrap();
        let run = Run(Some(Arc::new(Mutex::new(Run::begin_in(folder.path().to_owned(), "a", "b").unwrap()))));
        let id = run.id().unwrap();
        drop(run);
        std::thread::scope(|scope| {
            for cleaner in 0..4 {
                let (id, folder) = (&id, folder.path());
                scope.spawn(move || {
                    for image in 0..25 {
                        read(folder, id).unwrap().deleting(&format!("{cleaner}-{image}")).unwrap();
                    }
                });
            }
        });
        assert_eq!(read(folder.path(), &id).unwrap().record.deleting.len(), 100);
    }
}
