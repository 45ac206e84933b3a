//! How many connections fetch at once: as many as make it faster, and no more.
//!
//! Where one connection is held back by its server's thread, or by the length of the way, four are four times as fast. Where the service, the
//! network or this machine has no more to give, they only get in each other's way: each costs a handshake and a check of the token for each range,
//! and several streams on few cores are switched between.
//!
//! # How
//! At first one fetches. Then the number is doubled as long as that brings `GAIN` or more. After `LOOK_EVERY` it is tried again, one step up
//! or one down by turns: what was true at the start may not be so half an hour later. Where the rest takes less than `WORTH_IT`, nothing is
//! tried any more: a trial takes a second or two by itself.
//!
//! ```text
//! settle ── measure ──┬─ first figure: a step up is tried ── settle ── measure ──┬─ better: stay, and try the next
//!                     └─ nothing to try yet: go on                               └─ not:   back, and try again later
//! ```
//! A figure is the rate over `WINDOW` and `WINDOW_BYTES` at least, from when everybody who may fetch has got something, and nobody else is at
//! it any more.
//!
//! # Invariants
//! - The lowest numbers are at work: number 0 always may. So the oldest range in flight always gets on.
//! - Who may not fetch any more ends its range first.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

/// Twice as many have to be so many times as fast to be worth it.
const GAIN: f64 = 1.15;
/// Half as many are as good as all if they are so fast, in parts of the rate of all.
const AS_GOOD: f64 = 0.95;
/// How long is measured at least.
const WINDOW: Duration = Duration::from_millis(400);
/// How much has to arrive meanwhile at least.
const WINDOW_BYTES: u64 = 32 << 20;
/// After how long another number is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(20);

/// How long the rest has to take for a trial.
const WORTH_IT: Duration = Duration::from_secs(8);

/// A trial of another number.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Trial {
    /// The number before.
    from: usize,
    /// The rate then, bytes a second.
    rate: f64,
}

#[derive(Debug)]
struct State {
    most: usize,
    /// Bytes that have not arrived yet.
    left_bytes: u64,
    allowed: usize,
    /// By number: is it at a range, and how much has it got of it?
    at_work: Vec<Option<u64>>,
    trial: Option<Trial>,
    /// The next trial is a step down.
    down_next: bool,
    /// When the next trial begins.
    next_look: Duration,
    /// The window that is measured: its start, and what arrived since. `None`: it has not settled yet.
    window: Option<(Duration, u64)>,
    is_over: bool,
}

impl State {
    fn new(most: usize, bytes: u64) -> Self {
        Self {
            most,
            left_bytes: bytes,
            allowed: 1,
            at_work: vec![None; most],
            trial: None,
            down_next: false,
            next_look: Duration::ZERO,
            window: None,
            is_over: false,
        }
    }

    /// Has everybody who may fetch got something, and is nobody else at it?
    fn is_settled(&self) -> bool {
        self.at_work.iter().enumerate().all(|(number, got)| match got {
            Some(bytes) => number < self.allowed && *bytes > 0,
            // between two ranges, or held back by the window of ranges
            None => true,
        }) && self.at_work.iter().flatten().count() > self.allowed / 2
    }

    /// So much arrived at number `number`. Returns whether the number that may fetch is another one now.
    fn arrived(&mut self, now: Duration, number: usize, bytes: u64) -> bool {
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
        if let Some(got) = &mut self.at_work[number] {
            *got += bytes;
        }
        let Some((since, so_far)) = self.window else {
            if self.is_settled() {
                self.window = Some((now, 0));
            }
            return false;
        };
        let (elapsed, so_far) = (now.saturating_sub(since), so_far + bytes);
        self.window = Some((since, so_far));
        if elapsed < WINDOW || so_far < WINDOW_BYTES {
            return false;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate to compare with another")]
        let rate = so_far as f64 / elapsed.as_secs_f64();
        self.measured(now, rate)
    }

    /// A window is over.
    fn measured(&mut self, now: Duration, rate: f64) -> bool {
        let before = self.allowed;
        match self.trial.take() {
            Some(trial) if trial.from < self.allowed => {
                if rate >= trial.rate * GAIN {
                    self.step_up(rate);
                } else {
                    self.allowed = trial.from;
                }
            }
            Some(trial) => {
                if rate < trial.rate * AS_GOOD {
                    self.allowed = trial.from;
                }
            }
            None if now < self.next_look || !self.is_worth_it(rate) => {}
            None if self.down_next && self.allowed > 1 => {
                self.trial = Some(Trial { from: self.allowed, rate });
                self.allowed = self.allowed.div_ceil(2);
                self.down_next = false;
            }
            None => self.step_up(rate),
        }
        if self.trial.is_none() && now >= self.next_look && self.is_worth_it(rate) {
            self.next_look = now + LOOK_EVERY;
        }
        self.window = (self.allowed == before).then_some((now, 0));
        self.allowed != before
    }

    #[expect(clippy::cast_precision_loss, reason = "a time to compare with another")]
    fn is_worth_it(&self, rate: f64) -> bool {
        self.left_bytes as f64 / rate > WORTH_IT.as_secs_f64()
    }

    fn step_up(&mut self, rate: f64) {
        self.down_next = true;
        if self.allowed < self.most {
            self.trial = Some(Trial { from: self.allowed, rate });
            self.allowed = (self.allowed * 2).min(self.most);
        }
    }
}

/// Connections that share an image's ranges.
#[derive(Debug)]
pub struct ConnectionScaler {
    state: Mutex<State>,
    changed: Notify,
    started: Instant,
}

impl ConnectionScaler {
    /// At most `most` fetch at once, `bytes` in all; they are numbered from 0.
    #[must_use]
    pub fn new(most: usize, bytes: u64) -> Self {
        Self { state: Mutex::new(State::new(most.max(1), bytes)), changed: Notify::new(), started: Instant::now() }
    }

