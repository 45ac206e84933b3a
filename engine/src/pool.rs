//! The memory budget: a fixed number of aligned buffers, leased and returned.
#![allow(unsafe_code)] // aligned allocation; see each SAFETY line

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::{Deref, DerefMut, Range},
    ptr::NonNull,
    sync::{Arc, PoisonError},
    time::Instant,
};

use crate::{
    cancel::{CancelToken, Cancelled},
    metrics::StageMetrics,
    sync::{AtomicUsize, Mutex, Ordering, channel},
};

/// An aligned block of initialised bytes on the heap.
struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a Buffer owns its allocation alone, as a Box<[u8]> does.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new(layout: Layout) -> Self {
        // SAFETY: BufferPool::new refuses a size of 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `start` points at `size` bytes, initialised by alloc_zeroed, alive as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

struct Shared {
    /// One for each place that is free.
    places: (channel::Sender<()>, channel::Receiver<()>),
    /// Buffers that were used before, the last one on top: it is still in a cache, and what is never reached is never made. `None` after cancellation.
    used: Mutex<Option<Vec<Buffer>>>,
    layout: Layout,
    count: usize,
    leased: AtomicUsize,
    leased_peak: AtomicUsize,
    cancel: CancelToken,
}

impl Shared {
    fn change_used<T>(&self, change: impl FnOnce(&mut Option<Vec<Buffer>>) -> T) -> T {
        change(&mut self.used.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// `count` buffers of equal size and alignment. Clones are the same pool.
///
/// Buffers are made when they are first asked for and then used again, the last one first; the pool never holds more than
/// `count x buffer_bytes`.
#[derive(Clone)]
pub struct BufferPool(Arc<Shared>);

impl BufferPool {
    /// A pool for the run that `cancel` cancels. `align` is what the device asks of memory addresses.
    ///
    /// # Panics
    /// If `count` or `buffer_bytes` is 0, or `align` no power of two.
    #[must_use]
    pub fn new(count: usize, buffer_bytes: usize, align: usize, cancel: &CancelToken) -> Self {
        assert!(count > 0 && buffer_bytes > 0, "a pool of nothing");
        let layout = Layout::from_size_align(buffer_bytes, align).expect("alignment is a power of two");
        let places = channel::bounded(count);
        for _ in 0..count {
            assert!(places.0.try_send(()).is_ok(), "the channel has room for all places");
        }
        let (leased, leased_peak) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let used = Mutex::new(Some(Vec::new()));
        let shared = Arc::new(Shared { places, used, layout, count, leased, leased_peak, cancel: cancel.clone() });
        cancel.on_cancel(&shared, |shared| {
            shared.places.0.close();
            while shared.places.1.try_recv().is_ok() {}
            // freed under the lock: nobody makes one anew while they are still there
            shared.change_used(|used| *used = None);
        });
        Self(shared)
    }

    /// Number of buffers.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.count
    }

    /// Size of each, bytes.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.0.layout.size()
    }

    /// Buffers that are not leased now.
    #[must_use]
    pub fn available(&self) -> usize {
        self.0.count - self.0.leased.load(Ordering::SeqCst)
    }

    /// The most that were leased at once.
    #[must_use]
    pub fn leased_peak(&self) -> usize {
        self.0.leased_peak.load(Ordering::SeqCst)
    }

    /// Waits for a buffer. Its content is whatever the last holder left.
    ///
    /// # Errors
    /// [`Cancelled`].
    ///
    /// # Cancel safety
    /// Safe: a buffer is either returned or still in the pool.
    pub async fn acquire(&self) -> Result<Lease, Cancelled> {
        self.0.cancel.check()?;
        self.0.places.1.recv().await.map_err(|_| Cancelled)?;
        Ok(self.lease())
    }

    /// [`BufferPool::acquire`] that counts the wait as the stage's wait for output: whoever holds the leases is
    /// downstream.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub async fn acquire_for(&self, metrics: &StageMetrics) -> Result<Lease, Cancelled> {
        let since = Instant::now();
        let lease = self.acquire().await;
        metrics.waited_for_output(since);
        lease
    }

    /// [`BufferPool::acquire`] for threads that may block.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn acquire_blocking(&self) -> Result<Lease, Cancelled> {
        self.0.cancel.check()?;
        self.0.places.1.recv_blocking().map_err(|_| Cancelled)?;
        Ok(self.lease())
    }

    /// The caller took a place.
    fn lease(&self) -> Lease {
        let used = self.0.change_used(|used| used.as_mut().and_then(Vec::pop));
        let buffer = used.unwrap_or_else(|| Buffer::new(self.0.layout));
        let leased = self.0.leased.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.leased_peak.fetch_max(leased, Ordering::SeqCst);
        Lease { buffer: Some(buffer), pool: self.clone() }
    }
}

/// A buffer out of a pool, with one owner. Returns to the pool when dropped.
pub struct Lease {
    /// `None` only while it is being dropped.
    buffer: Option<Buffer>,
    pool: BufferPool,
}

impl Lease {
    /// Shares the first `bytes` bytes, read-only from now on.
    ///
    /// # Panics
    /// If the buffer is shorter.
    #[must_use]
    pub fn freeze(self, bytes: usize) -> Slice {
        assert!(bytes <= self.len(), "slice of {bytes} bytes out of a lease of {}", self.len());
        Slice { lease: Arc::new(self), range: 0..bytes }
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_ref().expect("a lease has its buffer until it is dropped").bytes()
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().expect("a lease has its buffer until it is dropped").bytes_mut()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let pool = &self.pool.0;
        // The buffer goes back before its place does: who takes a place makes a new one only if none is left. A cancelled run keeps none.
        let unwanted = pool.change_used(|used| match used {
            Some(used) => {
                used.extend(self.buffer.take());
                None
            }
            None => self.buffer.take(),
        });
        drop(unwanted);
        pool.leased.fetch_sub(1, Ordering::SeqCst);
        // fails only when the run is cancelled and the channel closed
        let _ = pool.places.0.try_send(());
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({} bytes)", self.len())
    }
}

/// A shared, read-only part of a lease. The buffer returns to the pool with the last of them.
#[derive(Clone)]
pub struct Slice {
    lease: Arc<Lease>,
    range: Range<usize>,
}

impl Slice {
    /// A part of this part.
    ///
    /// # Panics
    /// If the range passes the end.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "part {range:?} of {} bytes", self.range.len());
        let range = self.range.start + range.start..self.range.start + range.end;
        Self { lease: Arc::clone(&self.lease), range }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.lease[self.range.clone()]
    }
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({:?})", self.range)
    }
}
