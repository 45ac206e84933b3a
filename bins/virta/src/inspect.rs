//! `virta inspect`.

use std::{fs::File, io, os::unix::fs::FileTypeExt, process::ExitCode};

use clap::Args;
use engine::CancelToken;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use stages::{
    error::JobError,
    inspect::{Inspection, looking::Limits, partition::TableKind, readiness::Severity},
    openstack::config::Environment,
    progress::Progress,
    read_at::ReadAt,
    text::{printable, shell_word, size},
};

use crate::{
    display::Display,
    exit,
    flags::{CloudArgs, InspectFormat, ProgressChoice},
    image_names::path_or_image,
    location::End,
    look_inside::{in_glance, on_a_thread},
    runs::Run,
    sign_in::sign_in,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_long_help = "\
Of an image in Glance whose store serves ranges, a few MiB are read, however large it is; where it does not, the first 16 MiB. Nothing is written, mounted or \
executed. Raw and qcow2 are looked into; of other formats only the format is told.
Cloud-readiness is looked for in the files of Linux roots on ext4: what CSC's documentation of Pouta tells to look after before an image is used for more servers, \
or shared. Each finding names the file and what mends it. virt-sysprep and virt-customize come with guestfs-tools.
Examples:
  virta inspect glance:my-snapshot
  virta inspect --strict my-server.qcow2 && virta upload my-server.qcow2 my-server

Exit status: 0 whatever it finds (1 with --strict if there are findings), 1 failed, 2 wrong usage.")]
pub struct InspectArgs {
    /// What to look into: a path, or glance:IMAGE
    #[arg(add = path_or_image())]
    pub source: String,
    /// Exit with 1 if there are findings or faults
    #[arg(long)]
    pub strict: bool,
    /// What is printed on stdout
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "table")]
    pub format: InspectFormat,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

/// Runs the command.
pub async fn run(arguments: InspectArgs) -> ExitCode {
    let progress = Progress::default();
    let display = Display::start(ProgressChoice::Auto, &progress, Run::default());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    let result = look(&arguments, &progress, &display, &cancel).await;
    display.finish().await;
    let found = match result {
        Ok(found) => found,
        Err(error) => return exit::failure(&error, error.exit_code()),
    };
    let written = match arguments.format {
        InspectFormat::Json => exit::show(&serde_json::to_string_pretty(&found).unwrap_or_default()),
        InspectFormat::Table => exit::show(&text(&found)),
    };
    if !written {
        return exit::shown(false);
    }
    ExitCode::from(u8::from(arguments.strict && is_faulty(&found)))
}

fn is_faulty(found: &Inspection) -> bool {
    let findings = found.systems.iter().flat_map(|system| &system.system.findings);
    !found.safety.is_empty()
        || found.table.as_ref().is_some_and(|table| !table.faults.is_empty())
        || findings.into_iter().any(|finding| finding.severity == Severity::Finding)
}

async fn look(
    arguments: &InspectArgs,
    progress: &Progress,
    display: &Display,
    cancel: &CancelToken,
) -> Result<Inspection, JobError> {
    match End::parse(&arguments.source) {
        End::Stdio => {
            Err(JobError::Usage("what comes through a pipe cannot be looked at here and there: give a file".to_owned()))
        }
        End::Path(path) => match Local::open(&path) {
            Ok(local) => {
                let (allocated, shown) = (local.allocated, shell_word(&printable(&path)));
                on_a_thread(local, Limits::local(), allocated, shown, cancel).await
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (shown, word) = (printable(&path), shell_word(&printable(&path)));
                Err(JobError::Usage(format!("there is no file {shown}; an image in Glance is written glance:{word}")))
            }
            Err(error) => Err(JobError::Refused(format!("opening {}: {error}", printable(&path)))),
        },
        End::Glance(name) => {
            let looking = async {
                let session = sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?;
                let image = session.find_image(&name).await?;
                Ok::<_, JobError>((session, image))
            };
            let (session, image) = cancel.guard(looking).await.unwrap_or_else(|_| Err(JobError::interrupted()))?;
            in_glance(&session, &image, progress, cancel).await
        }
    }
}

