//! Responses as Glance words them.

use std::io;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Response, StatusCode, header::CONTENT_TYPE};
use serde_json::Value;

/// A response's body.
pub type Body = BoxBody<Bytes, io::Error>;
/// A response, or an error that closes the connection without one.
pub type Answer = Result<Response<Body>, io::Error>;

/// A whole body at once.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// JSON with a status.
pub fn json(status: StatusCode, value: &Value) -> Response<Body> {
    with(status, "application/json", value.to_string())
}

/// No content.
#[must_use]
pub fn empty(status: StatusCode) -> Response<Body> {
    with(status, "text/html; charset=UTF-8", String::new())
}

/// An error page as WebOb makes it.
#[must_use]
pub fn html(status: StatusCode, text: &str) -> Response<Body> {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let heading = format!("{} {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
    let page = format!(
        "<html>\n <head>\n  <title>{heading}</title>\n </head>\n <body>\n  <h1>{heading}</h1>\n  {escaped}<br /><br />\n\n\n </body>\n</html>"
    );
    with(status, "text/html; charset=UTF-8", page)
}

fn with(status: StatusCode, kind: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// An answer that is an error page.
pub fn refuse<T>(status: StatusCode, text: impl AsRef<str>) -> Result<T, Box<Response<Body>>> {
    Err(Box::new(html(status, text.as_ref())))
}
