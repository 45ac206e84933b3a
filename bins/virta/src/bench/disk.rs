//! The disk of a folder: writing and reading as a conversion does, in pieces of 2 MiB.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use engine::{BufferPool, CancelToken, LocalExecutor, Slice, TokioLocal};
use rustix::fs::{Advice, OFlags, fadvise, fcntl_getfl, fcntl_setfl, statvfs};
use stages::{
    convert::to_file::{PWRITE_THREADS, WRITE_DEPTH},
    disk::{
        pwrite::PwriteQueue,
        queue::{WriteBytes, WriteOp, WriteQueue},
        uring::{UringExecutor, UringQueue},
    },
};

use super::{
    record::{Group, Measure},
    sample::noise,
};

/// Bytes of one write or read.
const PIECE_BYTES: usize = 2 << 20;
/// Files written for each figure.
const SAMPLES: usize = 3;

/// What is to be measured, and with how much.
pub struct Disk<'a> {
    pub folder: &'a Path,
    /// Bytes of the file that is written and read.
    pub file_bytes: u64,
    /// For one figure at most; at least one sample is taken.
    pub patience: Duration,
    pub cancel: &'a CancelToken,
}

/// A file that has no name: nothing is left of it, whatever happens.
fn unnamed(folder: &Path) -> io::Result<File> {
    tempfile::tempfile_in(folder)
}

/// Bytes that may be written there without filling it.
pub fn room_bytes(folder: &Path) -> io::Result<u64> {
    let there = statvfs(folder)?;
    Ok(there.f_bavail * there.f_frsize)
}

impl Disk<'_> {
    /// Measures; what does not work here goes into `notes`.
    ///
    /// # Errors
    /// If not even a plain file can be written there.
    pub fn measure(&self, notes: &mut Vec<String>) -> io::Result<Vec<Measure>> {
        let pool = BufferPool::new(1, PIECE_BYTES, 4096, self.cancel);
        let mut lease = pool.acquire_blocking().map_err(io::Error::other)?;
        lease.copy_from_slice(&noise(PIECE_BYTES, 1));
        let piece = lease.freeze(PIECE_BYTES);
        let mut found = Vec::new();
        let uring = stages::disk::uring::probe(self.folder);
        if let Err(error) = &uring {
            notes.push(format!("io_uring does not work in {}: {error}", self.folder.display()));
        }
        for direct in [false, true] {
            let how = if direct { "direct" } else { "buffered" };
            if direct && let Err(error) = self.write(&piece, true, false, u64::try_from(PIECE_BYTES).unwrap_or(u64::MAX)) {
                notes.push(format!("O_DIRECT does not work in {}: {error}", self.folder.display()));
                continue;
            }
            for (uring_wanted, name) in [(false, "pwrite"), (true, "uring")] {
                if uring_wanted && uring.is_err() {
                    continue;
                }
                let samples = self.samples(|| self.write(&piece, direct, uring_wanted, self.file_bytes))?;
                let shown = if uring_wanted { "io_uring" } else { name };
                let key = format!("disk.write.{name}.{how}");
                found.extend(Measure::new(&key, Group::Disk, &format!("write and flush, {how}, {shown}"), 1, samples));
            }
        }
        let file = self.filled(&piece)?;
        for (direct, threads) in [(false, 1), (true, 1), (true, 4)] {
            let how = if direct { "direct" } else { "buffered" };
            if direct && set_direct(&file, true).is_err() {
                continue;
            }
            let mut refused = None;
            let samples = self.samples(|| match self.read(&file, threads) {
                Err(error) if direct => {
                    refused = Some(error);
                    Ok(f64::NAN)
                }
                read => read,
            })?;
            if let Some(error) = refused {
                notes.push(format!("direct reads do not work in {}: {error}", self.folder.display()));
            }
            let (key, name) = (format!("disk.read.{how}.{threads}"), format!("read, {how}, {}", threads_shown(threads)));
            found.extend(Measure::new(&key, Group::Disk, &name, threads, samples));
        }
        Ok(found)
    }

    /// Takes samples until there are enough, or time is up.
    fn samples(&self, mut one: impl FnMut() -> io::Result<f64>) -> io::Result<Vec<f64>> {
        let started = Instant::now();
        let mut samples = Vec::new();
        while samples.len() < SAMPLES && (samples.is_empty() || started.elapsed() < self.patience) {
            self.cancel.check().map_err(io::Error::other)?;
            samples.push(one()?);
        }
        Ok(samples)
    }

    /// Writes a new file, flushes it, and tells bytes a second.
    fn write(&self, piece: &Slice, direct: bool, uring: bool, bytes: u64) -> io::Result<f64> {
        let file = unnamed(self.folder)?;
        set_direct(&file, direct)?;
        let started = Instant::now();
        let mut result = Ok(());
        let ran = if uring {
            UringExecutor.block_on(Box::pin(async {
                result = fill(UringQueue::new(file, WRITE_DEPTH), piece, bytes).await;
            }))
        } else {
            TokioLocal.block_on(Box::pin(async {
                result = fill(PwriteQueue::new(file, WRITE_DEPTH, PWRITE_THREADS), piece, bytes).await;
            }))
        };
        ran.map_err(io::Error::other)?;
        result?;
        Ok(rate(bytes, started))
    }

    /// A file to read: complete, on the disk, and not in the page cache.
    fn filled(&self, piece: &[u8]) -> io::Result<File> {
        let file = unnamed(self.folder)?;
        let mut at = 0;
        while at < self.file_bytes {
            self.cancel.check().map_err(io::Error::other)?;
            file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        file.sync_all()?;
        Ok(file)
    }

    /// Reads the file once, by so many threads.
    fn read(&self, file: &File, threads: usize) -> io::Result<f64> {
        fadvise(file, 0, None, Advice::DontNeed)?;
        let cancel = CancelToken::new();
        let pool = BufferPool::new(threads, PIECE_BYTES, 4096, &cancel);
        let next = std::sync::atomic::AtomicU64::new(0);
        let pieces = self.file_bytes / PIECE_BYTES as u64;
        let started = Instant::now();
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let mut lease = pool.acquire_blocking().map_err(io::Error::other)?;
                        loop {
                            let piece = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            if piece >= pieces {
                                return Ok(());
                            }
                            self.cancel.check().map_err(io::Error::other)?;
                            file.read_exact_at(&mut lease, piece * PIECE_BYTES as u64)?;
                        }
                    })
                })
                .collect();
            readers
                .into_iter()
                .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))))
        })?;
        Ok(rate(pieces * PIECE_BYTES as u64, started))
    }
}

