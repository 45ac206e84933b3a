//! Ports: bounded queues with an async and a blocking end, where the end of input is a value and cancellation
//! an error.
//!
//! What is ours here is small: a count of producers, a flag that says that all of them finished, and the
//! order in which flag, close and cancel happen. `tests/model.rs` runs it under a model checker.

use std::{sync::Arc, time::Instant};

use crate::{
    cancel::{CancelToken, Cancelled, Cause},
    metrics::StageMetrics,
    sync::{AtomicBool, AtomicUsize, Ordering, channel},
};

/// What flows through ports.
pub trait Item: Send + 'static {
    /// Size for the metrics, in bytes. Has no influence on flow: leases bound bytes.
    fn bytes(&self) -> u64 {
        0
    }
}

/// What a source takes in: nothing, ever.
#[derive(Debug)]
pub enum NoInput {}
/// What a sink puts out: nothing, ever.
#[derive(Debug)]
pub enum NoOutput {}
impl Item for NoInput {}
impl Item for NoOutput {}

struct Gate<T> {
    producers: AtomicUsize,
    /// All producers finished. Set before the channel closes, so that who sees it closed sees the flag.
    ended: AtomicBool,
    cancel: CancelToken,
    sender: channel::Sender<T>,
    receiver: channel::Receiver<T>,
}

/// A port of `capacity` items (at least 1) for one run: the sender's and the receiver's end.
pub fn port<T: Item>(
    capacity: usize,
    cancel: &CancelToken,
    producer: &Arc<StageMetrics>,
    consumer: &Arc<StageMetrics>,
) -> (Outlet<T>, Inlet<T>) {
    let (sender, receiver) = channel::bounded(capacity.max(1));
    let (producers, ended) = (AtomicUsize::new(1), AtomicBool::new(false));
    let gate = Arc::new(Gate { producers, ended, cancel: cancel.clone(), sender, receiver });
    cancel.on_cancel(&gate, |gate| {
        gate.sender.close();
        // What nobody will receive any more goes now, so that its leases return while the token still lives (I3).
        while gate.receiver.try_recv().is_ok() {}
    });
    let outlet = Outlet { gate: Arc::clone(&gate), metrics: Arc::clone(producer), finished: false };
    (outlet, Inlet { gate, metrics: Arc::clone(consumer) })
}

/// The sending end. Clone it for each task that sends; each clone has to [`Outlet::finish`].
///
/// Dropping one without that cancels the run.
pub struct Outlet<T: Item> {
    gate: Arc<Gate<T>>,
    metrics: Arc<StageMetrics>,
    finished: bool,
}

impl<T: Item> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        self.gate.producers.fetch_add(1, Ordering::SeqCst);
        Self { gate: Arc::clone(&self.gate), metrics: Arc::clone(&self.metrics), finished: false }
    }
}

impl<T: Item> Outlet<T> {
    /// Sends, waiting for room.
    ///
    /// # Errors
    /// [`Cancelled`]; the item is dropped then.
    ///
    /// # Cancel safety
    /// If the future is dropped before it is ready, the item is dropped unsent.
    pub async fn send(&self, item: T) -> Result<(), Cancelled> {
        self.gate.cancel.check()?;
        let bytes = item.bytes();
        match self.gate.sender.try_send(item) {
            Ok(()) => {}
            Err(channel::TrySendError::Closed(_)) => return Err(Cancelled),
            Err(channel::TrySendError::Full(item)) => {
                let since = Instant::now();
                let sent = self.gate.sender.send(item).await;
                self.metrics.waited_for_output(since);
                sent.map_err(|_| Cancelled)?;
            }
        }
        self.metrics.count(1, bytes);
        Ok(())
    }

    /// [`Outlet::send`] for threads that may block.
    ///
    /// # Errors
    /// [`Cancelled`]; the item is dropped then.
    pub fn send_blocking(&self, item: T) -> Result<(), Cancelled> {
        self.gate.cancel.check()?;
        let bytes = item.bytes();
        match self.gate.sender.try_send(item) {
            Ok(()) => {}
            Err(channel::TrySendError::Closed(_)) => return Err(Cancelled),
            Err(channel::TrySendError::Full(item)) => {
                let since = Instant::now();
                let sent = self.gate.sender.send_blocking(item);
                self.metrics.waited_for_output(since);
                sent.map_err(|_| Cancelled)?;
            }
        }
        self.metrics.count(1, bytes);
        Ok(())
    }

