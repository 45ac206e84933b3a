//! Does this image store serve ranges, really?
//!
//! Proof is a 206 with the exact Content-Range and the exact length at a guest offset above 0, whose bytes equal that part
//! of a sequential read and differ from the image's first bytes. Anything less is no proof: glance_store answers
//! 400 on Ceph, Swift and S3; proxies answer 200; and an old release note of Glance promises "the entire image content
//! delivered despite the 206". The sequential read is the fetch itself, so a probe costs one small request.

use std::ops::Range;

use reqwest::{Method, StatusCode, header::CONTENT_RANGE};

use super::{body::Body, connection::Remote, range::ContentRange};
use crate::units::{to_u64, to_usize};

/// Bytes that are compared.
pub const SAMPLE_BYTES: usize = 4096;
/// A place to probe has to be found within the image's first 64 MiB; else it is read sequentially.
pub const SEARCH_BYTES: u64 = 64 << 20;

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Ranges are served.
    Random,
    /// They are not; why, for the notice.
    Sequential(String),
}

/// Tries where the answer says nothing about ranges: no answer, a server's own error, a body that breaks off.
const TRIES: u32 = 3;

/// Why one try proved nothing.
enum Doubt {
    /// The store does not serve ranges, and will not the next time.
    Settled(String),
    /// The way there was disturbed; another try may tell.
    Disturbed(String),
}

/// Asks for the range that `sample` was read from, and compares.
pub async fn probe(remote: &Remote, at: u64, sample: &[u8]) -> Probe {
    let mut tries = 1;
    loop {
        match once(remote, at, sample).await {
            Ok(()) => return Probe::Random,
            Err(Doubt::Disturbed(_)) if tries < TRIES && !remote.cancel.is_cancelled() => {
                // a pause cut short by a cancel ends in the next try
                let _ = remote.cancel.guard(tokio::time::sleep(remote.patience.pause_after(tries, None))).await;
                tries += 1;
            }
            Err(Doubt::Settled(why) | Doubt::Disturbed(why)) => return Probe::Sequential(why),
        }
    }
}

async fn once(remote: &Remote, at: u64, sample: &[u8]) -> Result<(), Doubt> {
    let settled = |why: &str| Doubt::Settled(why.to_owned());
    let disturbed = |why: &str| Doubt::Disturbed(why.to_owned());
    let url = remote.session.image_url(&["images", &remote.image_id, "file"]);
    let range: Range<u64> = at..at + to_u64(sample.len());
    let token = remote.session.token().await.map_err(|_| disturbed("the token could not be renewed"))?;
    let request = remote
        .session
        .request(Method::GET, &url, &token)
        .header("range", format!("bytes={}-{}", range.start, range.end - 1))
        .send();
    let response = match remote.cancel.guard(tokio::time::timeout(remote.patience.silence, request)).await {
        Ok(Ok(Ok(response))) => response,
        _ => return Err(disturbed("the range got no answer")),
    };
    let status = response.status();
    if status != StatusCode::PARTIAL_CONTENT {
        let why = format!("the image store answered {} to a range", status.as_u16());
        let passing = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        return Err(if passing { Doubt::Disturbed(why) } else { Doubt::Settled(why) });
    }
    let content_range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).and_then(ContentRange::parse);
    if !content_range.is_some_and(|found| found.answers(&range, remote.image_bytes)) {
        return Err(settled("the answer to a range had the wrong Content-Range"));
    }
    let mut body = Body::new(response, url, remote.patience.silence);
    // one byte more than asked for, to see whether the body ends where it should
    let mut bytes = Vec::with_capacity(sample.len() + 1);
    while bytes.len() <= sample.len() {
        match body.next(sample.len() + 1 - bytes.len(), &remote.cancel).await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(_) => return Err(disturbed("the answer to a range broke off")),
        }
    }
    if bytes.len() != sample.len() {
        return Err(settled("the answer to a range had the wrong length"));
    }
    if bytes != sample {
        return Err(settled("the answer to a range had other bytes than the image"));
    }
    Ok(())
}

/// Looks for a place to probe in what a sequential read delivers.
#[derive(Debug, Default)]
pub struct Candidate {
    head: Vec<u8>,
}

impl Candidate {
    /// Looks at the bytes from `guest_offset` on. A place will do if it differs from the image's first bytes.
    pub fn look(&mut self, guest_offset: u64, bytes: &[u8]) -> Option<(u64, Vec<u8>)> {
        if guest_offset == 0 {
            self.head = bytes[..bytes.len().min(SAMPLE_BYTES)].to_vec();
            // within the first extent, too: what follows the head may differ from it
            let next = bytes.get(SAMPLE_BYTES..2 * SAMPLE_BYTES)?;
            return (next != self.head).then(|| (to_u64(SAMPLE_BYTES), next.to_vec()));
        }
        let sample = bytes.get(..SAMPLE_BYTES)?;
        (guest_offset < SEARCH_BYTES && !self.head.is_empty() && sample != self.head).then(|| (guest_offset, sample.to_vec()))
    }
}

const _: () = assert!(to_usize(SEARCH_BYTES) > SAMPLE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_place_that_differs_from_the_images_first_bytes_is_probed() {
        let zeros = vec![0_u8; 2 << 20];
        let mut boot = zeros.clone();
        boot[510] = 0x55;
        let mut candidate = Candidate::default();
        assert_eq!(candidate.look(0, &zeros), None, "the first bytes prove nothing");
        assert_eq!(candidate.look(2 << 20, &zeros), None, "equal to the first bytes");
        assert_eq!(candidate.look(4 << 20, &boot).unwrap().0, 4 << 20);
        assert_eq!(candidate.look(SEARCH_BYTES, &boot), None, "too far");
        let mut candidate = Candidate::default();
        assert_eq!(candidate.look(0, &boot).unwrap().0, to_u64(SAMPLE_BYTES), "a boot sector, then zeros");
        assert_eq!(Candidate::default().look(2 << 20, &boot), None, "without the first bytes nothing can be told");
    }
}
