//! Reading a little of something large: blocks that were read once are kept, and there is an end to it.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// How much may be looked at. What a hostile image makes a parser read in circles ends there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes read at once, and kept.
    pub block_bytes: u64,
    /// Bytes read in all.
    pub bytes: u64,
    /// Questions in all, answered from what is kept or not.
    pub reads: u64,
    /// Bytes kept.
    pub kept_bytes: u64,
}

impl Limits {
    /// For something local: seeks are cheap.
    #[must_use]
    pub const fn local() -> Self {
        Self { block_bytes: 16 << 10, bytes: 256 << 20, reads: 1 << 20, kept_bytes: 32 << 20 }
    }

    /// For ranges: each costs a request.
    #[must_use]
    pub const fn remote() -> Self {
        Self { block_bytes: 128 << 10, bytes: 64 << 20, reads: 1 << 20, kept_bytes: 64 << 20 }
    }
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<u64, Vec<u8>>,
    /// In the order in which they came.
    order: VecDeque<u64>,
    bytes: u64,
    reads: u64,
}

/// A source that is looked at.
pub struct Looking<R> {
    source: R,
    len_bytes: u64,
    limits: Limits,
    state: Mutex<State>,
}

impl<R: ReadAt> Looking<R> {
    /// Begins.
    ///
    /// # Errors
    /// If the source does not tell its length.
    pub fn new(source: R, limits: Limits) -> io::Result<Self> {
        let len_bytes = source.len_bytes()?;
        Ok(Self { source, len_bytes, limits, state: Mutex::default() })
    }

    /// Bytes read so far.
    pub fn read_bytes(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }

    /// Lets `take` have a block of the source.
    fn block(&self, state: &mut State, index: u64) -> io::Result<()> {
        if state.blocks.contains_key(&index) {
            return Ok(());
        }
        let start = index * self.limits.block_bytes;
        let bytes = self.limits.block_bytes.min(self.len_bytes - start);
        if state.bytes + bytes > self.limits.bytes {
            return Err(io::Error::other(format!("more than {} MiB would have to be read", self.limits.bytes >> 20)));
        }
        let mut block = vec![0; to_usize(bytes)];
        self.source.read_exact_at(start, &mut block)?;
        state.bytes += bytes;
        state.blocks.insert(index, block);
        state.order.push_back(index);
        while to_u64(state.order.len()) * self.limits.block_bytes > self.limits.kept_bytes {
            let Some(oldest) = state.order.pop_front() else { break };
            state.blocks.remove(&oldest);
        }
        Ok(())
    }
}

impl<R: ReadAt> ReadAt for Looking<R> {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len_bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset.checked_add(to_u64(buf.len())).filter(|end| *end <= self.len_bytes);
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.reads += 1;
        if state.reads > self.limits.reads {
            return Err(io::Error::other(format!("more than {} reads: the image leads in circles", self.limits.reads)));
        }
        let mut at = file_offset;
        while at < end {
            let index = at / self.limits.block_bytes;
            self.block(&mut state, index)?;
            let block = state.blocks.get(&index).ok_or_else(|| io::Error::other("a block that was just read is gone"))?;
            let from = to_usize(at - index * self.limits.block_bytes);
            let here = (block.len() - from).min(to_usize(end - at));
            let into = to_usize(at - file_offset);
            buf[into..into + here].copy_from_slice(&block[from..from + here]);
            at += to_u64(here);
        }
        Ok(())
    }
}

/// A part of something.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    source: &'a dyn ReadAt,
    start: u64,
    bytes: u64,
}

impl<'a> Part<'a> {
    /// Bytes `[start, start + bytes)`, as far as they are there.
    ///
    /// # Errors
    /// If the source does not tell its length.
    pub fn new(source: &'a dyn ReadAt, start: u64, bytes: u64) -> io::Result<Self> {
        let len = source.len_bytes()?;
        let start = start.min(len);
        Ok(Self { source, start, bytes: bytes.min(len - start) })
    }

    /// Where it begins.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Its bytes from `at` on, as many; `None` where they are not there, or cannot be read.
    #[must_use]
    pub fn get(&self, at: u64, bytes: usize) -> Option<Vec<u8>> {
        let mut buf = vec![0; bytes];
        self.read_exact_at(at, &mut buf).ok()?;
        Some(buf)
    }
}

