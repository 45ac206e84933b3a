//! An image in Glance becomes a local file, byte by byte.
//!
//! ```text
//! to a file:   fetch (ranges, or one GET) ── land x 2 (zeros become holes) ── order ── hash
//! to a stream: fetch (one GET) ── forward (hashes on the way, keeps the last piece back until the hash agreed)
//! ```
//! The hash is computed over what is in the file, not over what came. A download that fails keeps what it has: `<name>.partial`, and beside it
//! `<name>.partial.json`, which says of which image it is and up to where it is whole. Another run goes on from there, after it has hashed what is
//! there; if the image in Glance is another one by then, it does not. Of an image without a hash nothing is kept: whether the kept part is still what it
//! was could not be told.

mod forward;
mod kept;
mod land;
mod order;

use std::{fs, fs::File, io, num::NonZeroUsize, path::Path, sync::Arc, time::Instant};

use engine::{BufferPool, CancelToken, Pipeline};
use serde::Serialize;
use tokio::runtime::Handle;

use crate::{
    access::Access,
    convert::report::HashReport,
    disk::{Left, OutputError, OutputFile},
    error::JobError,
    extent::EXTENT_BYTES,
    glance::{Fetch, ImageFile, Remote, fetch::FetchPlan},
    hash::HashLane,
    magic::DiskFormat,
    openstack::{Image, Session},
    progress::{Phase, Progress},
    reporter::Reporter,
    retry::{Patience, Retries},
    text::{printable, size},
    units::{ClusterBits, GuestRange, to_usize},
    watermark::Watermark,
};
use forward::Forward;
use kept::Mark;
use land::{Land, There};
use order::Order;

/// Threads that write: one writes while the other looks for zeros.
const LANDERS: usize = 2;

/// Bytes written to a pipe at once.
const PIPE_BYTES: usize = 64 << 10;

const LEASE_ALIGN: usize = 4096;

/// A download.
pub struct Download {
    /// Signed in.
    pub session: Session,
    /// The image, which is active.
    pub image: Image,
    /// Parallel ranges, where they are served.
    pub connections: NonZeroUsize,
    /// All of them from the start; otherwise only as many as make it faster.
    pub all_connections: bool,
    /// Replace a file that is there; start again where a partial one is.
    pub force: bool,
    /// Go on with a partial one.
    pub resume: bool,
    /// Flush the file and its folder.
    pub sync: bool,
    /// When to give up.
    pub patience: Patience,
    /// Counters.
    pub progress: Progress,
    /// Who is told.
    pub reporter: Arc<dyn Reporter>,
    /// Ends it.
    pub cancel: CancelToken,
}

/// What was downloaded.
#[derive(Clone, Debug, Serialize)]
pub struct DownloadReport {
    /// `glance:ID`.
    pub source: String,
    /// The file, or `-`.
    pub destination: String,
    /// As Glance names it.
    pub disk_format: Option<String>,
    /// The image's length, bytes.
    pub image_bytes: u64,
    /// Of those, in holes.
    pub zero_bytes: u64,
    /// Of those, there already when this run began.
    pub resumed_bytes: u64,
    /// Everything received, bytes.
    pub fetched_bytes: u64,
    /// Of those, received again after an error.
    pub retried_bytes: u64,
    /// Seconds.
    pub elapsed_s: f64,
    /// How the image could be read.
    pub access: Access,
    /// Glance's digest, and whether the file has it.
    pub image_hash: HashReport,
    /// Requests that were tried again.
    pub retries: Vec<String>,
    /// Warnings.
    pub warnings: Vec<String>,
}

impl Download {
    fn bytes(&self) -> u64 {
        self.image.size.unwrap_or(0)
    }

    fn mark(&self) -> Mark {
        Mark {
            image: self.image.id.clone(),
            bytes: self.bytes(),
            hash: self.image.hash_text(),
            created_at: self.image.created_at.clone(),
            whole_bytes: 0,
        }
    }

    fn remote(&self) -> Remote {
        let told = Arc::clone(&self.reporter);
        let retries = Retries::new(&self.progress, Arc::new(move |line| told.note(&line)));
        Remote::of_image(&self.session, &self.image, &self.progress, retries, self.patience, &self.cancel)
    }

    fn begin(&self, destination: &str) {
        let image = &self.image;
        self.reporter.note(&format!(
            "source: image {} ({}), {} {}; destination: {}",
            image.shown(),
            image.shown_id(),
            size(self.bytes()),
            printable(image.disk_format.as_deref().unwrap_or("of no known format")),
            printable(destination)
        ));
        if image.expected_hash().is_none() {
            self.reporter.warn(
                "Glance has no hash of the image (as after a direct Ceph snapshot): what is read cannot be checked against one",
            );
        }
        self.progress.set_virtual_bytes(self.bytes());
        self.progress.set_hash_expected(image.expected_hash().map_or(0, |_| self.bytes()));
        self.progress.set_phase(Phase::Reading);
    }

