//! The sink stage over one PUT with the exact length.
//!
//! Glance's Ceph, Cinder and S3 stores are slow when they do not know the length, so the PUT carries `Content-Length` and
//! `x-openstack-image-size` (which newer releases check). An answer can come in the middle of the body (413 when a
//! quota is full, 410 when the image was deleted): it is read before a write error is believed.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use engine::{ErrorKind, Inlet, NoOutput, Outlet, Stage, StageContext, StageError};
use http_body::{Frame, SizeHint};
use reqwest::{
    Method, StatusCode, Url,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use tokio::sync::mpsc;

use crate::{
    extent::Chunk,
    openstack::{ApiError, Session, session::SignInError},
    progress::Progress,
    retry::Patience,
    units::to_u64,
};

/// Chunks that wait between the emitter and the connection.
const CHUNKS_WAITING: usize = 2;

/// Why an upload failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadError {
    /// Glance refused, or the connection failed.
    #[error("uploading image {image}: {sent} of {total} bytes sent{advice}")]
    Api {
        /// The image.
        image: String,
        /// Bytes handed to the connection.
        sent: u64,
        /// Bytes in all.
        total: u64,
        /// What to do, with a leading `; `, or nothing.
        advice: &'static str,
        /// What Glance said, or did not.
        #[source]
        source: ApiError,
    },
    /// The token could not be renewed.
    #[error(transparent)]
    SignIn(#[from] SignInError),
}

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadReport {
    /// Bytes.
    pub sent_bytes: u64,
    /// Glance answered; if not, it had all bytes, and may still be at work on them.
    pub answered: bool,
}

/// The stage.
pub struct Upload {
    /// Signed in.
    pub session: Session,
    /// The image, which is `queued`.
    pub image_id: String,
    /// Exact length of the file.
    pub total_bytes: u64,
    /// Told of bytes taken by the connection.
    pub progress: Progress,
    /// When to give up.
    pub patience: Patience,
}

/// A request body of known length, fed through a channel.
struct ExactBody {
    chunks: mpsc::Receiver<Bytes>,
    left: u64,
    taken: Arc<AtomicU64>,
    progress: Progress,
}

impl http_body::Body for ExactBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match self.chunks.poll_recv(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(chunk)) => {
                let bytes = to_u64(chunk.len());
                let Some(left) = self.left.checked_sub(bytes) else {
                    return Poll::Ready(Some(Err(std::io::Error::other("more bytes than announced"))));
                };
                self.left = left;
                self.taken.fetch_add(bytes, Relaxed);
                self.progress.add_uploaded(bytes);
                Poll::Ready(Some(Ok(Frame::data(chunk))))
            }
            // A body that ends early must not look complete: the connection is broken off.
            Poll::Ready(None) if self.left > 0 => Poll::Ready(Some(Err(std::io::Error::other("the upload was broken off")))),
            Poll::Ready(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

impl Stage for Upload {
    type In = Chunk;
    type Out = NoOutput;
    type Report = UploadReport;

    async fn run(self, inlet: Inlet<Chunk>, outlet: Outlet<NoOutput>, cx: StageContext) -> Result<UploadReport, StageError> {
        // a fresh token right before a long transfer: Glance may use it until the end
        let token = cx.cancel.guard(self.session.token()).await?;
        let token = token.map_err(|error| StageError::new(ErrorKind::Remote, UploadError::from(error)))?;
        let url = self.session.image_url(&["images", &self.image_id, "file"]);
        let taken = Arc::new(AtomicU64::new(0));
        let (feed, chunks) = mpsc::channel(CHUNKS_WAITING);
        let body = ExactBody { chunks, left: self.total_bytes, taken: Arc::clone(&taken), progress: self.progress.clone() };
        let request = self
            .session
            .request(Method::PUT, &url, &token)
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, self.total_bytes)
            .header("x-openstack-image-size", self.total_bytes)
            .body(reqwest::Body::wrap(body))
            .send();
        tokio::pin!(request);

        // nothing to send: then silence is ours, not the peer's
        let starved = AtomicBool::new(false);
        let feeding = async {
            loop {
                starved.store(true, Relaxed);
                let Some(Chunk(chunk)) = inlet.recv().await? else { break };
                self.session.pace(to_u64(chunk.len())).await;
                starved.store(false, Relaxed);
                if feed.send(chunk).await.is_err() {
                    break; // the request has ended: its answer says why
                }
            }
            // what still waits in the channel is there to be taken
            starved.store(false, Relaxed);
            drop(feed);
            Ok::<(), StageError>(())
        };
        tokio::pin!(feeding);
        let mut fed = false;
        let response = loop {
            tokio::select! {
                biased;
                response = &mut request => break response,
                result = &mut feeding, if !fed => {
                    result?;
                    fed = true;
                }
                stalled = self.stall(&taken, &starved, &url) => return Err(self.failed(stalled, &taken)),
                () = cx.cancel.cancelled() => return Err(engine::Cancelled.into()),
            }
        };
        let answered = response.is_ok();
        match response {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => {
                let error = cx.cancel.guard(ApiError::from_response(Method::PUT, &url, response)).await?;
                if error.status() == Some(StatusCode::UNAUTHORIZED) {
                    // for whoever tries again; if this fails, that try will say so
                    let _ = cx.cancel.guard(self.session.renew(&token)).await?;
                }
                return Err(self.failed(error, &taken));
            }
            Err(error) => {
                let error = ApiError::connection(Method::PUT, &url, error);
                // Everything was sent and only the answer is missing: whether it arrived, size and hash will tell.
                let all_sent = taken.load(Relaxed) == self.total_bytes;
                if let Err(error) = cx.cancel.guard(self.what_glance_has(error, all_sent)).await? {
                    return Err(self.failed(error, &taken));
                }
            }
        }
        // An answer of success before the last byte was taken is none.
        if taken.load(Relaxed) != self.total_bytes {
            let what = "answered with success before the whole image was sent".to_owned();
            let error = ApiError::Answer { method: Method::PUT, path: url.path().to_owned(), what };
            return Err(self.failed(error, &taken));
        }
        if !fed {
            cx.cancel.guard(feeding).await??; // everything is taken: only the end of input is left to be seen
        }
        if inlet.recv().await?.is_some() {
            return Err(StageError::bug("there was more to send than the image's length"));
        }
        outlet.finish();
        Ok(UploadReport { sent_bytes: self.total_bytes, answered })
    }
}

impl Upload {
    /// Ends when the connection has taken nothing for too long although there was something to take.
    async fn stall(&self, taken: &AtomicU64, starved: &AtomicBool, url: &Url) -> ApiError {
        let mut last = taken.load(Relaxed);
        let mut since = Instant::now();
        let look_every = Duration::from_secs(1).min(self.patience.stall / 4);
        loop {
            tokio::time::sleep(look_every).await;
            let now = taken.load(Relaxed);
            let complete = now == self.total_bytes;
            if now != last || (starved.load(Relaxed) && !complete) {
                (last, since) = (now, Instant::now());
            }
            let patience = if complete { self.patience.answer } else { self.patience.stall };
            if since.elapsed() > patience {
                return ApiError::Silence { method: Method::PUT, path: url.path().to_owned(), seconds: patience.as_secs() };
            }
        }
    }

    /// The connection broke and no answer could be read: what became of the image says more.
    async fn what_glance_has(&self, error: ApiError, all_sent: bool) -> Result<(), ApiError> {
        Err(match self.session.image(&self.image_id).await {
            Ok(image) if all_sent && matches!(image.status.as_str(), "active" | "saving") => return Ok(()),
            Ok(image) => {
                use std::error::Error as _;
                let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
                let what = format!("the connection broke{cause}; Glance has the image as {}", image.status);
                let path = format!("/v2/images/{}/file", self.image_id);
                ApiError::Answer { method: Method::PUT, path, what }
            }
            Err(gone) if gone.status() == Some(StatusCode::NOT_FOUND) => gone,
            Err(_) => error,
        })
    }

    fn failed(&self, source: ApiError, taken: &AtomicU64) -> StageError {
        let advice = match source.status() {
            Some(StatusCode::PAYLOAD_TOO_LARGE) => {
                "; the quota or the size limit is reached: nothing is left of it. Make room (virta image list shows what takes it), or convert to a local file"
            }
            Some(StatusCode::UNSUPPORTED_MEDIA_TYPE) => "; Glance does not accept what is in it",
            Some(StatusCode::FORBIDDEN) => "; this user may not upload images here",
            Some(StatusCode::CONFLICT) => "; somebody else uploads to it, or it has data already",
            Some(StatusCode::GONE | StatusCode::NOT_FOUND) => "; somebody deleted it meanwhile",
            _ => "",
        };
        let kind = if source.status().is_some() { ErrorKind::Remote } else { ErrorKind::Network };
        let (image, sent, total) = (self.image_id.clone(), taken.load(Relaxed), self.total_bytes);
        StageError::new(kind, UploadError::Api { image, sent, total, advice, source })
    }
}
