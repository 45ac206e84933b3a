//! The source stage over an image in Glance.
//!
//! It begins with one plain GET. On the way it looks for a place to probe for ranges (see [`super::probe`]); if they are
//! served, it leaves the GET at an extent boundary and goes on with N parallel ranges; if not, the GET goes on to the
//! end. No byte is fetched twice either way, but for the probe's few.
//!
//! A lease is taken before its bytes are asked for. A body that is cut goes on where it stopped: by a range where the
//! image is random access, by a GET that discards up to there where it is not. Tries are bounded at each spot, and each
//! byte that arrives starts their count anew.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use engine::{BufferPool, CancelToken, ErrorKind, Inlet, Lease, NoInput, Outlet, Stage, StageContext, StageError};
use reqwest::{Method, StatusCode, header::CONTENT_RANGE};
use tokio::task::JoinSet;

use super::{
    body::{Body, BodyError},
    probe::{Candidate, Probe, probe},
    range::{ContentRange, RangeWindow, range_bytes},
    retry::{TRIES_MAX, pause},
};
use crate::{
    convert::report::Access,
    extent::{EXTENT_BYTES, Extent, Payload},
    magic::{DiskFormat, HEAD_BYTES},
    openstack::{ApiError, Session, config::Secret},
    progress::Progress,
    units::{GuestRange, to_u64, to_usize},
};

/// Images below this are fetched with one GET: a probe and more connections would cost more than they save.
const RANDOM_BYTES_MIN: u64 = 32 << 20;

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// A request failed for good.
    #[error("fetching image {image} at guest offset {guest_offset:#x}")]
    Api {
        /// The image.
        image: String,
        /// How far it was.
        guest_offset: u64,
        /// What Glance said, or did not.
        #[source]
        source: ApiError,
    },
    /// Its bytes are not a raw disk's.
    #[error("image {image} is not a raw disk image but {format}: {advice}")]
    NotRaw {
        /// The image.
        image: String,
        /// What it is.
        format: DiskFormat,
        /// What to do instead.
        advice: String,
    },
    /// Too many tries at one spot.
    #[error("fetching image {image} at guest offset {guest_offset:#x}: gave up after {tries} tries")]
    GaveUp {
        /// The image.
        image: String,
        /// How far it was.
        guest_offset: u64,
        /// How often.
        tries: u32,
        /// The last failure.
        #[source]
        source: ApiError,
    },
}

/// What a fetch did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchReport {
    /// How the image was read.
    pub access: Access,
    /// Bytes fetched again after an error.
    pub retried_bytes: u64,
}

/// Hears of retries and decisions.
pub type Say = Arc<dyn Fn(String) + Send + Sync>;

/// The stage.
pub struct Fetch {
    /// Signed in.
    pub session: Session,
    /// The image's id.
    pub image_id: String,
    /// Its size, bytes.
    pub image_bytes: u64,
    /// Parallel ranges; with 1, ranges are not even probed for.
    pub connections: NonZeroUsize,
    /// Where leases come from.
    pub pool: BufferPool,
    /// Told of bytes and retries.
    pub progress: Progress,
    /// A line for each retry, kept for the report.
    pub retries: Arc<Mutex<Vec<String>>>,
    /// Told of each retry and of how the image can be read.
    pub say: Say,
}

/// What all connections share.
struct Shared {
    session: Session,
    image_id: String,
    image_bytes: u64,
    pool: BufferPool,
    progress: Progress,
    retries: Arc<Mutex<Vec<String>>>,
    retried_bytes: AtomicU64,
    say: Say,
    cx: StageContext,
}

impl Stage for Fetch {
    type In = NoInput;
    type Out = Extent;
    type Report = FetchReport;

