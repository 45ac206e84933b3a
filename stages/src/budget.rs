//! How `--memory` is split, and what the machine has.

use std::fs;

use crate::{
    extent::EXTENT_BYTES,
    qcow2::{Geometry, arrival::RUN_BYTES},
    text::size,
};

/// The least that a conversion runs with: a handful of leases and some room for the index.
pub const MEMORY_MIN_BYTES: u64 = 32 << 20;
/// Largest default: more does not speed anything up but a store that needs it.
const DEFAULT_MAX_BYTES: u64 = 2 << 30;
/// What the process takes beside its budget: code, TLS, HTTP buffers, stacks.
pub const BASE_BYTES: u64 = 64 << 20;

/// The parts of `--memory`. Their sum is never above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// All of it, bytes.
    pub memory_bytes: u64,
    /// Leases in flight.
    pub leases: usize,
    /// Memory of the cluster store, bytes; 0 where the destination needs none.
    pub store_bytes: u64,
    /// Memory of the index, bytes.
    pub index_bytes: u64,
    /// Memory for what no tier keeps until the hash lane has passed it, bytes; later, for what is read again. 0 where the
    /// destination needs no store.
    pub window_bytes: u64,
}

/// Of conversions that run together, 7 of 16 bytes may be in buffers that are free or in use for stored clusters: any part of the memory gives its store
/// more than that, so what is free is never on top of the whole.
#[must_use]
pub const fn free_list_bytes(memory_bytes: u64) -> u64 {
    memory_bytes / 16 * 7
}

/// Largest window: four connections with ranges of 64 MiB.
const WINDOW_BYTES_MAX: u64 = 256 << 20;

/// `--memory` is below what works.
#[derive(Debug, thiserror::Error)]
#[error("--memory {} is too small: a conversion needs at least {}", size(*.memory_bytes), size(MEMORY_MIN_BYTES))]
pub struct MemoryTooSmall {
    /// What was asked for.
    pub memory_bytes: u64,
}

impl Budget {
    /// Splits `memory_bytes`. `in_flight` is how many leases keep everything busy; a quarter of the memory at most
    /// goes there.
    ///
    /// # Errors
    /// [`MemoryTooSmall`].
    pub fn split(memory_bytes: u64, in_flight: usize, with_store: bool) -> Result<Self, MemoryTooSmall> {
        if memory_bytes < MEMORY_MIN_BYTES {
            return Err(MemoryTooSmall { memory_bytes });
        }
        let most = usize::try_from(memory_bytes / 4 / EXTENT_BYTES).unwrap_or(usize::MAX);
        let leases = in_flight.clamp(4, most.max(4));
        let rest = memory_bytes - leases as u64 * EXTENT_BYTES;
        let (index_bytes, window_bytes) = if with_store { (rest / 8, (rest / 4).min(WINDOW_BYTES_MAX)) } else { (rest, 0) };
        let store_bytes = rest - index_bytes - window_bytes;
        Ok(Self { memory_bytes, leases, store_bytes, index_bytes, window_bytes })
    }

    /// The line that is printed at the start.
    #[must_use]
    pub fn describe(&self) -> String {
        let leases = size(self.leases as u64 * EXTENT_BYTES);
        let mut parts = format!("memory {}: {leases} in flight", size(self.memory_bytes));
        if self.store_bytes > 0 {
            parts.push_str(&format!(", {} for stored clusters", size(self.store_bytes)));
            parts.push_str(&format!(", {} for what passes", size(self.window_bytes)));
        }
        parts.push_str(&format!(", {} for the index", size(self.index_bytes)));
        parts
    }

    /// A warning if more was asked for than there is.
    #[must_use]
    pub fn available_warning(&self) -> Option<String> {
        let available = available_bytes().filter(|available| self.memory_bytes + BASE_BYTES > *available)?;
        Some(format!(
            "--memory {} is more than the {} that are free: the system may end this run",
            size(self.memory_bytes),
            size(available)
        ))
    }

