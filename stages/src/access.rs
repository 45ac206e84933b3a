//! How a source can be read.

use serde::Serialize;

/// How the source could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// At any offset.
    Random,
    /// From the start, as often as one likes.
    Sequential,
    /// From the start, once.
    Once,
}
