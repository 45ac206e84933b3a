//! What is in an image: looked at without converting it, by a few reads where they can be had.
//!
//! ```text
//! format ── (qcow2: guest view) ── partition table ── file system of each ── (LVM: of each linear volume) ── the root's files
//! ```
//! Everything here was written by somebody else: no number is believed before it is compared with what it must fit into, and
//! [`looking::Limits`] end what leads in circles. Nothing is written, mounted or executed.
//!
//! | module | noun |
//! |---|---|
//! | [`mod@format`] | which format, and what Glance will say to it |
//! | [`looking`] | reading a little of something large |
//! | [`partition`] | partition tables, and their faults |
//! | [`filesystem`] | what a partition holds: kind, label, used, free, clean or not |
//! | [`lvm`] | where logical volumes lie |
//! | [`readiness`] | is a Linux system ready to be started many times in a cloud? |

pub mod filesystem;
pub mod format;
pub mod looking;
pub mod lvm;
pub mod partition;
pub mod readiness;

use std::{io, sync::Arc};

use serde::Serialize;

use self::{
    filesystem::Filesystem,
    format::{FormatError, Qcow2Refused, check_qcow2, identify},
    looking::{Disk, Limits, Looking, Part, Scattered},
    partition::{Role, Table, TableKind},
    readiness::System,
};
use crate::{
    magic::DiskFormat,
    qcow2::{Qcow2, Qcow2Error},
    read_at::ReadAt,
};

/// What begins a line about files that were not looked at.
const FILES: &str = "the files:";
/// Logical volumes that are looked into.
const VOLUMES_MAX: usize = 16;

/// What was found in an image.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Its format, as `qemu-img` names it.
    pub format: &'static str,
    /// Length of the file, bytes.
    pub file_bytes: u64,
    /// Size of the disk in it, bytes; `None` where that format is not read here.
    pub virtual_bytes: Option<u64>,
    /// What Glance would refuse, or what should keep anybody from using it.
    pub safety: Vec<String>,
    /// Its partitions; `None` where the format is not read here.
    pub table: Option<Table>,
    /// What they hold.
    pub contents: Vec<Contents>,
    /// Linux systems that were looked into.
    pub systems: Vec<RootSystem>,
    /// What a conversion would make of it.
    pub predicted: Option<Predicted>,
    /// What could not be looked at, and why.
    pub not_looked_at: Vec<String>,
    /// Bytes that were read.
    pub read_bytes: u64,
}

/// A partition, a logical volume, or the whole disk, and what it holds.
#[derive(Clone, Debug, Serialize)]
pub struct Contents {
    /// The partition's number; `None` for the whole disk.
    pub partition: Option<u32>,
    /// `group/volume`.
    pub volume: Option<String>,
    /// First byte in the disk; `None` for a logical volume.
    pub start: Option<u64>,
    /// Its length.
    #[serde(rename = "place_bytes")]
    pub bytes: u64,
    /// What it holds.
    #[serde(flatten)]
    pub filesystem: Filesystem,
}

impl Contents {
    /// Where it is, for people.
    #[must_use]
    pub fn place(&self) -> String {
        match (&self.volume, self.partition) {
            (Some(volume), _) => volume.clone(),
            (None, Some(number)) => format!("partition {number}"),
            (None, None) => "the whole disk".to_owned(),
        }
    }
}

/// A Linux system, and where it is.
#[derive(Clone, Debug, Serialize)]
pub struct RootSystem {
    /// Where.
    pub place: String,
    /// What was found.
    #[serde(flatten)]
    pub system: System,
}

/// What a conversion to an uncompressed qcow2 would make, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Predicted {
    /// At most, everything taken over: what is zero is only known when it was read.
    pub at_most_bytes: u64,
    /// At most, without what file systems say is free; space between partitions is not counted. `None` where no file system says anything.
    pub without_free_bytes: Option<u64>,
}

/// Why nothing can be told at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The bytes.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The image.
    #[error("reading the image")]
    Io(#[from] io::Error),
}

/// The disk that a qcow2 image shows a guest.
struct GuestView<R>(Qcow2<R>);

impl<R: ReadAt> ReadAt for GuestView<R> {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.virtual_bytes())
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_guest(file_offset, buf).map_err(|error| io::Error::other(crate::text::causes(&error)))
    }
}