    /// All `most` fetch from the start to the end: somebody knows better.
    #[must_use]
    pub fn all_at_once(most: usize) -> Self {
        let scaler = Self::new(most, 0);
        {
            let mut state = scaler.state();
            (state.allowed, state.next_look) = (state.most, Duration::MAX);
        }
        scaler
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until number `number` may fetch, or nothing is left to fetch.
    ///
    /// # Cancel safety
    /// Safe: it only waits.
    pub async fn turn(&self, number: usize) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable(); // what changes between the look and the wait is not missed
            {
                let state = self.state();
                if number < state.allowed || state.is_over {
                    return;
                }
            }
            changed.await;
        }
    }

    /// It begins a range.
    pub fn begins(&self, number: usize) {
        self.state().at_work[number] = Some(0);
    }

    /// So many bytes of its range arrived.
    pub fn arrived(&self, number: usize, bytes: u64) {
        if self.state().arrived(self.started.elapsed(), number, bytes) {
            self.changed.notify_waiters();
        }
    }

    /// Its range is whole.
    pub fn ends(&self, number: usize) {
        self.state().at_work[number] = None;
    }

    /// Nothing is left to fetch: nobody waits for a turn any more.
    pub fn over(&self) {
        self.state().is_over = true;
        self.changed.notify_waiters();
    }

    /// How many may fetch just now.
    #[must_use]
    pub fn allowed(&self) -> usize {
        self.state().allowed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIECE: u64 = 2 << 20;

    /// Plays a transfer of `seconds` whose rate depends on how many fetch; returns how many did at its end, and how much arrived.
    fn played(state: &mut State, seconds: f64, rate_of: impl Fn(usize) -> f64, from: f64) -> f64 {
        let mut now = from;
        let mut bytes = 0.0;
        let mut turn = 0;
        while now < from + seconds {
            // who may not any more ends its range, which is short here
            for number in 0..state.most {
                let may = number < state.allowed;
                if may && state.at_work[number].is_none() {
                    state.at_work[number] = Some(0);
                } else if !may {
                    state.at_work[number] = None;
                }
            }
            turn = (turn + 1) % state.allowed;
            now += PIECE as f64 / rate_of(state.allowed);
            bytes += PIECE as f64;
            state.arrived(Duration::from_secs_f64(now), turn, PIECE);
        }
        bytes
    }

    #[test]
    fn where_each_connection_brings_as_much_again_all_are_at_work_after_a_moment() {
        let mut state = State::new(8, u64::MAX);
        played(&mut state, 4.0, |number| number as f64 * 100e6, 0.0);
        assert_eq!(state.allowed, 8);
        // and over minutes next to nothing is lost to trials
        let bytes = played(&mut state, 300.0, |number| number as f64 * 100e6, 4.0);
        assert!(bytes > 0.97 * 300.0 * 800e6, "{bytes}");
    }

    #[test]
    fn where_one_is_as_fast_as_many_there_is_one() {
        let mut state = State::new(4, u64::MAX);
        let slower = |number: usize| 900e6 / (1.0 + 0.2 * (number - 1) as f64);
        played(&mut state, 2.0, slower, 0.0);
        assert_eq!(state.allowed, 1);
        let bytes = played(&mut state, 300.0, slower, 2.0);
        assert!(bytes > 0.98 * 300.0 * 900e6, "{bytes}");
    }

    #[test]
    fn what_changes_on_the_way_is_found_out() {
        let mut state = State::new(4, u64::MAX);
        played(&mut state, 5.0, |_| 400e6, 0.0);
        assert_eq!(state.allowed, 1);
        played(&mut state, 60.0, |number| number as f64 * 100e6, 5.0);
        assert_eq!(state.allowed, 4, "the service is slower for each now");
        played(&mut state, 120.0, |_| 400e6, 65.0);
        assert!(state.allowed <= 2, "and one is enough again: {}", state.allowed);
    }

    #[test]
    fn nothing_is_tried_when_the_rest_is_there_in_a_moment() {
        let mut state = State::new(8, 6_000_000_000);
        played(&mut state, 5.9, |number| number as f64 * 1e9, 0.0);
        assert_eq!((state.allowed, state.trial), (1, None));
    }

    proptest! {
        #[test]
        fn somebody_may_always_fetch_and_never_more_than_there_are(
            most in 1_usize..20,
            events in prop::collection::vec((0_usize..20, 0_u64..64 << 20, 0_u64..2000, 0_u8..3), 0..300),
        ) {
            let mut state = State::new(most, u64::MAX);
            let mut now = Duration::ZERO;
            for (number, bytes, millis, what) in events {
                let number = number % most;
                now += Duration::from_millis(millis);
                match what {
                    0 => state.at_work[number] = Some(0),
                    1 => state.at_work[number] = None,
                    _ => _ = state.arrived(now, number, bytes),
                }
                prop_assert!((1..=most).contains(&state.allowed));
            }
        }
    }

    #[tokio::test]
    async fn whoever_waits_for_its_turn_goes_when_there_is_nothing_left() {
        let scaler = std::sync::Arc::new(ConnectionScaler::new(2, 1));
        scaler.turn(0).await;
        let waiting = tokio::spawn({
            let scaler = std::sync::Arc::clone(&scaler);
            async move { scaler.turn(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        scaler.over();
        waiting.await.unwrap();
    }
}
