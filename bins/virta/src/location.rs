//! Where an image is: a path, `glance:IMAGE`, or stdin and stdout; and pipes among the paths.

use std::path::Path;

use engine::CancelToken;
use stages::{
    error::JobError,
    openstack::Session,
    reporter::Reporter,
    text::{printable, shell_word},
};

use crate::display::Display;

/// Where an image is.
pub enum End {
    /// A local file.
    Path(String),
    /// An image in Glance.
    Glance(String),
    /// stdin or stdout.
    Stdio,
}

impl End {
    /// As it was typed.
    pub fn parse(text: &str) -> Self {
        match text.strip_prefix("glance:") {
            Some(name) => Self::Glance(name.to_owned()),
            None if text == "-" => Self::Stdio,
            None => Self::Path(text.to_owned()),
        }
    }
}

/// stdout by one of its names is `-`: nothing but the image may go there.
pub fn stdout_by_its_name(path: String) -> String {
    if matches!(path.as_str(), "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1") { "-".to_owned() } else { path }
}

/// A FIFO can only be written forward.
pub fn is_forward_only(path: impl AsRef<Path>) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Opens a FIFO when its reader is there; until then it can be interrupted.
pub async fn open_forward(path: &str, display: &Display, cancel: &CancelToken) -> Result<std::fs::File, JobError> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut told = false;
    loop {
        match std::fs::File::options().write(true).custom_flags(flags).open(path) {
            Ok(file) => return Ok(file),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
                if !std::mem::replace(&mut told, true) {
                    display.note(&format!("waiting until somebody reads {}", printable(path)));
                }
                let pause = tokio::time::sleep(std::time::Duration::from_millis(200));
                cancel.guard(pause).await.map_err(|_| JobError::interrupted())?;
            }
            Err(error) => return Err(JobError::Refused(format!("opening {}: {error}", printable(path)))),
        }
    }
}

pub fn stdout() -> Result<std::fs::File, JobError> {
    use std::os::fd::AsFd;
    let handle = std::io::stdout().as_fd().try_clone_to_owned();
    let file =
        handle.map(std::fs::File::from).map_err(|error| JobError::Refused(format!("stdout cannot be written: {error}")))?;
    let kind = file.metadata().map_err(|error| JobError::Refused(format!("stdout cannot be written: {error}")))?.file_type();
    // a closed stdout is opened as /dev/null before a program begins
    if std::os::unix::fs::FileTypeExt::is_char_device(&kind) {
        return Err(JobError::Usage(
            "`-` writes the image to stdout, which is closed or /dev/null: nobody would have it".to_owned(),
        ));
    }
    if kind.is_file() && !matches!(rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)), Ok(0)) {
        return Err(JobError::Usage(
            "`-` writes the image to stdout, which is a file that is not empty: give the file's name as destination".to_owned(),
        ));
    }
    Ok(file)
}

/// A path that is not there may be an image's name.
pub async fn did_you_mean(error: JobError, path: &str, session: Option<&Session>) -> JobError {
    let is_image = match session {
        Some(session) => session.find_image(path).await.is_ok(),
        None => uuid::Uuid::parse_str(path).is_ok(),
    };
    if session.is_none() && !is_image && !path.contains('/') {
        return JobError::Refused(format!(
            "there is no file {}; an image in Glance is written glance:{}",
            printable(path),
            shell_word(&printable(path))
        ));
    }
    if is_image {
        return JobError::Usage(format!("{} is no file; did you mean glance:{}?", printable(path), shell_word(&printable(path))));
    }
    error
}
