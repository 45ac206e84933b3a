//! What is converted: a local file or an image in Glance, checked before anything is made.

use std::{path::Path, sync::Arc};

use super::Options;
use crate::{
    disk::{PipeSource, RawFile},
    error::JobError,
    glance::fetch::glance_advice,
    hash::ExpectedHash,
    magic::DiskFormat,
    openstack::{Image, Session, image::ImageError, marks::REPLACES},
    text::{shell_word, size},
};

/// A checked source.
#[derive(Clone)]
pub enum Source {
    /// A local file or block device.
    Local(Arc<RawFile>),
    /// An image in Glance.
    Glance {
        /// Signed in where it is.
        session: Session,
        /// Its record.
        image: Box<Image>,
        /// Its size, bytes.
        bytes: u64,
    },
    /// A pipe, which can be read once.
    Pipe(PipeSource),
}

impl Source {
    /// A local source.
    ///
    /// # Errors
    /// If it cannot be read or is not raw.
    pub fn local(path: &Path) -> Result<Self, JobError> {
        Ok(Self::Local(Arc::new(RawFile::open(path)?)))
    }

    /// The image of this name or id, if it can be converted.
    ///
    /// # Errors
    /// [`JobError`]: not there, two of one name, not active, not raw, without bytes; each says what to do.
    pub async fn glance(session: &Session, name_or_id: &str) -> Result<Self, JobError> {
        Self::image(session, find_source(session, name_or_id).await?)
    }

    /// An image whose record is known, if it can be converted.
    ///
    /// # Errors
    /// Those of [`Source::glance`].
    pub fn image(session: &Session, image: Image) -> Result<Self, JobError> {
        let shown = format!("image {} ({})", image.shown(), image.id);
        if image.is_volume_backed() {
            return Err(JobError::Refused(format!(
                "{shown} is the snapshot of a volume-backed server: it has no bytes of its own, only a pointer to volume snapshots. \
                 To get an image with the bytes: make a volume from the snapshot, then \
                 `openstack image create --volume VOLUME --disk-format qcow2 NAME`; the block storage service converts it on the way"
            )));
        }
        match image.status.as_str() {
            "active" => {}
            "queued" | "saving" | "importing" | "uploading" => {
                let id = &image.id;
                let status = &image.status;
                return Err(JobError::Refused(format!(
                    "{shown} is still {status}: wait until it is active (virta image show {id} -c status)"
                )));
            }
            "deactivated" => {
                return Err(JobError::Refused(format!(
                    "{shown} is deactivated: its data cannot be downloaded until an administrator reactivates it"
                )));
            }
            other => return Err(JobError::Refused(format!("{shown} is {other}, not active"))),
        }
        let format = image.disk_format.as_deref().unwrap_or("unset");
        if format != "raw" {
            let advice = match format {
                "qcow2" => glance_advice(DiskFormat::Qcow2, &image.id),
                "iso" => glance_advice(DiskFormat::Iso, &image.id),
                "ami" | "ari" | "aki" => "such images are kernels and file systems, not disks".to_owned(),
                other => {
                    let other = shell_word(other);
                    let id = &image.id;
                    format!(
                        "openstack image save --file image.{other} {id}; then qemu-img convert -f {other} -O qcow2 image.{other} image.qcow2"
                    )
                }
            };
            return Err(JobError::Refused(format!("{shown} has disk_format {format}, not raw: {advice}")));
        }
        if image.container_format.as_deref() != Some("bare") {
            let container = image.container_format.as_deref().unwrap_or("unset");
            return Err(JobError::Refused(format!(
                "{shown} has container_format {container}, not bare: its disk is inside a container"
            )));
        }
        let bytes = image.size.unwrap_or(0);
        if bytes == 0 {
            return Err(JobError::Refused(format!("{shown} is empty: there is no disk in it to convert")));
        }
        Ok(Self::Glance { session: session.clone(), image: Box::new(image), bytes })
    }

