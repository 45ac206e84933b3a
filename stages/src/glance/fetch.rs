//! The source stage over an image in Glance.
//!
//! The first reading begins with one plain GET. On the way it looks for a place to probe for ranges (see [`super::probe`]); if they are
//! served, others may fetch ranges ahead of it, as many at once as make it faster (see [`super::scaler`]); if not, the GET goes on to the end. No
//! byte is fetched twice either way, but for the probe's few, and what is on its way when a GET is left.
//!
//! A second reading fetches the extents that are wanted: by ranges, or out of one GET that discards the rest. Its extents wait
//! downstream until it is their turn, with their leases, so a range is claimed only together with the leases that it needs, in guest
//! order: the oldest one that is wanted can always land.
//!
//! A lease is taken before its bytes are asked for. Zeros travel as a length, and leave their lease to what comes next. How broken connections are mended: [`super::connection`].

use std::{num::NonZeroUsize, sync::Arc};

use engine::{BufferPool, ErrorKind, Inlet, Lease, NoInput, Outlet, Stage, StageContext, StageError};
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
};

use super::{
    connection::{Asking, Connection, PartKind, Remote},
    probe::{Candidate, Probe, probe},
    range::{RangeWindow, range_bytes},
    scaler::ConnectionScaler,
};
use crate::{
    access::Access,
    extent::{EXTENT_BYTES, Extent, Payload},
    magic::{DiskFormat, HEAD_BYTES},
    units::{GuestRange, to_u64, to_usize},
    watermark::Watermark,
};

/// Images below this are fetched with one GET: a probe and more connections would cost more than they save.
const RANDOM_BYTES_MIN: u64 = 32 << 20;
/// The beginning of an extent of zeros.
static ZEROS: [u8; to_usize(HEAD_BYTES)] = [0; to_usize(HEAD_BYTES)];
/// Extents that one request of a second reading covers at most.
const BATCH_EXTENTS: usize = 8;

/// An image's bytes are not a raw disk's.
#[derive(Debug, thiserror::Error)]
#[error("image {image} is not a raw disk image but {format}: {advice}")]
pub struct NotRaw {
    /// The image.
    pub image: String,
    /// What it is.
    pub format: DiskFormat,
    /// What to do instead.
    pub advice: String,
}

/// What to read.
#[derive(Clone, Debug)]
pub enum FetchPlan {
    /// Everything, for the first time: how it can be read is found out on the way.
    All,
    /// These extents once more, which ascend.
    Again {
        /// How it could be read the first time.
        access: Access,
        /// Each within one aligned 2 MiB.
        wanted: Arc<Vec<GuestRange>>,
    },
}

/// The stage.
pub struct Fetch {
    /// The image.
    pub remote: Remote,
    /// What to read of it.
    pub plan: FetchPlan,
    /// Another format than raw is an error, told by the first bytes.
    pub only_raw: bool,
    /// Parallel ranges, at most; with 1, ranges are not even probed for.
    pub connections: NonZeroUsize,
    /// So many from the start, and not only as many as make it faster.
    pub all_at_once: bool,
    /// Where leases come from.
    pub pool: BufferPool,
    /// How far ahead it may read.
    pub watermark: Watermark,
}

/// What all connections share.
struct Shared {
    remote: Remote,
    pool: BufferPool,
    watermark: Watermark,
    only_raw: bool,
    outlet: Outlet<Extent>,
    cx: StageContext,
}

impl Stage for Fetch {
    type In = NoInput;
    type Out = Extent;
    type Report = Access;

