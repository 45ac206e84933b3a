//! Cancellation of a whole run: seen at every port, first cause kept.

use std::{
    fmt,
    sync::{Arc, PoisonError},
};

use crate::{
    error::StageError,
    sync::{AtomicBool, Mutex, Ordering, channel},
};

/// The run was cancelled. Not an end of input: nothing may be sealed, renamed or called complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the run was cancelled")]
pub struct Cancelled;

/// Why a run was cancelled.
#[derive(Debug)]
#[non_exhaustive]
pub enum Cause {
    /// A stage failed.
    Failed(StageError),
    /// Somebody outside asked for it; the text says who (`interrupted`, `time is up`).
    Requested(String),
    /// A stage dropped a port before its end and then claimed success: a bug of that stage.
    Abandoned {
        /// The stage's name.
        stage: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => write!(f, "{error}"),
            Self::Requested(why) => f.write_str(why),
            Self::Abandoned { stage } => write!(f, "stage {stage} dropped a port before its end"),
        }
    }
}

/// Acts on cancellation if told to (`true`); says whether what it acts on still exists.
type Hook = Box<dyn Fn(bool) -> bool + Send + Sync>;

/// The first cause, until somebody has told it.
#[derive(Default)]
struct Kept {
    cause: Option<Cause>,
    told: bool,
}

struct Shared {
    cancelled: AtomicBool,
    cause: Mutex<Kept>,
    later_failures: Mutex<Vec<StageError>>,
    hooks: Mutex<Vec<Hook>>,
    /// Nothing is ever sent on it; its closing wakes those who wait for cancellation.
    wake: (channel::Sender<()>, channel::Receiver<()>),
}

impl Shared {
    fn cancel(&self, cause: Cause) {
        {
            let mut kept = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
            let later = |error| self.later_failures.lock().unwrap_or_else(PoisonError::into_inner).push(error);
            match (&kept.cause, cause) {
                // Whoever shares the token has told the cause: what comes now are its consequences.
                (_, Cause::Failed(error)) if kept.told => later(error),
                (_, _) if kept.told => {}
                (None, cause) => kept.cause = Some(cause),
                (Some(Cause::Abandoned { .. }), cause @ (Cause::Failed(_) | Cause::Requested(_))) => kept.cause = Some(cause),
                (Some(_), Cause::Failed(error)) => later(error),
                (Some(_), _) => {}
            }
        }
        self.cancelled.store(true, Ordering::SeqCst);
        self.wake.0.close();
        for hook in self.hooks.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            hook(true);
        }
    }

    /// What somebody outside asked for, until it is told.
    fn requested(&self) -> Option<String> {
        match &self.cause.lock().unwrap_or_else(PoisonError::into_inner).cause {
            Some(Cause::Requested(why)) => Some(why.clone()),
            _ => None,
        }
    }
}

/// Cancels a run, or tells whether it is. Clones are the same token.
#[derive(Clone)]
pub struct CancelToken(Arc<Shared>);

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

impl CancelToken {
    /// A token nobody has cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            cause: Mutex::new(Kept::default()),
            later_failures: Mutex::new(Vec::new()),
            hooks: Mutex::new(Vec::new()),
            wake: channel::bounded(1),
        }))
    }

    /// A token that is cancelled with this one, for the reason that was asked for, and can be cancelled without it: for a part of a job that
    /// may fail and be tried again while the rest goes on.
    #[must_use]
    pub fn child(&self) -> Self {
        let (child, parent) = (Self::new(), Arc::downgrade(&self.0));
        self.on_cancel(&child.0, move |shared| {
            let why = parent.upgrade().and_then(|parent| parent.requested());
            shared.cancel(Cause::Requested(why.unwrap_or_else(|| "cancelled with the job it is a part of".to_owned())));
        });
        child
    }

    /// Cancels, keeping `cause` if it is the first. [`Cause::Abandoned`] gives way to a later real cause: a
    /// failing stage drops its ports before its error is known.
    pub fn cancel(&self, cause: Cause) {
        self.0.cancel(cause);
    }

    /// Was it cancelled?
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// `Err(Cancelled)` if it was.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.is_cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// Waits until it is cancelled.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost if the future is dropped.
    pub async fn cancelled(&self) {
        // the channel is never sent to, so this ends when it is closed
        let _ = self.0.wake.1.recv().await;
    }

    /// Runs `work` unless the run is cancelled first; then drops it.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub async fn guard<F: Future>(&self, work: F) -> Result<F::Output, Cancelled> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(Cancelled),
            output = work => Ok(output),
        }
    }

    /// Calls `act` with what `subject` points at on cancellation, or now if that was already. The token does not keep the subject
    /// alive: a token outlives many runs, and a pool's buffers go when its run is over.
    ///
    /// Acts run under a lock of the token: what they drop must not cancel the same token.
    pub(crate) fn on_cancel<S: Send + Sync + 'static>(&self, subject: &Arc<S>, act: impl Fn(&S) + Send + Sync + 'static) {
        let subject = Arc::downgrade(subject);
        let hook = move |fire: bool| match subject.upgrade() {
            Some(subject) => {
                if fire {
                    act(&subject);
                }
                true
            }
            None => false,
        };
        let mut hooks = self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: `cancel` sets the flag before it takes it, so either the flag is seen here or the
        // hook is seen there.
        if self.is_cancelled() {
            hook(true);
        }
        hooks.retain(|hook| hook(false));
        hooks.push(Box::new(hook));
    }

    /// Takes the cause and the failures that came after it.
    pub(crate) fn take_cause(&self) -> (Option<Cause>, Vec<StageError>) {
        let mut kept = self.0.cause.lock().unwrap_or_else(PoisonError::into_inner);
        let cause = kept.cause.take();
        kept.told = true;
        drop(kept);
        let later = std::mem::take(&mut *self.0.later_failures.lock().unwrap_or_else(PoisonError::into_inner));
        (cause, later)
    }
}
