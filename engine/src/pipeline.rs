//! The builder: what runs where, joined by which ports.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use tokio::runtime::Handle;

use crate::{
    cancel::{CancelToken, Cause},
    cpu::Worker,
    error::{ErrorKind, StageError},
    metrics::{Registry, StageMetrics},
    port::{Inlet, InletGuard, Item, NoInput, NoOutput, Outlet, port},
    ring::LocalExecutor,
    run::{Over, ReportHandle, Running, panic_error},
    stage::{BlockingStage, LocalStage, Stage, StageContext, Transform},
};

/// Items a port holds unless [`Pipeline::port`] says otherwise: one for each of a few workers to find without
/// waiting. Extents are up to 2 MiB, so more would only hold leases longer.
const PORT_ITEMS: usize = 4;

/// How a worker is told to start; everything it needs is inside.
type Start = Box<dyn FnOnce(&Handle, async_channel::Sender<Over>) -> Option<thread::JoinHandle<()>>>;

/// The stage built last: waits for the port that its successor's capacity decides.
type Pending<T> = Box<dyn FnOnce(Outlet<T>) -> Vec<Start>>;

/// A chain of stages under construction; nothing runs before [`Pipeline::start`]. `T` is what comes out at the end.
pub struct Pipeline<T: Item> {
    cancel: CancelToken,
    registry: Registry,
    starts: Vec<Start>,
    /// Name and counters of the last stage, and how to build it once its outlet exists.
    last: Option<(Arc<StageMetrics>, Pending<T>)>,
    port_items: usize,
}

impl Pipeline<NoInput> {
    /// An empty pipeline: add a source first.
    #[must_use]
    pub fn new(cancel: &CancelToken) -> Self {
        Self { cancel: cancel.clone(), registry: Registry::default(), starts: Vec::new(), last: None, port_items: PORT_ITEMS }
    }
}

impl<T: Item> Pipeline<T> {
    /// Capacity of the port to the stage that is added next.
    #[must_use]
    pub fn port(mut self, items: usize) -> Self {
        self.port_items = items;
        self
    }

    /// Closes the last stage with a port to a new one and returns what both need.
    fn link<U: Item>(mut self, name: &str, workers: usize) -> (Linked<T>, Pipeline<U>) {
        let metrics = self.registry.register(name, workers);
        let inlet = match self.last.take() {
            Some((before, build)) => {
                let (outlet, inlet) = port(self.port_items, &self.cancel, &before, &metrics);
                self.starts.extend(build(outlet));
                inlet
            }
            None => {
                // a source: an inlet that is at its end
                let (outlet, inlet) = port(1, &self.cancel, &metrics, &metrics);
                outlet.finish();
                inlet
            }
        };
        let next = Pipeline {
            cancel: self.cancel.clone(),
            registry: self.registry,
            starts: self.starts,
            last: None,
            port_items: PORT_ITEMS,
        };
        (Linked { inlet, context: StageContext { cancel: self.cancel, metrics } }, next)
    }

    /// Adds a stage that runs as a tokio task.
    #[must_use]
    pub fn network<S: Stage<In = T>>(self, name: &str, stage: S) -> Pipeline<S::Out> {
        self.network_reporting(name, stage).0
    }

    /// [`Pipeline::network`], with the stage's report.
    #[must_use]
    pub fn network_reporting<S: Stage<In = T>>(self, name: &str, stage: S) -> (Pipeline<S::Out>, ReportHandle<S::Report>) {
        let (linked, mut next) = self.link(name, 1);
        let (report, handle) = async_channel::bounded(1);
        let metrics = Arc::clone(&linked.context.metrics);
        next.last = Some((
            metrics,
            Box::new(move |outlet| {
                vec![Box::new(move |runtime, over| {
                    let Linked { inlet, context } = linked;
                    let guard = InletGuard::of(&inlet);
                    let metrics = Arc::clone(&context.metrics);
                    let cancel = context.cancel.clone();
                    metrics.begin();
                    let task = runtime.spawn(stage.run(inlet, outlet, context));
                    runtime.spawn(async move {
                        let result = match task.await {
                            Ok(result) => settle(result, &guard, &report),
                            Err(error) if error.is_panic() => Err(panic_error(&*error.into_panic())),
                            Err(_) => Err(StageError::bug("the runtime shut down under a stage")),
                        };
                        metrics.end();
                        conclude(&cancel, &metrics, result);
                        let _ = over.send(Over).await;
                    });
                    None
                })]
            }),
        ));
        (next, ReportHandle(handle, 1))
    }

