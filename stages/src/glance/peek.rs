//! An image in Glance, looked at here and there: a small range each time, or its first bytes where ranges are not served.

use std::io;

use tokio::runtime::Handle;

use super::{
    connection::{Asking, Connection, ReadError, Remote},
    file::ImageFile,
};
use crate::{
    access::Access,
    read_at::ReadAt,
    units::{to_u64, to_usize},
};

/// Bytes read of an image that cannot be read at any offset.
const HEAD_BYTES: u64 = 16 << 20;

/// An image. Calls block: use it on a thread that may, never on a runtime's.
pub struct Peek {
    remote: Remote,
    runtime: Handle,
    /// `None` where ranges are served.
    head: Option<Vec<u8>>,
}

impl Peek {
    /// Finds out how the image can be read.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn open(remote: Remote) -> Result<Self, ReadError> {
        let head = match ImageFile::access(&remote).await? {
            Access::Random => None,
            Access::Sequential | Access::Once => {
                let mut head = vec![0; to_usize(HEAD_BYTES.min(remote.image_bytes))];
                let mut connection = Connection::new(remote.clone(), Asking::Whole);
                if !head.is_empty() {
                    connection.read(0, remote.image_bytes, &mut head).await?;
                }
                connection.close();
                Some(head)
            }
        };
        Ok(Self { remote, runtime: Handle::current(), head })
    }

    /// Only the image's first bytes can be looked at.
    #[must_use]
    pub fn is_head_only(&self) -> bool {
        self.head.as_ref().is_some_and(|head| to_u64(head.len()) < self.remote.image_bytes)
    }
}

impl ReadAt for Peek {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.remote.image_bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = file_offset.checked_add(to_u64(buf.len())).filter(|end| *end <= self.remote.image_bytes);
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        if let Some(head) = &self.head {
            let beyond = || {
                io::Error::other(format!(
                    "this image store serves no ranges: only the first {} MiB are looked at",
                    HEAD_BYTES >> 20
                ))
            };
            let there = usize::try_from(file_offset).ok().and_then(|start| head.get(start..start.checked_add(buf.len())?));
            buf.copy_from_slice(there.ok_or_else(beyond)?);
            return Ok(());
        }
        if buf.is_empty() {
            return Ok(());
        }
        let mut connection = Connection::new(self.remote.clone(), Asking::Ranges);
        let read = self.runtime.block_on(connection.read(file_offset, end, buf));
        read.map_err(|error| match error {
            ReadError::Cancelled => io::Error::other(engine::Cancelled),
            ReadError::Failed(error) => io::Error::other(error),
        })
    }
}
