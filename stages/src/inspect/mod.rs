//! What is in an image: looked at without converting it, by a few reads where they can be had.
//!
//! | module | noun |
//! |---|---|
//! | [`mod@format`] | which format, and what Glance will say to it |

pub mod format;
