//! A staged dataflow: typed stages on bounded ports, in three worlds, with one budget of memory.
//!
//! This page is the architecture of Virta. The crate knows nothing of qcow2, HTTP or OpenStack.
//!
//! # Picture
//! ```text
//!            port             port              port
//!  network ────────> cpu x N ────────> ring ────────> cpu x 1
//!  (tokio)  bounded  (threads)         (one thread    (an ordered
//!     │     by count    │               and its own    lane)
//!     │                 │               executor)
//!     └── lease ────────┴──── returns to the pool when dropped, wherever that is
//! ```
//! Three worlds, joined by ports alone: tokio for sockets and timers, OS threads for work that computes or blocks,
//! one thread with a single-threaded executor for a ring of kernel operations. Where a stage runs is the
//! builder's verb, so the type system checks it:
//!
//! | verb | wants | runs on |
//! |---|---|---|
//! | [`Pipeline::network`] | [`Stage`]: an async loop, `Send` | a tokio task |
//! | [`Pipeline::cpu`] | [`Transform`]: a pure function of one item, never blocks | N threads, one instance each |
//! | [`Pipeline::threads`] | [`BlockingStage`]: a loop that may block | N threads, one instance each |
//! | [`Pipeline::ring`] | [`LocalStage`]: an async loop, need not be `Send` | one thread and a [`LocalExecutor`] made there |
//!
//! A source is a stage with `In = NoInput`, a sink one with `Out = NoOutput`.
//!
//! # Words
//! - *Port*: a bounded queue between two stages. It counts items; [`Lease`]s bound bytes.
//! - *Lease*: an aligned buffer out of a [`BufferPool`]; the pool is the memory budget, and there is no other.
//! - *End of input*: a value. [`Inlet::recv`] gives `Ok(None)` only after every producer said
//!   [`Outlet::finish`]. A producer that is dropped without it cancels the run, so a writer cannot mistake an
//!   accident for the end and seal half an image.
//! - *Cancel*: an error, [`Cancelled`], at every port of the run. The first cause is kept.
//!
//! # Invariants
//! - I1 Items into a stage = items it passed on, dropped or holds; a port loses none.
//! - I2 A port holds at most its capacity; a sender waits. With a stalled sink a source stops after exactly
//!   `port capacities + items held by stages`, or after `pool.count()` leases if that is less.
//! - I3 Every lease returns: when the run is over and items are dropped, `pool.available() == pool.count()`.
//! - I4 A lease outlives every operation on its bytes: operations own it, futures never do.
//! - I5 `Ok(None)` is seen only after all producers finished and all their items were received.
//! - I6 After the first failure no port delivers for longer than one item a worker; all stages return; the error
//!   shown is the first one's.
//! - I7 No stage waits for a lease of a pool while it holds one of the same pool.
//! - I8 The run is over only when all its threads are joined: nothing runs on after [`Running::join`].
//!
//! `tests/` quotes these numbers. I1, I2, I5 and I6 of a port are also model-checked over thread schedules
//! (`tests/model.rs`, with `--cfg virta_model`).
//!
//! # A stage of your own
//! `examples/histogram.rs` and `tests/embedding.rs` put one between two others in less than 40 lines.
//!
//! # Decisions
//! - 2026-11-24 Ports are a thin type over `async-channel`: it has both ends, and `close()` wakes whoever waits,
//!   which is all that cancellation needs. Items are extents of up to 2 MiB, so a port's cost per item does not
//!   matter: `benches/port.rs` measures it.
//! - 2026-11-24 The ring's executor is injected ([`LocalExecutor`]) rather than built in: this crate names no
//!   io_uring runtime, and the same stage runs where io_uring is denied.
//! - 2026-11-24 A pool is a bounded channel of places: waiting for a lease is receiving, returning one is sending.
//! - 2026-11-28 Its buffers lie on a stack beside it, made when none is left: the one that was used last is used first. In the channel itself, first in,
//!   first out, a run that needs three of sixteen touches all sixteen, and a page that is touched for the first time costs more than what is copied into it.

mod cancel;
mod cpu;
mod error;
mod metrics;
mod order;
mod pipeline;
mod pool;
mod port;
mod ring;
mod run;
mod stage;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;

pub use cancel::{CancelToken, Cancelled, Cause};
pub use cpu::Emitter;
pub use error::{BoxError, ErrorKind, StageError};
pub use metrics::{MetricsSnapshot, StageMetrics};
pub use order::{OrderError, Reorder};
pub use pipeline::Pipeline;
pub use pool::{BufferPool, Lease, Slice};
pub use port::{Inlet, Item, NoInput, NoOutput, Outlet, port};
pub use ring::{LocalExecutor, TokioLocal};
pub use run::{ReportHandle, RunError, Running};
pub use stage::{BlockingStage, LocalStage, Stage, StageContext, Transform};
