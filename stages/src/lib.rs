//! The stages of Virta. (draft)
pub mod qcow2;
pub mod read_at;
pub mod units;
pub mod zero;