/// Bytes of the qcow2's clusters (64 KiB) that are not all within holes of a file; `None` where the file system does not tell.
fn cluster_bytes_with_data(file: &File, bytes: u64) -> Option<u64> {
    const CLUSTER: u64 = 64 << 10;
    let (mut at, mut counted_to, mut sum) = (0, 0, 0_u64);
    while at < bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        at = seek(file, SeekFrom::Hole(start)).ok()?.min(bytes);
        let end = at.next_multiple_of(CLUSTER);
        sum += end - (start / CLUSTER * CLUSTER).max(counted_to).min(end);
        counted_to = end;
    }
    Some(sum)
}

/// A local file or block device.
struct Local {
    file: File,
    bytes: u64,
    allocated: Option<u64>,
}

impl Local {
    fn open(path: &str) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("it is no file and no block device"));
        }
        let file = File::open(path)?;
        let bytes = if kind.is_file() { metadata.len() } else { seek(&file, SeekFrom::End(0))? };
        let allocated = kind.is_file().then(|| cluster_bytes_with_data(&file, bytes)).flatten();
        Ok(Self { file, bytes, allocated })
    }
}

impl ReadAt for Local {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        ReadAt::read_exact_at(&self.file, file_offset, buf)
    }
}

/// What was found, for people.
pub fn text(found: &Inspection) -> String {
    let mut lines = Vec::new();
    let disk = match found.virtual_bytes {
        Some(bytes) if bytes != found.file_bytes => format!(", a disk of {}", size(bytes)),
        _ => String::new(),
    };
    lines.push(format!("format: {}, {}{disk}", found.format, size(found.file_bytes)));
    lines.extend(found.safety.iter().map(|text| format!("  ! {text}")));
    if let Some(table) = &found.table {
        lines.push(match table.kind {
            TableKind::None => "partitions: none".to_owned(),
            TableKind::Mbr => format!("partitions: MBR, {}", table.partitions.len()),
            TableKind::Gpt => format!("partitions: GPT, {}", table.partitions.len()),
        });
        lines.extend(table.faults.iter().map(|text| format!("  ! {text}")));
    }
    for content in &found.contents {
        let filesystem = &content.filesystem;
        let label = filesystem.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
        let used = match (filesystem.used_bytes(), filesystem.free_bytes) {
            (Some(used), Some(free)) => format!(", {} used, {} free", size(used), size(free)),
            _ => String::new(),
        };
        let clean = match filesystem.clean {
            Some(true) => ", clean",
            Some(false) => ", not clean",
            None => "",
        };
        lines.push(format!("  {}: {} {}{label}{used}{clean}", content.place(), size(content.bytes), filesystem.kind));
        lines.extend(filesystem.notes.iter().map(|text| format!("    {text}")));
    }
    if let Some(predicted) = found.predicted.filter(|_| found.format != "qcow2") {
        let less = predicted.without_free_bytes.filter(|bytes| *bytes < predicted.at_most_bytes);
        let without = less.map(|bytes| format!("; what its file systems use is {}", size(bytes))).unwrap_or_default();
        lines.push(format!(
            "as qcow2, uncompressed: at most {}, less by whatever is zero{without}",
            size(predicted.at_most_bytes)
        ));
    }
    for system in &found.systems {
        let name = system.system.name.as_deref().unwrap_or("a Linux system");
        let (findings, notes): (Vec<_>, Vec<_>) =
            system.system.findings.iter().partition(|finding| finding.severity == Severity::Finding);
        lines.push(format!(
            "{name}, in {}: {}",
            system.place,
            if findings.is_empty() { "nothing to mend".to_owned() } else { crate::image::counted(findings.len(), "finding") }
        ));
        for finding in findings.iter().chain(&notes) {
            let mark = if finding.severity == Severity::Finding { "!" } else { "-" };
            let file = finding.file.as_ref().map(|file| format!(" [{file}]")).unwrap_or_default();
            lines.push(format!("  {mark} {}{file}", finding.what));
            lines.extend(finding.mend.as_ref().map(|mend| format!("      {mend}")));
        }
    }
    lines.extend(found.not_looked_at.iter().map(|text| format!("not looked at: {text}")));
    lines.push(format!("read: {} of {}", size(found.read_bytes), size(found.file_bytes)));
    lines.join("\n")
}