    /// Adds a pure function that runs on `workers` threads (at least 1), an instance each. Delivery is unordered.
    #[must_use]
    pub fn cpu<F: Transform<In = T>>(self, name: &str, workers: usize, make: impl FnMut() -> F) -> Pipeline<F::Out> {
        self.cpu_reporting(name, workers, make).0
    }

    /// [`Pipeline::cpu`], with the workers' reports.
    #[must_use]
    pub fn cpu_reporting<F: Transform<In = T>>(
        self,
        name: &str,
        workers: usize,
        mut make: impl FnMut() -> F,
    ) -> (Pipeline<F::Out>, ReportHandle<F::Report>) {
        self.threads_reporting(name, workers, move || Worker(make()))
    }

    /// Adds a loop that may block; it runs on `workers` threads (at least 1), an instance each, which share the input.
    #[must_use]
    pub fn threads<S: BlockingStage<In = T>>(self, name: &str, workers: usize, make: impl FnMut() -> S) -> Pipeline<S::Out> {
        self.threads_reporting(name, workers, make).0
    }

    /// [`Pipeline::threads`], with the workers' reports.
    #[must_use]
    pub fn threads_reporting<S: BlockingStage<In = T>>(
        self,
        name: &str,
        workers: usize,
        mut make: impl FnMut() -> S,
    ) -> (Pipeline<S::Out>, ReportHandle<S::Report>) {
        let workers = workers.max(1);
        let stages: Vec<S> = std::iter::repeat_with(&mut make).take(workers).collect();
        let (linked, mut next) = self.link(name, workers);
        let (report, handle) = async_channel::bounded(workers);
        let metrics = Arc::clone(&linked.context.metrics);
        let name = name.to_owned();
        next.last = Some((
            metrics,
            Box::new(move |outlet| {
                let outlets: Vec<_> = std::iter::repeat_n(outlet, stages.len()).collect();
                let parts = stages.into_iter().zip(outlets).zip(0_usize..);
                let start = |((stage, outlet), index): ((S, Outlet<S::Out>), usize)| -> Start {
                    let linked = linked.clone();
                    let report = report.clone();
                    let name = format!("{name}/{index}");
                    Box::new(move |_, over| {
                        let Linked { inlet, context } = linked;
                        let (metrics, cancel) = (Arc::clone(&context.metrics), context.cancel.clone());
                        let work = move || {
                            let guard = InletGuard::of(&inlet);
                            let result = stage.run(inlet, outlet, context);
                            settle(result, &guard, &report)
                        };
                        Some(spawn(name, metrics, cancel, over, work))
                    })
                };
                parts.map(start).collect()
            }),
        ));
        (next, ReportHandle(handle, workers))
    }

    /// Adds a stage on a thread of its own, run by `executor`. `build` is called there: what it makes (a ring, open
    /// files) never leaves that thread.
    #[must_use]
    pub fn ring<S, B>(self, name: &str, executor: impl LocalExecutor, build: B) -> Pipeline<S::Out>
    where
        S: LocalStage<In = T>,
        B: FnOnce() -> Result<S, StageError> + Send + 'static,
    {
        self.ring_reporting(name, executor, build).0
    }

