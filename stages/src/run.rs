//! A run: one start of the program, as images name it, and what is kept of it.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use crate::openstack::{Image, marks::RUN};

/// What is kept of a run, so that a later one finds what it left: written down before the request leaves.
pub trait RunRecord: Send + Sync {
    /// An image is about to be made.
    fn making(&self, image_id: &str) {
        let _ = image_id;
    }

    /// A server is about to be changed; `None`: it is as it was found again. `false`: that could not be written down.
    fn holding(&self, server: Option<&FoundServer>) -> bool {
        let _ = server;
        true
    }

    /// Is this run known to be dead? A record of this machine's runs knows; nothing knows of other machines'.
    fn is_dead(&self, run: &str) -> bool {
        let _ = run;
        false
    }
}

/// Keeps nothing.
impl RunRecord for () {}

/// This start of the program, as images name it (`virta_run`). Clones are the same run.
#[derive(Clone)]
pub struct ThisRun {
    name: String,
    task: Option<String>,
    record: Arc<dyn RunRecord>,
    /// Ids of images that it has sent a DELETE for, or was about to: it does not take them up again (R2).
    abandoned: Arc<Mutex<HashSet<String>>>,
}

impl fmt::Debug for ThisRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl Default for ThisRun {
    fn default() -> Self {
        Self::named(&uuid::Uuid::new_v4().hyphenated().to_string())
    }
}

impl ThisRun {
    /// The run of this id, which no other start of any program has.
    #[must_use]
    pub fn named(id: &str) -> Self {
        Self { name: id.to_owned(), task: None, record: Arc::new(()), abandoned: Arc::default() }
    }

    /// The same, as a try at an engine's task: what earlier tries of the task left is passed by at once.
    #[must_use]
    pub fn of_task(self, task: Option<String>) -> Self {
        Self { task, ..self }
    }

    /// The same, of which a record is kept.
    #[must_use]
    pub fn recorded(self, record: Arc<dyn RunRecord>) -> Self {
        Self { record, ..self }
    }

    /// Its record.
    #[must_use]
    pub fn record(&self) -> &dyn RunRecord {
        &*self.record
    }

    /// `RUN`, or `TASK/RUN`.
    #[must_use]
    pub fn text(&self) -> String {
        match &self.task {
            Some(task) => format!("{task}/{}", self.name),
            None => self.name.clone(),
        }
    }

    /// Did this run, or an earlier try of its task, make the image?
    pub(crate) fn made(&self, image: &Image) -> bool {
        let text = image.property(RUN).unwrap_or_default();
        let same_task =
            self.task.as_ref().is_some_and(|task| text.strip_prefix(task.as_str()).is_some_and(|rest| rest.starts_with('/')));
        text == self.text() || same_task
    }

    pub(crate) fn abandon(&self, id: &str) {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
    }

    pub(crate) fn has_abandoned(&self, id: &str) -> bool {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }
}

/// The run's id in a `virta_run`.
#[must_use]
pub fn run_of(text: &str) -> &str {
    text.rsplit_once('/').map_or(text, |(_, run)| run)
}

/// A server as a run found it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FoundServer {
    /// Its id.
    pub id: String,
    /// Its name, for people.
    pub name: String,
    /// Its status then: `ACTIVE`, `SHUTOFF`, …
    pub status: String,
    /// The run stopped it, or was about to: what somebody else stopped stays so.
    #[serde(default)]
    pub stopped: bool,
}
