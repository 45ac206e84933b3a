//! A file that is written whole or not at all.

use std::{
    io::{self, Write},
    path::Path,
};

/// Writes a file for its owner alone: a reader sees the old one or the new one, and a kill leaves nothing beside it that is taken for either. `sync`: the new one is on
/// stable storage before it has the name.
///
/// # Errors
/// Of the file system. The old file is as it was then.
pub fn write_whole(path: &Path, bytes: &[u8], sync: bool) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // its own mode is 0600
    let mut file = tempfile::Builder::new().prefix(".virta-").suffix(".new").tempfile_in(folder)?;
    file.write_all(bytes)?;
    if sync {
        file.as_file().sync_data()?;
    }
    file.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_readable_by_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for text in ["a longer one", "short"] {
            write_whole(&path, text.as_bytes(), true).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write_whole(&folder.path().join("nowhere/file"), b"x", true).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing beside it");
    }
}
