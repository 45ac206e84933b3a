//! A response's body, read with a watch for silence.

use std::time::Duration;

use bytes::Bytes;
use engine::{CancelToken, Cancelled};
use reqwest::{Method, Response, Url};

use crate::openstack::ApiError;

/// A peer that sends nothing for so long is given up. Never a total time-out: hour-long bodies are normal.
pub const SILENCE: Duration = Duration::from_secs(60);

/// Why a body ended early, or was not read on.
#[derive(Debug)]
pub enum BodyError {
    /// The run was cancelled.
    Cancelled,
    /// The connection failed or fell silent.
    Api(ApiError),
}

impl From<Cancelled> for BodyError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

/// A body being read. What arrives is copied into buffers that were leased before it was asked for.
pub struct Body {
    response: Response,
    url: Url,
    rest: Bytes,
}

impl Body {
    /// Of a response with a good status.
    #[must_use]
    pub fn new(response: Response, url: Url) -> Self {
        Self { response, url, rest: Bytes::new() }
    }

    /// The next bytes as they come; `None` at the end. Only time spent waiting for the peer counts as silence.
    ///
    /// # Errors
    /// [`BodyError`].
    pub async fn next(&mut self, cancel: &CancelToken) -> Result<Option<Bytes>, BodyError> {
        if !self.rest.is_empty() {
            return Ok(Some(std::mem::take(&mut self.rest)));
        }
        match cancel.guard(tokio::time::timeout(SILENCE, self.response.chunk())).await? {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(BodyError::Api(ApiError::broken(Method::GET, &self.url, error))),
            Err(_) => Err(BodyError::Api(ApiError::Silence {
                method: Method::GET,
                path: self.url.path().to_owned(),
                seconds: SILENCE.as_secs(),
            })),
        }
    }

    /// Gives back what was taken too much.
    pub fn put_back(&mut self, rest: Bytes) {
        debug_assert!(self.rest.is_empty(), "nothing is between");
        self.rest = rest;
    }

    /// Fills `buf`; returns how much of it was filled when the body ended.
    ///
    /// # Errors
    /// [`BodyError`], with what was filled before it in `filled`.
    pub async fn fill(&mut self, buf: &mut [u8], filled: &mut usize, cancel: &CancelToken) -> Result<(), BodyError> {
        while *filled < buf.len() {
            let Some(mut chunk) = self.next(cancel).await? else { return Ok(()) };
            let here = chunk.len().min(buf.len() - *filled);
            let taken = chunk.split_to(here);
            buf[*filled..*filled + here].copy_from_slice(&taken);
            *filled += here;
            self.rest = chunk;
        }
        Ok(())
    }
}
