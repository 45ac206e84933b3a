//! An image's bytes from any offset on, over connections that break.
//!
//! A [`Connection`] reads forward. Where the store serves ranges it asks for the range that is left; where it does not, it asks for
//! the whole image again and discards what it had. Tries are bounded at each spot, and a mebibyte that arrives starts their
//! count anew.

use std::ops::Range;

use engine::{CancelToken, Cancelled, ErrorKind, StageError};
use reqwest::{Method, StatusCode, header::CONTENT_RANGE};
use tokio::sync::watch;

use super::{
    body::{Body, BodyError},
    range::ContentRange,
};
use crate::{
    openstack::{ApiError, Image, Session, config::Secret},
    progress::Progress,
    retry::{PROGRESS_BYTES, Patience, Retries},
    units::{to_u64, to_usize},
    zero::is_zero,
};

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// A request failed for good.
    #[error("fetching image {image} at file offset {file_offset:#x}")]
    Api {
        /// The image.
        image: String,
        /// How far it was.
        file_offset: u64,
        /// What Glance said, or did not.
        #[source]
        source: ApiError,
    },
    /// Too many tries at one spot.
    #[error("fetching image {image} at file offset {file_offset:#x}: gave up after {tries} tries")]
    GaveUp {
        /// The image.
        image: String,
        /// How far it was.
        file_offset: u64,
        /// How often.
        tries: u32,
        /// The last failure.
        #[source]
        source: ApiError,
    },
}

/// An image that can be read, and who hears of its troubles. Clones share all of it.
#[derive(Clone)]
pub struct Remote {
    /// Signed in where it is.
    pub session: Session,
    /// Its id.
    pub image_id: String,
    /// Its size, bytes.
    pub image_bytes: u64,
    /// Told of bytes that arrive.
    pub progress: Progress,
    /// Told of retries.
    pub retries: Retries,
    /// When to give up.
    pub patience: Patience,
    /// Ends waits.
    pub cancel: CancelToken,
    /// These bytes were, or will be, received once more than the conversion itself needs.
    pub again: bool,
}

impl Remote {
    /// An image as something to read, by what its record says.
    #[must_use]
    pub fn of_image(
        session: &Session,
        image: &Image,
        progress: &Progress,
        retries: Retries,
        patience: Patience,
        cancel: &CancelToken,
    ) -> Self {
        Self {
            session: session.clone(),
            image_id: image.id.clone(),
            image_bytes: image.size.unwrap_or(0),
            progress: progress.clone(),
            retries,
            patience,
            cancel: cancel.clone(),
            again: false,
        }
    }
}

impl From<FetchError> for StageError {
    fn from(error: FetchError) -> Self {
        let kind = match &error {
            FetchError::Api { source, .. } | FetchError::GaveUp { source, .. } if source.status().is_none() => ErrorKind::Network,
            _ => ErrorKind::Remote,
        };
        Self::new(kind, error)
    }
}

/// Why a read did not happen.
#[derive(Debug)]
pub enum ReadError {
    /// The run was cancelled.
    Cancelled,
    /// For good.
    Failed(FetchError),
}

impl From<Cancelled> for ReadError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<ReadError> for StageError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Cancelled => Cancelled.into(),
            ReadError::Failed(error) => error.into(),
        }
    }
}

/// Failures at one spot: is another try worth it?
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

/// How an image is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// By ranges.
    Ranges,
    /// As a whole, from the start.
    Whole,
}

/// What a part of an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// Zeros, and nothing else.
    Zeros,
    /// Something.
    Data,
}

/// A buffer being filled. As long as all that came is zeros, nothing is written to it.
struct Filling<'a> {
    buf: &'a mut [u8],
    filled: usize,
    content: PartKind,
}

