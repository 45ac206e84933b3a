//! Image bytes: PUT, GET, ranges.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use aws_lc_rs::digest;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use md5::Digest as _;

use crate::{answer::Body, faults::Faults};

/// Bytes read or written at once.
const CHUNK_BYTES: usize = 256 << 10;

/// What a `Range` header asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// These bytes, clamped to the image.
    Range(u64, u64),
    /// Starts past the end.
    PastEnd,
    /// More than one range.
    Several,
    /// Makes no sense.
    Invalid,
}

/// Reads a `Range` header as glance/common/wsgi.py does.
#[must_use]
pub fn parse_range(text: &str, size: u64) -> Asked {
    let Some(spec) = text.strip_prefix("bytes=") else { return Asked::Invalid };
    if spec.contains(',') {
        return Asked::Several;
    }
    let Some((first, last)) = spec.split_once('-') else { return Asked::Invalid };
    let number = |text: &str| text.parse::<u64>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    match (first.is_empty(), number(first), number(last)) {
        // a suffix; one that is longer than the image is all of it, and so is -0
        (true, _, Some(suffix)) if size > 0 => Asked::Range(if suffix == 0 { 0 } else { size.saturating_sub(suffix) }, size),
        (false, Some(first), _) if first >= size => Asked::PastEnd,
        (false, Some(first), None) if last.is_empty() => Asked::Range(first, size),
        (false, Some(first), Some(last)) if first <= last => Asked::Range(first, (last + 1).min(size)),
        _ => Asked::Invalid,
    }
}

/// What goes wrong with one GET's body.
#[derive(Clone, Copy, Debug, Default)]
pub struct BodyFault {
    cut_after: Option<u64>,
    stall_after: Option<(u64, Duration)>,
    corrupt: bool,
    overlong: bool,
    changed: bool,
}

impl BodyFault {
    /// Takes what the service was told to do to the next body.
    pub fn take(faults: &mut Faults) -> Self {
        let at = faults.cut_after_bytes;
        faults.gets_of_data += 1;
        Self {
            overlong: Faults::take(&mut faults.overlong_gets),
            changed: faults.changed_after_gets.is_some_and(|after| faults.gets_of_data > after),
            cut_after: (Faults::take(&mut faults.cut_gets) | faults.cuts_this_one()).then_some(at),
            stall_after: Faults::take(&mut faults.stalling_gets).then_some((at, faults.stall)),
            corrupt: Faults::take(&mut faults.corrupt_gets),
        }
    }
}

impl BodyFault {
    /// Does the body go on past its end?
    #[must_use]
    pub const fn is_overlong(self) -> bool {
        self.overlong
    }
}

