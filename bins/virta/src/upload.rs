//! `virta upload`.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::Args;
use engine::CancelToken;
use stages::{
    convert::{
        Job, Options, Source,
        as_is::{self, Opened, Upload, UploadReport, retry_as_is},
    },
    disk::SourceError,
    error::JobError,
    inspect::format::{Identified, check_qcow2, identify},
    magic::DiskFormat,
    openstack::{Session, config::Environment},
    progress::Progress,
    reporter::Reporter,
    retry::Patience,
    text::{causes, printable, shell_word, size},
};

use crate::{
    conclusion::{Outcome, conclude, into_glance},
    display::Display,
    exit,
    flags::{CloudArgs, ConversionArgs, FormatChoice, OutputArgs, check_format, job_options},
    in_cloud::{check_free, warn_without_record},
    leftovers, receipt,
    report_file::write_report,
    runs::Run,
    sign_in::sign_in,
    signals::watch_signals,
};

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct UploadArgs {
    /// The file
    #[arg(value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// What the image will be called
    pub name: String,
    /// What you think it is: an error if its bytes say otherwise (raw, qcow2, iso, vmdk, vdi, vhd, vhdx)
    #[arg(long, value_name = "FORMAT")]
    pub disk_format: Option<String>,
    /// Send a raw disk as it is, instead of making a qcow2 of it on the way
    #[arg(long)]
    pub keep_format: bool,
    /// Send even a format that most clouds cannot boot (VMDK, VDI, VHD, packed files), as it is
    #[arg(long)]
    pub as_is: bool,
    /// Property `description`, which lists show
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// What every image is that is made here
    #[arg(long, hide = true)]
    pub private: bool,
    /// Ordinary users may not: see the error for what to do instead
    #[arg(long)]
    pub public: bool,
    /// Make a second image of a name that is taken
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub conversion: ConversionArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A disk is a whole number of these.
const SECTOR_BYTES: u64 = 512;

const EXAMPLES: &str = "\
The format is found from the file's bytes, never from its name. A raw disk becomes a compact qcow2 on its way, with nothing written to disk;
qcow2 and ISO are sent as they are, after everything was checked that Glance would refuse only after the last byte, and what it would take and \
no server could boot from: a qcow2 that was cut short. The image is private, and min_disk follows from the disk's size.
Flags about compression, memory and the like are for raw disks.
Examples:
  virta upload disk.raw my-server
      a raw disk, which becomes a qcow2 image
  virta upload --description 'Debian 13 with our tools' debian.qcow2 debian-tools
      a finished qcow2
  virta upload alpine-virt.iso alpine
      an installation medium
What comes through a pipe: ssh host 'dd if=/dev/vda' | virta convert - glance:NAME --source-size SIZE

Exit status: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 130 interrupted.";

/// Runs the command.
pub async fn run(arguments: UploadArgs) -> ExitCode {
    let run = Run::begin(&arguments.file.display().to_string(), &format!("glance:{}", arguments.name));
    let progress = Progress::default();
    let display = Display::start(arguments.output.progress, &progress, run.clone());
    let cancel = CancelToken::new();
    watch_signals(&cancel, display.held());
    warn_without_record(&run, &display);
    let result = upload(&arguments, &progress, &display, &run, &cancel).await;
    display.finish().await;
    match &result {
        Ok(_) => run.end(0, &format!("made image {}", printable(&arguments.name))),
        Err(error) => run.end_with(error.exit_code(), &printable(&causes(error)), error.leaves_an_image()),
    }
    match result {
        Ok(Made::AsIs(report)) => tell(*report, &arguments, &display),
        Ok(Made::Converted(outcome)) => conclude(Ok(outcome), &display, &arguments.output, true, false),
        Err(error) => conclude(Err(error), &display, &arguments.output, true, false),
    }
}

enum Made {
    AsIs(Box<UploadReport>),
    Converted(Outcome),
}

async fn upload(
    arguments: &UploadArgs,
    progress: &Progress,
    display: &Display,
    run: &Run,
    cancel: &CancelToken,
) -> Result<Made, JobError> {
    if arguments.public {
        return Err(JobError::Usage(
            "--public: only administrators may make images public. To let other projects use one: virta share IMAGE PROJECT; to let everybody who \
             knows its id: openstack image set --community IMAGE"
                .to_owned(),
        ));
    }
    let options = job_options(&arguments.conversion).map_err(JobError::Usage)?;
    if name_of(arguments).is_empty() || name_of(arguments).chars().count() > 255 {
        return Err(JobError::Usage("the image needs a name of 1 to 255 characters".to_owned()));
    }
    if !arguments.file.exists() {
        return Err(JobError::Usage(format!("there is no file {}", printable(&arguments.file.display().to_string()))));
    }
    let what = look(arguments)?;
    if let (What::AsIs { .. }, Some(flag)) = (&what, arguments.conversion.first_given()) {
        return Err(JobError::Usage(format!(
            "{flag} is about raw disks that become qcow2 on their way, and this file is sent as it is. To compact a qcow2: qemu-img convert -c -O qcow2"
        )));
    }
    let signing_in = async {
        let session = sign_in("cloud", &arguments.cloud, &Environment::current(), display, cancel).await?;
        run.in_cloud(&session);
        leftovers::clean_up_before(&session, display, cancel).await?;
        Ok::<_, JobError>(session)
    };
    let session = cancel.guard(signing_in).await.unwrap_or_else(|_| Err(JobError::interrupted()))?;
    match what {
        What::Convert => {
            let properties = properties(arguments);
            let options = Options { properties, force: arguments.force, run: display.this_run(), ..options };
            let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
            let job = Job::new(Source::local(&arguments.file)?, options, progress, &reporter, cancel);
            Ok(Made::Converted(into_glance(&job, &session, name_of(arguments)).await?))
        }
        What::AsIs { opened, disk_format, virtual_bytes } => {
            send(arguments, &session, opened, disk_format, virtual_bytes, progress, display, cancel).await
        }
    }
}

/// The image's name, which some write as they do elsewhere: `glance:NAME`.
fn name_of(arguments: &UploadArgs) -> &str {
    arguments.name.strip_prefix("glance:").unwrap_or(&arguments.name)
}

/// What is to be done with a file.
enum What {
    /// A raw disk becomes a qcow2.
    Convert,
    /// It is sent as it is.
    AsIs { opened: Opened, disk_format: String, virtual_bytes: u64 },
}

/// Looks into the file, and refuses what Glance would refuse, or what no server would boot from.
fn look(arguments: &UploadArgs) -> Result<What, JobError> {
    let path = &arguments.file;
    let shown = shell_word(&printable(&path.display().to_string()));
    let kind = std::fs::metadata(path).map_err(|source| SourceError::Io { action: "look at", path: shown.clone(), source })?;
    if !kind.is_file() {
        return Err(JobError::Usage(format!(
            "{shown} is no regular file: what comes from a device or a pipe is sent with virta convert"
        )));
    }
    // what is looked into is what is sent, whatever the name leads to by then
    let opened = Opened::open(path)?;
    let file = opened.file();
    let Identified { format, file_bytes, boot_fault, .. } =
        identify(&file).map_err(|error| JobError::Refused(format!("{shown}: {}", causes(&error))))?;
    if let Some(wanted) = &arguments.disk_format {
        check_format(wanted)?;
        let known = format.glance_name().unwrap_or(format.name());
        let packed_as_is = arguments.as_is && format.is_packed();
        if !wanted.eq_ignore_ascii_case(known) && !packed_as_is {
            return Err(JobError::Usage(format!(
                "{shown} is {known} by its bytes, not {}: leave --disk-format out, or look whether it is the right file",
                printable(wanted)
            )));
        }
    }
    let as_is = |virtual_bytes| What::AsIs {
        opened: opened.clone(),
        disk_format: format.glance_name().unwrap_or("raw").to_owned(),
        virtual_bytes,
    };
    match format {
        DiskFormat::Raw if !arguments.as_is && file_bytes % SECTOR_BYTES != 0 => Err(JobError::Refused(format!(
            "{shown} is no disk: its {file_bytes} bytes are no whole number of sectors of {SECTOR_BYTES}, and no image format is known by them. To send \
             it as it is all the same: {}",
            retry_as_is(path, &arguments.name)
        ))),
        DiskFormat::Raw if !arguments.keep_format && !arguments.as_is => Ok(What::Convert),
        DiskFormat::Raw | DiskFormat::Luks => match boot_fault {
            Some(fault) if !arguments.as_is => Err(JobError::Refused(format!(
                "Glance refuses this disk as raw after its last byte: {fault}. Without --keep-format it becomes a qcow2, which is taken"
            ))),
            _ => Ok(as_is(file_bytes)),
        },
        DiskFormat::Qcow2 => {
            let facts = check_qcow2(&file, &shown).map_err(|error| JobError::Refused(format!("{shown}: {}", causes(&error))))?;
            Ok(as_is(facts.header.virtual_bytes))
        }
        DiskFormat::Iso => Ok(as_is(file_bytes)),
        _ if arguments.as_is => Ok(as_is(0)),
        other => Err(JobError::Refused(format!(
            "{shown} is {other}, of which most clouds boot nothing: {}. To send it as it is all the same: {}",
            other.advice(&printable(&path.display().to_string())),
            retry_as_is(path, &arguments.name)
        ))),
    }
}

fn properties(arguments: &UploadArgs) -> Vec<(String, String)> {
    let mut properties = arguments.conversion.property.clone();
    properties.extend(arguments.description.iter().map(|text| ("description".to_owned(), text.clone())));
    properties
}

#[allow(clippy::too_many_arguments)] // all of one run
async fn send(
    arguments: &UploadArgs,
    session: &Session,
    opened: Opened,
    disk_format: String,
    virtual_bytes: u64,
    progress: &Progress,
    display: &Display,
    cancel: &CancelToken,
) -> Result<Made, JobError> {
    cancel
        .guard(check_free(session, name_of(arguments), arguments.force))
        .await
        .unwrap_or_else(|_| Err(JobError::interrupted()))?;
    display.note(&format!(
        "source: {}, {} {disk_format}; destination: new image {}, as it is",
        printable(&arguments.file.display().to_string()),
        size(std::fs::metadata(&arguments.file).map_or(0, |metadata| metadata.len())),
        printable(&arguments.name)
    ));
    let upload = Upload {
        opened,
        name: name_of(arguments).to_owned(),
        disk_format,
        virtual_bytes,
        properties: properties(arguments),
        run: display.this_run(),
        patience: Patience::default(),
    };
    let reporter: Arc<dyn Reporter> = Arc::new(display.clone());
    Ok(Made::AsIs(Box::new(as_is::as_is(session, &upload, progress, &reporter, cancel).await?)))
}

/// What was sent, and what is proven of it.
fn tell(mut report: UploadReport, arguments: &UploadArgs, display: &Display) -> ExitCode {
    report.warnings = display.warnings();
    let proven = match (&report.image_hash.algorithm, report.image_hash.checked) {
        (Some(algorithm), true) => format!("proven: size and {algorithm} of the new image in Glance are those of the file"),
        _ => "proven: the new image's size in Glance; not proven: its content, for Glance computed no hash of it".to_owned(),
    };
    let json = serde_json::to_string_pretty(&report).unwrap_or_default();
    let receipt = receipt::write_told(&serde_json::json!({ "proven": [proven], "report": report }));
    let printed = match arguments.output.format {
        FormatChoice::Table => exit::print(&format!(
            "made {}: {} {}, as it is; {:.1} s\n{proven}{}",
            printable(&report.destination),
            size(report.image_bytes),
            report.disk_format,
            report.elapsed_s,
            receipt.as_ref().map(|path| format!("\nreceipt: {}", path.display())).unwrap_or_default()
        )),
        FormatChoice::Json => exit::print(&json),
        FormatChoice::Value => exit::print(printable(&report.destination).trim_start_matches("glance:")),
    };
    if let Err(error) = receipt {
        exit::say(&format!("virta: the image is made, but its receipt could not be written: {error}"));
    }
    if let Some(path) = &arguments.output.report
        && let Err(error) = write_report(path, &json)
    {
        exit::say(&format!("virta: the image is made, but its report could not be written to {}: {error}", path.display()));
        return ExitCode::from(1);
    }
    if !printed {
        exit::say(&format!("virta: made {}, but that could not be written to stdout", printable(&report.destination)));
        return ExitCode::from(1);
    }
    ExitCode::SUCCESS
}