/// Looks into an image. `allocated_bytes`: what a sparse local file takes, where that is known.
///
/// # Errors
/// [`InspectError`] only where nothing can be told; all else is part of what is found. Blocks; run it on a thread of its own.
pub fn inspect(
    source: impl ReadAt + Send + Sync + 'static,
    limits: Limits,
    allocated_bytes: Option<u64>,
    shown: &str,
) -> Result<Inspection, InspectError> {
    let source = Arc::new(source);
    let file = Arc::new(Looking::new(Arc::clone(&source), limits)?);
    let identified = identify(&file)?;
    let mut found = Inspection {
        format: identified.format.name(),
        file_bytes: identified.file_bytes,
        virtual_bytes: None,
        safety: Vec::new(),
        table: None,
        contents: Vec::new(),
        systems: Vec::new(),
        predicted: None,
        not_looked_at: Vec::new(),
        read_bytes: 0,
    };
    let disk: Option<Disk> = match identified.format {
        DiskFormat::Raw => {
            if let Some(fault) = identified.boot_fault {
                found.safety.push(format!("Glance refuses these bytes as raw: {fault}; as qcow2 they are taken"));
            }
            Some(Arc::clone(&file) as Disk)
        }
        DiskFormat::Qcow2 => guest_view(&file, limits),
        other => {
            found.not_looked_at.push(format!("what is in it: {}", other.advice(shown)));
            None
        }
    };
    if identified.format == DiskFormat::Qcow2 {
        found.read_bytes = check_tables(source, &mut found, limits, shown)?;
    }
    if let Some(disk) = disk {
        let virtual_bytes = disk.len_bytes()?;
        found.virtual_bytes = Some(virtual_bytes);
        look_into(&disk, virtual_bytes, &mut found);
        if found.systems.is_empty() && !found.not_looked_at.iter().any(|text| text.starts_with(FILES)) {
            found
                .not_looked_at
                .push(format!("{FILES} cloud-readiness: no root of a Linux system was found on an ext4 file system"));
        }
        found.predicted = Some(predict(&found, virtual_bytes, allocated_bytes.filter(|_| identified.format == DiskFormat::Raw)));
    }
    found.read_bytes += file.read_bytes();
    // commands that can be pasted, where there is a file that they can be about
    if !shown.starts_with("glance:") {
        let mends =
            found.systems.iter_mut().flat_map(|system| &mut system.system.findings).filter_map(|finding| finding.mend.as_mut());
        mends.for_each(|mend| *mend = mend.replace("-a IMAGE", &format!("-a {shown}")));
    }
    Ok(found)
}

/// The disk in a qcow2; `None` where it cannot be opened: the check of its tables says why.
fn guest_view<R: ReadAt + Send + Sync + 'static>(file: &Arc<Looking<R>>, limits: Limits) -> Option<Disk> {
    let open = Qcow2::open(Arc::clone(file)).ok()?;
    let view = Looking::new(GuestView(open), Limits { block_bytes: 64 << 10, ..limits });
    view.ok().map(|view| Arc::new(view) as Disk)
}

/// Reads all tables of a qcow2, with a budget of its own: there may be many of them. Returns how much was read.
fn check_tables(source: impl ReadAt, found: &mut Inspection, limits: Limits, shown: &str) -> Result<u64, InspectError> {
    let file = Arc::new(Looking::new(source, limits)?);
    match check_qcow2(Arc::clone(&file), shown) {
        Ok(facts) => {
            if facts.header.snapshots > 0 {
                found.safety.push(format!("it has {} internal snapshots, which go wherever it goes", facts.header.snapshots));
            }
        }
        // what cannot be read is not damaged
        Err(Qcow2Refused { source: Some(Qcow2Error::Io { source, .. }), .. }) => {
            found.not_looked_at.push(format!("whether all of the qcow2 is there: {source}"));
        }
        Err(error) => found.safety.push(crate::text::causes(&error)),
    }
    Ok(file.read_bytes())
}

