//! GET and PUT of an image's file: what Glance answers, and what a test made of it.

use std::{io, sync::Arc};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use serde_json::json;

use crate::{
    answer::{Answer, Body, empty, html},
    data::{Asked, BodyFault, Storing, body, inspect, parse_range},
    faults::{Faults, Ranges},
    server::{Shared, activate},
};

/// GET: the whole, or a range of it.
pub(crate) fn download(shared: &Arc<Shared>, id: &str, range: &str, project: &str) -> Answer {
    let (path, size, checksum, fault, ranges, fails) = {
        let mut state = shared.state();
        let record = match state.images.get_for(id, project) {
            Ok(record) => record,
            Err(refusal) => return Ok(*refusal),
        };
        match record.text("status") {
            "active" => {}
            "deactivated" => {
                return Ok(html(
                    StatusCode::FORBIDDEN,
                    "The requested image has been deactivated. Image data download is forbidden.",
                ));
            }
            // the real one closes the connection with no response
            _ if !range.is_empty() => return Err(io::Error::other("a range of an image without data")),
            _ => return Ok(empty(StatusCode::NO_CONTENT)),
        }
        let path = record.data.clone();
        let (size, checksum) = (record.size().unwrap_or(0), record.text("checksum").to_owned());
        let fails = Faults::take(&mut state.faults.failing_gets);
        let ranges = match state.faults.ranges {
            Ranges::RefusedAfter(0) => Ranges::Refused,
            Ranges::RefusedAfter(left) if !range.is_empty() => {
                state.faults.ranges = Ranges::RefusedAfter(left - 1);
                Ranges::Served
            }
            other => other,
        };
        (path, size, checksum, BodyFault::take(&mut state.faults), ranges, fails)
    };
    if fails {
        return Ok(html(
            StatusCode::SERVICE_UNAVAILABLE,
            "The server is currently unavailable. Please try again at a later time.",
        ));
    }
    let (status, start, end) = if range.is_empty() || ranges == Ranges::Ignored {
        (StatusCode::OK, 0, size)
    } else if ranges == Ranges::Refused {
        return Ok(html(StatusCode::BAD_REQUEST, "Getting images randomly from this store is not supported"));
    } else {
        match parse_range(range, size) {
            Asked::Range(start, end) => (StatusCode::PARTIAL_CONTENT, start, end),
            Asked::PastEnd => {
                let last = size.saturating_sub(1);
                let text =
                    format!("Invalid start position in Range header. Start position MUST be in the inclusive range [0, {last}].");
                return Ok(html(StatusCode::RANGE_NOT_SATISFIABLE, &text));
            }
            Asked::Several => {
                let text = "Requests with multiple ranges are not supported in Glance. Please use multiple single-range requests instead.";
                return Ok(html(StatusCode::BAD_REQUEST, text));
            }
            Asked::Invalid => return Ok(html(StatusCode::RANGE_NOT_SATISFIABLE, "Invalid Range header.")),
        }
    };
    // 206 and the right header, but the image's first bytes
    let (from, to) = if ranges == Ranges::FirstBytes { (0, end - start) } else { (start, end) };
    let content = match path {
        Some(path) => body(&path, from, to, fault)?,
        None => crate::answer::full(Bytes::new()),
    };
    let mut response = Response::new(content);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if !fault.is_overlong() {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(end - start));
    }
    if !checksum.is_empty() {
        // of the whole image, even on a 206
        headers.insert("content-md5", HeaderValue::from_str(&checksum).map_err(io::Error::other)?);
    }
    if status == StatusCode::PARTIAL_CONTENT {
        let shift = u64::from(ranges == Ranges::WrongContentRange);
        let text = format!("bytes {}-{}/{size}", start + shift, end - 1 + shift);
        headers.insert(CONTENT_RANGE, HeaderValue::from_str(&text).map_err(io::Error::other)?);
    }
    Ok(response)
}

/// Glance's own 500.
fn erred() -> Response<Body> {
    html(StatusCode::INTERNAL_SERVER_ERROR, "The server has either erred or is incapable of performing the requested operation.")
}

/// What becomes of one PUT.
struct PutFate {
    cut: bool,
    dies: bool,
    errs: bool,
    vanishes: bool,
    stalls: bool,
}