    async fn run(self, _: Inlet<NoInput>, outlet: Outlet<Extent>, cx: StageContext) -> Result<Access, StageError> {
        let connections = self.connections.get();
        let Self { remote, pool, watermark, only_raw, all_at_once, .. } = self;
        let shared = Arc::new(Shared { remote, pool, watermark, only_raw, outlet, cx });
        let image_bytes = shared.remote.image_bytes;
        let access = match self.plan {
            FetchPlan::All => {
                let look_for_ranges = connections > 1 && image_bytes >= RANDOM_BYTES_MIN;
                match sequential(&shared, look_for_ranges).await? {
                    Some((reached, connection)) => {
                        let scaler = match all_at_once {
                            true => ConnectionScaler::all_at_once(connections),
                            false => ConnectionScaler::new(connections, image_bytes - reached),
                        };
                        parallel(&shared, reached, connection, to_u64(connections), scaler).await?;
                        Access::Random
                    }
                    None => Access::Sequential,
                }
            }
            FetchPlan::Again { access: Access::Random, wanted } => {
                again_by_ranges(&shared, wanted, connections).await?;
                Access::Random
            }
            FetchPlan::Again { access, wanted } => {
                again_in_one_stream(&shared, &wanted).await?;
                access
            }
        };
        let shared = Arc::try_unwrap(shared).map_err(|_| StageError::bug("a connection outlived its fetch"))?;
        shared.outlet.finish();
        Ok(access)
    }
}

impl Shared {
    fn connection(&self, asking: Asking) -> Connection {
        Connection::new(self.remote.clone(), asking)
    }

    /// The lease at hand, else one from the pool.
    async fn lease(&self, connection: &mut Connection, spare: &mut Option<Lease>) -> Result<Lease, StageError> {
        match spare.take() {
            Some(lease) => Ok(lease),
            None => Ok(connection.while_waiting(self.pool.acquire_for(&self.cx.metrics)).await?),
        }
    }

    /// Reads one extent and sends it on; its lease comes back if it was not needed, because all of it is zeros. A connection that nobody reads
    /// from meanwhile is closed in time.
    async fn extent_or_zeros(
        &self,
        connection: &mut Connection,
        guest: GuestRange,
        range_end: u64,
        mut lease: Lease,
    ) -> Result<Option<Lease>, StageError> {
        let bytes = &mut lease[..to_usize(guest.bytes())];
        let content = connection.read_unless_zero(guest.start.0, range_end, bytes).await?;
        self.send_content(connection, guest, content, lease).await
    }

    async fn send_content(
        &self,
        connection: &mut Connection,
        guest: GuestRange,
        content: PartKind,
        lease: Lease,
    ) -> Result<Option<Lease>, StageError> {
        let (payload, lease) = match content {
            PartKind::Zeros => (Payload::Zeros, Some(lease)),
            PartKind::Data => (Payload::Bytes(lease), None),
        };
        connection.while_waiting(self.outlet.send(Extent { guest, payload })).await?;
        Ok(lease)
    }

    /// Reads one extent into a lease and sends it on, whatever is in it.
    async fn extent(
        &self,
        connection: &mut Connection,
        guest: GuestRange,
        range_end: u64,
        mut lease: Lease,
    ) -> Result<(), StageError> {
        connection.read(guest.start.0, range_end, &mut lease[..to_usize(guest.bytes())]).await?;
        self.send_content(connection, guest, PartKind::Data, lease).await.map(|_| ())
    }
}

/// The extent that begins at `start`, within one aligned 2 MiB.
fn extent_at(start: u64, end: u64) -> GuestRange {
    GuestRange::new(start, ((start / EXTENT_BYTES + 1) * EXTENT_BYTES).min(end) - start)
}

