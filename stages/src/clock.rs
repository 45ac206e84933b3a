//! Time that nobody sets, and how long what was seen may be believed.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment by a clock that goes on while the machine sleeps, and that is never set (`CLOCK_BOOTTIME`). That of one run of one machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Duration);

impl Moment {
    pub(crate) fn now() -> Self {
        let since_boot = clock_gettime(ClockId::Boottime);
        let (seconds, nanos) = (u64::try_from(since_boot.tv_sec), u32::try_from(since_boot.tv_nsec));
        Self(Duration::new(seconds.unwrap_or_default(), nanos.unwrap_or_default()))
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }

    pub(crate) fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }
}

/// How long what a look has seen is believed. A DELETE that follows upon it is on its way for as long as its answer is waited for, and this.
pub(crate) const LOOK_LASTS: Duration = Duration::from_secs(30);
/// Looks for one that is so quick.
pub(crate) const LOOKS: u32 = 4;

/// What a look has seen that took less than [`LOOK_LASTS`]; `None` if each of [`LOOKS`] took longer. What a slow one has seen, or one that the machine
/// slept through, may be over.
///
/// # Errors
/// The look's.
pub(crate) async fn seen_in_time<T, E, F: Future<Output = Result<T, E>>>(look: impl Fn() -> F) -> Result<Option<T>, E> {
    seen_within(LOOK_LASTS, look).await
}

async fn seen_within<T, E, F: Future<Output = Result<T, E>>>(lasts: Duration, look: impl Fn() -> F) -> Result<Option<T>, E> {
    for _ in 0..LOOKS {
        let begun = Moment::now();
        let seen = look().await?;
        if begun.elapsed() < lasts {
            return Ok(Some(seen));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicU32, Ordering::SeqCst},
    };

    use super::*;

    #[tokio::test]
    async fn what_a_slow_look_has_seen_is_not_believed() {
        let lasts = Duration::from_millis(200);
        let looks = AtomicU32::new(0);
        let quick_after = |slow: u32| {
            looks.store(0, SeqCst);
            let looks = &looks;
            move || async move {
                let nth = looks.fetch_add(1, SeqCst) + 1;
                if nth <= slow {
                    tokio::time::sleep(lasts * 2).await;
                }
                Ok::<_, Infallible>(nth)
            }
        };
        assert_eq!(seen_within(lasts, quick_after(2)).await, Ok(Some(3)));
        assert_eq!(seen_within(lasts, quick_after(LOOKS)).await, Ok(None));
        assert_eq!(looks.load(SeqCst), LOOKS);
        assert_eq!(seen_within(lasts, async || Err::<(), _>("gone")).await, Err("gone"));
    }

    #[test]
    fn it_goes_on() {
        let before = Moment::now();
        std::thread::sleep(Duration::from_millis(5));
        assert!(before.elapsed() >= Duration::from_millis(5) && before.elapsed() < Duration::from_secs(60));
        assert!(before.after(Duration::from_millis(5)) <= Moment::now());
        assert_eq!(before.after(Duration::from_secs(60)).elapsed(), Duration::ZERO, "it is yet to come");
    }
}
