//! A local file becomes a new image in Glance, byte by byte: for formats that are not converted.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use engine::{BlockingStage, CancelToken, ErrorKind, Inlet, NoInput, Outlet, Pipeline, ReportHandle, StageContext, StageError};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    drive::{Both, Filled, Finished, Work, drive},
    maker::Maker,
    report::HashReport,
    transfer::{ImageBytes, Sent, Transfer},
};
use crate::{
    disk::SourceError,
    error::JobError,
    extent::Chunk,
    hash::Hasher,
    openstack::{Image, Session, carry_over::check_properties},
    ownership::{self, Family, Goal, Mark, Proof, claim::Moves},
    progress::{Phase, Progress},
    read_at::ReadAt,
    reporter::Reporter,
    retry::{Patience, Retries},
    run::ThisRun,
    store::EmitReport,
    text::{printable, shell_word, size},
    units::to_usize,
};

/// Bytes read and sent at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// A file that was opened to be looked into, and is sent as it was then.
#[derive(Clone, Debug)]
pub struct Opened {
    path: PathBuf,
    file: Arc<File>,
    identity: Identity,
}

impl Opened {
    /// Opens a file.
    ///
    /// # Errors
    /// [`SourceError::Io`].
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let io = |source| SourceError::Io { action: "open", path: printable(&path.display().to_string()), source };
        let file = File::open(path).map_err(io)?;
        let identity = Identity::of(&file).map_err(io)?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), identity })
    }

    /// Its bytes.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }
}

/// What is sent.
#[derive(Clone, Debug)]
pub struct Upload {
    /// The file, as it was looked into.
    pub opened: Opened,
    /// What the image is called.
    pub name: String,
    /// As Glance names it.
    pub disk_format: String,
    /// Size of the disk in it, bytes: what `min_disk` follows from.
    pub virtual_bytes: u64,
    /// More properties.
    pub properties: Vec<(String, String)>,
    /// The run, as the image names it.
    pub run: ThisRun,
    /// When to give up.
    pub patience: Patience,
}

/// What was sent.
#[derive(Clone, Debug, Serialize)]
pub struct UploadReport {
    /// The file.
    pub source: String,
    /// `glance:ID`.
    pub destination: String,
    /// As Glance names it.
    pub disk_format: String,
    /// Size of the disk in it, bytes.
    pub virtual_bytes: u64,
    /// The image's length, bytes.
    pub image_bytes: u64,
    /// Bytes handed to the connection by all tries.
    pub uploaded_bytes: u64,
    /// Seconds.
    pub elapsed_s: f64,
    /// Digest of what was sent, and whether Glance has the same.
    pub image_hash: HashReport,
    /// Requests that were tried again.
    pub retries: Vec<String>,
    /// Warnings.
    pub warnings: Vec<String>,
}

/// What tells a file from another one, or from what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    place: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            place: (metadata.dev(), metadata.ino()),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// A file, read forward as often as it takes.
struct FileContent {
    file: Arc<File>,
    shown: String,
    identity: Identity,
}

impl ImageBytes for FileContent {
    fn bytes(&self) -> u64 {
        self.identity.bytes
    }

    async fn emission(
        &self,
        cancel: &CancelToken,
        hasher: Hasher,
    ) -> Result<(Pipeline<Chunk>, ReportHandle<EmitReport>), JobError> {
        let mut read =
            Some(ReadFile { file: Arc::clone(&self.file), shown: self.shown.clone(), identity: self.identity, hasher });
        Ok(Pipeline::new(cancel).threads_reporting("read", 1, || read.take().expect("one worker asks once")))
    }
}

/// Source stage: a file's bytes in order.
struct ReadFile {
    file: Arc<File>,
    shown: String,
    identity: Identity,
    hasher: Hasher,
}

impl BlockingStage for ReadFile {
    type In = NoInput;
    type Out = Chunk;
    type Report = EmitReport;

    fn run(mut self, _: Inlet<NoInput>, outlet: Outlet<Chunk>, _: StageContext) -> Result<EmitReport, StageError> {
        let io = |error| StageError::new(ErrorKind::Io, error);
        let bytes = self.identity.bytes;
        let mut at = 0;
        while at < bytes {
            let mut chunk = vec![0; to_usize(CHUNK_BYTES.min(bytes - at))];
            ReadAt::read_exact_at(&*self.file, at, &mut chunk).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    let (path, what) = (self.shown.clone(), "it became shorter");
                    StageError::new(ErrorKind::InvalidData, SourceError::Changed { path, what })
                }
                _ => io(error),
            })?;
            self.hasher.update(&chunk);
            at += CHUNK_BYTES.min(bytes - at);
            // the last piece leaves only when the whole is known to be one and the same file
            if at == bytes && Identity::of(&self.file).map_err(io)? != self.identity {
                let what = "its size or its time of change";
                return Err(StageError::new(ErrorKind::InvalidData, SourceError::Changed { path: self.shown, what }));
            }
            outlet.send_blocking(Chunk(chunk.into()))?;
        }
        outlet.finish();
        Ok(EmitReport { bytes, digest: self.hasher.finish() })
    }
}

