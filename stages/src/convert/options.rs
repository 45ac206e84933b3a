//! What can be asked of a conversion.

use std::{num::NonZeroUsize, path::PathBuf};

use crate::{
    compress::Compression, disk::IoMode, ownership::Proof, retry::Patience, run::ThisRun, store::FreeList, units::ClusterBits,
};

/// How sure one wants to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Verify {
    /// The source is not hashed. Size and hash of a new image in Glance are still compared.
    None,
    /// The source's hash over what was read; size and hash of the new image in Glance over what was sent.
    #[default]
    Hash,
    /// That, and the new image is read back, decoded, and compared cluster by cluster with what was read of the source.
    Readback,
}

impl Verify {
    /// How strictly a conversion that is asked for so has to be proven.
    #[must_use]
    pub const fn proof(self) -> Proof {
        match self {
            Self::None => Proof::Sent,
            Self::Hash => Proof::Hash,
            Self::Readback => Proof::Readback,
        }
    }
}

/// What becomes of a source in Glance once the new image is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum After {
    /// It stays.
    #[default]
    Keep,
    /// It is deleted.
    Delete,
    /// It is deleted, and the new image takes its name.
    Replace,
}

/// Options of one conversion, with defaults that suit a small machine.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cluster size of the image.
    pub cluster_bits: ClusterBits,
    /// How clusters are compressed, if at all.
    pub compression: Option<Compression>,
    /// How sure one wants to be.
    pub verify: Verify,
    /// Parallel ranges, where the source takes them.
    pub connections: NonZeroUsize,
    /// Threads for zero test, compression and copying.
    pub workers: NonZeroUsize,
    /// All memory for data, store and index, bytes.
    pub memory_bytes: u64,
    /// Memory of conversions that are over, where several share one list: beside `memory_bytes`, up to the list's limit.
    pub free_list: FreeList,
    /// Folder for a scratch file, where memory does not hold the data.
    pub scratch: Option<PathBuf>,
    /// Bytes that it may take.
    pub scratch_limit_bytes: u64,
    /// How local files are written.
    pub io: IoMode,
    /// Flush a local file and its folder before it counts as done.
    pub sync: bool,
    /// Replace a local file; make a second image of one name.
    pub force: bool,
    /// Properties to set on a new image, over those of the source.
    pub properties: Vec<(String, String)>,
    /// What becomes of the source.
    pub after: After,
    /// Share the new image with the projects that the source is shared with.
    pub copy_members: bool,
    /// The new image goes into another cloud: ids of the source's cloud stay behind.
    pub elsewhere: bool,
    /// All connections fetch from the start; otherwise only as many as make it faster.
    pub all_connections: bool,
    /// The run, as images name it.
    pub run: ThisRun,
    /// Claims of other runs are passed by: for who knows that they are dead.
    pub take_over: bool,
    /// A conversion of this source under any name will do, if there is one.
    pub any_name: bool,
    /// Conversions that share the line, for the claim's length.
    pub jobs: NonZeroUsize,
    /// When to give up.
    pub patience: Patience,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            cluster_bits: ClusterBits::DEFAULT,
            compression: None,
            verify: Verify::default(),
            // four streams fill a 10 Gbit/s link and leave Glance's other users room
            connections: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN),
            workers: NonZeroUsize::new(cores.min(8)).unwrap_or(NonZeroUsize::MIN),
            memory_bytes: crate::budget::default_memory_bytes(),
            free_list: FreeList::default(),
            scratch: None,
            scratch_limit_bytes: u64::MAX,
            io: IoMode::Auto,
            sync: true,
            force: false,
            properties: Vec::new(),
            after: After::Keep,
            copy_members: false,
            elsewhere: false,
            all_connections: false,
            run: ThisRun::default(),
            take_over: false,
            any_name: false,
            jobs: NonZeroUsize::MIN,
            patience: Patience::default(),
        }
    }
}
