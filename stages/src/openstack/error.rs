//! What a service answered, with all that its operators ask for.

use std::fmt;

use reqwest::{Method, Response, StatusCode, Url};

use crate::{retry::Retryable, text::printable};

/// Bytes of an error body that are read.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Characters of it that are shown.
const SHOWN_CHARS: usize = 600;

/// A request that did not get what it asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// The service answered with an error.
    #[error("{0}")]
    Status(Box<StatusError>),
    /// No answer: the connection failed.
    #[error("{method} {path}: no answer")]
    Connection {
        /// The request's method.
        method: Method,
        /// Its path; no query, which may hold secrets.
        path: String,
        /// Why, without the URL.
        #[source]
        source: reqwest::Error,
    },
    /// The answer's body broke off.
    #[error("{method} {path}: the connection broke in the middle of the body")]
    Broken {
        /// The request's method.
        method: Method,
        /// Its path.
        path: String,
        /// Why, without the URL.
        #[source]
        source: reqwest::Error,
    },
    /// No answer in time.
    #[error("{method} {path}: nothing came for {seconds} s")]
    Silence {
        /// The request's method.
        method: Method,
        /// Its path.
        path: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The credentials are not good any more, so nothing can be asked.
    #[error("{method} {path}: {what}")]
    Credentials {
        /// The request's method.
        method: Method,
        /// Its path.
        path: String,
        /// What Keystone said.
        what: String,
    },
    /// An answer that is not what the API promises.
    #[error("{method} {path}: {what}")]
    Answer {
        /// The request's method.
        method: Method,
        /// Its path.
        path: String,
        /// What is wrong with it.
        what: String,
    },
}

/// An answer with an error status.
#[derive(Debug, Clone)]
pub struct StatusError {
    /// The request's method.
    pub method: Method,
    /// Its path.
    pub path: String,
    /// The status.
    pub status: StatusCode,
    /// The service's own text, as plain text.
    pub text: String,
    /// `x-openstack-request-id`.
    pub request_id: Option<String>,
    /// When, UTC.
    pub at: String,
    /// Seconds to wait before the next try, if the service said so.
    pub retry_after_s: Option<u64>,
}

impl fmt::Display for StatusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.method, self.path, self.status)?;
        if !self.text.is_empty() {
            write!(f, ": {}", self.text)?;
        }
        write!(f, " (")?;
        if let Some(id) = &self.request_id {
            write!(f, "request {id}, ")?;
        }
        write!(f, "{})", self.at)
    }
}

impl ApiError {
    /// Reads an answer with an error status to its end, or to a limit.
    pub async fn from_response(method: Method, url: &Url, mut response: Response) -> Self {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let request_id = header("x-openstack-request-id").or_else(|| header("x-compute-request-id")).map(|id| printable(&id));
        let retry_after_s = header("retry-after").and_then(|value| value.trim().parse().ok());
        let status = response.status();
        let mut body = Vec::new();
        // the text is a help, not a need: if it does not come, the status has to do
        let reading = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                body.extend_from_slice(&chunk);
                if body.len() > BODY_BYTES_MAX {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(std::time::Duration::from_secs(10), reading).await;
        Self::Status(Box::new(StatusError {
            method,
            path: url.path().to_owned(),
            status,
            text: plain_text(&String::from_utf8_lossy(&body), status),
            request_id,
            at: now_utc(),
            retry_after_s,
        }))
    }

    /// A connection error without the URL, whose query may hold secrets.
    #[must_use]
    pub fn connection(method: Method, url: &Url, source: reqwest::Error) -> Self {
        Self::Connection { method, path: url.path().to_owned(), source: source.without_url() }
    }

    /// A body that broke off.
    #[must_use]
    pub fn broken(method: Method, url: &Url, source: reqwest::Error) -> Self {
        Self::Broken { method, path: url.path().to_owned(), source: source.without_url() }
    }

    /// The status, if there was an answer.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status(error) => Some(error.status),
            _ => None,
        }
    }

    /// What the service says about when to come back, seconds.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::Status(error) => error.retry_after_s,
            _ => None,
        }
    }

    /// Could another try get what this one did not?
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Status(error) => {
                error.status.is_server_error() && error.status != StatusCode::NOT_IMPLEMENTED
                    || matches!(error.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            Self::Connection { source, .. } => !source.is_builder(),
            Self::Broken { .. } | Self::Silence { .. } => true,
            Self::Answer { .. } | Self::Credentials { .. } => false,
        }
    }

    /// May what was asked for have been done, or be yet? A request is repeated inside, so a sign-in that failed or was refused may have been its
    /// second try.
    #[must_use]
    pub fn may_have_been_heard(&self) -> bool {
        self.is_retryable()
            || matches!(self, Self::Answer { .. } | Self::Credentials { .. })
            || self.status() == Some(StatusCode::UNAUTHORIZED)
    }
}

impl Retryable for ApiError {
    fn is_retryable(&self) -> bool {
        self.is_retryable()
    }

    fn retry_after_s(&self) -> Option<u64> {
        self.retry_after_s()
    }
}

/// Now, in UTC, to the second.
#[must_use]
pub fn now_utc() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The service's message out of its JSON or HTML.
fn plain_text(body: &str, status: StatusCode) -> String {
    if let Ok(value) = serde_json::from_str::<serde_json::Value>(body) {
        // {"error": {"message": …}} (Keystone), {"badRequest": {"message": …}} (Nova), {"message": …}
        let nested = value.as_object().and_then(|object| object.values().find_map(|inner| inner.get("message")));
        if let Some(message) = value.get("message").or(nested).and_then(|message| message.as_str()) {
            return shorten(message);
        }
    }
    let mut text = String::new();
    let mut in_tag = false;
    for c in body.split("</title>").last().unwrap_or_default().chars() {
        match c {
            '<' => in_tag = true,
            '>' if in_tag => {
                in_tag = false;
                text.push(' ');
            }
            _ if !in_tag => text.push(c),
            _ => {}
        }
    }
    let text = text
        .replace("&quot;", "\"")
        .replace("&#x27;", "'")
        .replace("&#39;", "'")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // WebOb repeats the status as the page's heading
    let heading = format!("{} {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
    shorten(text.strip_prefix(&heading).unwrap_or(&text).trim())
}

fn shorten(text: &str) -> String {
    let text = printable(text.trim());
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glances_html_and_keystones_json_become_their_message() {
        let html = "<html>\n <head>\n  <title>404 Not Found</title>\n </head>\n <body>\n  <h1>404 Not Found</h1>\n  No image found with ID &quot;x&quot;<br /><br />\n\n\n </body>\n</html>";
        assert_eq!(plain_text(html, StatusCode::NOT_FOUND), "No image found with ID \"x\"");
        let json =
            r#"{"error":{"code":401,"message":"The request you have made requires authentication.","title":"Unauthorized"}}"#;
        assert_eq!(plain_text(json, StatusCode::UNAUTHORIZED), "The request you have made requires authentication.");
        assert_eq!(plain_text("quota\u{1b}[31m exceeded", StatusCode::PAYLOAD_TOO_LARGE), "quota\\u{1b}[31m exceeded");
        assert!(plain_text(&"x".repeat(5000), StatusCode::BAD_REQUEST).chars().count() <= SHOWN_CHARS + 1);
    }
}
