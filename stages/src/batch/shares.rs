//! The budgets of all conversions together, and each one's part.
//!
//! A conversion's part is fixed when it begins: what it needs, but no more than an equal part of what is free among the slots that can still
//! be filled. So the sum never passes the whole (B1 of the batch), small images leave room to others, and the last ones get the rest.

use std::num::NonZeroUsize;

use crate::{
    budget::{MEMORY_MIN_BYTES, free_list_bytes},
    convert::Options,
    store::FreeList,
    text::size,
};

/// An image below this is fetched by one connection, whatever is there ([`crate::glance::fetch`]).
const ONE_CONNECTION_BYTES: u64 = 32 << 20;
/// Memory for extents in flight, beside what is stored.
const IN_FLIGHT_BYTES: u64 = 64 << 20;

/// A part of the budgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Parallel ranges.
    pub connections: usize,
    /// Threads for zero test, compression and copying.
    pub workers: usize,
    /// Scratch, bytes; `u64::MAX` where there is no limit.
    pub scratch_bytes: u64,
}

/// The budgets do not suffice for even one conversion.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--memory {} is too small: a conversion needs at least {}", size(*.0), size(MEMORY_MIN_BYTES))]
pub struct TooSmall(pub u64);

/// What is free of the budgets.
#[derive(Debug)]
pub struct Shares {
    total: Grant,
    free: Grant,
    slots: usize,
    running: usize,
    /// What one conversion kept its clusters in, the next one uses.
    free_list: FreeList,
}

impl Shares {
    /// The budgets out of the options for all. Fewer slots than asked for, where memory does not do for so many; a connection and a worker
    /// for each at least.
    ///
    /// # Errors
    /// [`TooSmall`].
    pub fn new(options: &Options, jobs: NonZeroUsize) -> Result<Self, TooSmall> {
        let fitting = usize::try_from(options.memory_bytes / MEMORY_MIN_BYTES).unwrap_or(usize::MAX);
        let slots = jobs.get().min(fitting);
        if slots == 0 {
            return Err(TooSmall(options.memory_bytes));
        }
        let total = Grant {
            memory_bytes: options.memory_bytes,
            connections: options.connections.get().max(slots),
            workers: options.workers.get().max(slots),
            scratch_bytes: options.scratch_limit_bytes,
        };
        Ok(Self { total, free: total, slots, running: 0, free_list: FreeList::new(free_list_bytes(total.memory_bytes)) })
    }

    /// Conversions at once.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Is there a slot?
    #[must_use]
    pub const fn has_slot(&self) -> bool {
        self.running < self.slots
    }

    /// The options of one conversion within its part.
    #[must_use]
    pub fn applied(&self, grant: &Grant, options: &Options) -> Options {
        Options { free_list: self.free_list.clone(), ..grant.applied(options) }
    }

    /// The line that is printed at the start.
    #[must_use]
    pub fn describe(&self) -> String {
        let scratch = match self.total.scratch_bytes {
            u64::MAX => String::new(),
            bytes => format!(", scratch {}", size(bytes)),
        };
        format!(
            "for all together: memory {}, {} connections, {} workers{scratch}; {} at once",
            size(self.total.memory_bytes),
            self.total.connections,
            self.total.workers,
            self.slots
        )
    }

    /// A part for an image of so many bytes, with `waiting` others behind it; `None` if there is nothing to give now.
    pub fn grant(&mut self, image_bytes: u64, waiting: usize) -> Option<Grant> {
        let parts = (self.slots - self.running).min(waiting + 1);
        if parts == 0 || self.free.memory_bytes < MEMORY_MIN_BYTES || self.free.connections == 0 || self.free.workers == 0 {
            return None;
        }
        let small = image_bytes < ONE_CONNECTION_BYTES;
        // the store gets five eighths of what is not in flight
        let memory_needed = (IN_FLIGHT_BYTES + image_bytes / 5 * 8).max(MEMORY_MIN_BYTES);
        let count = |free: usize| if small { 1 } else { (free / parts).max(1) };
        let part = self.free.memory_bytes / u64::try_from(parts).unwrap_or(u64::MAX);
        let grant = Grant {
            memory_bytes: memory_needed.min(part.max(MEMORY_MIN_BYTES)),
            connections: count(self.free.connections),
            workers: count(self.free.workers),
            scratch_bytes: match self.total.scratch_bytes {
                u64::MAX => u64::MAX,
                // sums: what cannot be told is the same for all
                all => image_bytes.min(self.free.scratch_bytes).min(all / u64::try_from(self.slots).unwrap_or(u64::MAX)),
            },
        };
        self.running += 1;
        self.free.memory_bytes -= grant.memory_bytes;
        self.free.connections -= grant.connections;
        self.free.workers -= grant.workers;
        if self.total.scratch_bytes != u64::MAX {
            self.free.scratch_bytes -= grant.scratch_bytes;
        }
        Some(grant)
    }