    async fn run(self, _: Inlet<NoInput>, outlet: Outlet<Extent>, cx: StageContext) -> Result<FetchReport, StageError> {
        let connections = to_u64(self.connections.get());
        let shared = Arc::new(Shared {
            session: self.session,
            image_id: self.image_id,
            image_bytes: self.image_bytes,
            pool: self.pool,
            progress: self.progress,
            retries: self.retries,
            retried_bytes: AtomicU64::new(0),
            say: self.say,
            cx,
        });
        let look_for_ranges = connections > 1 && shared.image_bytes >= RANDOM_BYTES_MIN;
        let reached = sequential(&shared, &outlet, look_for_ranges).await?;
        let access = if reached < shared.image_bytes {
            parallel(&shared, &outlet, reached, connections).await?;
            Access::Random
        } else {
            Access::Sequential
        };
        outlet.finish();
        Ok(FetchReport { access, retried_bytes: shared.retried_bytes.load(Relaxed) })
    }
}

/// One failed try: is another worth it?
#[derive(Default)]
struct Tries {
    count: u32,
    /// A 401 was answered with a new token already: a second one in a row is final.
    renewed: bool,
    /// The next request needs another token than this one.
    rejected: Option<Secret>,
    /// The token of the last request.
    used: Option<Secret>,
    /// Bytes since the last failure.
    arrived_bytes: u64,
}

/// Progress that starts the count of tries anew. A server that gives a byte and cuts is not getting better.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Lines about retries that are kept for the report.
const RETRY_LINES_MAX: usize = 1000;

impl Tries {
    fn arrived(&mut self, bytes: u64) {
        self.arrived_bytes += bytes;
        if self.arrived_bytes >= PROGRESS_BYTES {
            *self = Self::default();
        }
    }
}

impl Shared {
    fn stage_error(&self, guest_offset: u64, source: ApiError) -> StageError {
        let kind = if source.status().is_some() { ErrorKind::Remote } else { ErrorKind::Network };
        StageError::new(kind, FetchError::Api { image: self.image_id.clone(), guest_offset, source })
    }

    /// Waits before another try, or gives up.
    async fn after(&self, error: ApiError, guest_offset: u64, tries: &mut Tries) -> Result<(), StageError> {
        tries.count += 1;
        tries.arrived_bytes = 0;
        if error.status() == Some(StatusCode::UNAUTHORIZED) && !tries.renewed {
            tries.renewed = true;
            tries.rejected = tries.used.clone();
            self.note_retry(&error, guest_offset);
            return Ok(());
        }
        // a short or overlong body, or a Content-Range of another range, is an accident worth another try, too
        let retryable = error.is_retryable() || matches!(error, ApiError::Answer { .. });
        if !retryable {
            return Err(self.stage_error(guest_offset, error));
        }
        if tries.count >= TRIES_MAX {
            let (image, tries) = (self.image_id.clone(), tries.count);
            return Err(StageError::new(ErrorKind::Network, FetchError::GaveUp { image, guest_offset, tries, source: error }));
        }
        self.note_retry(&error, guest_offset);
        self.cx.cancel.guard(tokio::time::sleep(pause(tries.count, error.retry_after_s()))).await?;
        Ok(())
    }

    fn note_retry(&self, error: &ApiError, guest_offset: u64) {
        use std::error::Error as _;
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        let line = format!("fetch at guest offset {guest_offset:#x} tried again: {error}{cause}");
        self.progress.add_retries(1);
        (self.say)(line.clone());
        let mut lines = self.retries.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() < RETRY_LINES_MAX {
            lines.push(line);
        }
    }