impl Filling<'_> {
    const fn left(&self) -> usize {
        self.buf.len() - self.filled
    }

    /// The next bytes, at most as many as are left.
    fn take(&mut self, chunk: &[u8]) {
        let end = self.filled + chunk.len();
        if self.content == PartKind::Zeros && !is_zero(chunk) {
            self.buf[..self.filled].fill(0);
            self.content = PartKind::Data;
        }
        if self.content == PartKind::Data {
            self.buf[self.filled..end].copy_from_slice(chunk);
        }
        self.filled = end;
    }
}

/// Reads forward. One request at a time.
pub struct Connection {
    remote: Remote,
    asking: Asking,
    tries: Tries,
    /// The open body, the image offset of its next byte, and that of its end.
    body: Option<(Body, u64, u64)>,
    /// How far this connection ever got: what is received below is received again.
    reached: u64,
    /// Whoever probes for ranges tells here what came of it.
    ranges: Option<watch::Receiver<Option<bool>>>,
}

impl Connection {
    /// Nothing is asked for yet.
    #[must_use]
    pub fn new(remote: Remote, asking: Asking) -> Self {
        Self { remote, asking, tries: Tries::default(), body: None, reached: 0, ranges: None }
    }

    /// Somebody finds out whether ranges are served: when the body breaks, that is waited for, for a whole image that is asked for again may break at
    /// the same place for ever.
    pub fn will_know(&mut self, ranges: watch::Receiver<Option<bool>>) {
        self.ranges = Some(ranges);
    }

    async fn learn_ranges(&mut self) {
        if self.asking == Asking::Whole
            && let Some(ranges) = self.ranges.as_mut()
            && let Ok(Ok(found)) = self.remote.cancel.guard(ranges.wait_for(Option::is_some)).await
            && *found == Some(true)
        {
            self.asking = Asking::Ranges;
        }
    }

    /// Goes on by ranges: what is open is a range up to the image's end from now on.
    #[must_use]
    pub fn by_ranges(self) -> Self {
        Self { asking: Asking::Ranges, ..self }
    }

    /// The image.
    #[must_use]
    pub const fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Fills `buf` with the image's bytes from `at` on. Where ranges are asked for, a new request goes up to `range_end`.
    ///
    /// # Errors
    /// [`ReadError`], when trying again does not help.
    ///
    /// # Cancel safety
    /// Not safe: bytes that arrived may be lost with the future. Cancel with the remote's token.
    pub async fn read(&mut self, at: u64, range_end: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        if self.read_unless_zero(at, range_end, buf).await? == PartKind::Zeros {
            buf.fill(0);
        }
        Ok(())
    }

    /// [`Connection::read`] for whoever has no use for zeros: where all bytes are, `buf` is left with anything in it. Most of a disk is zeros, and
    /// each piece is looked at while it is in the processor's cache: nothing is copied, and nothing looked at once more.
    ///
    /// # Errors
    /// [`ReadError`], when trying again does not help.
    ///
    /// # Cancel safety
    /// As [`Connection::read`].
    pub async fn read_unless_zero(&mut self, at: u64, range_end: u64, buf: &mut [u8]) -> Result<PartKind, ReadError> {
        let mut filling = Filling { buf, filled: 0, content: PartKind::Zeros };
        loop {
            match self.try_read(at, range_end, &mut filling).await {
                Ok(()) => return Ok(filling.content),
                Err(BodyError::Cancelled) => return Err(ReadError::Cancelled),
                Err(BodyError::Api(error)) => {
                    self.body = None;
                    self.after(error, at + to_u64(filling.filled)).await?;
                    self.learn_ranges().await;
                }
            }
        }
    }

