//! Buffers of conversions that are over, for those that come after them.
//!
//! A page that the system hands out is cleared first, and each costs a page fault: together several times what copying into it costs. So what
//! one conversion of a batch has kept its clusters in, the next one uses again.
//!
//! # Invariants
//! - In use and free together are never more than the limit, unless what is in use alone is: then nothing is free. In use is all that is stored, buffers
//!   that are too small to be used again and compressed clusters included.
//! - A buffer is free only when nobody can read it any more: the last [`Bytes`] of it is gone.
//! - A buffer that is used again is exactly as large as what was asked for, so what is charged for it is what it takes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;

use crate::units::{to_u64, to_usize};

/// Smaller ones the allocator itself uses again.
const BYTES_MIN: usize = 128 << 10;

/// Buffers to be used again. Clones are the same list; the default keeps none.
#[derive(Clone, Debug, Default)]
pub struct FreeList(Option<Arc<Mutex<Buffers>>>);

#[derive(Debug)]
struct Buffers {
    limit_bytes: usize,
    in_use_bytes: usize,
    free_bytes: usize,
    /// By capacity.
    free: HashMap<usize, Vec<Vec<u8>>>,
}

/// An empty buffer with room, which returns to its list.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    share: Share,
}

/// A part of what is in use.
#[derive(Debug)]
struct Share {
    list: FreeList,
    bytes: usize,
}

/// Bytes that are in use, and come from elsewhere.
struct Counted {
    bytes: Bytes,
    _share: Share,
}