    /// Sends a GET, with a range or without, and checks the answer's head.
    async fn open(&self, range: Option<&Range<u64>>, tries: &mut Tries) -> Result<Body, BodyError> {
        let url = self.session.image_url(&["images", &self.image_id, "file"]);
        let sign_in = |error: crate::openstack::session::SignInError| {
            BodyError::Api(ApiError::Answer { method: Method::GET, path: url.path().to_owned(), what: error.to_string() })
        };
        let token = match tries.rejected.take() {
            Some(rejected) => self.session.renew(&rejected).await.map_err(sign_in)?,
            None => self.session.token().await.map_err(sign_in)?,
        };
        tries.used = Some(token.clone());
        let mut request = self.session.request(Method::GET, &url, &token);
        if let Some(range) = range {
            request = request.header("range", format!("bytes={}-{}", range.start, range.end - 1));
        }
        let response = match self.cx.cancel.guard(tokio::time::timeout(super::body::SILENCE, request.send())).await? {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(BodyError::Api(ApiError::connection(Method::GET, &url, error))),
            Err(_) => {
                let seconds = super::body::SILENCE.as_secs();
                return Err(BodyError::Api(ApiError::Silence { method: Method::GET, path: url.path().to_owned(), seconds }));
            }
        };
        let answer = |what: String| BodyError::Api(ApiError::Answer { method: Method::GET, path: url.path().to_owned(), what });
        let status = response.status();
        let (expected_status, expected_bytes) = match range {
            Some(range) => (StatusCode::PARTIAL_CONTENT, range.end - range.start),
            None => (StatusCode::OK, self.image_bytes),
        };
        if status.is_client_error() || status.is_server_error() {
            return Err(BodyError::Api(ApiError::from_response(Method::GET, &url, response).await));
        }
        if status != expected_status {
            return Err(answer(format!("server sent {}, expected {}", status.as_u16(), expected_status.as_u16())));
        }
        if let Some(range) = range {
            let text = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
            if !ContentRange::parse(&text).is_some_and(|found| found.answers(range, self.image_bytes)) {
                return Err(answer(format!(
                    "range {:#x}+{}: server sent Content-Range {text:?}",
                    range.start,
                    range.end - range.start
                )));
            }
        }
        if let Some(length) = response.content_length()
            && length != expected_bytes
        {
            return Err(answer(format!("server announced {length} bytes, expected {expected_bytes}")));
        }
        Ok(Body::new(response, url))
    }

    /// The bytes of an extent, from `filled` on; fewer if the body ends or fails.
    async fn fill(&self, body: &mut Body, bytes: &mut [u8], filled: &mut usize, at: u64) -> Result<(), BodyError> {
        let before = *filled;
        let result = body.fill(bytes, filled, &self.cx.cancel).await;
        self.progress.add_fetched(to_u64(*filled - before));
        result?;
        if *filled < bytes.len() {
            return Err(BodyError::Api(ApiError::Answer {
                method: Method::GET,
                path: format!("/v2/images/{}/file", self.image_id),
                what: format!("the body ended at guest offset {:#x}, too early", at + to_u64(*filled)),
            }));
        }
        Ok(())
    }
}

/// The end of the extent that begins at `start`, within one aligned 2 MiB.
fn extent_end(start: u64, end: u64) -> u64 {
    ((start / EXTENT_BYTES + 1) * EXTENT_BYTES).min(end)
}

