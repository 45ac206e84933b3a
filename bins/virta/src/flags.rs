//! Flags that several commands have, and what they mean.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{Args, ValueEnum};
use stages::{
    compress::{Codec, Compression},
    convert::{After, Options, Verify},
    disk::IoMode,
    error::JobError,
    text::{printable, shell_word},
    units::ClusterBits,
};

/// Flags about what becomes of a source once its new image is proven.
#[derive(Args, Clone)]
pub struct SourceArgs {
    /// Delete the source image once the new one is verified (by readback, unless --verify hash says otherwise). Asks first
    #[arg(long, conflicts_with = "replace")]
    pub delete_source: bool,
    /// The new image takes the source's name and visibility, and the source is deleted; until then it is called what it would be without this.
    /// Its id does change: pinned ids break
    #[arg(long)]
    pub replace: bool,
    /// Share the new image with the projects that the source is shared with; each has to accept it again
    #[arg(long)]
    pub copy_members: bool,
    /// Do not ask before deleting
    #[arg(long)]
    pub yes: bool,
}

impl SourceArgs {
    /// What becomes of it.
    pub const fn after(&self) -> After {
        match (self.delete_source, self.replace) {
            (_, true) => After::Replace,
            (true, false) => After::Delete,
            (false, false) => After::Keep,
        }
    }

    /// How sure to be: what is the only copy of somebody's machine goes only after the new one was read back, unless somebody says otherwise.
    pub fn verify(&self, asked: Option<VerifyChoice>) -> Verify {
        let usual = if self.after() == After::Keep { Verify::Hash } else { Verify::Readback };
        asked.map_or(usual, Into::into)
    }
}

/// Flags about the image that a conversion makes, and how.
#[derive(Args, Clone)]
pub struct ConversionArgs {
    /// Compress clusters: zlib boots everywhere, zstd is faster and needs QEMU 5.1 or later wherever the image is used
    #[arg(long, value_name = "HOW", default_value = "none")]
    pub compress: CompressChoice,
    /// Level: zlib 1 to 12, zstd 1 to 19 [default: 2 for zlib, 3 for zstd: smaller than qemu-img's at a fraction of its time]
    #[arg(long, value_name = "N")]
    pub compress_level: Option<u8>,
    /// How sure to be [default: hash; readback where the source is to be deleted]: hash compares the source's and the new image's hashes in Glance; readback fetches the new image again, decodes
    /// it and compares every cluster with what was read; none hashes no source
    #[arg(long, value_name = "HOW")]
    pub verify: Option<VerifyChoice>,
    #[command(flatten)]
    pub tuning: Tuning,
    /// Property of the new image, over the source's (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub property: Vec<(String, String)>,
}

impl ConversionArgs {
    /// A flag that was given, of those that mean nothing where nothing is converted.
    pub fn first_given(&self) -> Option<&'static str> {
        let tuning = &self.tuning;
        [
            (self.compress != CompressChoice::None, "--compress"),
            (self.compress_level.is_some(), "--compress-level"),
            (self.verify.is_some(), "--verify"),
            (tuning.workers.is_some(), "--workers"),
            (tuning.memory.is_some(), "--memory"),
            (tuning.scratch.is_some(), "--scratch"),
            (tuning.cluster_size != ClusterBits::DEFAULT, "--cluster-size"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }
}

/// Flags that choose the cloud, as `openstack` has them.
#[derive(Args, Clone, Default)]
pub struct CloudArgs {
    /// Cloud from clouds.yaml [env: OS_CLOUD]
    #[arg(long, value_name = "NAME")]
    pub os_cloud: Option<String>,
    /// Region [env: OS_REGION_NAME]
    #[arg(long, value_name = "NAME")]
    pub os_region_name: Option<String>,
    /// Endpoint to use: public, internal or admin [env: OS_INTERFACE]
    #[arg(long, value_name = "NAME")]
    pub os_interface: Option<String>,
    /// PEM file of certificate authorities, beside the system's [env: OS_CACERT]
    #[arg(long, value_name = "FILE")]
    pub os_cacert: Option<String>,
    /// Do not check the services' certificates: whoever is in between reads the password
    #[arg(long)]
    pub insecure: bool,
}

/// Flags that decide how much of the machine is used.
#[derive(Args, Clone)]
pub struct Tuning {
    /// Parallel ranges to fetch, where the image store serves ranges [default: up to 4, as many as make it faster]
    #[arg(long, value_name = "N", value_parser = count)]
    pub connections: Option<NonZeroUsize>,
    /// Threads for zero test and copying [default: one a core, at most 8]
    #[arg(long, value_name = "N", value_parser = count)]
    pub workers: Option<NonZeroUsize>,
    /// Memory for data, SIZE; the program itself takes up to 100M beside. To Glance or a pipe, data that does not fit goes to --scratch, or is read twice; into a file 64M will do
    /// [default: a quarter of what is free, at most 2G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Folder for a scratch file, for data that memory does not hold. Without one, none is ever made
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Most that the scratch file may take, SIZE [default: until the disk is full; then the rest is read twice]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "scratch")]
    pub scratch_limit: Option<u64>,
    /// Cluster size of the image, a power of two from 512 to 2M. Larger clusters need less index
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_cluster_size)]
    pub cluster_size: ClusterBits,
    /// How local files are written: auto takes io_uring where it works
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub io: IoChoice,
    /// Do not wait until a local file is on stable storage. A power cut may cost the image
    #[arg(long)]
    pub no_sync: bool,
}