impl ReadAt for Part<'_> {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset.checked_add(to_u64(buf.len()));
        if end.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.source.read_exact_at(self.start + file_offset, buf)
    }
}

/// What a disk's bytes come from, shared by whoever looks at a part of it.
pub type Disk = Arc<dyn ReadAt + Send + Sync>;

/// Bytes that lie in several places of a disk, one behind the other: a logical volume, or a partition in a single place.
#[derive(Clone)]
pub struct Scattered {
    disk: Disk,
    /// From, how many.
    segments: Vec<(u64, u64)>,
}

impl Scattered {
    /// These places, in this order.
    #[must_use]
    pub fn new(disk: &Disk, segments: Vec<(u64, u64)>) -> Self {
        Self { disk: Arc::clone(disk), segments }
    }
}

impl ReadAt for Scattered {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.segments.iter().fold(0, |sum, segment| sum.saturating_add(segment.1)))
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let past_end = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let (mut skipped, mut done) = (0_u64, 0);
        for (from, bytes) in &self.segments {
            let at = file_offset.checked_add(to_u64(done)).ok_or_else(past_end)?;
            let end = skipped.checked_add(*bytes).ok_or_else(past_end)?;
            if done < buf.len() && (skipped..end).contains(&at) {
                let here = to_usize((end - at).min(to_u64(buf.len() - done)));
                let place = from.checked_add(at - skipped).ok_or_else(past_end)?;
                self.disk.read_exact_at(place, &mut buf[done..done + here])?;
                done += here;
            }
            skipped = end;
        }
        if done < buf.len() { Err(past_end()) } else { Ok(()) }
    }
}

/// A little-endian number out of bytes that are long enough.
pub(super) fn le(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A big-endian number out of bytes that are long enough.
pub(super) fn be(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A text that ends at its first NUL, harmless for a terminal; `None` for an empty one.
pub(super) fn label(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]).trim().to_owned();
    (!text.is_empty()).then(|| crate::text::printable(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_once_is_not_read_again_and_there_is_an_end_to_it() {
        let source: Vec<u8> = (0..1 << 20).map(|number: u32| number.to_le_bytes()[1]).collect();
        let limits = Limits { block_bytes: 4096, bytes: 64 << 10, reads: 100, kept_bytes: 16 << 10 };
        let looking = Looking::new(source.clone(), limits).unwrap();
        let mut buf = vec![0; 5000];
        looking.read_exact_at(3000, &mut buf).unwrap();
        assert_eq!(buf, source[3000..8000]);
        looking.read_exact_at(3000, &mut buf).unwrap();
        assert_eq!(looking.read_bytes(), 8192);
        assert!(looking.read_exact_at((1 << 20) - 10, &mut buf).is_err(), "past the end");
        let far = (1..).map(|step| step * 10_000).find(|at| looking.read_exact_at(*at, &mut buf[..1]).is_err()).unwrap();
        assert!(far <= 160_000, "{far}");
        for _ in 0..200 {
            let _ = looking.read_exact_at(3000, &mut buf);
        }
        assert!(looking.read_exact_at(3000, &mut buf).unwrap_err().to_string().contains("circles"));
    }

    #[test]
    fn bytes_come_from_one_place_after_the_other() {
        let disk: Disk = Arc::new((0..200).collect::<Vec<u8>>());
        let scattered = Scattered::new(&disk, vec![(100, 10), (50, 10)]);
        let mut buf = [0; 12];
        scattered.read_exact_at(4, &mut buf).unwrap();
        assert_eq!(buf, [104, 105, 106, 107, 108, 109, 50, 51, 52, 53, 54, 55]);
        assert!(scattered.read_exact_at(10, &mut buf).is_err());
        assert!(Scattered::new(&disk, vec![(u64::MAX, 10), (5, u64::MAX)]).read_exact_at(4, &mut buf).is_err());
    }

    #[test]
    fn a_part_ends_where_its_source_does() {
        let source: Vec<u8> = (0..100).collect();
        let part = Part::new(&source, 90, 50).unwrap();
        assert_eq!((part.len_bytes().unwrap(), part.get(0, 10)), (10, Some((90..100).collect())));
        assert_eq!(part.get(1, 10), None);
        assert_eq!(Part::new(&source, 1000, 5).unwrap().len_bytes().unwrap(), 0);
    }
}
