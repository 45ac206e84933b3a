//! Is a buffer all zeros?
//!
//! [`scan`] is the reference, byte by byte and obviously right; [`fast`] is what runs and must equal it. `fast`
//! looks at three words first, where data mostly shows itself, then ORs 512-byte blocks with an early exit after
//! each. On x86-64 the block loop is compiled a second time for AVX2 and chosen at run time.
//!
//! [`classify`] cuts an extent into runs of zero and data clusters; it is the CPU stage of every conversion.

pub mod classify;
pub mod fast;
pub mod scan;

pub use fast::is_zero;