    async fn try_read(&mut self, at: u64, range_end: u64, filling: &mut Filling<'_>) -> Result<(), BodyError> {
        while filling.left() > 0 {
            let wanted = at + to_u64(filling.filled);
            let fits = |place: u64, end: u64| match self.asking {
                Asking::Whole => place <= wanted,
                Asking::Ranges => place == wanted && wanted < end,
            };
            if !self.body.as_ref().is_some_and(|(_, place, end)| fits(*place, *end)) {
                self.body = None;
                let range = (self.asking == Asking::Ranges).then_some(wanted..range_end.max(at + to_u64(filling.buf.len())));
                let body = self.open(range.as_ref()).await?;
                self.body = Some(match range {
                    Some(range) => (body, range.start, range.end),
                    None => (body, 0, self.remote.image_bytes),
                });
            }
            let Some((body, place, _)) = self.body.as_mut() else { continue };
            let skip = wanted - *place;
            let most = if skip > 0 { to_usize(skip) } else { filling.left() };
            let Some(chunk) = body.next(most, &self.remote.cancel).await? else {
                let what = format!("the body ended at file offset {place:#x}, too early");
                return Err(self.answer(what));
            };
            let bytes = to_u64(chunk.len());
            *place += bytes;
            let place = *place;
            self.arrived(place, bytes);
            self.remote.cancel.guard(self.remote.session.pace(bytes)).await?;
            if skip == 0 {
                filling.take(&chunk);
            }
        }
        Ok(())
    }

    /// Bytes up to `place` have come.
    fn arrived(&mut self, place: u64, bytes: u64) {
        let progress = &self.remote.progress;
        progress.add_fetched(bytes);
        // what this connection had before is received once more
        let known = self.reached.saturating_sub(place - bytes).min(bytes);
        progress.add_retried(known);
        if self.remote.again {
            progress.add_reread(bytes - known);
        }
        if place > self.reached {
            self.tries.arrived_bytes += place - self.reached.max(place - bytes);
            self.reached = place;
            if self.tries.arrived_bytes >= PROGRESS_BYTES {
                self.tries = Tries::default();
            }
        }
    }

    /// Waits for something else than the peer; a body that nobody reads meanwhile is closed before the server cuts it.
    pub async fn while_waiting<F: Future>(&mut self, wait: F) -> F::Output {
        tokio::pin!(wait);
        if self.body.is_some() {
            match tokio::time::timeout(self.remote.patience.unread, &mut wait).await {
                Ok(output) => return output,
                Err(_) => self.body = None,
            }
        }
        wait.await
    }