    /// A conversion is over.
    pub fn give_back(&mut self, grant: Grant) {
        self.running -= 1;
        self.free.memory_bytes += grant.memory_bytes;
        self.free.connections += grant.connections;
        self.free.workers += grant.workers;
        if self.total.scratch_bytes != u64::MAX {
            self.free.scratch_bytes += grant.scratch_bytes;
        }
    }
}

impl Grant {
    fn applied(&self, options: &Options) -> Options {
        let count = |count: usize| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        Options {
            memory_bytes: self.memory_bytes,
            connections: count(self.connections),
            workers: count(self.workers),
            scratch_limit_bytes: self.scratch_bytes,
            ..options.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(memory_bytes: u64, scratch_limit_bytes: u64) -> Options {
        let count = |count| NonZeroUsize::new(count).unwrap();
        Options { memory_bytes, scratch_limit_bytes, connections: count(4), workers: count(2), ..Options::default() }
    }

    proptest! {
        #[test]
        fn parts_never_pass_the_whole_and_each_suffices(
            memory in MEMORY_MIN_BYTES..8 << 30, jobs in 1_usize..20, scratch in prop_oneof![Just(u64::MAX), 0_u64..1 << 40],
            sizes in proptest::collection::vec(0_u64..1 << 40, 1..60), ends in proptest::collection::vec(0_usize..20, 60),
        ) {
            let mut shares = Shares::new(&options(memory, scratch), NonZeroUsize::new(jobs).unwrap()).unwrap();
            let total = shares.total;
            let mut running: Vec<Grant> = Vec::new();
            for (n, bytes) in sizes.iter().enumerate() {
                while !shares.has_slot() || (running.len() > ends[n] && !running.is_empty()) {
                    shares.give_back(running.remove(ends[n] % running.len()));
                }
                let grant = match shares.grant(*bytes, sizes.len() - n - 1) {
                    Some(grant) => grant,
                    None => {
                        // the last ones took the rest: when they are over there is a part again
                        prop_assert!(!running.is_empty());
                        while let Some(grant) = running.pop() {
                            shares.give_back(grant);
                        }
                        shares.grant(*bytes, 0).unwrap()
                    }
                };
                running.push(grant);
                prop_assert!(grant.memory_bytes >= MEMORY_MIN_BYTES && grant.connections > 0 && grant.workers > 0);
                prop_assert!(running.iter().map(|grant| grant.memory_bytes).sum::<u64>() <= memory);
                prop_assert!(running.iter().map(|grant| grant.connections).sum::<usize>() <= total.connections);
                prop_assert!(running.iter().map(|grant| grant.workers).sum::<usize>() <= total.workers);
                if scratch != u64::MAX {
                    prop_assert!(running.iter().map(|grant| u128::from(grant.scratch_bytes)).sum::<u128>() <= u128::from(scratch));
                }
            }
        }
    }

    #[test]
    fn a_small_image_leaves_room_and_the_last_one_gets_the_rest() {
        let mut shares = Shares::new(&options(1 << 30, u64::MAX), NonZeroUsize::new(4).unwrap()).unwrap();
        let small = shares.grant(1 << 20, 10).unwrap();
        assert!(small.memory_bytes < 80 << 20 && small.connections == 1);
        let huge = shares.grant(80 << 30, 10).unwrap();
        assert!(huge.memory_bytes > 300 << 20, "a third of what the small one left");
        let last = shares.grant(80 << 30, 0).unwrap();
        assert_eq!(small.memory_bytes + huge.memory_bytes + last.memory_bytes, 1 << 30);
        assert_eq!(shares.grant(1, 0), None);
        assert_eq!(Shares::new(&options(1 << 20, 0), NonZeroUsize::MIN).unwrap_err(), TooSmall(1 << 20));
        let few = Shares::new(&options(100 << 20, 0), NonZeroUsize::new(50).unwrap()).unwrap();
        assert_eq!(few.slots(), 3, "memory does not do for more");
    }
}
