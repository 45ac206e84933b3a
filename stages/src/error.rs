//! Why a conversion failed, and the exit code that goes with it.

use std::io;

use engine::{BoxError, ErrorKind, RunError, StageError};

use reqwest::StatusCode;

use crate::{
    budget::MemoryTooSmall,
    compare::Difference,
    disk::{OutputError, SourceError, UringDenied},
    glance::{
        connection::{FetchError, ReadError},
        upload::UploadError,
    },
    hash::HashMismatch,
    openstack::{ApiError, ConfigError, image::ImageError, server::ServerError, session::SignInError},
    qcow2::Qcow2Error,
    store::{reread::SourceChanged, scratch::ScratchError},
};

/// What to do about a failure, for whoever has more than one thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Another try may go better.
    Transient,
    /// It would fail again.
    Permanent,
    /// The project's quota for images is full.
    Quota,
    /// The credentials are not good, or not good any more.
    Credentials,
    /// Another run has the source.
    Held,
    /// Somebody stopped it.
    Interrupted,
}

/// A conversion that did not happen. Nothing half-made is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The local source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The local destination.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Disk and cluster size do not go together.
    #[error(transparent)]
    Format(#[from] Qcow2Error),
    /// io_uring was insisted on.
    #[error(transparent)]
    Uring(#[from] UringDenied),
    /// The budget.
    #[error(transparent)]
    Memory(#[from] MemoryTooSmall),
    /// The scratch folder.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Reading an image.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A stage failed.
    #[error("it failed in stage {stage}")]
    Stage {
        /// Which.
        stage: String,
        /// What kind of failure.
        kind: ErrorKind,
        /// The stage's own error.
        #[source]
        source: BoxError,
    },
    /// Two images could not be compared.
    #[error("the images could not be compared")]
    Compare {
        /// Which one, and why.
        #[source]
        source: BoxError,
    },
    /// The image could not be written.
    #[error("writing {path}{advice}")]
    Write {
        /// The file under construction.
        path: String,
        /// What to do, with a leading `: `, or nothing.
        advice: &'static str,
        /// The stage's own error.
        #[source]
        source: BoxError,
    },
    /// Somebody stopped it.
    #[error("{0}")]
    Interrupted(String),
    /// Source and destination do not go together, or the request makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The cloud's configuration or sign-in.
    #[error(transparent)]
    SignIn(#[from] SignInError),
    /// Finding an image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Finding a server, or doing something with it.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A call to Glance.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// What was made is not what it should be.
    #[error("verification failed: {0}")]
    Verification(String),
    /// Another run converts this source just now.
    #[error(
        "run {run} is converting this source to this name (image {image}); its claim ends {until}. If that run is dead: the same command with --take-over"
    )]
    Held {
        /// The image that it makes.
        image: String,
        /// The run.
        run: String,
        /// How long its claim is good, UTC.
        until: String,
    },
    /// The new image does not fit beside the old one.
    #[error("{0}")]
    Quota(String),
    /// The new image is proven and marked; something behind that failed.
    #[error("the new image {new_id} is there and verified; {}", if *.deletes { "its source was not deleted" } else { "what was to follow was not done" })]
    SourceKept {
        /// The new image.
        new_id: String,
        /// The source was to be deleted.
        deletes: bool,
        /// What failed.
        #[source]
        error: Box<JobError>,
    },
    /// The new image is proven and marked, and a DELETE of the source was not answered.
    #[error(
        "the new image {new_id} is there and verified; Glance did not confirm that the source is deleted: it may be gone, or go yet"
    )]
    SourceGoing {
        /// The new image.
        new_id: String,
        /// What came in between.
        #[source]
        error: Box<JobError>,
    },
    /// The mark was sent, and nobody knows whether it arrived.
    #[error("Glance did not confirm the last change of image {image}, which is whole and proven: start the same command again")]
    Unconfirmed {
        /// The new image.
        image: String,
        /// What came in between.
        #[source]
        error: Box<JobError>,
    },
    /// Everything was sent, and Glance does not get on with it.
    #[error("the whole image was sent, but Glance has image {id} as {status} after {seconds} s")]
    Stuck {
        /// The image's id.
        id: String,
        /// Its status.
        status: String,
        /// How long was waited.
        seconds: u64,
    },
    /// It failed, and what was half made could not be removed either.
    #[error("image {id} may be left behind half made; look with `virta image show {id}` and remove it with: virta image delete {id}{}", .left.as_ref().map(|left| format!(" (deleting it failed: {left})")).unwrap_or_default())]
    LeftBehind {
        /// The image's id.
        id: String,
        /// Why it failed in the first place.
        #[source]
        error: Box<JobError>,
        /// Why it could not be removed.
        left: Option<ApiError>,
    },
    /// It cannot be done as things are; the text says what to do.
    #[error("{0}")]
    Refused(String),
}

