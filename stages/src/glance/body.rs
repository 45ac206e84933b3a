//! A response's body, read with a watch for silence.

use std::time::Duration;

use bytes::Bytes;
use engine::{CancelToken, Cancelled};
use reqwest::{Method, Response, Url};

use crate::openstack::ApiError;

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
    silence: Duration,
}

impl Body {
    /// Of a response with a good status; given up after `silence`.
    #[must_use]
    pub fn new(response: Response, url: Url, silence: Duration) -> Self {
        Self { response, url, rest: Bytes::new(), silence }
    }

    /// The next bytes as they come, at most `most`; `None` at the end. Only time spent waiting for the peer counts as silence.
    ///
    /// # Errors
    /// [`BodyError`].
    pub async fn next(&mut self, most: usize, cancel: &CancelToken) -> Result<Option<Bytes>, BodyError> {
        while self.rest.is_empty() {
            match cancel.guard(tokio::time::timeout(self.silence, self.response.chunk())).await? {
                Ok(Ok(Some(chunk))) => self.rest = chunk,
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(BodyError::Api(ApiError::broken(Method::GET, &self.url, error))),
                Err(_) => {
                    return Err(BodyError::Api(ApiError::Silence {
                        method: Method::GET,
                        path: self.url.path().to_owned(),
                        seconds: self.silence.as_secs(),
                    }));
                }
            }
        }
        Ok(Some(self.rest.split_to(most.min(self.rest.len()))))
    }
}
