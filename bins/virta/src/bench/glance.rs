//! The image service, and the network to it: fetching with 1, 2, 4 and 8 connections, and sending.

use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::{BlockingStage, CancelToken, Inlet, NoInput, Outlet, Pipeline, StageContext, StageError};
use reqwest::StatusCode;
use serde_json::json;
use stages::{
    error::JobError,
    extent::Chunk,
    glance::{
        Upload,
        connection::{Asking, Connection, ReadError},
    },
    openstack::{
        Image, Session,
        marks::{BENCH, RUN},
    },
    progress::Progress,
    retry::Patience,
    text::causes,
};
use tokio::task::JoinSet;

use super::{
    disk::rate,
    record::{Group, Measure},
    sample::noise,
};
use crate::{look_inside::quiet_remote, runs::Run};

/// Bytes of one read.
const PIECE_BYTES: usize = 2 << 20;
/// Bytes of one request where there are several connections: Glance closes the connection behind each.
const RANGE_BYTES: u64 = 64 << 20;
/// An image that is large enough to say something.
const IMAGE_BYTES_MIN: u64 = 16 << 20;
/// Connections that are tried.
pub const CONNECTIONS: [usize; 4] = [1, 2, 4, 8];

/// What is to be measured, and with how much.
pub struct Glance<'a> {
    pub session: &'a Session,
    /// For one figure.
    pub slice: Duration,
    /// Bytes of the image that is sent.
    pub upload_bytes: u64,
    pub cancel: &'a CancelToken,
}

