//! Standard error, written by a thread of its own.
//!
//! Whoever reads it may stand still: a pager, a terminal after Ctrl-S, a pipe that nobody empties. No transfer waits for that, and no interrupt:
//! lines are kept in memory, in their order, until they are taken.
//!
//! ```text
//! notes, errors ──┐
//! bars (Terminal) ┼─> queue ── thread ──> stderr
//! progress lines ─┘   (only while nothing is waiting: the next one says more)
//! ```
//! It is no stage's thread, and nobody joins it: the process may end while it waits for its reader. Who ends the process calls [`drain`], which waits as long as somebody reads, and a while when nobody does.

use std::{
    io::{self, Write},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use console::Term;
use indicatif::ProgressDrawTarget;

/// How long the process waits at its end for somebody who reads nothing.
pub const PATIENT: Duration = Duration::from_secs(5);
/// How long it waits where it is to stop at once, or before something on stdout, which has its place behind.
pub const BRIEFLY: Duration = Duration::from_secs(1);
/// Bytes of one write: a pipe takes so many as a whole.
const PIECE_BYTES: usize = 4096;
/// What nobody reads is not kept beyond that. Notes and errors of hundreds of conversions are far from it.
const KEPT_BYTES_MAX: usize = 4 << 20;
/// Frames of bars a second.
const FRAMES_PER_S: u8 = 10;

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Some of it is with the thread.
    writing: bool,
    /// Bytes that were taken so far.
    taken: u64,
    /// Nobody had read anything when it was waited for last, and this much was taken by then.
    stalled_at: Option<u64>,
}

impl Queue {
    const fn is_empty(&self) -> bool {
        self.bytes.is_empty() && !self.writing
    }
}

#[derive(Default)]
struct Lines {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Lines {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue();
        if queue.bytes.len() + bytes.len() <= KEPT_BYTES_MAX {
            queue.bytes.extend_from_slice(bytes);
            self.changed.notify_all();
        }
    }

    /// The thread: writes what there is. What cannot be written is gone: that the terminal is closed is no reason to stop.
    fn write_to(&self, mut out: impl Write) {
        loop {
            let mut queue = self.queue();
            while queue.bytes.is_empty() {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let bytes = std::mem::take(&mut queue.bytes);
            queue.writing = true;
            drop(queue);
            for piece in bytes.chunks(PIECE_BYTES) {
                write_piece(&mut out, piece, |bytes| self.queue().taken += bytes as u64);
            }
            self.queue().writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits until all is taken, or nothing was for `within`.
    fn drain(&self, within: Duration) -> bool {
        let mut queue = self.queue();
        if within <= BRIEFLY && queue.stalled_at == Some(queue.taken) && !queue.is_empty() {
            return false; // a short wait is not repeated for each line
        }
        let mut last = (queue.taken, Instant::now());
        while !queue.is_empty() {
            if queue.taken != last.0 {
                last = (queue.taken, Instant::now());
            }
            let Some(left) = within.checked_sub(last.1.elapsed()) else {
                queue.stalled_at = Some(queue.taken);
                return false;
            };
            queue =
                self.changed.wait_timeout(queue, left.min(Duration::from_millis(50))).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

fn write_piece(out: &mut impl Write, mut piece: &[u8], mut taken_of_it: impl FnMut(usize)) {
    while !piece.is_empty() {
        match out.write(piece) {
            Ok(0) => return,
            Ok(taken) => {
                piece = &piece[taken..];
                taken_of_it(taken);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // somebody else made it so that it does not wait: then it is asked again
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => return,
        }
    }
}

/// The lines, and the thread that writes them; `None` where no thread can be had.
fn lines() -> Option<&'static Arc<Lines>> {
    static LINES: OnceLock<Option<Arc<Lines>>> = OnceLock::new();
    let begin = || {
        let lines = Arc::new(Lines::default());
        let writing = Arc::clone(&lines);
        let thread = std::thread::Builder::new().name("stderr".to_owned());
        thread.spawn(move || writing.write_to(io::stderr())).ok().map(|_| lines)
    };
    LINES.get_or_init(begin).as_ref()
}

/// Text for stderr, as it is. Never waits.
pub fn write(text: &str) {
    let _ = Terminal.write(text.as_bytes());
}

/// Does something wait to be read? Then what the next moment makes worthless is better left out.
pub fn is_behind() -> bool {
    lines().is_some_and(|lines| !lines.queue().is_empty())
}

/// Waits until all is read, or nobody has read anything for `within`.
pub fn drain(within: Duration) {
    if let Some(lines) = lines() {
        lines.drain(within);
    }
}

/// Where bars are drawn.
pub fn draw_target() -> ProgressDrawTarget {
    ProgressDrawTarget::term(Term::read_write_pair(io::stdin(), Terminal), FRAMES_PER_S)
}

/// The terminal on stderr, for whoever draws on it.
#[derive(Debug)]
struct Terminal;

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match lines() {
            Some(lines) => lines.push(bytes),
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        io::stderr().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_who_stands_still_and_nothing_is_lost_or_mixed_up_when_he_goes_on() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lines = Arc::new(Lines::default());
        let writing = Arc::clone(&lines);
        std::thread::Builder::new().spawn(move || writing.write_to(writer)).unwrap();
        // more than a pipe holds: the thread is stuck, and nobody else
        let expected: String = (0..20_000).map(|line| format!("line {line}\n")).collect();
        expected.split_inclusive('\n').for_each(|line| lines.push(line.as_bytes()));
        assert!(!lines.drain(Duration::from_millis(100)), "nobody has read it");
        assert!(!lines.queue().is_empty());
        let mut read = vec![0; expected.len()];
        io::Read::read_exact(&mut reader, &mut read).unwrap();
        assert!(String::from_utf8(read).unwrap() == expected);
        assert!(lines.drain(PATIENT));
    }

    #[test]
    fn what_nobody_reads_does_not_grow_without_end() {
        let lines = Lines::default();
        (0..100).for_each(|_| lines.push(&[b'x'; 100_000]));
        assert!(lines.queue().bytes.len() <= KEPT_BYTES_MAX);
    }
}
