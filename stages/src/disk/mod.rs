//! Local files: reading raw disks without touching their holes, writing images through one seam.
//!
//! | module | noun |
//! |---|---|
//! | [`queue`] | [`queue::WriteQueue`], the device seam: operations own their bytes, completions give the result |
//! | [`uring`] | that seam over io_uring (tokio-uring), and its probe |
//! | [`pwrite`] | that seam over `pwrite` on threads, where io_uring is denied |
//! | [`output`] | the file an image becomes: `.partial`, locked, renamed when complete |
//! | [`raw_file`] | a raw disk image to read, its data and its holes |
//! | [`read`] | the source stages over it |
//! | [`pipe`] | a raw disk that comes through a pipe |
//! | [`mod@write`] | the writer stage: clusters in order of arrival, tables last |
//!
//! Invariants: an operation owns its bytes until its completion (engine I4); a short write is continued from the
//! gap, never taken for a whole one; an output exists under its name only when it is complete and, unless told
//! otherwise, on stable storage.

pub mod output;
pub mod pipe;
pub mod pwrite;
pub mod queue;
pub mod raw_file;
pub mod read;
pub mod uring;
pub mod write;

use std::path::Path;

pub use output::{Left, OutputError, OutputFile};
pub use pipe::PipeSource;
pub use raw_file::{RawFile, SourceError};

/// Which back end writes, as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IoMode {
    /// io_uring where a probe of the target's folder succeeds, else `pwrite`.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// `pwrite` on threads.
    Pwrite,
}

/// Which back end writes, as decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring through tokio-uring.
    Uring,
    /// `pwrite` on threads.
    Pwrite,
}

/// io_uring was asked for and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("io_uring does not work for {folder}: use --io pwrite or --io auto")]
pub struct UringDenied {
    /// The folder that was probed.
    pub folder: String,
    /// Why: EPERM where a seccomp profile or `kernel.io_uring_disabled` forbids it, ENOSYS on old kernels.
    #[source]
    pub source: std::io::Error,
}

/// Decides how to write into `folder`: probes io_uring with a real write and read there.
///
/// # Errors
/// [`UringDenied`] only for [`IoMode::Uring`].
pub fn choose_backend(mode: IoMode, folder: &Path) -> Result<Backend, UringDenied> {
    if mode == IoMode::Pwrite {
        return Ok(Backend::Pwrite);
    }
    match (uring::probe(folder), mode) {
        (Ok(()), _) => Ok(Backend::Uring),
        (Err(error), IoMode::Auto) => {
            tracing::debug!(%error, "io_uring is not available, writing with pwrite");
            Ok(Backend::Pwrite)
        }
        (Err(source), _) => Err(UringDenied { folder: folder.display().to_string(), source }),
    }
}

/// What a path leads to, if it is neither a file nor a block device.
pub(crate) fn no_file(kind: std::fs::FileType) -> Option<&'static str> {
    use std::os::unix::fs::FileTypeExt;
    let kinds = [
        (kind.is_dir(), "a folder"),
        (kind.is_fifo(), "a FIFO"),
        (kind.is_char_device(), "a character device"),
        (kind.is_socket(), "a socket"),
    ];
    kinds.into_iter().find_map(|(is, name)| is.then_some(name))
}
