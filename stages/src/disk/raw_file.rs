//! A raw disk image on the local machine: its size, its data and its holes.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{SeekFrom, seek};

use crate::{
    magic::{DiskFormat, HEAD_BYTES},
    read_at::ReadAt,
    units::to_usize,
};

/// Why a local source cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// It cannot be opened or read.
    #[error("{action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no file and no block device.
    #[error("{path} is {what}: a source is a file or a block device")]
    Kind {
        /// The path.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// Its bytes are those of another format.
    #[error("{path} is not a raw disk image but {format}: {advice}")]
    NotRaw {
        /// The path.
        path: String,
        /// What it is.
        format: DiskFormat,
        /// What to do with it instead.
        advice: String,
    },
    /// There is nothing in it.
    #[error("{path} is empty: there is no disk in it to convert")]
    Empty {
        /// The path.
        path: String,
    },
    /// A pipe that gave fewer bytes, or more, than it has to.
    #[error("{path} gave {bytes} bytes, but --source-size says {expected}: the pipe broke, or that is another disk")]
    Length {
        /// The pipe.
        path: String,
        /// What came.
        bytes: u64,
        /// What had to come.
        expected: u64,
    },
    /// It changed while it was read, so what was read may be half old, half new.
    #[error("{path} changed while it was read ({what}): stop whatever writes to it and start again")]
    Changed {
        /// The path.
        path: String,
        /// What differs.
        what: &'static str,
    },
}

/// What is compared before and after reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    bytes: u64,
    modified: (i64, i64),
}

/// An open raw disk image.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    path: PathBuf,
    bytes: u64,
    identity: Option<Identity>,
}

/// A run of the file that is either data or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRun {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// Has to be read; else it is a hole and reads as zeros.
    pub data: bool,
}

impl RawFile {
    /// Opens a file or block device and makes sure by its bytes that it is raw.
    ///
    /// # Errors
    /// [`SourceError`], each naming the path and what to do.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let io = |action| move |source| SourceError::Io { action, path: path.display().to_string(), source };
        // looked at before it is opened: opening a FIFO would wait for its other end
        let kind = std::fs::metadata(path).map_err(io("open"))?.file_type();
        if let Some(what) = super::no_file(kind) {
            return Err(SourceError::Kind { path: path.display().to_string(), what });
        }
        Self::from_file(File::open(path).map_err(io("open"))?, path)
    }

    /// A file or block device that is open already; `path` is what it is called in messages.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn from_file(file: File, path: &Path) -> Result<Self, SourceError> {
        let shown = || path.display().to_string();
        let io = |action| move |source| SourceError::Io { action, path: path.display().to_string(), source };
        let kind = file.metadata().map_err(io("look at"))?.file_type();
        if let Some(what) = super::no_file(kind) {
            return Err(SourceError::Kind { path: shown(), what });
        }
        let (bytes, identity) = if kind.is_block_device() {
            (seek(&file, SeekFrom::End(0)).map_err(|error| io("find the size of")(error.into()))?, None)
        } else {
            let identity = identity(&file).map_err(io("look at"))?;
            (identity.bytes, Some(identity))
        };
        if bytes == 0 {
            return Err(SourceError::Empty { path: shown() });
        }
        let mut head = vec![0; to_usize(bytes.min(HEAD_BYTES))];
        file.read_exact_at(0, &mut head).map_err(io("read the start of"))?;
        let mut tail = vec![0; to_usize(bytes.min(512))];
        file.read_exact_at(bytes - bytes.min(512), &mut tail).map_err(io("read the end of"))?;
        let format = DiskFormat::detect(&head, &tail);
        if !format.is_disk() {
            return Err(SourceError::NotRaw { path: shown(), format, advice: format.advice(&shown()) });
        }
        Ok(Self { file, path: path.to_owned(), bytes, identity })
    }

    /// Size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file itself, for reading.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is the file still what it was when it was opened? Call after reading.
    ///
    /// # Errors
    /// [`SourceError::Changed`]. A block device says nothing about changes; nothing is checked there.
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        let Some(before) = self.identity else { return Ok(()) };
        let path = self.path.display().to_string();
        let after = identity(&self.file).map_err(|source| SourceError::Io { action: "look at", path: path.clone(), source })?;
        if after.bytes != before.bytes {
            return Err(SourceError::Changed { path, what: "its size" });
        }
        if after.modified != before.modified {
            return Err(SourceError::Changed { path, what: "its modification time" });
        }
        Ok(())
    }

    /// The run that begins at `start`, by SEEK_DATA and SEEK_HOLE; `None` at the end. File systems and devices that
    /// know no holes give one run of data.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn run_at(&self, start: u64) -> Result<Option<FileRun>, SourceError> {
        if start >= self.bytes {
            return Ok(None);
        }
        let io = |source: rustix::io::Errno| SourceError::Io {
            action: "find the holes of",
            path: self.path.display().to_string(),
            source: source.into(),
        };
        let data = match seek(&self.file, SeekFrom::Data(start)) {
            Ok(data) => data.min(self.bytes),
            Err(rustix::io::Errno::NXIO) => self.bytes, // no data after `start`
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP) => {
                return Ok(Some(FileRun { start, end: self.bytes, data: true }));
            }
            Err(error) => return Err(io(error)),
        };
        if data > start {
            return Ok(Some(FileRun { start, end: data, data: false }));
        }
        let hole = seek(&self.file, SeekFrom::Hole(start)).map_err(io)?.min(self.bytes);
        // a hole at `start` itself can only mean that the file changes under us: read it
        let end = if hole <= start { self.bytes } else { hole };
        Ok(Some(FileRun { start, end, data: true }))
    }
}

fn identity(file: &File) -> io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok(Identity { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
}
