//! An image in Glance as [`ReadAt`]: for reading back what was made.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use engine::CancelToken;
use reqwest::{Method, StatusCode, header::CONTENT_RANGE};
use tokio::runtime::Handle;

use super::{body::Body, range::ContentRange};
use crate::{
    openstack::{ApiError, Session},
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// Bytes fetched at once: readers go forward mostly.
const WINDOW_BYTES: u64 = 8 << 20;

/// An image whose store serves ranges. Calls block: use it on a thread that may, never on a runtime's.
pub struct RangedFile {
    session: Session,
    image_id: String,
    image_bytes: u64,
    runtime: Handle,
    cancel: CancelToken,
    window: Mutex<(u64, Vec<u8>)>,
}

impl RangedFile {
    /// The image of this id and size; requests run on `runtime`.
    #[must_use]
    pub fn new(session: Session, image_id: String, image_bytes: u64, runtime: Handle, cancel: CancelToken) -> Self {
        Self { session, image_id, image_bytes, runtime, cancel, window: Mutex::new((0, Vec::new())) }
    }

    async fn fetch(&self, start: u64, bytes: usize) -> Result<Vec<u8>, io::Error> {
        let url = self.session.image_url(&["images", &self.image_id, "file"]);
        let range = start..start + to_u64(bytes);
        let token = self.session.token().await.map_err(io::Error::other)?;
        let request =
            self.session.request(Method::GET, &url, &token).header("range", format!("bytes={}-{}", range.start, range.end - 1));
        let response = request.send().await.map_err(|error| io::Error::other(ApiError::connection(Method::GET, &url, error)))?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(io::Error::other(ApiError::from_response(Method::GET, &url, response).await));
        }
        let content_range =
            response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).and_then(ContentRange::parse);
        if !content_range.is_some_and(|found| found.answers(&range, self.image_bytes)) {
            return Err(io::Error::other("the answer to a range had the wrong Content-Range"));
        }
        let mut buffer = vec![0; bytes];
        let mut filled = 0;
        match Body::new(response, url).fill(&mut buffer, &mut filled, &self.cancel).await {
            Ok(()) if filled == bytes => Ok(buffer),
            Ok(()) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(super::body::BodyError::Cancelled) => Err(io::Error::other(engine::Cancelled)),
            Err(super::body::BodyError::Api(error)) => Err(io::Error::other(error)),
        }
    }
}

impl ReadAt for RangedFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.image_bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset.checked_add(to_u64(buf.len())).filter(|end| *end <= self.image_bytes);
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = file_offset;
        while at < end {
            let inside = at >= window.0 && at < window.0 + to_u64(window.1.len());
            if !inside {
                let bytes = to_usize(WINDOW_BYTES.min(self.image_bytes - at));
                *window = (at, self.runtime.block_on(self.fetch(at, bytes))?);
            }
            let from = to_usize(at - window.0);
            let here = (window.1.len() - from).min(to_usize(end - at));
            let to = to_usize(at - file_offset);
            buf[to..to + here].copy_from_slice(&window.1[from..from + here]);
            at += to_u64(here);
        }
        Ok(())
    }
}