/// Reads with one GET from the start, to the image's end, or to an extent boundary where ranges are proven: which one, and the GET.
async fn sequential(shared: &Arc<Shared>, look_for_ranges: bool) -> Result<Option<(u64, Connection)>, StageError> {
    let remote = &shared.remote;
    let mut connection = shared.connection(Asking::Whole);
    let mut candidate = look_for_ranges.then(Candidate::default);
    let mut probing: Option<tokio::task::JoinHandle<Probe>> = None;
    // a lease that zeros did not need is kept for what comes next
    let mut spare = None;
    let mut at = 0;
    while at < remote.image_bytes {
        let guest = extent_at(at, remote.image_bytes);
        let admitted = shared.watermark.admit(guest.end.0);
        connection.while_waiting(remote.cancel.guard(admitted)).await?;
        let mut lease = shared.lease(&mut connection, &mut spare).await?;
        let bytes = to_usize(guest.bytes());
        let content = connection.read_unless_zero(at, guest.end.0, &mut lease[..bytes]).await?;
        let head = match content {
            PartKind::Zeros => &ZEROS[..bytes.min(ZEROS.len())],
            PartKind::Data => &lease[..bytes],
        };
        if at == 0 && shared.only_raw {
            refuse_other_formats(shared, head)?;
        }
        if let Some((place, sample)) = candidate.as_mut().and_then(|candidate| candidate.look(at, head)) {
            candidate = None;
            let remote = remote.clone();
            let (tell, told) = watch::channel(None);
            connection.will_know(told);
            probing = Some(tokio::spawn(async move {
                let found = probe(&remote, place, &sample).await;
                tell.send_replace(Some(found == Probe::Random));
                found
            }));
        }
        spare = shared.send_content(&mut connection, guest, content, lease).await?;
        at = guest.end.0;
        if let Some(task) = probing.take_if(|task| task.is_finished()) {
            match task.await {
                Ok(Probe::Random) if at < remote.image_bytes => return Ok(Some((at, connection))),
                Ok(Probe::Random) => {}
                Ok(Probe::Sequential(why)) => remote.retries.say(format!("one stream: {why}")),
                Err(error) => return Err(StageError::bug(error)),
            }
        }
        if candidate.is_some() && at >= super::probe::SEARCH_BYTES {
            candidate = None;
            remote.retries.say("one stream: the image's first 64 MiB offer no place to probe for ranges".to_owned());
        }
    }
    connection.check_end().await?;
    Ok(None)
}

/// What is converted is raw: other formats are told by their first bytes, whatever Glance calls them.
fn refuse_other_formats(shared: &Shared, head: &[u8]) -> Result<(), StageError> {
    let format = DiskFormat::detect(&head[..head.len().min(to_usize(HEAD_BYTES))], &[]);
    if format.is_disk() {
        return Ok(());
    }
    let image = shared.remote.image_id.clone();
    let advice = glance_advice(format, &image);
    Err(StageError::new(ErrorKind::Unsupported, NotRaw { image, format, advice }))
}

/// What to do with an image of another format, with the commands.
#[must_use]
pub fn glance_advice(format: DiskFormat, image: &str) -> String {
    let image = crate::text::shell_word(image);
    match format {
        DiskFormat::Qcow2 => "it is qcow2 already and needs no conversion".to_owned(),
        DiskFormat::Iso => "an installation medium stays as it is".to_owned(),
        other => {
            let file = format!("image.{}", other.name());
            format!("openstack image save --file {file} {image}; then {}", other.advice(&file))
        }
    }
}