/// Sends a file as a new image.
///
/// # Errors
/// [`JobError`]; no image is left behind then, or the error says which.
///
/// # Cancel safety
/// Cancel with the token: the half-made image is deleted before this returns.
pub async fn as_is(
    session: &Session,
    upload: &Upload,
    progress: &Progress,
    reporter: &Arc<dyn Reporter>,
    cancel: &CancelToken,
) -> Result<UploadReport, JobError> {
    check_properties(&upload.properties).map_err(JobError::Usage)?;
    let started = Instant::now();
    let Opened { path, file, identity } = upload.opened.clone();
    let shown = printable(&path.display().to_string());
    if let Ok(Some(left)) = cancel.guard(session.quota_left_bytes()).await
        && identity.bytes > left
    {
        return Err(JobError::Refused(format!(
            "the quota for images has {} left, and this one needs {}: delete what is not needed, or ask for more",
            size(left),
            size(identity.bytes)
        )));
    }
    progress.set_virtual_bytes(identity.bytes);
    progress.set_image_bytes(identity.bytes);
    let told = Arc::clone(reporter);
    let retries = Retries::new(progress, Arc::new(move |line| told.note(&line)));
    let rate_limit = session.rate_bytes_per_s();
    let moves = Moves { source_bytes: identity.bytes, readings: 0, read_back: false, rate_limit, jobs: 1 };
    let project = session.whoami().project_id.as_deref().unwrap_or_default();
    let mut maker = Maker {
        session,
        family: Family::of_image("", project, &upload.name, ownership::Content::Exact).alone(),
        run: upload.run.clone(),
        record: record(upload),
        droppable: Vec::new(),
        claim: moves.claim(),
        source: None,
        any_name: None,
        replaces: false,
        protected: false,
        take_over: false,
        patience: upload.patience,
        cancel,
        reporter,
        retries: &retries,
        seen: Vec::new(),
        of_source: Vec::new(),
        failed_posts: 0,
    };
    let content = FileContent { file, shown: shown.clone(), identity };
    let mut work = Sender { content, progress, tries: 0, image_hash: HashReport::none() };
    let goal = Goal { proof: Proof::Sent, deletes_source: false, own_proof: false };
    let (Finished::Made(made) | Finished::Earlier(made)) = drive(&mut maker, &mut work, goal, None).await?;
    let (id, image_hash) = (made.id, work.image_hash);
    progress.set_phase(Phase::Finishing);
    Ok(UploadReport {
        source: shown,
        destination: format!("glance:{id}"),
        disk_format: upload.disk_format.clone(),
        virtual_bytes: upload.virtual_bytes,
        image_bytes: identity.bytes,
        uploaded_bytes: progress.sent_bytes(),
        elapsed_s: started.elapsed().as_secs_f64(),
        image_hash,
        retries: retries.lines(),
        warnings: Vec::new(),
    })
}

/// A file's way into one image after the other, until one has it.
struct Sender<'a> {
    content: FileContent,
    progress: &'a Progress,
    tries: u32,
    image_hash: HashReport,
}

impl Work for Sender<'_> {
    async fn fill(&mut self, maker: &Maker<'_>, id: &str) -> Result<Filled, JobError> {
        let transfer = Transfer { maker, content: &self.content, progress: self.progress };
        let Sent::Active(active) = transfer.until_active(id, &mut self.tries).await? else { return Ok(Filled::Useless) };
        self.image_hash = transfer.compare(&active.image, &active.emitted).await?;
        Ok(Filled::Proven(Mark::of(&active.image, if self.image_hash.checked { Proof::Hash } else { Proof::Sent })))
    }

    async fn prove(&mut self, _: &Image) -> Result<bool, JobError> {
        Ok(true)
    }

    async fn settle(&mut self, _: &Image) -> Result<(), JobError> {
        Ok(())
    }

    async fn look_at_both(&mut self, _: &Image) -> Result<Both, JobError> {
        Ok(Both::SourceGone)
    }

    fn source(&self) -> Option<(&Session, &Image)> {
        None
    }
}

fn record(upload: &Upload) -> Map<String, Value> {
    let mut record = Map::new();
    record.insert("disk_format".to_owned(), json!(upload.disk_format));
    record.insert("container_format".to_owned(), json!("bare"));
    record.insert("visibility".to_owned(), json!("private"));
    record.insert("min_disk".to_owned(), json!(upload.virtual_bytes.div_ceil(1 << 30)));
    for (key, value) in &upload.properties {
        record.insert(key.clone(), json!(value));
    }
    record
}

/// What to type to go on after a file was refused in some format.
#[must_use]
pub fn retry_as_is(path: &Path, name: &str) -> String {
    format!("virta upload --as-is {} {}", shell_word(&path.display().to_string()), shell_word(name))
}
