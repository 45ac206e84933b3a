//! A clock that goes on while the machine sleeps, and that nobody sets.

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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let before = Moment::now();
        std::thread::sleep(Duration::from_millis(5));
        assert!(before.elapsed() >= Duration::from_millis(5) && before.elapsed() < Duration::from_secs(60));
    }
}