/// Reads the rest with parallel ranges. `first` is open at `start`.
async fn parallel(
    shared: &Arc<Shared>,
    start: u64,
    first: Connection,
    connections: u64,
    scaler: ConnectionScaler,
) -> Result<(), StageError> {
    let remote = &shared.remote;
    let image_bytes = remote.image_bytes;
    let mut first = Some(first.by_ranges());
    let range = range_bytes(image_bytes - start, connections, shared.watermark.window_bytes());
    let most = if scaler.allowed() == 1 { "up to " } else { "" };
    remote.retries.say(format!("ranges are served: {most}{connections} connections, {} MiB each time", range >> 20));
    let window = Arc::new(RangeWindow::new(start, image_bytes, range, connections * range));
    let scaler = Arc::new(scaler);
    join_all((0..to_usize(connections)).map(|number| {
        let (shared, window, scaler) = (Arc::clone(shared), Arc::clone(&window), Arc::clone(&scaler));
        let mut connection = first.take().unwrap_or_else(|| shared.connection(Asking::Ranges));
        async move {
            loop {
                connection.while_waiting(shared.remote.cancel.guard(scaler.turn(number))).await?;
                let Some(range) = connection.while_waiting(window.claim()).await else { break };
                scaler.begins(number);
                // Glance closes a connection at the range's end: who is alone asks for all that is left. When others join, what it has open
                // does not fit its next range any more, and is closed
                let asked_end = if scaler.allowed() == 1 { image_bytes } else { range.end };
                let admitted = shared.watermark.admit(range.end);
                connection.while_waiting(shared.remote.cancel.guard(admitted)).await?;
                // given back before the next range is claimed: whoever waits for its turn holds no lease
                let mut spare = None;
                let mut at = range.start;
                while at < range.end {
                    let guest = extent_at(at, range.end);
                    let lease = shared.lease(&mut connection, &mut spare).await?;
                    spare = shared.extent_or_zeros(&mut connection, guest, asked_end, lease).await?;
                    at = guest.end.0;
                    scaler.arrived(number, guest.bytes());
                }
                if range.end == image_bytes {
                    connection.check_end().await?;
                }
                scaler.ends(number);
                window.landed(range.start);
            }
            scaler.over();
            Ok(())
        }
    }))
    .await
}

/// Fetches wanted extents by ranges.
async fn again_by_ranges(shared: &Arc<Shared>, wanted: Arc<Vec<GuestRange>>, connections: usize) -> Result<(), StageError> {
    let batch = (shared.pool.count() / connections).clamp(1, BATCH_EXTENTS);
    let next = Arc::new(Mutex::new(0_usize));
    join_all((0..connections).map(|_| {
        let (shared, wanted, next) = (Arc::clone(shared), Arc::clone(&wanted), Arc::clone(&next));
        async move {
            loop {
                let mut first = next.lock().await; // held until the leases are there: claims are in guest order
                let neighbours =
                    wanted[*first..].windows(2).take(batch).take_while(|pair| pair[0].end == pair[1].start).count() + 1;
                let claimed = &wanted[*first..(*first + neighbours.min(batch)).min(wanted.len())];
                let Some(range_end) = claimed.last().map(|guest| guest.end.0) else { return Ok(()) };
                let mut leases = Vec::with_capacity(claimed.len());
                for _ in claimed {
                    leases.push(shared.pool.acquire_for(&shared.cx.metrics).await?);
                }
                *first += claimed.len();
                drop(first);
                let mut connection = shared.connection(Asking::Ranges);
                for (guest, lease) in claimed.iter().zip(leases) {
                    shared.extent(&mut connection, *guest, range_end, lease).await?;
                }
            }
        }
    }))
    .await
}

/// Fetches wanted extents out of one GET that discards the rest.
async fn again_in_one_stream(shared: &Arc<Shared>, wanted: &[GuestRange]) -> Result<(), StageError> {
    let mut connection = shared.connection(Asking::Whole);
    for guest in wanted {
        let lease = shared.lease(&mut connection, &mut None).await?;
        shared.extent(&mut connection, *guest, guest.end.0, lease).await?;
    }
    Ok(())
}

/// Runs tasks to their end; the first failure is returned, and ends the others.
async fn join_all<F>(tasks: impl Iterator<Item = F>) -> Result<(), StageError>
where
    F: Future<Output = Result<(), StageError>> + Send + 'static,
{
    let mut set: JoinSet<_> = tasks.collect();
    let mut first = Ok(());
    while let Some(result) = set.join_next().await {
        let result = result.map_err(StageError::bug).flatten();
        if result.is_err() && first.is_ok() {
            first = result;
            set.abort_all(); // theirs would only be consequences
        }
    }
    first
}