/// A part of a file as a response's body.
struct FileBody {
    file: File,
    at: u64,
    end: u64,
    sent: u64,
    file_bytes: u64,
    fault: BodyFault,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl http_body::Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(pause) = self.pause.as_mut() {
            std::task::ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        if self.at >= self.end {
            let more = std::mem::take(&mut self.fault.overlong);
            return Poll::Ready(more.then(|| Ok(Frame::data(Bytes::from_static(b"what does not belong here")))));
        }
        let mut chunk = usize::try_from(self.end - self.at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        if let Some(cut) = self.fault.cut_after {
            if self.sent >= cut {
                return Poll::Ready(Some(Err(io::Error::other("told to cut the body off"))));
            }
            chunk = chunk.min(usize::try_from(cut - self.sent).unwrap_or(chunk));
        }
        if let Some((after, how_long)) = self.fault.stall_after
            && self.sent >= after
        {
            self.fault.stall_after = None;
            self.pause = Some(Box::pin(tokio::time::sleep(how_long)));
            return self.poll_frame(cx);
        }
        let mut bytes = vec![0; chunk];
        // blocks for a page-cache access
        if let Err(error) = self.file.read_exact_at(&mut bytes, self.at) {
            return Poll::Ready(Some(Err(error)));
        }
        if std::mem::take(&mut self.fault.corrupt) {
            bytes[chunk / 2] ^= 1;
        }
        let place = self.file_bytes / 4 * 3;
        if self.fault.changed
            && let Some(byte) = place.checked_sub(self.at).and_then(|at| bytes.get_mut(usize::try_from(at).unwrap_or(usize::MAX)))
        {
            *byte ^= 1;
        }
        self.at += chunk as u64;
        self.sent += chunk as u64;
        Poll::Ready(Some(Ok(Frame::data(bytes.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        if self.fault.overlong { SizeHint::default() } else { SizeHint::with_exact(self.end - self.at) }
    }
}

/// `[start, end)` of a file.
///
/// # Errors
/// If it cannot be opened.
pub fn body(path: &Path, start: u64, end: u64, fault: BodyFault) -> io::Result<Body> {
    let file = File::open(path)?;
    let file_bytes = file.metadata()?.len();
    Ok(FileBody { file, at: start, end, sent: 0, file_bytes, fault, pause: None }.boxed())
}

/// A file being stored: written sparsely, with the digests that Glance keeps.
pub struct Storing {
    file: File,
    bytes: u64,
    md5: md5::Md5,
    sha512: digest::Context,
    head: Vec<u8>,
}

/// A stored file.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its length.
    pub bytes: u64,
    /// Glance's `checksum`.
    pub md5: String,
    /// Glance's `os_hash_value`.
    pub sha512: String,
    /// Its first bytes, for the format inspector.
    pub head: Vec<u8>,
}

impl Storing {
    /// Begins a file.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(path: &Path) -> io::Result<Self> {
        let sha512 = digest::Context::new(&digest::SHA512);
        Ok(Self { file: File::create(path)?, bytes: 0, md5: md5::Md5::new(), sha512, head: Vec::new() })
    }

    /// The next bytes. Runs of zeros become holes.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.md5.update(bytes);
        self.sha512.update(bytes);
        if self.head.len() < 512 {
            self.head.extend_from_slice(&bytes[..bytes.len().min(512 - self.head.len())]);
        }
        let (mut at, mut pending) = (0, 0); // bytes[pending..at] is data that is still to be written
        for part in bytes.chunks(4096) {
            let end = at + part.len();
            if part.iter().all(|&byte| byte == 0) {
                self.file.write_all_at(&bytes[pending..at], self.bytes + pending as u64)?;
                pending = end;
            }
            at = end;
        }
        self.file.write_all_at(&bytes[pending..], self.bytes + pending as u64)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// It is complete.
    ///
    /// # Errors
    /// If its length cannot be set.
    pub fn finish(self) -> io::Result<Stored> {
        self.file.set_len(self.bytes)?;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        Ok(Stored {
            bytes: self.bytes,
            md5: hex(&self.md5.finalize()),
            sha512: hex(self.sha512.finish().as_ref()),
            head: self.head,
        })
    }
}

/// What OpenStack's format inspector says of a file that claims `disk_format`; `None` if it has nothing against it.
#[must_use]
pub fn inspect(disk_format: &str, head: &[u8]) -> Option<String> {
    let is_qcow2 = head.starts_with(b"QFI\xfb");
    if disk_format == "qcow2" && !is_qcow2 {
        return Some("Image disk_format qcow2 does not match stream data raw".to_owned());
    }
    let unsafe_qcow2 = is_qcow2
        && head.len() >= 80
        && (head[8..16].iter().any(|&byte| byte != 0) || head[79] & 0b1_0100 != 0 || head[72..79].iter().any(|&byte| byte != 0));
    (disk_format == "qcow2" && unsafe_qcow2).then(|| "Image failed safety checks".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_glance_reads_them() {
        for (text, asked) in [
            ("bytes=0-9", Asked::Range(0, 10)),
            ("bytes=90-", Asked::Range(90, 100)),
            ("bytes=-10", Asked::Range(90, 100)),
            ("bytes=-500", Asked::Range(0, 100)),
            ("bytes=-0", Asked::Range(0, 100)),
            ("bytes=50-500", Asked::Range(50, 100)),
            ("bytes=100-", Asked::PastEnd),
            ("bytes=5-2", Asked::Invalid),
            ("items=0-1", Asked::Invalid),
            ("bytes=0-0,5-6", Asked::Several),
        ] {
            assert_eq!(parse_range(text, 100), asked, "{text}");
        }
        assert_eq!(parse_range("bytes=0-0", 0), Asked::PastEnd);
    }
}