    /// A warning if an index of the worst kind (every other cluster data) could pass its part.
    #[must_use]
    pub fn index_warning(&self, geometry: Geometry) -> Option<String> {
        let worst = geometry.guest_clusters().div_ceil(2).saturating_mul(RUN_BYTES);
        (worst > self.index_bytes).then(|| {
            format!(
                "if its data is scattered, this disk's index may need {}, and there are {} for it: \
                 should it not fit, raise --memory or choose a larger --cluster-size (now {})",
                size(worst),
                size(self.index_bytes),
                size(geometry.cluster_bits().cluster_bytes()),
            )
        })
    }
}

/// A quarter of the smaller of available memory and the cgroup's limit, at most 2 GiB; never so much that it and the
/// process itself pass what is available.
#[must_use]
pub fn default_memory_bytes() -> u64 {
    let available = available_bytes().unwrap_or(1 << 30);
    default_for(available)
}

fn default_for(available: u64) -> u64 {
    let quarter = (available / 4).min(DEFAULT_MAX_BYTES);
    quarter.max(MEMORY_MIN_BYTES).min(available.saturating_sub(BASE_BYTES).max(MEMORY_MIN_BYTES))
}

/// Memory that this process could take now: the machine's, or the cgroup's if that is less.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let machine = meminfo_bytes("MemAvailable:")?;
    Some(cgroup_available_bytes().map_or(machine, |cgroup| cgroup.min(machine)))
}

/// A line of `/proc/meminfo`, by its key with the colon.
#[must_use]
pub fn meminfo_bytes(key: &str) -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// What is left of the tightest memory limit on the way from this process's cgroup to the root (version 2), or of
/// its own (version 1).
fn cgroup_available_bytes() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut least: Option<u64> = None;
    let mut take = |limit: Option<u64>, used: Option<u64>| {
        if let Some(limit) = limit.filter(|limit| *limit < 1 << 60) {
            let left = limit.saturating_sub(used.unwrap_or(0));
            least = Some(least.map_or(left, |least| least.min(left)));
        }
    };
    for line in own.lines() {
        if let Some(path) = line.strip_prefix("0::") {
            let mut path = path.to_owned();
            loop {
                let folder = format!("/sys/fs/cgroup{path}");
                take(number(&format!("{folder}/memory.max")), number(&format!("{folder}/memory.current")));
                match path.rfind('/') {
                    Some(cut) if path.len() > 1 => path.truncate(cut.max(1).min(path.len() - 1)),
                    _ => break,
                }
            }
        } else if let Some((_, path)) = line.split_once(":memory:") {
            let folder = format!("/sys/fs/cgroup/memory{path}");
            take(number(&format!("{folder}/memory.limit_in_bytes")), number(&format!("{folder}/memory.usage_in_bytes")));
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ClusterBits;

    #[test]
    fn the_parts_never_pass_the_whole() {
        for memory in [MEMORY_MIN_BYTES, 100 << 20, 1 << 30, 1 << 40] {
            for in_flight in [1, 10, 100, 100_000] {
                for with_store in [false, true] {
                    let budget = Budget::split(memory, in_flight, with_store).unwrap();
                    assert!(
                        budget.leases as u64 * EXTENT_BYTES + budget.store_bytes + budget.index_bytes + budget.window_bytes
                            <= memory
                    );
                    assert!(budget.leases >= 4 && budget.index_bytes > 0);
                    assert!(!with_store || budget.store_bytes >= free_list_bytes(memory));
                }
            }
        }
        assert!(Budget::split(MEMORY_MIN_BYTES - 1, 1, true).is_err());
    }

    #[test]
    fn the_default_leaves_the_machine_its_memory() {
        assert_eq!(default_for(64 << 30), 2 << 30);
        assert_eq!(default_for(4 << 30), 1 << 30);
        assert_eq!(default_for(128 << 20), 32 << 20);
        assert!(default_for(1 << 30) + BASE_BYTES < 1 << 30);
    }

    #[test]
    fn small_clusters_on_a_large_disk_are_warned_of_and_the_flag_is_named() {
        let budget = Budget::split(64 << 20, 8, false).unwrap();
        let small = Geometry::new(80 << 30, ClusterBits::MIN).unwrap();
        assert!(budget.index_warning(small).unwrap().contains("--cluster-size"));
        let usual = Geometry::new(80 << 30, ClusterBits::DEFAULT).unwrap();
        assert_eq!(budget.index_warning(usual), None);
    }
}
