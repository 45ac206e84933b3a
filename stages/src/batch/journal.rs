//! What happened, line by line: for people, and for the run that comes after a kill.
//!
//! Each line is a JSON object with `at`, `run` and `event`, written whole and flushed before the batch goes on. Nothing is ever changed in
//! it. Several runs may write to one journal at once. Its last line may be half written by a run that was killed: such a line is passed
//! over, and a line break put before the next.
//!
//! What it is for, Glance not knowing it: which image a name meant when the batch began, and what became of images that are gone now.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::openstack::error::now_utc;

/// A journal that is larger is not read: nothing writes so much.
const BYTES_MAX: u64 = 256 << 20;

/// How long is waited for others that write to it.
const LOCK_WITHIN: Duration = Duration::from_secs(2);

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the journal {path}")]
pub struct JournalError {
    /// Where it is.
    pub path: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// What is known of an image from earlier runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// What it was called when it was first seen.
    pub name: Option<String>,
    /// The image that was made of it, if it was finished.
    pub made: Option<String>,
}

/// A journal. Lines are appended by one process at a time.
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    run: String,
    project: String,
    by_id: BTreeMap<String, Known>,
    /// What was typed, and the ids that it meant, in the order in which they were first seen.
    by_word: BTreeMap<String, Vec<String>>,
}

impl Journal {
    /// Opens or makes it, for its owner alone, and reads what earlier runs wrote of images of `project`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(path: &Path, run: &str, project: &str) -> Result<Self, JournalError> {
        let opened = (|| {
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            }
            let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("that is no ordinary file"));
            }
            let mut bytes = Vec::new();
            Read::by_ref(&mut file).take(BYTES_MAX).read_to_end(&mut bytes)?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let first = text.lines().next().unwrap_or_default();
            let fits = !first.is_empty() && ("{\"at\":".starts_with(first) || first.starts_with("{\"at\":"));
            if !text.is_empty() && !fits {
                return Err(io::Error::other("that file is there and is no journal of a batch: choose another name"));
            }
            Ok((file, text))
        })();
        let (file, text) = opened.map_err(|source| JournalError { path: path.display().to_string(), source })?;
        let mut journal = Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            run: run.to_owned(),
            project: project.to_owned(),
            by_id: BTreeMap::new(),
            by_word: BTreeMap::new(),
        };
        for line in text.lines() {
            // what a kill cut off says nothing
            if let Ok(line) = serde_json::from_str::<Value>(line) {
                journal.learn(&line);
            }
        }
        Ok(journal)
    }

    fn learn(&mut self, line: &Value) {
        // a name in another project is another image's
        if line["project"] != self.project.as_str() {
            return;
        }
        let text = |key: &str| line[key].as_str().map(str::to_owned);
        let Some(id) = text("id") else { return };
        let known = self.by_id.entry(id.clone()).or_default();
        match line["event"].as_str() {
            Some("planned") => {
                known.name = known.name.take().or_else(|| text("name"));
                if let Some(word) = text("word") {
                    let meanings = self.by_word.entry(word).or_default();
                    meanings.retain(|meaning| *meaning != id);
                    meanings.push(id);
                }
            }
            Some("done") => known.made = text("image"),
            _ => {}
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known of the image with this id.
    #[must_use]
    pub fn known(&self, id: &str) -> Option<&Known> {
        self.by_id.get(id)
    }

    /// The ids that a word meant to earlier runs, the latest last: a name is given again when its image has gone.
    #[must_use]
    pub fn meanings(&self, word: &str) -> &[String] {
        self.by_word.get(word).map(Vec::as_slice).unwrap_or_default()
    }

    /// Appends a line. `fields` is an object.
    ///
    /// # Errors
    /// [`JournalError`]: a full disk. What happened has happened all the same.
    pub fn write(&self, event: &str, fields: &Value) -> Result<(), JournalError> {
        let mut line = json!({ "at": now_utc(), "run": self.run, "project": self.project, "event": event });
        for (key, value) in fields.as_object().into_iter().flatten() {
            line[key] = value.clone();
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = (|| {
            // others may append at the same time, and look at the last byte, too; who holds it for long is no reason to stand still
            let started = Instant::now();
            while let Err(error) = file.try_lock() {
                match error {
                    TryLockError::WouldBlock if started.elapsed() < LOCK_WITHIN => std::thread::sleep(Duration::from_millis(20)),
                    TryLockError::WouldBlock => return Err(io::Error::other("somebody else keeps it locked")),
                    TryLockError::Error(error) => return Err(error),
                }
            }
            let mut bytes = Vec::new();
            if file.seek(SeekFrom::End(0))? > 0 {
                let mut last = [0];
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
                if last != *b"\n" {
                    bytes.push(b'\n');
                }
            }
            bytes.extend_from_slice(line.to_string().as_bytes());
            bytes.push(b'\n');
            file.write_all(&bytes)?;
            file.sync_data()
        })();
        let _ = file.unlock();
        written.map_err(|source| JournalError { path: self.path.display().to_string(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_run_wrote_the_next_one_knows_whatever_cut_it_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/journal.jsonl");
        let journal = Journal::open(&path, "r1", "p").unwrap();
        journal.write("planned", &json!({ "id": "i", "name": "web", "word": "web" })).unwrap();
        journal.write("planned", &json!({ "id": "j", "name": "db", "word": "db" })).unwrap();
        journal.write("done", &json!({ "id": "i", "image": "new" })).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let again = Journal::open(&path, "r2", "p").unwrap_or_else(|error| panic!("cut at {cut}: {error:?}"));
            again.write("planned", &json!({ "id": "k", "name": "x", "word": "web" })).unwrap();
            let third = Journal::open(&path, "r3", "p").unwrap();
            let lines = whole[..cut].split(|byte| *byte == b'\n').filter(|line| line.ends_with(b"}")).count();
            let meanings: &[&str] = if lines > 0 { &["i", "k"] } else { &["k"] };
            assert_eq!(third.meanings("web"), meanings, "cut at {cut}");
            assert_eq!(third.known("i").and_then(|known| known.made.clone()).is_some(), lines == 3);
            assert_eq!(third.known("k").unwrap().name.as_deref(), Some("x"), "cut at {cut}");
        }
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn another_file_is_never_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        fs::write(&path, "dear diary\n").unwrap();
        assert!(Journal::open(&path, "r", "p").is_err());
        assert!(Journal::open(folder.path(), "r", "p").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"dear diary\n");
    }
}