    /// Is the image still the one that it was?
    async fn check_unchanged(&self) -> Result<(), JobError> {
        let now = self.cancel.guard(self.session.image(&self.image.id)).await.map_err(|_| JobError::interrupted())??;
        match self.image.differs_from(&now) {
            Some(what) => {
                let id = self.image.shown_id();
                Err(JobError::Verification(format!("image {id} is not what it was when this run began: its {what} differs")))
            }
            None => Ok(()),
        }
    }

    fn report(
        &self,
        destination: String,
        access: Access,
        resumed_bytes: u64,
        started: Instant,
        remote: &Remote,
    ) -> DownloadReport {
        DownloadReport {
            source: format!("glance:{}", self.image.id),
            destination,
            disk_format: self.image.disk_format.clone(),
            image_bytes: self.bytes(),
            zero_bytes: self.progress.zero_bytes(),
            resumed_bytes,
            fetched_bytes: self.progress.fetched_bytes(),
            retried_bytes: self.progress.retried_bytes(),
            elapsed_s: started.elapsed().as_secs_f64(),
            access,
            image_hash: HashReport::checked(self.image.expected_hash()),
            retries: remote.retries.lines(),
            warnings: Vec::new(),
        }
    }

    /// Downloads into a file, or onto a block device.
    ///
    /// # Errors
    /// [`JobError`]. The destination is then as it was before; what has come is kept as `<name>.partial`, unless its hash is wrong.
    ///
    /// # Cancel safety
    /// Cancel with the token: what is in flight is waited for.
    pub async fn to_file(&self, destination: &Path) -> Result<DownloadReport, JobError> {
        let started = Instant::now();
        if self.resume && !self.force && self.is_complete(destination).await? {
            self.reporter.note(&format!("{} is complete already: it has the image's hash", destination.display()));
            let (bytes, remote) = (self.bytes(), self.remote());
            return Ok(self.report(destination.display().to_string(), Access::Sequential, bytes, started, &remote));
        }
        let format = self.image.disk_format.as_deref().and_then(DiskFormat::from_glance);
        let mark = self.mark();
        let output = OutputFile::open(destination, self.force, format, Some(self.bytes()), |partial, bytes| {
            self.what_is_left(partial, bytes, &mark)
        })?;
        let (partial, start) = (output.path().to_owned(), output.continued_bytes());
        self.begin(&destination.display().to_string());
        let file = output.handle()?;
        let write = {
            let path = partial.display().to_string();
            move |error| JobError::Write { path: path.clone(), advice: "", source: Box::new(error) }
        };
        if !output.is_device() {
            // what landed out of order behind the mark could shine through where a hole is now
            if let Err(error) = file.set_len(start).and_then(|()| file.set_len(self.bytes())).map_err(&write) {
                return Err(self.keep(error, output, &partial));
            }
        }
        if !output.is_device() {
            // from now on a partial file is known to be ours, however this run ends; it is a help for another one, no need of this one
            let _ = Mark { whole_bytes: start, ..mark.clone() }.write(&partial);
        }
        if start > 0 {
            self.reporter.note(&format!("going on at {} of {}", size(start), size(self.bytes())));
        }
        let remote = self.remote();
        let landed = self.land(&output, file, &partial, mark, start, &remote).await;
        let access = match landed {
            Ok(access) => access,
            Err(error) => return Err(self.keep(error, output, &partial)),
        };
        self.progress.set_phase(Phase::Finishing);
        let finish = async {
            if self.image.expected_hash().is_none() {
                self.check_unchanged().await?;
            }
            if self.sync {
                output.handle()?.sync_all().map_err(&write)?;
            }
            Ok::<_, JobError>(())
        };
        if let Err(error) = finish.await {
            return Err(self.keep(error, output, &partial));
        }
        let committed = output.commit(self.sync);
        // also where the name could not be given: what is complete is nothing to go on with, and nothing to be emptied
        let _ = fs::remove_file(Mark::path(&partial));
        let path = committed?;
        Ok(self.report(path.display().to_string(), access, start, started, &remote))
    }

