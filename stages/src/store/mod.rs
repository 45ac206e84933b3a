//! The cluster store: what keeps surveyed clusters until the image is emitted, in tiers.
//!
//! For destinations that only go forward. A survey reads the source once and remembers every data cluster; the layout is
//! then complete and the length exact; emit produces the file, as often as it has to.
//!
//! | tier | what | until |
//! |---|---|---|
//! | 1 | memory | its part of `--memory` |
//! | 2 | one scratch file without a name, in `--scratch` | `--scratch-limit`, or the disk is full |
//! | 3 | the source, read again during emit | – |
//!
//! A source that can be read only once (a pipe) has no third tier: it ends with [`keep::StoreFull`].
//!
//! The store never keeps a pool lease: [`keep::Keep`] copies data clusters, packed, into memory of the store's own,
//! and the lease returns. Otherwise the survey would wait for a lease that only emit frees. What no tier keeps stays in memory until
//! the hash lane has passed it ([`crate::extent::Holder::Passing`]), bounded by the [`crate::watermark::Watermark`].
//!
//! What is read again obeys the survey's record: each cluster's digest is compared, and its stored form made again to the same length,
//! before a byte of it leaves ([`reread`]).
//!
//! ```text
//! survey: … ── keep ──> scratch ──> collect ──> hash
//! emit:   again ── recheck x N ──> emit ──> (trickle) ──> upload, pipe
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`free_list`] | memory of conversions that are over, for those that come after them |
//! | [`keep`] | encodes data clusters and keeps them in memory, under its limit |
//! | [`scratch`] | the scratch file |
//! | [`collect`] | puts extents into guest order, proves that they cover the disk, and builds the [`Survey`] |
//! | [`reread`] | clusters that are read again, against the survey's record |
//! | [`emit`] | the file strictly forward, with its digest |

pub mod collect;
pub mod emit;
pub mod free_list;
pub mod keep;
pub mod reread;
pub mod scratch;

pub use collect::{Collect, Survey, Tier};
pub use emit::{Emit, EmitReport};
pub use free_list::FreeList;
pub use keep::{Keep, MemoryStore};
pub use reread::{ReadAgain, Rebuilt, Recheck};
pub use scratch::{ScratchFile, ScratchWrite};
