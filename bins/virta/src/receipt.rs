//! Receipts: each run that changes something leaves one in the state folder, for its owner alone.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use stages::{convert::Report, openstack::error::now_utc, whole_file::write_whole};

/// Writes the receipt of a finished conversion; returns its path. No secret is ever on the command line, so the command is
/// kept as it was typed.
pub fn write(report: &Report, proven: &[String], source_deleted: bool) -> io::Result<PathBuf> {
    write_told(&json!({ "proven": proven, "source_deleted": source_deleted, "report": report }))
}

/// Writes what else a run has to tell.
pub fn write_told(told: &Value) -> io::Result<PathBuf> {
    let folder =
        crate::runs::state_folder().ok_or_else(|| io::Error::other("neither XDG_STATE_HOME nor HOME is set"))?.join("receipts");
    write_into(&folder, told)
}

fn write_into(folder: &Path, told: &Value) -> io::Result<PathBuf> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let at = now_utc();
    let id = uuid::Uuid::new_v4().simple().to_string();
    let path = folder.join(format!("{}-{}.json", at.replace(':', ""), &id[..8]));
    let command: Vec<String> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let mut receipt = json!({ "virta": env!("CARGO_PKG_VERSION"), "finished_at": at, "command": command });
    for (key, value) in told.as_object().into_iter().flatten() {
        receipt[key] = value.clone();
    }
    write_whole(&path, (serde_json::to_string_pretty(&receipt)? + "\n").as_bytes(), true)?;
    Ok(path)
}
