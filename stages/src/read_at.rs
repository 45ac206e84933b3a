//! Random access reading: what the parsers ask of whatever holds their bytes.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::units::to_u64;

/// Bytes that can be read at any file offset: a file, memory, HTTP ranges, a fuzzer's input.
///
/// Calls may block. Implementations are shared by threads.
pub trait ReadAt {
    /// Total length in bytes.
    ///
    /// # Errors
    /// What the underlying storage reports.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buf` from `file_offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if fewer bytes are there; else what the storage reports.
    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for File {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, file_offset)
    }
}

impl ReadAt for [u8] {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(to_u64(self.len()))
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let source = usize::try_from(file_offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        buf.copy_from_slice(source);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn len_bytes(&self) -> io::Result<u64> {
        self.as_slice().len_bytes()
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        ReadAt::read_exact_at(self.as_slice(), file_offset, buf)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for std::sync::Arc<T> {
    fn len_bytes(&self) -> io::Result<u64> {
        (**self).len_bytes()
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(file_offset, buf)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn len_bytes(&self) -> io::Result<u64> {
        (**self).len_bytes()
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(file_offset, buf)
    }
}
