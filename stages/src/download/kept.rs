//! What is written down beside a partial file.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::whole_file::write_whole;

/// What is written down beside a partial file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) image: String,
    pub(super) bytes: u64,
    /// The digest that Glance has of it.
    pub(super) hash: Option<String>,
    pub(super) created_at: Option<String>,
    /// Up to here all bytes are in the file.
    pub(super) whole_bytes: u64,
}

impl Mark {
    pub(super) fn path(partial: &Path) -> PathBuf {
        let mut name = partial.file_name().map(ToOwned::to_owned).unwrap_or_default();
        name.push(".json");
        partial.with_file_name(name)
    }

    pub(super) fn read(partial: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::path(partial)).ok()?).ok()
    }

    pub(super) fn write(&self, partial: &Path) -> io::Result<()> {
        write_whole(&Self::path(partial), serde_json::to_string(self)?.as_bytes(), false)
    }

    /// Is it of this image, as it is now?
    pub(super) fn is_of(&self, other: &Self) -> bool {
        self.image == other.image && self.bytes == other.bytes && self.hash == other.hash && self.created_at == other.created_at
    }
}