/// Fills the file through a queue, as the writer stage does, and flushes it.
async fn fill<Q: WriteQueue>(queue: io::Result<Q>, piece: &Slice, bytes: u64) -> io::Result<()> {
    let mut queue = queue?;
    let mut first = Ok(());
    let mut at = 0;
    while at < bytes && first.is_ok() {
        let op = WriteOp { host_offset: at, bytes: WriteBytes::Slice(piece.clone()), tag: 0 };
        if queue.submit(op).is_ok() {
            at += piece.len() as u64;
        } else if let Some(done) = queue.reap().await {
            first = done.result.map_err(|error| error.source);
        }
    }
    while let Some(done) = queue.reap().await {
        first = first.and(done.result.map_err(|error| error.source));
    }
    first?;
    queue.sync().await
}

/// Past the page cache, or through it.
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(fcntl_setfl(file, flags)?)
}

/// Bytes a second since then.
pub fn rate(bytes: u64, started: Instant) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    bytes / started.elapsed().as_secs_f64().max(1e-9)
}

/// How many threads, in words.
pub fn threads_shown(threads: usize) -> String {
    if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_disk_is_measured_and_nothing_is_left_there() {
        let folder = tempfile::tempdir().unwrap();
        let cancel = CancelToken::new();
        let disk = Disk { folder: folder.path(), file_bytes: 8 << 20, patience: Duration::ZERO, cancel: &cancel };
        let mut notes = Vec::new();
        let found = disk.measure(&mut notes).unwrap();
        let keys: Vec<_> = found.iter().map(|measure| measure.key.as_str()).collect();
        assert!(keys.contains(&"disk.write.pwrite.buffered") && keys.contains(&"disk.read.buffered.1"), "{keys:?} {notes:?}");
        assert!(found.iter().all(|measure| measure.bytes_per_s > 0.0 && measure.samples == 1));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error() {
        let cancel = CancelToken::new();
        let disk = Disk { folder: Path::new("/proc"), file_bytes: 1 << 21, patience: Duration::ZERO, cancel: &cancel };
        assert!(disk.measure(&mut Vec::new()).is_err());
    }
}
