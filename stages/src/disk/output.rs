//! The file an image becomes: `<name>.partial` while it is being written, locked against a second run, renamed when
//! it is complete. Dropped before that, it is removed.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::magic::DiskFormat;

/// Why an output cannot be opened or completed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// It is there already.
    #[error("{path} exists: choose another name, or replace it with --force")]
    Exists {
        /// The file.
        path: String,
    },
    /// It came into being while the run went on.
    #[error("{path} was made by somebody else meanwhile; the finished image is kept as {kept}")]
    AppearedMeanwhile {
        /// The file.
        path: String,
        /// Where the image is.
        kept: String,
    },
    /// The folder it should be in is not there.
    #[error("{path}: there is no folder {folder}")]
    NoFolder {
        /// The file.
        path: String,
        /// The folder.
        folder: String,
    },
    /// Its name promises another format.
    #[error("{path}: the extension .{extension} is not that of a {format} image; name it .{format}")]
    Extension {
        /// The file.
        path: String,
        /// What it ends in.
        extension: String,
        /// What will be in it.
        format: &'static str,
    },
    /// Another run holds it.
    #[error("{path} is being written by another run")]
    Locked {
        /// The `.partial` file.
        path: String,
    },
    /// Its partial file holds something that no dead run of ours left.
    #[error(
        "{path} is in the way: it is needed while the image is written, and its content is not what an interrupted run leaves. \
         Move it elsewhere (a complete image that could not be renamed may be in it)"
    )]
    InTheWay {
        /// The `.partial` file.
        path: String,
    },
    /// The image is complete, but could not be given its name.
    #[error("the image is complete, but could not be renamed to {path}; it is kept as {kept}")]
    Kept {
        /// The name it should have.
        path: String,
        /// Where it is.
        kept: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no file.
    #[error("{path} is {what}: an image can be written to a file, or with --force to a block device")]
    Kind {
        /// The path.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// A block device that is smaller than what shall go onto it. Nothing on it was changed.
    #[error("{path} has {room} bytes, and the image {bytes}: a larger device is needed")]
    TooSmall {
        /// The device.
        path: String,
        /// What it has.
        room: u64,
        /// What is needed.
        bytes: u64,
    },
    /// A partial file that needs a decision.
    #[error("{path} {what}")]
    Unfinished {
        /// The `.partial` file.
        path: String,
        /// What it is, and what to do.
        what: String,
    },
    /// A block device would be overwritten.
    #[error("{path} is a block device, and everything on it would be lost: write to it with --force")]
    Device {
        /// The device.
        path: String,
    },
    /// The file system refused.
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
}

/// What a file is called while it is written.
const SUFFIX: &str = ".partial";
/// Longest file name of the usual file systems.
const NAME_BYTES_MAX: usize = 255;

/// Extensions of disk image formats and of compressed files.
const EXTENSIONS: [&str; 17] =
    ["qcow2", "raw", "img", "vmdk", "vdi", "vhd", "vhdx", "vpc", "iso", "qed", "qcow", "gz", "xz", "bz2", "zst", "ova", "tar"];

/// What a partial file that is there already may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// What a dead conversion leaves begins with zeros; anything else is somebody's.
    Zeros,
    /// It is known to be ours: it is emptied.
    Ours,
    /// It is known to be ours, and whole up to here: it is gone on with.
    Continued(u64),
}

/// An image file under construction.
#[derive(Debug)]
pub struct OutputFile {
    file: File,
    target: PathBuf,
    /// `None` for a block device, which is written in place.
    partial: Option<PathBuf>,
    replace: bool,
    done: bool,
    /// Bytes of an earlier run that are gone on with.
    continued: u64,
}

impl OutputFile {
    /// Opens `path` for a new image. With `force` an existing file is replaced (a symlink's target, not the link) and
    /// a block device written; nothing is touched before [`OutputFile::commit`], a device excepted.
    ///
    /// # Errors
    /// [`OutputError`], each naming the path and the way out.
    pub fn create(path: &Path, force: bool) -> Result<Self, OutputError> {
        Self::open(path, force, Some(DiskFormat::Qcow2), None, |_, _| Ok(Left::Zeros))
    }