/// Reads with one GET from the start. Returns where it stopped: the image's end, or an extent boundary if ranges were proven.
async fn sequential(shared: &Arc<Shared>, outlet: &Outlet<Extent>, look_for_ranges: bool) -> Result<u64, StageError> {
    let cancel = shared.cx.cancel.clone();
    let mut at = 0;
    let mut tries = Tries::default();
    let mut candidate = look_for_ranges.then(Candidate::default);
    let mut probing: Option<tokio::task::JoinHandle<Probe>> = None;
    let mut held: Option<(Lease, usize)> = None; // an extent that a cut body left half filled
    'again: loop {
        let opened = shared.open(None, &mut tries).await;
        let mut body = match opened {
            Ok(body) => body,
            Err(BodyError::Cancelled) => return Err(engine::Cancelled.into()),
            Err(BodyError::Api(error)) => {
                shared.after(error, at, &mut tries).await?;
                continue;
            }
        };
        // a second GET begins at the beginning: what was read before is discarded
        let mut discard = at + held.as_ref().map_or(0, |(_, filled)| to_u64(*filled));
        while discard > 0 {
            match body.next(&cancel).await {
                Ok(Some(mut chunk)) => {
                    let here = discard.min(to_u64(chunk.len()));
                    shared.progress.add_fetched(here);
                    shared.retried_bytes.fetch_add(here, Relaxed);
                    discard -= here;
                    let rest = chunk.split_off(to_usize(here));
                    body.put_back(rest);
                }
                Ok(None) => {
                    let what = "the body ended before the place it had reached before".to_owned();
                    let path = format!("/v2/images/{}/file", shared.image_id);
                    shared.after(ApiError::Answer { method: Method::GET, path, what }, at, &mut tries).await?;
                    continue 'again;
                }
                Err(BodyError::Cancelled) => return Err(engine::Cancelled.into()),
                Err(BodyError::Api(error)) => {
                    shared.after(error, at, &mut tries).await?;
                    continue 'again;
                }
            }
        }
        while at < shared.image_bytes {
            let end = extent_end(at, shared.image_bytes);
            let (mut lease, mut filled) = match held.take() {
                Some(held) => held,
                None => (shared.pool.acquire_for(&shared.cx.metrics).await?, 0),
            };
            let before = filled;
            let result = shared.fill(&mut body, &mut lease[..to_usize(end - at)], &mut filled, at).await;
            tries.arrived(to_u64(filled - before));
            match result {
                Ok(()) => {}
                Err(BodyError::Cancelled) => return Err(engine::Cancelled.into()),
                Err(BodyError::Api(error)) => {
                    held = Some((lease, filled));
                    shared.after(error, at + to_u64(filled), &mut tries).await?;
                    continue 'again;
                }
            }
            if at == 0 {
                refuse_other_formats(shared, &lease[..filled])?;
            }
            if let Some(found) = candidate.as_mut().and_then(|candidate| candidate.look(at, &lease[..filled])) {
                candidate = None;
                let shared = Arc::clone(shared);
                probing = Some(tokio::spawn(async move {
                    let (place, sample) = found;
                    probe(&shared.session, &shared.image_id, place, &sample, shared.image_bytes, &shared.cx.cancel).await
                }));
            }
            outlet.send(Extent { guest: GuestRange::new(at, end - at), payload: Payload::Bytes(lease) }).await?;
            at = end;
            if let Some(task) = probing.take_if(|task| task.is_finished()) {
                match task.await {
                    Ok(Probe::Random) if at < shared.image_bytes => return Ok(at),
                    Ok(Probe::Random) => {}
                    Ok(Probe::Sequential(why)) => (shared.say)(format!("one stream: {why}")),
                    Err(error) => return Err(StageError::bug(error)),
                }
            }
            if candidate.is_some() && at >= super::probe::SEARCH_BYTES {
                candidate = None;
                (shared.say)("one stream: the image's first 64 MiB offer no place to probe for ranges".to_owned());
            }
        }
        return check_end(shared, &mut body, &cancel).await.map(|()| at);
    }
}

/// What is converted is raw: other formats are told by their first bytes, whatever Glance calls them.
fn refuse_other_formats(shared: &Shared, head: &[u8]) -> Result<(), StageError> {
    let format = DiskFormat::detect(&head[..head.len().min(to_usize(HEAD_BYTES))], &[]);
    if format == DiskFormat::Raw {
        return Ok(());
    }
    let error = FetchError::NotRaw { image: shared.image_id.clone(), format, advice: glance_advice(format, &shared.image_id) };
    Err(StageError::new(ErrorKind::Unsupported, error))
}