/// Flags that decide what is shown.
#[derive(Args, Clone)]
pub struct OutputArgs {
    /// Progress on stderr: auto is bars on a terminal and plain lines elsewhere
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub progress: ProgressChoice,
    /// Write the report there, as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// What is printed on stdout at the end
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: FormatChoice,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum CompressChoice {
    None,
    Zlib,
    Zstd,
}

impl CompressChoice {
    /// With this level, or the codec's own.
    pub fn with_level(self, level: Option<u8>) -> Result<Option<Compression>, String> {
        let codec = match (self, level) {
            (Self::None, None) => return Ok(None),
            (Self::None, Some(_)) => return Err("--compress-level needs --compress zlib or --compress zstd".to_owned()),
            (Self::Zlib, _) => Codec::Deflate,
            (Self::Zstd, _) => Codec::Zstd,
        };
        match level {
            None => Ok(Some(Compression::new(codec))),
            Some(level) => Compression::with_level(codec, level).map(Some).map_err(|error| format!("--compress-level: {error}")),
        }
    }
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum VerifyChoice {
    None,
    Hash,
    Readback,
}

impl From<VerifyChoice> for Verify {
    fn from(choice: VerifyChoice) -> Self {
        match choice {
            VerifyChoice::None => Self::None,
            VerifyChoice::Hash => Self::Hash,
            VerifyChoice::Readback => Self::Readback,
        }
    }
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum IoChoice {
    Auto,
    Uring,
    Pwrite,
}

impl From<IoChoice> for IoMode {
    fn from(choice: IoChoice) -> Self {
        match choice {
            IoChoice::Auto => Self::Auto,
            IoChoice::Uring => Self::Uring,
            IoChoice::Pwrite => Self::Pwrite,
        }
    }
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum ProgressChoice {
    Auto,
    /// A line now and then
    Plain,
    /// JSON lines
    Json,
    None,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum FormatChoice {
    Table,
    Json,
    /// The new image's id or path alone
    Value,
}

/// `64K`, `1GiB`, `5MB`, `512`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    if text.starts_with('-') {
        return Err("a size cannot be negative".to_owned());
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        other => return Err(format!("unit {other:?} is not known: use K M G T, KiB MiB GiB TiB, or kB MB GB TB")),
    };
    let bad = || format!("{text:?} is no size: write for example 64K, 512M, 1.5G");
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if !number.contains(|c: char| c.is_ascii_digit()) || fraction.contains('.') || fraction.len() > 9 {
        return Err(bad());
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().map_err(|_| bad())? };
    let bytes = whole.checked_mul(factor).ok_or_else(|| format!("{text} is too large"))?;
    if fraction.is_empty() {
        return Ok(bytes);
    }
    let part = fraction.parse::<u128>().map_err(|_| bad())? * u128::from(factor)
        / 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    bytes.checked_add(u64::try_from(part).map_err(|_| bad())?).ok_or_else(|| format!("{text} is too large"))
}

/// 1 to 256: more threads or connections than that help nobody.
pub fn count(text: &str) -> Result<NonZeroUsize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(count) if count.get() <= 256 => Ok(count),
        _ => Err("has to be a number from 1 to 256".to_owned()),
    }
}

pub fn parse_cluster_size(text: &str) -> Result<ClusterBits, String> {
    ClusterBits::from_cluster_bytes(parse_size(text)?).map_err(|error| error.to_string())
}

pub fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// The options that the flags say.
pub fn options(tuning: &Tuning) -> Options {
    let mut options = Options {
        cluster_bits: tuning.cluster_size,
        all_connections: tuning.connections.is_some(),
        io: tuning.io.into(),
        sync: !tuning.no_sync,
        ..Options::default()
    };
    if let Some(connections) = tuning.connections {
        options.connections = connections;
    }
    if let Some(workers) = tuning.workers {
        options.workers = workers;
    }
    if let Some(memory) = tuning.memory {
        options.memory_bytes = memory;
    }
    options.scratch.clone_from(&tuning.scratch);
    if let Some(limit) = tuning.scratch_limit {
        options.scratch_limit_bytes = limit;
    }
    options
}

/// The options that the flags of a conversion say.
///
/// # Errors
/// The text of a usage error.
pub fn job_options(conversion: &ConversionArgs) -> Result<Options, String> {
    let compression = conversion.compress.with_level(conversion.compress_level)?;
    let verify = conversion.verify.map_or(Verify::Hash, Into::into);
    Ok(Options { properties: conversion.property.clone(), compression, verify, ..options(&conversion.tuning) })
}

/// `--os-cloud NAME ` where it was given, for a command to paste.
pub fn chosen_cloud(cloud: &CloudArgs) -> String {
    cloud.os_cloud.as_ref().map(|name| format!("--os-cloud {} ", shell_word(name))).unwrap_or_default()
}

#[derive(Clone, Copy, clap::ValueEnum, PartialEq, Eq)]
pub enum InspectFormat {
    /// For people
    Table,
    /// For programs: sizes in bytes
    Json,
}

/// Is it a disk format that there is?
///
/// # Errors
/// A usage error that lists them.
pub fn check_format(word: &str) -> Result<(), JobError> {
    const FORMATS: [&str; 12] = ["raw", "qcow2", "iso", "vmdk", "vdi", "vhd", "vhdx", "ploop", "gpt", "ami", "ari", "aki"];
    if FORMATS.iter().any(|format| format.eq_ignore_ascii_case(word)) {
        return Ok(());
    }
    Err(JobError::Usage(format!("{} is no disk format; there are: {}", printable(word), FORMATS.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_documented() {
        for (text, bytes) in
            [("512", 512), ("64K", 65536), ("1.5G", 3 << 29), ("2MiB", 2 << 20), ("5kB", 5000), ("1 GB", 1_000_000_000)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1X", "-1", "1..2", "99999999999T", "."] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(parse_cluster_size("48K").is_err());
    }
}