    /// Is the whole image there, so that there is nothing to go on with?
    async fn is_complete(&self, destination: &Path) -> Result<bool, JobError> {
        let Some(expected) = self.image.expected_hash() else { return Ok(false) };
        let Ok(file) = File::open(destination) else { return Ok(false) };
        if !file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == self.bytes()) {
            return Ok(false);
        }
        let mut lane = Some(HashLane {
            expected: Some(expected),
            file: Some(file),
            cluster_bits: ClusterBits::DEFAULT,
            codec: None,
            progress: self.progress.clone(),
            watermark: None,
        });
        let token = self.cancel.child();
        let pipeline = Pipeline::new(&token).threads("read", 1, || There { bytes: self.bytes() });
        let pipeline = pipeline.threads("hash", 1, || lane.take().expect("one worker asks once"));
        let joined = pipeline.start(&Handle::current()).join().await;
        match joined.map_err(JobError::from) {
            Ok(_) => Ok(true),
            Err(error) if error.exit_code() == 3 => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What of an earlier run is there, `bytes` long: how it is to be opened, and where to go on. Where it is started again, the mark goes first: it must
    /// never speak of bytes that are not there.
    fn what_is_left(&self, partial: &Path, bytes: u64, mark: &Mark) -> Result<Left, OutputError> {
        let needs = |what: String| Err(OutputError::Unfinished { path: partial.display().to_string(), what });
        let again = |left: Left| match fs::remove_file(Mark::path(partial)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = Mark::path(partial).display().to_string();
                Err(OutputError::Io { action: "remove", path, source: error })
            }
            _ => Ok(left),
        };
        match Mark::read(partial) {
            Some(found) if found.is_of(mark) && bytes >= found.whole_bytes && found.whole_bytes > 0 => {
                match (self.resume, self.force) {
                    (true, _) => Ok(Left::Continued(found.whole_bytes)),
                    (false, true) => again(Left::Ours),
                    (false, false) => needs(format!(
                        "has {} of {} of this image: go on with --resume, or start again with --force",
                        size(found.whole_bytes),
                        size(found.bytes)
                    )),
                }
            }
            Some(found) if !found.is_of(mark) && bytes > 0 => match self.force {
                true => {
                    self.reporter.note(&format!(
                        "{} is of another image ({}): starting again",
                        partial.display(),
                        printable(&found.image)
                    ));
                    again(Left::Ours)
                }
                false => needs(format!(
                    "is of image {}, or of what this one was before: nothing of it is of use. Start again with --force",
                    printable(&found.image)
                )),
            },
            // a run that was killed before anything was whole; or a mark without its file, or that says more than is there
            Some(found) => again(if found.is_of(mark) { Left::Ours } else { Left::Zeros }),
            None => {
                if self.resume {
                    self.reporter.note("there is nothing to go on with: starting at the beginning");
                }
                Ok(Left::Zeros)
            }
        }
    }

    /// What has come is kept, unless it is wrong.
    fn keep(&self, error: JobError, output: OutputFile, partial: &Path) -> JobError {
        let kept = Mark::read(partial).filter(|mark| mark.whole_bytes > 0);
        match (error.exit_code(), kept) {
            (3, _) | (_, None) => {
                drop(output);
                let _ = fs::remove_file(Mark::path(partial));
                error
            }
            (_, Some(mark)) => {
                self.reporter.note(&format!(
                    "{} of {} are kept as {}: the same command with --resume goes on",
                    size(mark.whole_bytes),
                    size(mark.bytes),
                    partial.display()
                ));
                output.leave();
                error
            }
        }
    }

    async fn land(
        &self,
        output: &OutputFile,
        file: File,
        partial: &Path,
        mark: Mark,
        start: u64,
        remote: &Remote,
    ) -> Result<Access, JobError> {
        let bytes = self.bytes();
        if bytes == 0 {
            return Ok(Access::Sequential);
        }
        let connections = self.connections.get();
        let pool = BufferPool::new(2 * connections + 2 * LANDERS + 4, to_usize(EXTENT_BYTES), LEASE_ALIGN, &self.cancel);
        let (plan, access) = if start == 0 {
            (FetchPlan::All, None)
        } else {
            let access = ImageFile::access(remote).await?;
            let first = start / EXTENT_BYTES;
            let ranges = (first..bytes.div_ceil(EXTENT_BYTES)).map(|extent| {
                let from = (extent * EXTENT_BYTES).max(start);
                GuestRange::new(from, ((extent + 1) * EXTENT_BYTES).min(bytes) - from)
            });
            (FetchPlan::Again { access, wanted: Arc::new(ranges.filter(|range| range.bytes() > 0).collect()) }, Some(access))
        };
        let fetch = Fetch {
            remote: remote.clone(),
            plan,
            only_raw: false,
            connections: self.connections,
            all_at_once: self.all_connections,
            pool,
            watermark: Watermark::new(u64::MAX),
        };
        let (pipeline, fetched) = Pipeline::new(&self.cancel).network_reporting("fetch", fetch);
        let file = Arc::new(file);
        let holes = !output.is_device();
        let pipeline =
            pipeline.threads("write", LANDERS, || Land { file: Arc::clone(&file), holes, progress: self.progress.clone() });
        // without a hash nothing could tell whether what was kept is still what it was
        let mark = (holes && self.image.expected_hash().is_some()).then(|| (partial.to_owned(), mark));
        let pipeline = pipeline.threads("order", 1, || Order { start, mark: mark.clone(), progress: self.progress.clone() });
        let mut lane = Some(HashLane {
            expected: self.image.expected_hash(),
            file: Some(output.handle()?),
            cluster_bits: ClusterBits::DEFAULT,
            codec: None,
            progress: self.progress.clone(),
            watermark: None,
        });
        let pipeline = pipeline.threads("hash", 1, || lane.take().expect("one worker asks once"));
        let joined = pipeline.start(&Handle::current()).join().await;
        joined.map_err(|error| match JobError::from(error).writing_to(output.path()) {
            JobError::Write { path, advice, source } if !advice.is_empty() => {
                JobError::Write { path, advice: ": the disk is full: make room, then go on with --resume", source }
            }
            other => other,
        })?;
        Ok(match access {
            Some(access) => access,
            None => fetched.one().await.unwrap_or(Access::Sequential),
        })
    }