fn look_into(disk: &Disk, virtual_bytes: u64, found: &mut Inspection) {
    let table = partition::read(&**disk);
    let whole = table.kind == TableKind::None;
    let places: Vec<(Option<u32>, u64, u64)> = match whole {
        true => vec![(None, 0, virtual_bytes)],
        false => table
            .partitions
            .iter()
            .filter(|partition| partition.role != Role::Extended && partition.start < virtual_bytes)
            .map(|partition| (Some(partition.number), partition.start, partition.bytes.min(virtual_bytes - partition.start)))
            .collect(),
    };
    for (number, start, bytes) in places {
        let place = Scattered::new(disk, vec![(start, bytes)]);
        let Some(content) = content(&place, number, None, Some(start), bytes) else { continue };
        let is_lvm = content.filesystem.kind == "lvm2";
        root(&place, &content, &table, number, found);
        found.contents.push(content);
        if is_lvm {
            volumes(disk, &place, number, start, &table, found);
        }
    }
    found.table = Some(table);
}

fn content(
    place: &Scattered,
    partition: Option<u32>,
    volume: Option<String>,
    start: Option<u64>,
    bytes: u64,
) -> Option<Contents> {
    let part = Part::new(place, 0, bytes).ok()?;
    Some(Contents { partition, volume, start, bytes, filesystem: filesystem::detect(&part) })
}

fn volumes(disk: &Disk, place: &Scattered, number: Option<u32>, start: u64, table: &Table, found: &mut Inspection) {
    let read = Part::new(place, 0, u64::MAX).map_err(|error| error.to_string()).and_then(|part| lvm::read(&part));
    let group = match read {
        Ok(group) => group,
        Err(why) => return found.not_looked_at.push(format!("the volumes of LVM in partition {}: {why}", number.unwrap_or(0))),
    };
    for volume in group.volumes.into_iter().take(VOLUMES_MAX) {
        let name = format!("{}/{}", group.name, volume.name);
        let Some(segments) = volume.segments else {
            found.not_looked_at.push(format!("{name}: it is not linear, or partly on another disk"));
            continue;
        };
        let segments = segments.into_iter().filter_map(|(from, bytes)| Some((start.checked_add(from)?, bytes))).collect();
        let place = Scattered::new(disk, segments);
        let Some(content) = content(&place, number, Some(name), None, volume.bytes) else { continue };
        root(&place, &content, table, None, found);
        found.contents.push(content);
    }
}

/// Looks into the files of an ext4 file system, if it is a system's root.
fn root(place: &Scattered, content: &Contents, table: &Table, number: Option<u32>, found: &mut Inspection) {
    match content.filesystem.kind {
        "ext2" | "ext3" | "ext4" => {}
        "xfs" | "btrfs" => {
            let kind = content.filesystem.kind;
            return found.not_looked_at.push(format!(
                "{FILES} {} is {kind}, which is not read here, so nothing is said of cloud-init, keys and accounts",
                content.place()
            ));
        }
        _ => return,
    }
    let looked = Part::new(place, 0, u64::MAX)
        .map_err(|error| error.to_string())
        .and_then(|part| readiness::look(&part, place.clone(), table, number));
    match looked {
        Ok(Some(system)) => found.systems.push(RootSystem { place: content.place(), system }),
        Ok(None) => {}
        Err(why) => found.not_looked_at.push(format!("{FILES} {}: {why}", content.place())),
    }
}

/// What a qcow2 with 64 KiB clusters needs beside `data` bytes of clusters: header, L1, L2 tables, refcounts.
fn with_tables(data_bytes: u64, virtual_bytes: u64) -> u64 {
    let clusters = virtual_bytes.div_ceil(64 << 10);
    let l2 = clusters.div_ceil(8192) << 16;
    data_bytes.saturating_add(l2).saturating_add((clusters / 32_768) << 16).saturating_add(4 << 16)
}

fn predict(found: &Inspection, virtual_bytes: u64, allocated_bytes: Option<u64>) -> Predicted {
    let at_most = allocated_bytes.unwrap_or(virtual_bytes).min(virtual_bytes);
    let mut known = false;
    let mut used = 0_u64;
    for content in &found.contents {
        let filesystem = &content.filesystem;
        // a physical volume's bytes are counted with its volumes
        if filesystem.kind == "lvm2" && found.contents.iter().any(|other| other.volume.is_some()) {
            continue;
        }
        known |= filesystem.free_bytes.is_some();
        used = used.saturating_add(match filesystem.kind {
            "empty" => 0,
            "swap" if filesystem.free_bytes.is_some() => 64 << 10,
            _ => filesystem.used_bytes().unwrap_or(content.bytes),
        });
    }
    Predicted {
        at_most_bytes: with_tables(at_most, virtual_bytes),
        without_free_bytes: known.then(|| with_tables(used.min(at_most), virtual_bytes)),
    }
}