impl Glance<'_> {
    /// The image to fetch: the one that was named, else the largest of the project.
    ///
    /// # Errors
    /// [`JobError`] if a named one is not there, or has no data.
    pub async fn choose(&self, named: Option<&str>) -> Result<Option<Image>, JobError> {
        if let Some(name) = named {
            let image = self.session.find_image(name).await?;
            if image.status != "active" || image.size.unwrap_or(0) < IMAGE_BYTES_MIN {
                return Err(JobError::Refused(format!(
                    "image {} is {}, or smaller than 16 MiB: choose another",
                    image.shown(),
                    image.status
                )));
            }
            return Ok(Some(image));
        }
        let owner = self.session.whoami().project_id.clone().unwrap_or_default();
        let images = self.session.images_matching(&[("status", "active"), ("owner", &owner)]).await?;
        let large = images.into_iter().filter(|image| image.size.unwrap_or(0) >= IMAGE_BYTES_MIN && !image.is_volume_backed());
        Ok(large.max_by_key(|image| image.size))
    }

    /// Fetches parts of an image and throws them away.
    ///
    /// # Errors
    /// [`JobError`], when not even one connection works.
    pub async fn down(&self, image: &Image, notes: &mut Vec<String>) -> Result<Vec<Measure>, JobError> {
        let mut found = Vec::new();
        for connections in CONNECTIONS {
            match self.down_with(image, connections).await {
                Ok(samples) => {
                    let key = format!("glance.down.{connections}");
                    let name = if connections == 1 {
                        "fetch, 1 connection".to_owned()
                    } else {
                        format!("fetch, {connections} connections")
                    };
                    found.extend(Measure::new(&key, Group::Glance, &name, connections, samples));
                }
                Err(ReadError::Failed(error)) if connections > 1 => {
                    notes.push(format!("fetching ends at one connection, this store serves no ranges: {}", causes(&error)));
                    break;
                }
                Err(ReadError::Cancelled) => return Err(JobError::interrupted()),
                Err(failed) => return Err(failed.into()),
            }
        }
        Ok(found)
    }

    async fn down_with(&self, image: &Image, connections: usize) -> Result<Vec<f64>, ReadError> {
        let progress = Progress::default();
        let image_bytes = image.size.unwrap_or(0);
        let mut set: JoinSet<Result<(), ReadError>> = (0..connections as u64)
            .map(|number| {
                let remote = quiet_remote(self.session, image, &progress, self.cancel);
                let share = (image_bytes / connections as u64).max(1);
                async move {
                    let asking = if connections == 1 { Asking::Whole } else { Asking::Ranges };
                    let mut buffer = vec![0; PIECE_BYTES];
                    loop {
                        // range after range of this connection's share, as a conversion asks for them, until the time is up
                        let (mut at, end) = (number * share, ((number + 1) * share).min(image_bytes));
                        while at < end {
                            let range_end = if connections == 1 { end } else { (at + RANGE_BYTES).min(end) };
                            let mut connection = Connection::new(remote.clone(), asking);
                            while at < range_end {
                                let bytes = PIECE_BYTES.min(usize::try_from(range_end - at).unwrap_or(PIECE_BYTES));
                                connection.read(at, range_end, &mut buffer[..bytes]).await?;
                                at += bytes as u64;
                            }
                        }
                    }
                }
            })
            .collect();
        // the first bytes have arrived: from then on it counts
        let mut samples = Vec::new();
        let failed = loop {
            let (before, since) = (progress.fetched_bytes(), Instant::now());
            tokio::select! {
                ended = set.join_next() => break ended,
                () = tokio::time::sleep(self.slice / 4) => {}
            }
            // once the first bytes are there, a second without any counts, too
            if before > 0 {
                samples.push(rate(progress.fetched_bytes() - before, since).max(1.0));
            }
            if samples.len() == 3 {
                break None;
            }
        };
        set.shutdown().await;
        match failed {
            Some(Ok(Err(error))) => Err(error),
            _ => Ok(samples),
        }
    }

    /// Sends an image of noise, and deletes it. One sample: it is made, sent, and answered as a real one is.
    ///
    /// # Errors
    /// [`JobError`]; the image is deleted, or the error names it.
    pub async fn up(&self, run: &Run) -> Result<Option<Measure>, JobError> {
        let id = uuid::Uuid::new_v4().hyphenated().to_string();
        let name = format!("virta-bench-{}", &id[..8]);
        let record = json!({
            "id": id, "name": name, "disk_format": "raw", "container_format": "bare", "visibility": "private", RUN: run.name(), BENCH: "noise",
        });
        let record = record.as_object().expect("an object");
        run.making(&id);
        let patience = Patience::default();
        // an interrupt waits for the answer, but not for ever: an image that was made has to be there to be deleted
        let sent = match patience.to_its_end(self.cancel, self.session.create_image(record)).await {
            Some(created) => {
                created?;
                self.send(&id).await
            }
            None => Err(JobError::interrupted()),
        };
        // deleted whatever happened, an interrupt included
        let deleted = patience.to_its_end(self.cancel, self.session.delete_image(&id)).await;
        // what is left behind comes first, whatever became of the sending
        let left = match deleted {
            Some(Ok(())) => None,
            Some(Err(gone)) if gone.status() == Some(StatusCode::NOT_FOUND) => None,
            Some(Err(left)) => Some(Some(left)),
            None => Some(None),
        };
        if let Some(left) = left {
            let error = match sent {
                Err(error) => error,
                Ok(_) if self.cancel.is_cancelled() => JobError::interrupted(),
                Ok(_) => JobError::Refused("it was sent, and is of no use any more".to_owned()),
            };
            return Err(JobError::LeftBehind { id, error: Box::new(error), left });
        }
        let rate = sent?;
        self.cancel.check().map_err(|_| JobError::interrupted())?;
        Ok(Measure::new("glance.up.1", Group::Glance, "send, 1 connection", 1, vec![rate]))
    }

    async fn send(&self, id: &str) -> Result<f64, JobError> {
        let upload = Upload {
            session: self.session.clone(),
            image_id: id.to_owned(),
            total_bytes: self.upload_bytes,
            progress: Progress::default(),
            patience: Patience::default(),
        };
        let attempt = self.cancel.child();
        let mut source = Some(Noise { bytes: self.upload_bytes });
        let started = Instant::now();
        let pipeline = Pipeline::new(&attempt).threads("noise", 1, || source.take().expect("one worker asks once"));
        pipeline.network("upload", upload).start(&tokio::runtime::Handle::current()).join().await?;
        Ok(rate(self.upload_bytes, started))
    }
}

/// Source: so many bytes that nobody compresses.
struct Noise {
    bytes: u64,
}

impl BlockingStage for Noise {
    type In = NoInput;
    type Out = Chunk;
    type Report = ();

    fn run(self, _: Inlet<NoInput>, outlet: Outlet<Chunk>, _: StageContext) -> Result<(), StageError> {
        let piece = Bytes::from(noise(PIECE_BYTES, 3));
        let mut left = self.bytes;
        while left > 0 {
            let part = piece.slice(..PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES)));
            left -= part.len() as u64;
            outlet.send_blocking(Chunk(part))?;
        }
        outlet.finish();
        Ok(())
    }
}