impl From<RunError> for JobError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Failed { error, .. } => Self::from_stage(error),
            RunError::Cancelled(why) => Self::Interrupted(why),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl From<ConfigError> for JobError {
    fn from(error: ConfigError) -> Self {
        Self::SignIn(error.into())
    }
}

impl From<ReadError> for JobError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Cancelled => Self::interrupted(),
            ReadError::Failed(error) => Self::Fetch(error),
        }
    }
}

impl JobError {
    /// Somebody stopped it.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::Interrupted("interrupted".to_owned())
    }

    fn from_stage(error: StageError) -> Self {
        let StageError { stage, kind, source } = error;
        let source = source.unwrap_or_else(|| "it gave no reason".into());
        Self::Stage { stage, kind, source }
    }

    /// Names the file that a failed writer wrote to, and the way out of a full disk.
    #[must_use]
    pub fn writing_to(self, path: &std::path::Path) -> Self {
        match self {
            Self::Stage { stage, kind: ErrorKind::Io, source } if stage == "write" => {
                let full = source.downcast_ref::<crate::disk::queue::WriteError>().is_some_and(|error| {
                    matches!(error.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
                });
                let advice =
                    if full { ": the disk is full. Nothing is left of the image; choose a folder with more room" } else { "" };
                Self::Write { path: path.display().to_string(), advice, source }
            }
            other => other,
        }
    }

    /// An invariant that does not hold.
    #[must_use]
    pub fn bug(what: &str) -> Self {
        Self::Refused(format!("this is a bug in virta: {what}"))
    }

    /// What Glance, or another service, answered at the bottom of it.
    #[must_use]
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Api(error) | Self::Image(ImageError::Api(error)) => Some(error),
            Self::Fetch(FetchError::Api { source, .. } | FetchError::GaveUp { source, .. }) => Some(source),
            Self::SignIn(SignInError::Refused { source, .. } | SignInError::Call { source, .. }) => Some(source),
            Self::LeftBehind { error, .. }
            | Self::SourceGoing { error, .. }
            | Self::SourceKept { error, .. }
            | Self::Unconfirmed { error, .. } => error.api(),
            Self::Stage { source, .. } | Self::Compare { source } => api_below(&**source),
            _ => None,
        }
    }

    /// May an image of this run be there, half made or proven?
    #[must_use]
    pub fn leaves_an_image(&self) -> bool {
        matches!(self, Self::LeftBehind { .. } | Self::SourceGoing { .. } | Self::SourceKept { .. } | Self::Unconfirmed { .. })
    }

    /// What to do about it.
    #[must_use]
    pub fn failure_kind(&self) -> FailureKind {
        match self {
            Self::Interrupted(_) => return FailureKind::Interrupted,
            Self::Held { .. } => return FailureKind::Held,
            Self::Quota(_) => return FailureKind::Quota,
            Self::Stuck { .. } => return FailureKind::Transient,
            // what was sent stays: the next try finds it marked, or makes another
            Self::Unconfirmed { error, .. } => {
                return match error.failure_kind() {
                    FailureKind::Interrupted => FailureKind::Interrupted,
                    _ => FailureKind::Transient,
                };
            }
            Self::LeftBehind { error, .. } | Self::SourceGoing { error, .. } | Self::SourceKept { error, .. } => {
                return error.failure_kind();
            }
            _ => {}
        }
        let refused_to_sign_in = |error: &SignInError| matches!(error, SignInError::Refused { .. } | SignInError::Config(_));
        let of_upload = match self {
            Self::Stage { source, .. } => source.downcast_ref::<UploadError>(),
            _ => None,
        };
        if matches!(self, Self::SignIn(error) if refused_to_sign_in(error))
            || matches!(of_upload, Some(UploadError::SignIn(error)) if refused_to_sign_in(error))
        {
            return FailureKind::Credentials;
        }
        let Some(api) = self.api() else {
            return if matches!(self, Self::Stage { kind: ErrorKind::Network, .. }) {
                FailureKind::Transient
            } else {
                FailureKind::Permanent
            };
        };
        match api {
            ApiError::Status(error) if error.status == StatusCode::PAYLOAD_TOO_LARGE => {
                // "Image exceeds the storage quota", and not "The incoming image is too large"
                if error.text.contains("quota") { FailureKind::Quota } else { FailureKind::Permanent }
            }
            ApiError::Credentials { .. } => FailureKind::Credentials,
            api if api.status() == Some(StatusCode::UNAUTHORIZED) => FailureKind::Credentials,
            // answers that no API promises come from what stands between
            ApiError::Answer { .. } => FailureKind::Transient,
            // the image that was being made went away
            _ if of_upload.is_some() && matches!(api.status(), Some(StatusCode::NOT_FOUND | StatusCode::GONE)) => {
                FailureKind::Transient
            }
            api if api.is_retryable() => FailureKind::Transient,
            _ => FailureKind::Permanent,
        }
    }

    /// Exit code: 1 failed, 2 usage, 3 verification failed, 75 another run has the source, 130 interrupted.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Memory(_) | Self::Uring(_) | Self::Scratch(_) => 2,
            Self::Output(OutputError::Exists { .. } | OutputError::Extension { .. } | OutputError::Device { .. }) => 2,
            Self::Output(
                OutputError::Kind { .. }
                | OutputError::InTheWay { .. }
                | OutputError::NoFolder { .. }
                | OutputError::TooSmall { .. }
                | OutputError::Unfinished { .. },
            ) => 2,
            Self::Interrupted(_) => 130,
            Self::Verification(_) => 3,
            Self::Held { .. } => 75,
            Self::LeftBehind { error, .. }
            | Self::SourceGoing { error, .. }
            | Self::SourceKept { error, .. }
            | Self::Unconfirmed { error, .. } => error.exit_code(),
            Self::SignIn(SignInError::Config(_)) | Self::Image(ImageError::NotFound { .. } | ImageError::Ambiguous { .. }) => 2,
            Self::Server(ServerError::NotFound { .. } | ServerError::Ambiguous { .. } | ServerError::NoCompute) => 2,
            Self::Stage { kind: ErrorKind::InvalidData, source, .. }
                if source.is::<HashMismatch>() || source.is::<SourceChanged>() || source.is::<Difference>() =>
            {
                3
            }
            Self::Format(Qcow2Error::TooLarge { .. }) => 2,
            _ => 1,
        }
    }
}

/// What a service answered, anywhere below an error: who reads through an image knows only that reading failed.
fn api_below<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a ApiError> {
    if let Some(FetchError::Api { source, .. } | FetchError::GaveUp { source, .. }) = error.downcast_ref() {
        return Some(source);
    }
    match error.downcast_ref() {
        Some(UploadError::Api { source, .. }) => return Some(source),
        Some(UploadError::SignIn(SignInError::Refused { source, .. } | SignInError::Call { source, .. })) => return Some(source),
        _ => {}
    }
    // an I/O error does not name what it wraps as its source
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => api_below(inner),
        None => error.source().and_then(api_below),
    }
}