    /// Downloads onto a pipe: with one GET, in order.
    ///
    /// # Errors
    /// [`JobError`]. The last bytes are written only once the hash agreed: a reader takes an end of input for success.
    pub async fn to_stream(&self, output: File, name: &str) -> Result<DownloadReport, JobError> {
        let started = Instant::now();
        self.begin(name);
        let remote = self.remote();
        if self.bytes() > 0 {
            let pool = BufferPool::new(4, to_usize(EXTENT_BYTES), LEASE_ALIGN, &self.cancel);
            let fetch = Fetch {
                remote: remote.clone(),
                plan: FetchPlan::All,
                only_raw: false,
                connections: NonZeroUsize::MIN,
                all_at_once: false,
                pool,
                watermark: Watermark::new(u64::MAX),
            };
            let mut forward = Some(Forward {
                output,
                name: name.to_owned(),
                total: self.bytes(),
                expected: self.image.expected_hash(),
                progress: self.progress.clone(),
            });
            let pipeline = Pipeline::new(&self.cancel).network("fetch", fetch);
            let pipeline = pipeline.threads("forward", 1, || forward.take().expect("one worker asks once"));
            pipeline.start(&Handle::current()).join().await?;
        }
        Ok(self.report(name.to_owned(), Access::Sequential, 0, started, &remote))
    }
}

#[cfg(test)]
mod tests {
    use engine::{BlockingStage, CancelToken, Inlet, NoInput, NoOutput, Outlet, Pipeline, StageContext, StageError};

    use super::*;
    use crate::{
        extent::{Extent, Payload, StoredExtent},
        units::GuestRange,
    };

    /// Source: one extent of zeros.
    struct Zeros;

    impl BlockingStage for Zeros {
        type In = NoInput;
        type Out = Extent;
        type Report = ();

        fn run(self, _: Inlet<NoInput>, outlet: Outlet<Extent>, _: StageContext) -> Result<(), StageError> {
            outlet.send_blocking(Extent { guest: GuestRange::new(4096, 8192), payload: Payload::Zeros })?;
            outlet.finish();
            Ok(())
        }
    }

    /// Sink: whatever landed.
    struct Landed;

    impl BlockingStage for Landed {
        type In = StoredExtent;
        type Out = NoOutput;
        type Report = ();

        fn run(self, inlet: Inlet<StoredExtent>, outlet: Outlet<NoOutput>, _: StageContext) -> Result<(), StageError> {
            while inlet.recv_blocking()?.is_some() {}
            outlet.finish();
            Ok(())
        }
    }

    /// The first 16 KiB of a file that was full of something else, after zeros landed on its second and third page.
    async fn landed(holes: bool) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &[0xff; 16384]).unwrap();
        let (file, progress) = (Arc::new(file), Progress::default());
        let land = || Land { file: Arc::clone(&file), holes, progress: progress.clone() };
        let pipeline = Pipeline::new(&CancelToken::new()).threads("zeros", 1, || Zeros).threads("write", 1, land);
        pipeline.threads("landed", 1, || Landed).start(&Handle::current()).join().await.unwrap();
        let mut bytes = vec![0; 16384];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 0).unwrap();
        bytes
    }

    #[tokio::test]
    async fn zeros_that_come_as_a_length_are_written_where_there_can_be_no_holes() {
        let device = landed(false).await;
        assert!(device[4096..12288].iter().all(|&byte| byte == 0), "what stood on the device shows through");
        assert!(device[..4096].iter().chain(&device[12288..]).all(|&byte| byte == 0xff));
        // a fresh file has a hole there; this one shows that nothing was written
        assert!(landed(true).await.iter().all(|&byte| byte == 0xff));
    }
}