/// What to do with an image of another format, with the commands.
#[must_use]
pub fn glance_advice(format: DiskFormat, image: &str) -> String {
    let image = crate::text::shell_word(image);
    match format {
        DiskFormat::Qcow2 => "it is qcow2 already and needs no conversion".to_owned(),
        DiskFormat::Iso => "an installation medium stays as it is".to_owned(),
        other => {
            let file = format!("image.{}", other.name());
            format!("openstack image save --file {file} {image}; then {}", other.advice(&file))
        }
    }
}

/// A body that goes on past the image's end is not this image.
async fn check_end(shared: &Shared, body: &mut Body, cancel: &CancelToken) -> Result<(), StageError> {
    match body.next(cancel).await {
        // a connection that fails after the last byte has delivered all of them
        Ok(None) | Err(BodyError::Api(_)) => Ok(()),
        Ok(Some(_)) => {
            let path = format!("/v2/images/{}/file", shared.image_id);
            let what = format!("the body goes on past the image's {} bytes", shared.image_bytes);
            Err(shared.stage_error(shared.image_bytes, ApiError::Answer { method: Method::GET, path, what }))
        }
        Err(BodyError::Cancelled) => Err(engine::Cancelled.into()),
    }
}

/// Reads the rest with parallel ranges.
async fn parallel(shared: &Arc<Shared>, outlet: &Outlet<Extent>, start: u64, connections: u64) -> Result<(), StageError> {
    let range = range_bytes(shared.image_bytes - start, connections);
    (shared.say)(format!("ranges are served: {connections} connections, {} MiB each time", range >> 20));
    let window = Arc::new(RangeWindow::new(start, shared.image_bytes, range, connections * range));
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let (shared, window, outlet) = (Arc::clone(shared), Arc::clone(&window), outlet.clone());
        tasks.spawn(async move {
            while let Some(range) = window.claim().await {
                let start = range.start;
                fetch_range(&shared, &outlet, range).await?;
                window.landed(start);
            }
            outlet.finish();
            Ok::<(), StageError>(())
        });
    }
    let mut first = Ok(());
    while let Some(result) = tasks.join_next().await {
        let result = result.map_err(StageError::bug).flatten();
        if result.is_err() && first.is_ok() {
            first = result;
            tasks.abort_all(); // theirs would only be consequences
        }
    }
    first
}

/// Fetches one range, going on from where a failed try stopped.
async fn fetch_range(shared: &Shared, outlet: &Outlet<Extent>, range: Range<u64>) -> Result<(), StageError> {
    let mut at = range.start;
    let mut tries = Tries::default();
    let mut held: Option<(Lease, usize)> = None;
    'again: while at < range.end {
        let (mut lease, mut filled) = match held.take() {
            Some(held) => held,
            None => (shared.pool.acquire_for(&shared.cx.metrics).await?, 0),
        };
        let from = at + to_u64(filled);
        let mut body = match shared.open(Some(&(from..range.end)), &mut tries).await {
            Ok(body) => body,
            Err(BodyError::Cancelled) => return Err(engine::Cancelled.into()),
            Err(BodyError::Api(error)) => {
                held = Some((lease, filled));
                shared.after(error, from, &mut tries).await?;
                continue;
            }
        };
        loop {
            let end = extent_end(at, range.end);
            let before = filled;
            let result = shared.fill(&mut body, &mut lease[..to_usize(end - at)], &mut filled, at).await;
            tries.arrived(to_u64(filled - before));
            match result {
                Ok(()) => {}
                Err(BodyError::Cancelled) => return Err(engine::Cancelled.into()),
                Err(BodyError::Api(error)) => {
                    held = Some((lease, filled));
                    shared.after(error, at + to_u64(filled), &mut tries).await?;
                    continue 'again;
                }
            }
            outlet.send(Extent { guest: GuestRange::new(at, end - at), payload: Payload::Bytes(lease) }).await?;
            at = end;
            if at >= range.end {
                return Ok(());
            }
            lease = shared.pool.acquire_for(&shared.cx.metrics).await?;
            filled = 0;
        }
    }
    Ok(())
}
