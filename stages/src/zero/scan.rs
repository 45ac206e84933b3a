//! The reference: one byte after the other.

/// Are all bytes zero? True for an empty buffer.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}