impl FreeList {
    /// A list for buffers of `limit_bytes` together.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        let limit_bytes = to_usize(limit_bytes);
        Self(Some(Arc::new(Mutex::new(Buffers { limit_bytes, in_use_bytes: 0, free_bytes: 0, free: HashMap::new() }))))
    }

    /// An empty buffer with room for so many bytes.
    #[must_use]
    pub fn buffer(&self, bytes: usize) -> Buffer {
        let used = self.change(|buffers| {
            let used = buffers.pop(bytes);
            buffers.in_use_bytes += bytes;
            (used, buffers.evict())
        });
        // what is to go is given back to the system here, out of the lock
        let (used, _evicted) = used.unwrap_or_default();
        Buffer { bytes: used.unwrap_or_else(|| Vec::with_capacity(bytes)), share: Share { list: self.clone(), bytes } }
    }

    /// The same bytes, which count as in use as long as somebody has them.
    #[must_use]
    pub fn counted(&self, bytes: Bytes) -> Bytes {
        let length = bytes.len();
        let evicted = self.change(|buffers| {
            buffers.in_use_bytes += length;
            buffers.evict()
        });
        match evicted {
            Some(_) => Bytes::from_owner(Counted { bytes, _share: Share { list: self.clone(), bytes: length } }),
            None => bytes,
        }
    }

    /// Bytes of the buffers that are free.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.change(|buffers| to_u64(buffers.free_bytes)).unwrap_or_default()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Buffers) -> T) -> Option<T> {
        let buffers = self.0.as_ref()?;
        Some(change(&mut buffers.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Buffers {
    fn pop(&mut self, capacity: usize) -> Option<Vec<u8>> {
        let same = self.free.get_mut(&capacity)?;
        let buffer = same.pop()?;
        if same.is_empty() {
            self.free.remove(&capacity);
        }
        self.free_bytes -= capacity;
        Some(buffer)
    }

    /// Free buffers that have no position any more.
    fn evict(&mut self) -> Vec<Vec<u8>> {
        let mut evicted = Vec::new();
        while self.in_use_bytes + self.free_bytes > self.limit_bytes
            && let Some(capacity) = self.free.keys().next().copied()
        {
            evicted.extend(self.pop(capacity));
        }
        evicted
    }
}

impl Buffer {
    /// Appends.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Shares what was written, read-only from now on. The buffer is free again with the last of it.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.bytes);
        buffer.clear();
        let capacity = self.share.bytes;
        let fits = buffer.capacity() == capacity && capacity >= BYTES_MIN;
        let left = self.share.list.change(|buffers| {
            // it is still in use here: its share goes behind this
            if !fits || buffers.in_use_bytes + buffers.free_bytes > buffers.limit_bytes {
                return Some(buffer);
            }
            buffers.free_bytes += capacity;
            buffers.in_use_bytes -= capacity;
            buffers.free.entry(capacity).or_default().push(buffer);
            None
        });
        if matches!(left, Some(None)) {
            self.share.bytes = 0;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let bytes = self.bytes;
        self.list.change(|buffers| buffers.in_use_bytes -= bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    /// A buffer that was written to, and where it lies.
    fn written(list: &FreeList, bytes: usize, value: u8) -> (Bytes, *const u8) {
        let mut buffer = list.buffer(bytes);
        buffer.extend_from_slice(&vec![value; bytes]);
        let bytes = buffer.freeze();
        let at = bytes.as_ptr();
        (bytes, at)
    }

    #[test]
    fn a_buffer_is_used_again_when_nobody_can_read_it() {
        let list = FreeList::new(8 << 20);
        let (first, at) = written(&list, MIB, 1);
        let slice = first.slice(MIB / 2..);
        drop(first);
        let (second, elsewhere) = written(&list, MIB, 2);
        assert_ne!(at, elsewhere, "half of it is still there to be read");
        assert!(slice.iter().all(|byte| *byte == 1));
        drop(slice);
        let (third, again) = written(&list, MIB, 3);
        assert_eq!(again, at);
        assert!(third.len() == MIB && third.iter().all(|byte| *byte == 3), "nothing of what was in it before");
        assert!(second.iter().all(|byte| *byte == 2));
        drop((second, third));
        assert_eq!(list.free_bytes(), 2 << 20);
        assert_eq!(list.buffer(MIB / 2).bytes.capacity(), MIB / 2, "a larger one is not taken");
    }

    #[test]
    fn without_a_list_and_where_they_are_small_buffers_go_back_to_the_system() {
        let none = FreeList::default();
        let (bytes, _) = written(&none, MIB, 1);
        assert!(bytes.iter().all(|byte| *byte == 1));
        drop(bytes);
        assert_eq!((none.free_bytes(), in_use(&none)), (0, 0));
        let small = FreeList::new(8 << 20);
        let (bytes, _) = written(&small, BYTES_MIN - 1, 1);
        assert_eq!(in_use(&small), BYTES_MIN - 1);
        drop(bytes);
        assert_eq!((small.free_bytes(), in_use(&small)), (0, 0));
    }

    #[test]
    fn what_comes_from_elsewhere_takes_the_place_of_free_buffers() {
        let list = FreeList::new(4 << 20);
        let buffers = [written(&list, MIB, 1).0, written(&list, MIB, 2).0, written(&list, MIB, 3).0];
        drop(buffers);
        assert_eq!(list.free_bytes(), 3 << 20);
        let compressed = list.counted(Bytes::from(vec![7; 2 * MIB]));
        assert_eq!((list.free_bytes(), in_use(&list)), (2 << 20, 2 * MIB));
        let part = compressed.slice(..5);
        drop(compressed);
        assert_eq!((&part[..], in_use(&list)), (&[7; 5][..], 2 * MIB), "all of it is there for the part");
        drop(part);
        assert_eq!((list.free_bytes(), in_use(&list)), (2 << 20, 0));
        assert_eq!(FreeList::default().counted(Bytes::from_static(b"x")), "x");
    }

    fn in_use(list: &FreeList) -> usize {
        list.change(|buffers| buffers.in_use_bytes).unwrap_or_default()
    }

    proptest! {
        #[test]
        fn in_use_and_free_are_within_the_limit(
            steps in proptest::collection::vec((prop_oneof![1_usize..3 << 20, Just(2 << 20)], any::<bool>(), any::<prop::sample::Index>()), 1..80),
        ) {
            let list = FreeList::new(16 << 20);
            let mut used: Vec<Bytes> = Vec::new();
            for (bytes, elsewhere, which) in steps {
                if used.len() > 12 {
                    used.swap_remove(which.index(used.len()));
                }
                used.push(if elsewhere { list.counted(Bytes::from(vec![1; bytes])) } else { written(&list, bytes, 2).0 });
                let held: usize = used.iter().map(Bytes::len).sum();
                prop_assert_eq!(held, in_use(&list));
                prop_assert!(held + to_usize(list.free_bytes()) <= (16 << 20).max(held));
                let free = list.change(|buffers| buffers.free.iter().map(|(capacity, same)| capacity * same.len()).sum::<usize>());
                prop_assert_eq!(free, Some(to_usize(list.free_bytes())));
            }
            used.clear();
            prop_assert!(in_use(&list) == 0 && list.free_bytes() <= 16 << 20);
        }
    }
}
