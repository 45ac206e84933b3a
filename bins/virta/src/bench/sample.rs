//! Bytes to hash and to compress.

use std::{fs::File, io::Read, path::Path};

/// Bytes that nobody can compress; the same for the same seed.
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

/// Folders whose files are what a server's disk is full of.
const SYSTEM: [&str; 3] = ["/usr/bin", "/usr/lib", "/usr/share"];

/// A sample of a disk's data, and what it is: the head of a file that was named, else of this system's files.
///
/// # Errors
/// If the named file cannot be read, or is empty.
pub fn of_data(named: Option<&Path>, bytes: usize) -> std::io::Result<(Vec<u8>, String)> {
    if let Some(path) = named {
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("that is no ordinary file"));
        }
        let mut sample = Vec::new();
        File::open(path)?.take(bytes as u64).read_to_end(&mut sample)?;
        if sample.len() < 1 << 16 {
            return Err(std::io::Error::other("a sample has to have 64 KiB or more"));
        }
        let whole = sample.len() >> 16 << 16;
        sample.truncate(whole);
        return Ok((sample, path.display().to_string()));
    }
    let mut sample = Vec::with_capacity(bytes);
    for folder in SYSTEM {
        collect(
            Path::new(folder),
            bytes * (SYSTEM.iter().position(|at| *at == folder).unwrap_or(0) + 1) / SYSTEM.len(),
            &mut sample,
        );
    }
    if sample.len() < bytes / 2 {
        // a container with next to nothing in it
        let text: Vec<u8> = noise(4096, 2).iter().flat_map(|byte| [b'a' + byte % 16, b'e', *byte, b' ']).collect();
        sample = text.iter().copied().cycle().take(bytes).collect();
        return Ok((sample, "made up: this system has too few files".to_owned()));
    }
    let whole = sample.len() >> 16 << 16;
    sample.truncate(whole);
    Ok((sample, "files of this system".to_owned()))
}

/// Files below `folder` in the order of their names, until there are `bytes`; what cannot be read is passed over.
fn collect(folder: &Path, bytes: usize, into: &mut Vec<u8>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if into.len() >= bytes {
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&entry.path(), bytes, into);
        } else if kind.is_file()
            && let Ok(file) = File::open(entry.path())
        {
            // no file is more than a sixteenth of it
            let most = (bytes / 16).min(bytes - into.len());
            let _ = file.take(most as u64).read_to_end(into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_whole_clusters_and_says_what_it_is() {
        let (sample, what) = of_data(None, 1 << 20).unwrap();
        assert!(sample.len() >= 1 << 19 && sample.len() % (1 << 16) == 0, "{} {what}", sample.len());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 200_000]).unwrap();
        assert_eq!(of_data(Some(file.path()), 1 << 20).unwrap().0.len(), 3 << 16);
        std::fs::write(file.path(), b"short").unwrap();
        assert!(of_data(Some(file.path()), 1 << 20).is_err());
    }
}
