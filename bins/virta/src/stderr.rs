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
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use console::Term;
use crossbeam::channel::{self, Receiver, Sender};
use indicatif::ProgressDrawTarget;

/// How long the process waits at its end for somebody who reads nothing.
pub const PATIENT: Duration = Duration::from_secs(5);
/// How long it waits where it is to stop at once, or before something on stdout, which has its place behind.
pub const BRIEFLY: Duration = Duration::from_secs(1);
/// Bytes of one write: a pipe takes so many as a whole.
const PIECE_BYTES: usize = 4096;
/// What nobody reads is not kept beyond that. Notes and errors of hundreds of conversions are far from it.
const KEPT_BYTES_MAX: usize = 4 << 20;
/// How often it is looked whether all is written.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Frames of bars a second.
const FRAMES_PER_S: u8 = 10;

/// What waits to be written, and how far its reader is.
struct Lines {
    queue: Sender<Vec<u8>>,
    /// Bytes that wait, those that are with the thread among them.
    waiting: AtomicUsize,
    /// What waited when nobody had read anything for a while.
    stalled_at: AtomicUsize,
}

impl Lines {
    /// The lines, and the end that the thread writes from.
    fn new() -> (Arc<Self>, Receiver<Vec<u8>>) {
        let (queue, written) = channel::unbounded();
        (Arc::new(Self { queue, waiting: AtomicUsize::new(0), stalled_at: AtomicUsize::new(0) }), written)
    }

    fn is_empty(&self) -> bool {
        self.waiting.load(SeqCst) == 0
    }

    fn push(&self, bytes: &[u8]) {
        if self.waiting.fetch_add(bytes.len(), SeqCst) + bytes.len() > KEPT_BYTES_MAX || self.queue.send(bytes.to_vec()).is_err()
        {
            self.waiting.fetch_sub(bytes.len(), SeqCst);
        }
    }

    /// The thread: writes what there is. What cannot be written is gone: that the terminal is closed is no reason to stop.
    fn write_to(&self, mut out: impl Write, lines: &Receiver<Vec<u8>>) {
        // what waits is written together
        while let Ok(mut bytes) = lines.recv() {
            bytes.extend(lines.try_iter().flatten());
            for piece in bytes.chunks(PIECE_BYTES) {
                let mut left = piece.len();
                write_piece(&mut out, piece, |taken| {
                    left -= taken;
                    self.waiting.fetch_sub(taken, SeqCst);
                });
                self.waiting.fetch_sub(left, SeqCst);
            }
        }
    }

    /// Waits until all is taken, or nothing was for `within`.
    fn drain(&self, within: Duration) -> bool {
        let mut last = (self.waiting.load(SeqCst), Instant::now());
        if within <= BRIEFLY && last.0 > 0 && self.stalled_at.load(SeqCst) == last.0 {
            return false; // a short wait is not repeated for each line
        }
        loop {
            let waiting = self.waiting.load(SeqCst);
            if waiting == 0 {
                return true;
            }
            if waiting != last.0 {
                last = (waiting, Instant::now());
            }
            if last.1.elapsed() > within {
                self.stalled_at.store(waiting, SeqCst);
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
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
        let (lines, written) = Lines::new();
        let writing = Arc::clone(&lines);
        let thread = std::thread::Builder::new().name("stderr".to_owned());
        thread.spawn(move || writing.write_to(io::stderr(), &written)).ok().map(|_| lines)
    };
    LINES.get_or_init(begin).as_ref()
}

/// Text for stderr, as it is. Never waits.
pub fn write(text: &str) {
    let _ = Terminal.write(text.as_bytes());
}

/// Does something wait to be read? Then what the next moment makes worthless is better left out.
pub fn is_behind() -> bool {
    lines().is_some_and(|lines| !lines.is_empty())
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
        let (lines, written) = Lines::new();
        let writing = Arc::clone(&lines);
        std::thread::Builder::new().spawn(move || writing.write_to(writer, &written)).unwrap();
        // more than a pipe holds: the thread is stuck, and nobody else
        let expected: String = (0..20_000).map(|line| format!("line {line}\n")).collect();
        expected.split_inclusive('\n').for_each(|line| lines.push(line.as_bytes()));
        assert!(!lines.drain(Duration::from_millis(100)), "nobody has read it");
        assert!(!lines.is_empty());
        let mut read = vec![0; expected.len()];
        io::Read::read_exact(&mut reader, &mut read).unwrap();
        assert!(String::from_utf8(read).unwrap() == expected);
        assert!(lines.drain(PATIENT));
    }

    #[test]
    fn what_nobody_reads_does_not_grow_without_end() {
        let (lines, written) = Lines::new();
        (0..100).for_each(|_| lines.push(&[b'x'; 100_000]));
        assert!(written.try_iter().map(|bytes| bytes.len()).sum::<usize>() <= KEPT_BYTES_MAX);
    }
}