    /// [`Pipeline::ring`], with the stage's report.
    #[must_use]
    pub fn ring_reporting<S, B>(
        self,
        name: &str,
        executor: impl LocalExecutor,
        build: B,
    ) -> (Pipeline<S::Out>, ReportHandle<S::Report>)
    where
        S: LocalStage<In = T>,
        B: FnOnce() -> Result<S, StageError> + Send + 'static,
    {
        let (linked, mut next) = self.link(name, 1);
        let (report, handle) = async_channel::bounded(1);
        let metrics = Arc::clone(&linked.context.metrics);
        let name = format!("{name}/0");
        next.last = Some((
            metrics,
            Box::new(move |outlet| {
                vec![Box::new(move |_, over| {
                    let Linked { inlet, context } = linked;
                    let (metrics, cancel) = (Arc::clone(&context.metrics), context.cancel.clone());
                    let work = move || {
                        let guard = InletGuard::of(&inlet);
                        let mut result = Err(StageError::bug("the executor did not run its stage"));
                        let slot = &mut result;
                        executor.block_on(Box::pin(async move {
                            *slot = match build() {
                                Ok(stage) => stage.run(inlet, outlet, context).await,
                                Err(error) => Err(error),
                            };
                        }))?;
                        settle(result, &guard, &report)
                    };
                    Some(spawn(name, metrics, cancel, over, work))
                })]
            }),
        ));
        (next, ReportHandle(handle, 1))
    }
}

impl Pipeline<NoOutput> {
    /// Starts all stages. Network stages run on `runtime`.
    #[must_use]
    pub fn start(mut self, runtime: &Handle) -> Running {
        if let Some((metrics, build)) = self.last.take() {
            metrics.mark_as_sink();
            let (outlet, inlet) = port(1, &self.cancel, &metrics, &metrics);
            drop(inlet);
            self.starts.extend(build(outlet));
        }
        let workers = self.starts.len();
        let (sender, over) = async_channel::bounded(workers.max(1));
        let threads = self.starts.into_iter().filter_map(|start| start(runtime, sender.clone())).collect();
        Running { cancel: self.cancel, registry: self.registry, over, workers, threads, joined: false }
    }
}

/// What a stage gets when it is linked to its predecessor.
struct Linked<T: Item> {
    inlet: Inlet<T>,
    context: StageContext,
}

impl<T: Item> Clone for Linked<T> {
    fn clone(&self) -> Self {
        Self { inlet: self.inlet.clone(), context: self.context.clone() }
    }
}

/// A stage has returned: hands its report over, unless it left input behind.
fn settle<T: Item, R>(
    result: Result<R, StageError>,
    guard: &InletGuard<T>,
    report: &async_channel::Sender<R>,
) -> Result<(), StageError> {
    let value = result?;
    if !guard.all_received() {
        return Err(StageError::bug("returned before the end of its input"));
    }
    // The reader of the report may have gone; that is no concern of the stage.
    let _ = report.try_send(value);
    Ok(())
}

/// A worker is over: a failure cancels the run at once, whether or not somebody waits for the run yet (I6).
fn conclude(cancel: &CancelToken, metrics: &StageMetrics, result: Result<(), StageError>) {
    if let Err(mut error) = result
        && error.kind != ErrorKind::Cancelled
    {
        metrics.name().clone_into(&mut error.stage);
        cancel.cancel(Cause::Failed(error));
    }
}

/// A named thread that reports however it ends.
#[allow(clippy::disallowed_methods)] // this is the engine's one place to make threads
fn spawn(
    name: String,
    metrics: Arc<StageMetrics>,
    cancel: CancelToken,
    over: async_channel::Sender<Over>,
    work: impl FnOnce() -> Result<(), StageError> + Send + 'static,
) -> thread::JoinHandle<()> {
    let body = move || {
        metrics.begin();
        let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(panic_error(&*payload)));
        metrics.end();
        conclude(&cancel, &metrics, result);
        let _ = over.try_send(Over);
    };
    thread::Builder::new().name(name).spawn(body).expect("the machine has a thread left")
}
