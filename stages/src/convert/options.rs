//! What can be asked of a conversion.

use std::num::NonZeroUsize;

use crate::{disk::IoMode, units::ClusterBits};

/// Options of one conversion, with defaults that suit a small machine.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cluster size of the image.
    pub cluster_bits: ClusterBits,
    /// Parallel ranges, where the source takes them.
    pub connections: NonZeroUsize,
    /// Threads for zero test and copying.
    pub workers: NonZeroUsize,
    /// All memory for data, store and index, bytes.
    pub memory_bytes: u64,
    /// How local files are written.
    pub io: IoMode,
    /// Flush a local file and its folder before it counts as done.
    pub sync: bool,
    /// Replace a local file; make a second image of one name.
    pub force: bool,
    /// Properties to set on a new image, over those of the source.
    pub properties: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            cluster_bits: ClusterBits::DEFAULT,
            // four streams fill a 10 Gbit/s link and leave Glance's other users room
            connections: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN),
            workers: NonZeroUsize::new(cores.min(8)).unwrap_or(NonZeroUsize::MIN),
            memory_bytes: super::budget::default_memory_bytes(),
            io: IoMode::Auto,
            sync: true,
            force: false,
            properties: Vec::new(),
        }
    }
}

/// Who is told what is going on, a line at a time: decisions at the start, retries, warnings.
pub trait Notices: Send + Sync {
    /// Something worth a line.
    fn note(&self, line: &str);

    /// Something that goes into the report's `warnings`, too.
    fn warn(&self, line: &str) {
        self.note(line);
    }
}

/// Tells nobody.
impl Notices for () {
    fn note(&self, _: &str) {}
}