    /// [`Self::create`] for a file of another format (`None`: of whatever extension) and of a length that is known. `left` says what a partial file may be
    /// that is there already, by its path and its length: asked while it is locked, and before anything in it is changed.
    ///
    /// # Errors
    /// As [`Self::create`], and what `left` says.
    pub fn open(
        path: &Path,
        force: bool,
        format: Option<DiskFormat>,
        bytes: Option<u64>,
        left: impl FnOnce(&Path, u64) -> Result<Left, OutputError>,
    ) -> Result<Self, OutputError> {
        let shown = path.display().to_string();
        let io = |action: &'static str, path: &Path| {
            let path = path.display().to_string();
            move |source| OutputError::Io { action, path, source }
        };
        let target = match fs::canonicalize(path) {
            Ok(target) => target,
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
                Ok(link) => path.parent().unwrap_or(Path::new("")).join(link), // a dangling link: make its target
                Err(_) => path.to_owned(),
            },
            Err(error) => return Err(io("open", path)(error)),
        };
        match fs::metadata(&target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io("look at", &target)(error)),
            Ok(metadata) => {
                let kind = metadata.file_type();
                if kind.is_block_device() {
                    if !force {
                        return Err(OutputError::Device { path: shown });
                    }
                    return Self::open_device(target, bytes);
                }
                let what = super::no_file(kind);
                if let Some(what) = what {
                    return Err(OutputError::Kind { path: shown, what });
                }
                if !force {
                    return Err(OutputError::Exists { path: shown });
                }
            }
        }
        let extension = target.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
        if let (Some(lower), Some(format)) = (extension, format) {
            // `.img` is anything: cloud images of distributions are qcow2 and called so
            let own = [Some(format.name()), format.glance_name(), Some("img")];
            if EXTENSIONS.contains(&lower.as_str()) && !own.contains(&Some(lower.as_str())) {
                return Err(OutputError::Extension { path: shown, extension: lower, format: format.name() });
            }
        }
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            return Err(OutputError::NoFolder { path: shown, folder: folder.display().to_string() });
        }
        let partial = partial_of(&target);
        let (file, left) = Self::lock_partial(&partial, left)?;
        // Only what a dead run left is emptied: ext4 flushes a file that was ever truncated to nothing when it is closed
        // (auto_da_alloc), which took longer than the conversion.
        if !matches!(left, Left::Continued(_)) && file.metadata().map_err(io("look at", &partial))?.len() > 0 {
            file.set_len(0).map_err(io("empty", &partial))?;
        }
        let continued = if let Left::Continued(bytes) = left { bytes } else { 0 };
        Ok(Self { file, target, partial: Some(partial), replace: force, done: false, continued })
    }

    /// Opens and locks the partial file. What a dead run left is taken over, and nothing else: such a file begins with
    /// zeros, for the header is written last.
    fn lock_partial(
        partial: &Path,
        left: impl FnOnce(&Path, u64) -> Result<Left, OutputError>,
    ) -> Result<(File, Left), OutputError> {
        let shown = || partial.display().to_string();
        let io = |action| move |source| OutputError::Io { action, path: partial.display().to_string(), source };
        // O_NOFOLLOW: somebody else's link must not lead us into a file of theirs.
        let flags = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
        loop {
            let mut options = fs::OpenOptions::new();
            options.read(true).write(true).mode(0o600).custom_flags(flags);
            let (file, new) = match options.clone().create_new(true).open(partial) {
                Ok(file) => (file, true),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match options.open(partial) {
                    Ok(file) => (file, false),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // renamed or removed just now
                    Err(error) => return Err(io("open")(error)),
                },
                Err(error) => return Err(io("create")(error)),
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(OutputError::Locked { path: shown() }),
                // a file system without locks: only a file that nobody else can have opened before is ours
                Err(TryLockError::Error(_)) if new => return Ok((file, Left::Zeros)),
                Err(TryLockError::Error(_)) => return Err(OutputError::InTheWay { path: shown() }),
            }
            if !new {
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                file.set_permissions(mode).map_err(io("set the permissions of"))?;
            }
            // The run that held the lock may have renamed or removed the file since it was opened.
            let opened = file.metadata().map_err(io("look at"))?;
            match fs::symlink_metadata(partial) {
                Ok(named) if named.ino() == opened.ino() && named.dev() == opened.dev() => {}
                _ => continue,
            }
            let left = left(partial, opened.len())?;
            let mut head = [0; 4096];
            let mut filled = 0;
            while filled < head.len() {
                match file.read_at(&mut head[filled..], filled as u64).map_err(io("read"))? {
                    0 => break,
                    bytes => filled += bytes,
                }
            }
            if left == Left::Zeros && !crate::zero::is_zero(&head[..filled]) {
                return Err(OutputError::InTheWay { path: shown() });
            }
            return Ok((file, left));
        }
    }

    fn open_device(target: PathBuf, bytes: Option<u64>) -> Result<Self, OutputError> {
        let shown = target.display().to_string();
        let io = |action| {
            let path = shown.clone();
            move |source| OutputError::Io { action, path, source }
        };
        // O_EXCL on a block device: not while it is mounted
        let flags = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
        let file = fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&target).map_err(io("open"))?;
        let room = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| io("look at")(error.into()))?;
        if let Some(bytes) = bytes.filter(|bytes| *bytes > room) {
            return Err(OutputError::TooSmall { path: shown, room, bytes });
        }
        // What was there must not be taken for the image while it is incomplete: its header goes first.
        file.write_all_at(&[0; 4096], 0).and_then(|()| file.sync_data()).map_err(io("clear the start of"))?;
        Ok(Self { file, target, partial: None, replace: true, done: false, continued: 0 })
    }

    /// A second handle on the file, for the stage that writes it.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn handle(&self) -> Result<File, OutputError> {
        self.file.try_clone().map_err(|source| OutputError::Io {
            action: "open again",
            path: self.target.display().to_string(),
            source,
        })
    }

    /// Bytes of an earlier run that are there and are gone on with.
    #[must_use]
    pub const fn continued_bytes(&self) -> u64 {
        self.continued
    }

    /// Is it a block device, which has no holes?
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.partial.is_none()
    }

    /// Leaves the partial file for a later run that goes on with it.
    pub fn leave(mut self) {
        self.done = self.partial.is_some();
    }

    /// Where it is while it is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.partial.as_deref().unwrap_or(&self.target)
    }

    /// The path that the image will have.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The folder it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        match self.target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// Gives the complete file its name. With `sync`, the folder is flushed after it (the file's content was, by
    /// whoever wrote it).
    ///
    /// # Errors
    /// [`OutputError::AppearedMeanwhile`] if the name is taken and may not be replaced: the image stays under its
    /// partial name then.
    pub fn commit(mut self, sync: bool) -> Result<PathBuf, OutputError> {
        let Some(partial) = self.partial.clone() else {
            self.done = true;
            return Ok(self.target.clone());
        };
        let io = |action, source| OutputError::Io { action, path: self.target.display().to_string(), source };
        let appeared = |output: &mut Self| {
            output.done = true;
            Err(OutputError::AppearedMeanwhile { path: output.target.display().to_string(), kept: partial.display().to_string() })
        };
        let renamed = if self.replace {
            fs::rename(&partial, &self.target)
        } else {
            match renameat_with(CWD, &partial, CWD, &self.target, RenameFlags::NOREPLACE) {
                Ok(()) => Ok(()),
                Err(rustix::io::Errno::EXIST) => return appeared(&mut self),
                // A file system without RENAME_NOREPLACE: a hard link refuses an existing name, too.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => match fs::hard_link(&partial, &self.target) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return appeared(&mut self),
                    linked => linked.and_then(|()| fs::remove_file(&partial)),
                },
                Err(error) => Err(error.into()),
            }
        };
        self.done = true;
        if let Err(source) = renamed {
            // hours of work are not thrown away for a name
            let (path, kept) = (self.target.display().to_string(), partial.display().to_string());
            return Err(OutputError::Kept { path, kept, source });
        }
        if sync {
            File::open(self.folder()).and_then(|folder| folder.sync_all()).map_err(|source| io("flush the folder of", source))?;
        }
        Ok(self.target.clone())
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        match &self.partial {
            // Nothing half-made is left. If even this fails, the next run takes the file over.
            Some(partial) => {
                let _ = fs::remove_file(partial);
            }
            // What is on the device must not look like an image: nothing has vouched for it.
            None => {
                let _ = self.file.write_all_at(&[0; 4096], 0).and_then(|()| self.file.sync_data());
            }
        }
    }
}