fn header_number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// PUT: the image becomes `active`, or what the faults make of it.
pub(crate) async fn upload(shared: &Arc<Shared>, id: &str, request: Request<Incoming>, project: &str) -> Answer {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind != "application/octet-stream" {
        return Ok(html(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Unsupported Content-Type"));
    }
    let announced = header_number(request.headers(), "content-length");
    let declared = header_number(request.headers(), "x-openstack-image-size");
    let path = shared.store.join(id);
    if Faults::take(&mut shared.state().faults.failing_puts) {
        return Ok(html(
            StatusCode::SERVICE_UNAVAILABLE,
            "The server is currently unavailable. Please try again at a later time.",
        ));
    }
    let (faults, fate, disk_format) = {
        let mut state = shared.state();
        let record = match state.images.get_mut_for(id, project) {
            Ok(record) => record,
            Err(refusal) => return Ok(*refusal),
        };
        let status = record.text("status").to_owned();
        if status != "queued" {
            return Ok(html(StatusCode::CONFLICT, &format!("Image status transition from {status} to saving is not allowed")));
        }
        if record.spoiled {
            return Ok(erred());
        }
        if record.text("disk_format").is_empty() || record.text("container_format").is_empty() {
            return Ok(html(
                StatusCode::BAD_REQUEST,
                "Properties disk_format, container_format must be set prior to saving data.",
            ));
        }
        let disk_format = record.text("disk_format").to_owned();
        record.set("status", json!("saving"));
        let faults = &mut state.faults;
        let fate = PutFate {
            cut: Faults::take(&mut faults.cut_puts) | faults.cuts_this_one(),
            dies: Faults::take(&mut faults.dying_puts),
            errs: Faults::take(&mut faults.erring_puts),
            vanishes: Faults::take(&mut faults.vanishing_puts),
            stalls: Faults::take(&mut faults.stalling_puts),
        };
        (faults.clone(), fate, disk_format)
    };
    let back_to_queued = |spoiled: bool| {
        if let Some(record) = shared.state().images.0.get_mut(id) {
            record.set("status", json!("queued"));
            record.spoiled = spoiled;
        }
        let _ = std::fs::remove_file(&path);
    };
    let mut fate = fate;
    let mut storing = Storing::create(&path)?;
    let mut incoming = request.into_body();
    while let Some(frame) = incoming.frame().await {
        let data = match frame.map(hyper::body::Frame::into_data) {
            Ok(Ok(data)) => data,
            Ok(Err(_)) => continue,
            Err(_) => {
                back_to_queued(false); // the client is gone
                return Err(io::Error::other("the client went away"));
            }
        };
        let wrote = if faults.corrupt_puts && storing.bytes() == 0 && !data.is_empty() {
            let mut damaged = data.to_vec();
            let last = damaged.len() - 1;
            damaged[last] ^= 1;
            storing.write(&damaged)
        } else {
            storing.write(&data)
        };
        if wrote.is_err() {
            back_to_queued(false);
            return Ok(html(
                StatusCode::PAYLOAD_TOO_LARGE,
                "Image storage media is full: There is not enough disk space on the image storage media.",
            ));
        }
        let half = announced.is_some_and(|announced| storing.bytes() * 2 >= announced);
        if fate.dies && half {
            return Err(io::Error::other("told to die")); // the image stays as it is
        }
        if fate.vanishes && half {
            let _ = shared.state().images.delete(id, project);
        }
        if std::mem::take(&mut fate.stalls) {
            tokio::time::sleep(faults.stall).await;
        }
        if shared.state().images.get(id).is_err() {
            let _ = std::fs::remove_file(&path);
            return Ok(html(
                StatusCode::GONE,
                &format!("Image {id} could not be found after upload. The image may have been deleted during the upload."),
            ));
        }
        let over = shared.state().quota_left(project).is_some_and(|left| storing.bytes() > left);
        if faults.quota_hit_mid_body && half || over {
            back_to_queued(false);
            // what is unread resets the connection when it closes
            return Ok(html(
                StatusCode::PAYLOAD_TOO_LARGE,
                "Image exceeds the storage quota: The size of the data would exceed the quota.",
            ));
        }
        if fate.cut && storing.bytes() >= faults.cut_after_bytes {
            back_to_queued(false);
            return Err(io::Error::other("told to cut the upload off"));
        }
    }
    let stored = storing.finish()?;
    if let Some(declared) = declared.filter(|declared| *declared != stored.bytes) {
        back_to_queued(false);
        let text = format!("Size mismatch: expected {declared} bytes, got {} bytes", stored.bytes);
        return Ok(html(StatusCode::BAD_REQUEST, &text));
    }
    let verdict =
        if faults.refuse_format { Some("Image failed safety checks".to_owned()) } else { inspect(&disk_format, &stored.head) };
    if let Some(verdict) = verdict {
        back_to_queued(true);
        return Ok(html(StatusCode::UNSUPPORTED_MEDIA_TYPE, &verdict));
    }
    if fate.errs {
        return Ok(erred());
    }
    if !faults.stuck_saving {
        activate(&mut shared.state(), id, &path, &stored);
    }
    Ok(empty(StatusCode::NO_CONTENT))
}
