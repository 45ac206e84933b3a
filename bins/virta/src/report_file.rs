//! The file of `--report`.

use std::path::Path;

use stages::error::JobError;

use crate::location::is_forward_only;

/// Can a report be written there at the end, over nothing but an earlier one?
///
/// # Errors
/// [`JobError::Usage`].
pub fn check_report_file(report: &Path) -> Result<(), JobError> {
    use std::io::Read;
    let usage = |text: String| Err(JobError::Usage(format!("--report {}: {text}", report.display())));
    if std::fs::metadata(report).is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type())) {
        return usage("that is a disk: give a file".to_owned());
    }
    // one that is open already (/dev/stdout, a shell's >(…)) has its reader; any other would be waited for
    let is_open = report.starts_with("/dev") || report.starts_with("/proc");
    if is_forward_only(report) && !is_open {
        return usage("that is a named pipe, whose reader would have to be waited for: give a file".to_owned());
    }
    let mut start = [0];
    if report.is_file()
        && matches!(std::fs::File::open(report).map(|mut file| file.read(&mut start)), Ok(Ok(1)))
        && start != *b"{"
    {
        return usage("that file is there and is no report of an earlier run; choose another name".to_owned());
    }
    match open_private(report) {
        Ok(_) => Ok(()),
        Err(error) => usage(format!("cannot be written: {error}")),
    }
}

/// Opens a file for writing, for its owner alone if it is new.
pub fn open_private(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

pub fn write_report(path: &Path, json: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = open_private(path)?;
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    file.write_all(json.as_bytes())?;
    file.write_all(b"\n")
}
