//! The store's second tier: one file without a name, so that a kill leaves nothing.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::Path,
};

use engine::{Cancelled, ErrorKind, Inlet, LocalStage, Outlet, StageContext, StageError};

use crate::{
    disk::queue::{Completion, WriteBytes, WriteOp, WriteQueue},
    extent::{Holder, StoredExtent},
    progress::Progress,
    retry::Retries,
    units::to_u64,
};

/// A scratch folder that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("--scratch {folder}: a file cannot be made there")]
pub struct ScratchError {
    /// The folder.
    pub folder: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// An open file that no folder lists.
#[derive(Debug)]
pub struct ScratchFile(File);

impl ScratchFile {
    /// Makes one in `folder`.
    ///
    /// # Errors
    /// [`ScratchError`].
    pub fn create(folder: &Path) -> Result<Self, ScratchError> {
        use rustix::fs::{Mode, OFlags, open};
        use std::os::unix::fs::OpenOptionsExt;
        let error = |source| ScratchError { folder: folder.display().to_string(), source };
        if !folder.is_dir() {
            return Err(error(io::Error::new(io::ErrorKind::NotADirectory, "there is no such folder")));
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        if let Ok(file) = open(folder, flags, Mode::RUSR | Mode::WUSR) {
            return Ok(Self(file.into()));
        }
        // a file system without O_TMPFILE: named for the moment between two calls
        let path = folder.join(format!(".virta-scratch-{}", uuid::Uuid::new_v4()));
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(error)?;
        fs::remove_file(&path).map_err(error)?;
        Ok(Self(file))
    }

    /// A second handle.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn handle(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

/// Neither memory nor the scratch file holds the data of a source that cannot be read again.
#[derive(Debug, thiserror::Error)]
#[error(
    "what comes through a pipe cannot be read again, and neither memory (--memory {}) nor the scratch file holds it: full at guest offset \
     {guest_offset:#x}. Raise --memory or --scratch-limit, or choose a folder with more room for --scratch",
    crate::text::size(*.memory_bytes)
)]
pub struct ScratchFull {
    /// The whole budget of memory, bytes.
    pub memory_bytes: u64,
    /// Where the survey was.
    pub guest_offset: u64,
}

/// Writes what memory did not take, until its limit or the disk's; from then on extents pass as they come, to be read again. A write that
/// fails fails no run.
pub struct ScratchWrite<Q> {
    /// The scratch file.
    pub queue: Q,
    /// Bytes it may take.
    pub limit_bytes: u64,
    /// What it does not take would be lost: then the run ends, naming the whole budget of memory.
    pub refuse: Option<u64>,
    /// Told of bytes written.
    pub progress: Progress,
    /// Told when it is full.
    pub retries: Retries,
}

struct Writer<Q> {
    queue: Q,
    limit_bytes: u64,
    refuse: Option<u64>,
    used: u64,
    /// No more is written: it is full, or failed.
    closed: bool,
    pending: HashMap<u64, (StoredExtent, u64)>,
    next_tag: u64,
    progress: Progress,
    retries: Retries,
}

impl<Q: WriteQueue> LocalStage for ScratchWrite<Q> {
    type In = StoredExtent;
    type Out = StoredExtent;
    type Report = ();

    async fn run(self, inlet: Inlet<StoredExtent>, outlet: Outlet<StoredExtent>, _: StageContext) -> Result<(), StageError> {
        let Self { queue, limit_bytes, refuse, progress, retries } = self;
        let mut writer = Writer {
            queue,
            limit_bytes,
            refuse,
            used: 0,
            closed: false,
            pending: HashMap::new(),
            next_tag: 0,
            progress,
            retries,
        };
        let result = writer.pass_all(&inlet, &outlet).await;
        // whatever happened, nothing is in flight when this stage returns (engine I4)
        let mut drained = Ok(());
        while let Some(completion) = writer.queue.reap().await {
            let result = if drained.is_ok() { writer.completed(completion, &outlet).await } else { Err(Cancelled.into()) };
            drained = drained.and(result);
        }
        result?;
        drained?;
        outlet.finish();
        Ok(())
    }
}

impl<Q: WriteQueue> Writer<Q> {
    async fn pass_all(&mut self, inlet: &Inlet<StoredExtent>, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        loop {
            let received = if self.queue.in_flight() == 0 {
                inlet.recv().await?
            } else {
                // both are cancel-safe: the branch not taken loses nothing
                tokio::select! {
                    biased;
                    Some(completion) = self.queue.reap() => {
                        self.completed(completion, outlet).await?;
                        continue;
                    }
                    received = inlet.recv() => received?,
                }
            };
            let Some(stored_extent) = received else { return Ok(()) };
            self.pass(stored_extent, outlet).await?;
        }
    }

    async fn pass(&mut self, stored_extent: StoredExtent, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        let bytes = match &stored_extent.holder {
            Holder::Passing(bytes) if !self.closed => bytes.clone(),
            _ => return self.let_go(stored_extent, outlet).await,
        };
        let len = to_u64(bytes.len());
        if self.used + len > self.limit_bytes {
            self.closed = true;
            self.retries.say(format!("the scratch file has reached its limit of {}", crate::text::size(self.limit_bytes)));
            return self.let_go(stored_extent, outlet).await;
        }
        let tag = self.next_tag;
        self.next_tag += 1;
        let at = self.used;
        self.used += len;
        self.pending.insert(tag, (stored_extent, at));
        let mut op = WriteOp { host_offset: at, bytes: WriteBytes::Shared(bytes), tag };
        while let Err(rejected) = self.queue.submit(op) {
            op = rejected;
            if let Some(completion) = self.queue.reap().await {
                self.completed(completion, outlet).await?;
            }
        }
        Ok(())
    }

    /// Passes an extent on that nothing keeps.
    async fn let_go(&self, stored_extent: StoredExtent, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        match (self.refuse, &stored_extent.holder) {
            (Some(memory_bytes), Holder::Passing(_)) => {
                let full = ScratchFull { memory_bytes, guest_offset: stored_extent.guest.start.0 };
                Err(StageError::new(ErrorKind::Limit, full))
            }
            _ => Ok(outlet.send(stored_extent).await?),
        }
    }

    async fn completed(&mut self, completion: Completion, outlet: &Outlet<StoredExtent>) -> Result<(), StageError> {
        let Some((mut stored_extent, at)) = self.pending.remove(&completion.tag) else {
            return Err(StageError::bug("a write completed that nobody started"));
        };
        match completion.result {
            Ok(()) => {
                if let Holder::Passing(bytes) = &stored_extent.holder {
                    self.progress.add_scratch(to_u64(bytes.len()));
                }
                stored_extent.holder = Holder::Scratch(at);
            }
            Err(error) if !self.closed => {
                self.closed = true;
                let cause = crate::text::causes(&error);
                self.retries.say(format!("the scratch file takes no more ({cause}): what follows is read again from the source"));
            }
            Err(_) => {}
        }
        self.let_go(stored_extent, outlet).await
    }
}
