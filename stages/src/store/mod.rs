//! The cluster store: what keeps surveyed clusters until the image is emitted, and the two stages around it.
//!
//! For destinations that only go forward. A survey reads the source once and keeps every data cluster; the layout is
//! then complete and the length exact; emit produces the file from the store, as often as it has to.
//!
//! The store never keeps a pool lease: [`keep::Keep`] copies data clusters, packed, into memory of the store's own,
//! and the lease returns. Otherwise the survey would wait for a lease that only emit frees. A full store never
//! waits: it fails at once, naming the guest offset reached and the flag to raise.
//!
//! | module | noun |
//! |---|---|
//! | [`keep`] | copies data clusters into the store, under its limit |
//! | [`collect`] | puts extents into guest order, proves that they cover the disk, and builds the [`Survey`] |
//! | [`emit`] | the file strictly forward, with its digest |

pub mod collect;
pub mod emit;
pub mod keep;

pub use collect::{Collect, Survey};
pub use emit::{Chunk, Emit, EmitReport};
pub use keep::{Keep, MemoryStore};