    /// This producer has sent all it had. The last one's call is the end of input.
    pub fn finish(mut self) {
        self.finished = true;
        if self.gate.producers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.gate.ended.store(true, Ordering::SeqCst);
            self.gate.sender.close();
        }
    }
}

impl<T: Item> Drop for Outlet<T> {
    fn drop(&mut self) {
        if !self.finished {
            self.gate.cancel.cancel(Cause::Abandoned { stage: self.metrics.name().to_owned() });
        }
    }
}

/// The receiving end. Clones share the items: each is received once.
///
/// Dropping the only one before the end of input cancels the run: input that nobody reads would be lost in
/// silence.
pub struct Inlet<T: Item> {
    gate: Arc<Gate<T>>,
    metrics: Arc<StageMetrics>,
}

impl<T: Item> Clone for Inlet<T> {
    fn clone(&self) -> Self {
        Self { gate: Arc::clone(&self.gate), metrics: Arc::clone(&self.metrics) }
    }
}

impl<T: Item> Inlet<T> {
    /// The next item; `Ok(None)` once all producers finished and all items are received.
    ///
    /// # Errors
    /// [`Cancelled`].
    ///
    /// # Cancel safety
    /// Safe: an item is either returned or still in the port.
    pub async fn recv(&self) -> Result<Option<T>, Cancelled> {
        self.gate.cancel.check()?;
        match self.gate.receiver.try_recv() {
            Ok(item) => return Ok(Some(self.received(item))),
            Err(channel::TryRecvError::Closed) => return self.end(),
            Err(channel::TryRecvError::Empty) => {}
        }
        let since = Instant::now();
        let item = self.gate.receiver.recv().await;
        self.metrics.waited_for_input(since);
        match item {
            Ok(item) => Ok(Some(self.received(item))),
            Err(_) => self.end(),
        }
    }

    /// [`Inlet::recv`] for threads that may block.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn recv_blocking(&self) -> Result<Option<T>, Cancelled> {
        self.gate.cancel.check()?;
        match self.gate.receiver.try_recv() {
            Ok(item) => return Ok(Some(self.received(item))),
            Err(channel::TryRecvError::Closed) => return self.end(),
            Err(channel::TryRecvError::Empty) => {}
        }
        let since = Instant::now();
        let item = self.gate.receiver.recv_blocking();
        self.metrics.waited_for_input(since);
        match item {
            Ok(item) => Ok(Some(self.received(item))),
            Err(_) => self.end(),
        }
    }

    /// An item if one is there now; `Ok(None)` says only that there is none now.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn try_recv(&self) -> Result<Option<T>, Cancelled> {
        self.gate.cancel.check()?;
        Ok(self.gate.receiver.try_recv().ok().map(|item| self.received(item)))
    }

    /// Items waiting now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.gate.receiver.len()
    }

    fn received(&self, item: T) -> T {
        self.metrics.taken_in(item.bytes());
        item
    }

    /// The channel is closed and empty: by its producers' end, or by cancellation?
    fn end(&self) -> Result<Option<T>, Cancelled> {
        self.gate.cancel.check()?;
        if self.gate.ended.load(Ordering::SeqCst) { Ok(None) } else { Err(Cancelled) }
    }
}

/// Held by the runner of a stage, not by the stage: cancels if the stage is gone and its input was not.
pub(crate) struct InletGuard<T: Item>(Inlet<T>);

impl<T: Item> InletGuard<T> {
    pub(crate) fn of(inlet: &Inlet<T>) -> Self {
        Self(inlet.clone())
    }

    /// The stage returned successfully: was all input received?
    pub(crate) fn all_received(&self) -> bool {
        self.0.gate.ended.load(Ordering::SeqCst) && self.0.gate.receiver.is_empty()
    }
}