/// The name of a file while it is being written.
#[must_use]
pub fn partial_of(target: &Path) -> PathBuf {
    let name = target.file_name().map(ToOwned::to_owned).unwrap_or_default();
    let bytes = name.as_encoded_bytes();
    if bytes.len() + SUFFIX.len() > NAME_BYTES_MAX {
        // a file system takes 255 bytes: the name's digest stands in for what is too long
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        let short: String = digest.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        return target.with_file_name(format!("virta-{short}{SUFFIX}"));
    }
    let mut partial = name;
    partial.push(SUFFIX);
    target.with_file_name(partial)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_file_is_taken_over_only_if_a_dead_run_left_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, partial) = (folder.path().join("a.qcow2"), folder.path().join("a.qcow2.partial"));
        for precious in [b"somebody's only raw disk".as_slice(), b"QFI\xfb a complete image that was kept"] {
            fs::write(&partial, precious).unwrap();
            assert!(matches!(OutputFile::create(&path, true), Err(OutputError::InTheWay { .. })));
            assert_eq!(fs::read(&partial).unwrap(), precious);
        }
        let mut dead = vec![0; 100_000];
        dead[70_000] = 1;
        fs::write(&partial, dead).unwrap();
        OutputFile::create(&path, false).unwrap().commit(false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn nothing_is_there_before_commit_and_nothing_is_left_without_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let output = OutputFile::create(&path, false).unwrap();
        output.handle().unwrap().write_all_at(b"x", 0).unwrap();
        assert!(!path.exists());
        assert!(matches!(OutputFile::create(&path, false), Err(OutputError::Locked { .. })));
        drop(output);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let output = OutputFile::create(&path, false).unwrap();
        output.commit(true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(OutputFile::create(&path, false), Err(OutputError::Exists { .. })));
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_overwritten_and_the_image_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let output = OutputFile::create(&path, false).unwrap();
        fs::write(&path, "theirs").unwrap();
        assert!(matches!(output.commit(false), Err(OutputError::AppearedMeanwhile { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        assert!(folder.path().join("a.qcow2.partial").exists());
    }

    #[test]
    fn a_links_target_is_replaced_and_the_link_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (link, target) = (folder.path().join("link.qcow2"), folder.path().join("target.qcow2"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink("target.qcow2", &link).unwrap();
        OutputFile::create(&link, true).unwrap().commit(false).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&target).unwrap().len(), 0);
    }

    #[test]
    fn names_of_other_formats_folders_and_fifos_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(OutputFile::create(&folder.path().join("a.VMDK"), false), Err(OutputError::Extension { .. })));
        assert!(matches!(OutputFile::create(folder.path(), true), Err(OutputError::Kind { what: "a folder", .. })));
        assert!(matches!(OutputFile::create(Path::new("/dev/null"), true), Err(OutputError::Kind { .. })));
        let nowhere = folder.path().join("no/such/a.qcow2");
        assert!(matches!(OutputFile::create(&nowhere, false), Err(OutputError::NoFolder { .. })));
    }
}