    /// What stdin is: a file is read at any offset, anything else once, and has to have `expected_bytes`, where they are given.
    ///
    /// # Errors
    /// If it is a terminal, or a file that is not raw.
    pub fn stdin(expected_bytes: Option<u64>) -> Result<Self, JobError> {
        use std::os::fd::AsFd;
        let stdin = std::io::stdin();
        if std::io::IsTerminal::is_terminal(&stdin) {
            return Err(JobError::Usage(
                "`-` reads a disk from stdin, and stdin is a terminal: give it a file or a pipe".to_owned(),
            ));
        }
        let file = stdin.as_fd().try_clone_to_owned().map(std::fs::File::from);
        let file = file.map_err(|error| JobError::Refused(format!("stdin cannot be read: {error}")))?;
        let kind = file.metadata().map_err(|error| JobError::Refused(format!("stdin cannot be read: {error}")))?.file_type();
        let at_start = rustix::fs::seek(&file, rustix::fs::SeekFrom::Current(0)) == Ok(0);
        if at_start && (kind.is_file() || std::os::unix::fs::FileTypeExt::is_block_device(&kind)) {
            return Ok(Self::Local(Arc::new(RawFile::from_file(file, Path::new("-"))?)));
        }
        Ok(Self::Pipe(PipeSource::new(file, "stdin", expected_bytes)))
    }

    /// Its size, bytes; `None` for a pipe.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        match self {
            Self::Local(raw) => Some(raw.bytes()),
            Self::Glance { bytes, .. } => Some(*bytes),
            Self::Pipe(_) => None,
        }
    }

    /// How it is named in reports.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Local(raw) => raw.path().display().to_string(),
            Self::Glance { image, .. } => format!("glance:{}", image.id),
            Self::Pipe(_) => "-".to_owned(),
        }
    }

    /// The line about it.
    #[must_use]
    pub fn line(&self) -> String {
        match self {
            Self::Local(raw) => format!("source: {}, {} raw", raw.path().display(), size(raw.bytes())),
            Self::Glance { image, bytes, .. } => format!("source: image {} ({}), {} raw", image.shown(), image.id, size(*bytes)),
            Self::Pipe(pipe) => match pipe.expected_bytes() {
                Some(bytes) => format!("source: stdin, a pipe of {} raw", size(bytes)),
                None => {
                    "source: stdin, a pipe: a connection that breaks looks like its end; --source-size BYTES tells them apart"
                        .to_owned()
                }
            },
        }
    }

    /// The digest that what is read has to have.
    #[must_use]
    pub fn expected_hash(&self) -> Option<ExpectedHash> {
        match self {
            Self::Local(_) | Self::Pipe(_) => None,
            Self::Glance { image, .. } => image.expected_hash(),
        }
    }

    /// Leases that keep this source and its workers busy.
    #[must_use]
    pub fn leases(&self, options: &Options) -> usize {
        let workers = options.workers.get();
        match self {
            Self::Local(_) | Self::Pipe(_) => 2 * workers + 4,
            Self::Glance { .. } => 2 * options.connections.get() + 2 * workers + 4,
        }
    }

    /// The image's record, where it is one.
    #[must_use]
    pub fn record(&self) -> Option<&Image> {
        match self {
            Self::Glance { image, .. } => Some(image),
            Self::Local(_) | Self::Pipe(_) => None,
        }
    }
}

/// The image that a word means as a source: of several of one name the one that the others have replaced, or are about to.
///
/// # Errors
/// [`ImageError`].
pub async fn find_source(session: &Session, name_or_id: &str) -> Result<Image, ImageError> {
    let found = session.find_image(name_or_id).await;
    let Err(ImageError::Ambiguous { .. }) = &found else { return found };
    let images = session.images_named(name_or_id.strip_prefix("glance:").unwrap_or(name_or_id)).await?;
    sole_source(&images).cloned().map_or(found, Ok)
}

/// Of images of one name, the one that is left without those that take the place of another of them.
#[must_use]
pub fn sole_source(images: &[Image]) -> Option<&Image> {
    let replaces = |image: &Image| images.iter().any(|other| other.id != image.id && image.property(REPLACES) == Some(&other.id));
    let mut sources = images.iter().filter(|image| !replaces(image));
    match (sources.next(), sources.next()) {
        (Some(source), None) => Some(source),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image(id: &str, status: &str, replaces: Option<&str>) -> Image {
        serde_json::from_value(json!({ "id": id, "status": status, "name": "n", REPLACES: replaces })).unwrap()
    }

    #[test]
    fn of_two_of_one_name_the_one_that_is_replaced_is_the_source() {
        let (source, made) = (image("s", "active", None), image("m", "active", Some("s")));
        assert_eq!(sole_source(&[made.clone(), source.clone()]).unwrap().id, "s");
        assert_eq!(sole_source(&[source.clone(), image("t", "active", None)]), None);
        assert_eq!(sole_source(std::slice::from_ref(&made)).unwrap().id, "m", "its source is gone");
    }
}
