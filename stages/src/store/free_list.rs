//! Buffers of conversions that are over, for those that come after them.
//!
//! A page that the system hands out is cleared first, and each costs a page fault: together several times what copying into it costs. So what
//! one conversion of a batch has kept its clusters in, the next one uses again.
//!
//! # Invariants
//! - In use and free together are never more than the limit, unless what is in use alone is: then nothing is free.
//! - A buffer is free only when nobody can read it any more: the last [`Bytes`] of it is gone.
//! - A buffer that is used again is at most a quarter larger than what was asked for.

use std::{
    collections::BTreeMap,
    ops::RangeBounds,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;

use crate::units::{to_u64, to_usize};

/// Smaller ones the allocator itself uses again.
const BYTES_MIN: usize = 128 << 10;

/// Buffers to be used again. Clones are the same list; the default keeps none.
#[derive(Clone, Debug, Default)]
pub struct FreeList(Arc<Mutex<Buffers>>);

#[derive(Debug, Default)]
struct Buffers {
    limit_bytes: usize,
    /// In use and free.
    held_bytes: usize,
    /// By capacity.
    free: BTreeMap<usize, Vec<Vec<u8>>>,
}

/// An empty buffer with room, which returns to its list.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// As it came from the list.
    capacity: usize,
    list: Weak<Mutex<Buffers>>,
}

impl FreeList {
    /// A list for buffers of `limit_bytes` together.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self(Arc::new(Mutex::new(Buffers { limit_bytes: to_usize(limit_bytes), ..Buffers::default() })))
    }

    /// An empty buffer with room for so many bytes, and up to a quarter more.
    #[must_use]
    pub fn buffer(&self, bytes: usize) -> Buffer {
        if bytes < BYTES_MIN {
            return Buffer { bytes: Vec::with_capacity(bytes), capacity: bytes, list: Weak::new() };
        }
        let buffer = lock(&self.0).take(bytes);
        Buffer { capacity: buffer.capacity(), bytes: buffer, list: Arc::downgrade(&self.0) }
    }

    /// Bytes of the buffers that are free.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        lock(&self.0).free.iter().map(|(capacity, buffers)| to_u64(capacity * buffers.len())).sum()
    }
}

fn lock(buffers: &Mutex<Buffers>) -> std::sync::MutexGuard<'_, Buffers> {
    buffers.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Buffers {
    fn take(&mut self, bytes: usize) -> Vec<u8> {
        if let Some(buffer) = self.pop(bytes..=bytes + bytes / 4) {
            return buffer;
        }
        let made = Vec::with_capacity(bytes);
        self.held_bytes += made.capacity();
        while self.held_bytes > self.limit_bytes
            && let Some(freed) = self.pop(..)
        {
            self.held_bytes -= freed.capacity();
        }
        made
    }

    /// The smallest of these capacities.
    fn pop(&mut self, capacities: impl RangeBounds<usize>) -> Option<Vec<u8>> {
        let (&capacity, buffers) = self.free.range_mut(capacities).next()?;
        let buffer = buffers.pop();
        if buffers.is_empty() {
            self.free.remove(&capacity);
        }
        buffer
    }

    fn give_back(&mut self, mut buffer: Vec<u8>, capacity: usize) {
        if self.held_bytes > self.limit_bytes || buffer.capacity() != capacity {
            self.held_bytes -= capacity;
            return;
        }
        buffer.clear();
        self.free.entry(capacity).or_default().push(buffer);
    }
}

impl Buffer {
    /// Its room, bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

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

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(list) = self.list.upgrade() {
            lock(&list).give_back(std::mem::take(&mut self.bytes), self.capacity);
        }
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
        let (third, again) = written(&list, MIB - 4096, 3);
        assert_eq!(again, at);
        assert!(third.len() == MIB - 4096 && third.iter().all(|byte| *byte == 3), "nothing of what was in it before");
        assert!(second.iter().all(|byte| *byte == 2));
        drop((second, third));
        assert_eq!(list.free_bytes(), 2 << 20);
        assert!(list.buffer(MIB / 2).capacity() < MIB, "a much larger one is not taken");
    }

    #[test]
    fn without_a_limit_and_without_a_list_buffers_go_back_to_the_system() {
        let (bytes, _) = written(&FreeList::default(), MIB, 1);
        assert!(bytes.iter().all(|byte| *byte == 1));
        let none = FreeList::default();
        drop(written(&none, MIB, 1));
        assert_eq!((none.free_bytes(), lock(&none.0).held_bytes), (0, 0));
        let small = FreeList::new(8 << 20);
        drop(written(&small, BYTES_MIN - 1, 1));
        assert_eq!((small.free_bytes(), lock(&small.0).held_bytes), (0, 0));
    }

    proptest! {
        #[test]
        fn in_use_and_free_are_within_the_limit(sizes in proptest::collection::vec((1_usize..3 << 20, any::<prop::sample::Index>()), 1..80)) {
            let list = FreeList::new(16 << 20);
            let mut used: Vec<(Buffer, usize)> = Vec::new();
            for (bytes, which) in sizes {
                if used.len() > 12 {
                    used.swap_remove(which.index(used.len()));
                }
                used.push((list.buffer(bytes), bytes));
                for (buffer, bytes) in &used {
                    prop_assert!(buffer.capacity() >= *bytes && buffer.capacity() <= bytes + bytes / 4);
                }
                let in_use: usize = used.iter().map(|(buffer, _)| buffer.capacity()).filter(|bytes| *bytes >= BYTES_MIN).sum();
                let held = lock(&list.0).held_bytes;
                prop_assert_eq!(held, in_use + to_usize(list.free_bytes()));
                prop_assert!(held <= (16 << 20).max(in_use));
            }
            used.clear();
            prop_assert!(list.free_bytes() <= 16 << 20);
        }
    }
}
