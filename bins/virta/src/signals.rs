//! Signals: an interrupt ends a run in order, a second one at once; a terminal that goes away ends nothing.

use engine::{CancelToken, Cause};
use stages::{error::JobError, text::printable};

use crate::{display::Held, exit, stderr};

/// Cancels on SIGINT and SIGTERM; a second one ends the process at once. A terminal that goes away (SIGHUP) stops
/// nothing.
pub fn watch_signals(cancel: &CancelToken, held: Held) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return;
    };
    // a file that reaches the limit for its size is an error to whoever writes it, not a death
    let _ = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()));
    let cancel = cancel.clone();
    tokio::spawn(async move {
        let mut asked: Option<std::time::Instant> = None;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => continue,
            }
            match asked {
                // `timeout` and a terminal may signal process and group: that is one wish, not two
                Some(first) if first.elapsed() < std::time::Duration::from_secs(1) => continue,
                Some(_) => {
                    let held = held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
                    match held {
                        Some(server) => exit::say(&format!(
                            "virta: stopped at once. Server {} was {} and may not be so now; {}",
                            printable(&server.name),
                            server.status,
                            stages::snapshot::by_hand(&server)
                        )),
                        None => exit::say(
                            "virta: stopped at once. A half-made image may be left: the same command, or virta clean, removes it",
                        ),
                    }
                    stderr::drain(stderr::BRIEFLY);
                    std::process::exit(130);
                }
                None => asked = Some(std::time::Instant::now()),
            }
            if let Some(server) = held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_ref() {
                exit::say(&format!(
                    "virta: interrupted; server {} is brought back to {} (a second interrupt leaves it as it is)",
                    printable(&server.name),
                    server.status
                ));
            }
            cancel.cancel(Cause::Requested("interrupted".to_owned()));
        }
    });
}

/// Work that an interrupt breaks off.
pub async fn interruptible<T>(cancel: &CancelToken, work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
    cancel.guard(work).await.unwrap_or_else(|_| Err(JobError::Interrupted("interrupted".to_owned())))
}
