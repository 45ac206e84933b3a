//! The primitives under ports, pool and cancellation: std's and async-channel's, or, with `--cfg virta_model`,
//! the model checker's, so that what is ours in them runs under every schedule it tries.

#[cfg(not(virta_model))]
pub(crate) use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

#[cfg(not(virta_model))]
pub(crate) use async_channel as channel;

#[cfg(virta_model)]
pub(crate) use shuttle::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// A stand-in with async-channel's contract, made of the model checker's primitives. Only blocking ends.
#[cfg(virta_model)]
pub(crate) mod channel {
    use std::collections::VecDeque;

    use std::sync::Arc;

    use shuttle::sync::{Condvar, Mutex};

    struct State<T> {
        items: VecDeque<T>,
        closed: bool,
    }

    struct Shared<T> {
        state: Mutex<State<T>>,
        changed: Condvar,
        capacity: usize,
    }

    pub(crate) struct Sender<T>(Arc<Shared<T>>);
    pub(crate) struct Receiver<T>(Arc<Shared<T>>);
    #[derive(Debug)]
    pub(crate) struct Closed;
    pub(crate) enum TrySendError<T> {
        Full(T),
        Closed(#[allow(dead_code)] T),
    }
    pub(crate) enum TryRecvError {
        Empty,
        Closed,
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            Self(Arc::clone(&self.0))
        }
    }
    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Self(Arc::clone(&self.0))
        }
    }

    pub(crate) fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let state = Mutex::new(State { items: VecDeque::new(), closed: false });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), capacity });
        (Sender(Arc::clone(&shared)), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub(crate) fn close(&self) -> bool {
            let mut state = self.0.state.lock().expect("no panic under the lock");
            let was_open = !std::mem::replace(&mut state.closed, true);
            self.0.changed.notify_all();
            was_open
        }

        pub(crate) fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
            let mut state = self.0.state.lock().expect("no panic under the lock");
            if state.closed {
                return Err(TrySendError::Closed(item));
            }
            if state.items.len() >= self.0.capacity {
                return Err(TrySendError::Full(item));
            }
            state.items.push_back(item);
            self.0.changed.notify_all();
            Ok(())
        }

        pub(crate) fn send_blocking(&self, item: T) -> Result<(), Closed> {
            let mut state = self.0.state.lock().expect("no panic under the lock");
            while !state.closed && state.items.len() >= self.0.capacity {
                state = self.0.changed.wait(state).expect("no panic under the lock");
            }
            if state.closed {
                return Err(Closed);
            }
            state.items.push_back(item);
            self.0.changed.notify_all();
            Ok(())
        }

        pub(crate) async fn send(&self, item: T) -> Result<(), Closed> {
            self.send_blocking(item)
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn len(&self) -> usize {
            self.0.state.lock().expect("no panic under the lock").items.len()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.len() == 0
        }

        pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
            let mut state = self.0.state.lock().expect("no panic under the lock");
            match state.items.pop_front() {
                Some(item) => {
                    self.0.changed.notify_all();
                    Ok(item)
                }
                None if state.closed => Err(TryRecvError::Closed),
                None => Err(TryRecvError::Empty),
            }
        }

        pub(crate) fn recv_blocking(&self) -> Result<T, Closed> {
            let mut state = self.0.state.lock().expect("no panic under the lock");
            loop {
                if let Some(item) = state.items.pop_front() {
                    self.0.changed.notify_all();
                    return Ok(item);
                }
                if state.closed {
                    return Err(Closed);
                }
                state = self.0.changed.wait(state).expect("no panic under the lock");
            }
        }

        pub(crate) async fn recv(&self) -> Result<T, Closed> {
            self.recv_blocking()
        }
    }
}