    /// After the last byte: a body that goes on is not this image's.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn check_end(&mut self) -> Result<(), ReadError> {
        let Some((mut body, ..)) = self.body.take() else { return Ok(()) };
        match body.next(1, &self.remote.cancel).await {
            // a connection that fails after the last byte has delivered all of them
            Ok(None) | Err(BodyError::Api(_)) => Ok(()),
            Ok(Some(_)) => {
                let what = format!("the body goes on past the image's {} bytes", self.remote.image_bytes);
                let BodyError::Api(source) = self.answer(what) else { return Err(ReadError::Cancelled) };
                let (image, file_offset) = (self.remote.image_id.clone(), self.remote.image_bytes);
                Err(ReadError::Failed(FetchError::Api { image, file_offset, source }))
            }
            Err(BodyError::Cancelled) => Err(ReadError::Cancelled),
        }
    }

    /// Closes what is open.
    pub fn close(&mut self) {
        self.body = None;
    }

    /// Waits before another try, or gives up.
    async fn after(&mut self, error: ApiError, file_offset: u64) -> Result<(), ReadError> {
        let tries = &mut self.tries;
        tries.count += 1;
        tries.arrived_bytes = 0;
        let renew = error.status() == Some(StatusCode::UNAUTHORIZED) && !tries.renewed;
        if renew {
            tries.renewed = true;
            tries.rejected = tries.used.clone();
        }
        // a short or overlong body, or a PartKind-Range of another range, is an accident worth another try, too
        let retryable = renew || error.is_retryable() || matches!(error, ApiError::Answer { .. });
        let image = self.remote.image_id.clone();
        if !retryable {
            return Err(ReadError::Failed(FetchError::Api { image, file_offset, source: error }));
        }
        if tries.count >= self.remote.patience.tries {
            let tries = tries.count;
            return Err(ReadError::Failed(FetchError::GaveUp { image, file_offset, tries, source: error }));
        }
        let cause = crate::text::causes(&error);
        self.remote.retries.note(format!("fetch at file offset {file_offset:#x} tried again: {cause}"));
        if !renew {
            let pause = self.remote.patience.pause_after(tries.count, error.retry_after_s());
            self.remote.cancel.guard(tokio::time::sleep(pause)).await?;
        }
        Ok(())
    }

    fn answer(&self, what: String) -> BodyError {
        let path = self.remote.session.image_url(&["images", &self.remote.image_id, "file"]).path().to_owned();
        BodyError::Api(ApiError::Answer { method: Method::GET, path, what })
    }

    /// Sends a GET, with a range or without, and checks the answer's head.
    async fn open(&mut self, range: Option<&Range<u64>>) -> Result<Body, BodyError> {
        let Remote { session, image_id, image_bytes, patience, cancel, .. } = &self.remote;
        let url = session.image_url(&["images", image_id, "file"]);
        let token = match self.tries.rejected.take() {
            Some(rejected) => cancel.guard(session.renew(&rejected)).await?,
            None => cancel.guard(session.token()).await?,
        };
        let token = token.map_err(|error| self.answer(crate::text::causes(&error)))?;
        self.tries.used = Some(token.clone());
        let mut request = session.request(Method::GET, &url, &token);
        if let Some(range) = range {
            request = request.header("range", format!("bytes={}-{}", range.start, range.end - 1));
        }
        let response = match cancel.guard(tokio::time::timeout(patience.silence, request.send())).await? {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(BodyError::Api(ApiError::connection(Method::GET, &url, error))),
            Err(_) => {
                let seconds = patience.silence.as_secs();
                return Err(BodyError::Api(ApiError::Silence { method: Method::GET, path: url.path().to_owned(), seconds }));
            }
        };
        let status = response.status();
        let (expected_status, expected_bytes) = match range {
            Some(range) => (StatusCode::PARTIAL_CONTENT, range.end - range.start),
            None => (StatusCode::OK, *image_bytes),
        };
        if status.is_client_error() || status.is_server_error() {
            return Err(BodyError::Api(cancel.guard(ApiError::from_response(Method::GET, &url, response)).await?));
        }
        if status != expected_status {
            return Err(self.answer(format!("server sent {}, expected {}", status.as_u16(), expected_status.as_u16())));
        }
        if let Some(range) = range {
            let text = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
            if !ContentRange::parse(text).is_some_and(|found| found.answers(range, *image_bytes)) {
                let what = format!("range {:#x}+{}: server sent PartKind-Range {text:?}", range.start, range.end - range.start);
                return Err(self.answer(what));
            }
        }
        if let Some(length) = response.content_length()
            && length != expected_bytes
        {
            return Err(self.answer(format!("server announced {length} bytes, expected {expected_bytes}")));
        }
        Ok(Body::new(response, url, patience.silence))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills a buffer that holds somebody else's bytes, in pieces of `piece` bytes.
    fn filled(bytes: &[u8], piece: usize) -> (PartKind, Vec<u8>) {
        let mut buf = vec![0xff; bytes.len()];
        let mut filling = Filling { buf: &mut buf, filled: 0, content: PartKind::Zeros };
        bytes.chunks(piece).for_each(|chunk| filling.take(chunk));
        assert_eq!(filling.left(), 0);
        (filling.content, buf)
    }

    #[test]
    fn zeros_are_told_and_what_stood_in_the_buffer_never_shows_through() {
        for piece in [1, 7, 512, 4096, 10_000] {
            assert_eq!(filled(&[0; 10_000], piece).0, PartKind::Zeros, "pieces of {piece}");
            for at in [0, 1, 511, 512, 4096, 9_999] {
                let mut bytes = vec![0; 10_000];
                bytes[at] = 1;
                assert_eq!(filled(&bytes, piece), (PartKind::Data, bytes.clone()), "pieces of {piece}, data at {at}");
            }
        }
    }
}
