//! The command line on local files.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use stages::qcow2::Qcow2;

fn virta(folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_virta"))
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("HOME", folder.join("home"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code(), text)
}

#[track_caller]
fn ends(folder: &Path, arguments: &[&str], code: i32, texts: &[&str]) {
    let (found, text) = virta(folder, arguments);
    assert_eq!(found, Some(code), "{arguments:?}: {text}");
    for wanted in texts {
        assert!(text.contains(wanted), "{arguments:?}: no {wanted:?} in {text}");
    }
}

#[test]
fn what_inspect_says_at_most_is_never_less_than_what_convert_makes() {
    let folder = tempfile::tempdir().unwrap();
    let file = fs::File::create(folder.path().join("disk.raw")).unwrap();
    file.set_len(300 << 20).unwrap();
    // clumps of 8 KiB, by turns within a cluster and across two, and one right before a hole's end
    for clump in 0..40_u64 {
        file.write_all_at(&[7; 8 << 10], (clump << 20) + (clump % 2 * (60 << 10))).unwrap();
    }
    file.write_all_at(&[9], (300 << 20) - 1).unwrap();
    let (code, text) = virta(folder.path(), &["inspect", "disk.raw", "-f", "json"]);
    let told: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{code:?} {error}: {text}"));
    let at_most = told["predicted"]["at_most_bytes"].as_u64().unwrap();
    ends(folder.path(), &["convert", "disk.raw", "disk.qcow2", "--progress", "none"], 0, &[]);
    let made = fs::metadata(folder.path().join("disk.qcow2")).unwrap().len();
    assert!((made..made + (512 << 10)).contains(&at_most), "{at_most} said, {made} made");
}

/// 5 MiB with a hole, an odd size.
fn folder_with_disk() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = fs::File::create(folder.path().join("disk.raw")).unwrap();
    file.set_len((5 << 20) + 333).unwrap();
    file.write_all_at(&[7; 100_000], 0).unwrap();
    file.write_all_at(&[9; 333], 5 << 20).unwrap();
    folder
}

fn assert_is_the_disk(folder: &Path, name: &str) {
    let raw = fs::read(folder.join("disk.raw")).unwrap();
    let image = Qcow2::open(fs::File::open(folder.join(name)).unwrap()).unwrap();
    let mut guest = vec![1; usize::try_from(image.virtual_bytes()).unwrap()];
    image.read_guest(0, &mut guest).unwrap();
    assert!(guest[..raw.len()] == *raw);
}

#[test]
fn a_file_becomes_a_qcow2_file_and_nothing_else_changes() {
    let folder = folder_with_disk();
    let place = folder.path();
    ends(
        place,
        &["convert", "disk.raw", "disk.qcow2", "--report", "r.json", "--io", "pwrite"],
        0,
        &["made", "5.0 MiB", "receipt"],
    );
    assert_is_the_disk(place, "disk.qcow2");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(place.join("r.json")).unwrap()).unwrap();
    assert_eq!(report["virtual_bytes"], (5 << 20) + 512);
    assert_eq!(report["image_bytes"], fs::metadata(place.join("disk.qcow2")).unwrap().len());
    assert!(!place.join("disk.qcow2.partial").exists());
    ends(place, &["convert", "disk.raw", "disk.qcow2"], 2, &["exists", "--force"]);
    ends(place, &["convert", "disk.raw", "disk.qcow2", "--force", "--cluster-size", "512", "-f", "value"], 0, &["disk.qcow2"]);
    assert_is_the_disk(place, "disk.qcow2");
}

#[test]
fn the_source_is_never_written_to_whatever_the_destination_is_called() {
    let folder = folder_with_disk();
    let place = folder.path();
    let before = fs::read(place.join("disk.raw")).unwrap();
    fs::hard_link(place.join("disk.raw"), place.join("link")).unwrap();
    std::os::unix::fs::symlink("disk.raw", place.join("symlink")).unwrap();
    fs::hard_link(place.join("disk.raw"), place.join("out.qcow2.partial")).unwrap();
    for destination in ["link", "symlink", "./disk.raw", "out.qcow2", "out.qcow2.partial"] {
        let (code, text) = virta(place, &["convert", "disk.raw", destination, "--force"]);
        assert_eq!(code, Some(2), "{destination}: {text}");
        assert_eq!(fs::read(place.join("disk.raw")).unwrap(), before, "{destination}");
    }
    // somebody else's file that is called like our partial one
    fs::write(place.join("other.qcow2.partial"), "precious").unwrap();
    ends(place, &["convert", "disk.raw", "other.qcow2", "--force"], 2, &["is in the way"]);
    assert_eq!(fs::read(place.join("other.qcow2.partial")).unwrap(), b"precious");
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_to_do() {
    let folder = folder_with_disk();
    let place = folder.path();
    fs::write(place.join("q"), b"QFI\xfb\0\0\0\x03 and so on").unwrap();
    fs::write(place.join("packed.raw"), b"\xfd7zXZ\0 and so on").unwrap();
    fs::write(place.join("empty"), b"").unwrap();
    for (arguments, code, texts) in [
        (&["convert", "disk.raw", "x.vmdk"][..], 2, &["extension .vmdk"][..]),
        (&["convert", "disk.raw", "-", "--verify", "readback"], 2, &["a pipe cannot be read back"]),
        (&["convert", "-", "x.qcow2", "--delete-source"], 2, &["need a new image in Glance"]),
        (&["convert", "disk.raw", "glance:x", "--copy-members", "--to-os-cloud", "b"], 2, &["mean nothing in another"]),
        (&["convert", "-O", "qcow2", "disk.raw", "x.qcow2"], 2, &["virta always makes qcow2"]),
        (&["convert", "-f", "raw", "disk.raw", "x.qcow2"], 2, &["output format"]),
        (&["convert", "disk.raw", "x.qcow2", "--cluster-size", "48K"], 2, &["power of two"]),
        (&["convert", "disk.raw", "x.qcow2", "--memory", "1M"], 2, &["at least 32.0 MiB"]),
        (&["convert", "disk.raw", "x.qcow2", "--connections", "0"], 2, &["connections"]),
        (&["convert", "disk.raw"], 2, &["DESTINATION"]),
        (&["convert", "nowhere.raw", "x.qcow2"], 1, &["there is no file nowhere.raw", "glance:nowhere.raw"]),
        (&["convert", "disk.raw", "x.qcow2", "--report", "disk.raw"], 2, &["is the source or the destination"]),
        (&["convert", "disk.raw", "x.qcow2", "--report", "q"], 2, &["is no report"]),
        (&["convert", "disk.raw", "x.qcow2", "--report", "no/such"], 2, &["cannot be written"]),
        (&["convert", "disk.raw", "x.qcow2", "--workers", "100000"], 2, &["from 1 to 256"]),
        (&["convert", "disk.raw", "newdir/"], 2, &["names a folder"]),
        (&["convert", "disk.raw", ""], 2, &["names a folder"]),
        (&["convert", ".", "x.qcow2"], 1, &["is a folder"]),
        (&["convert", "empty", "x.qcow2"], 1, &["is empty"]),
        (&["convert", "q", "x.qcow2"], 1, &["not a raw disk image but qcow2"]),
        (&["convert", "packed.raw", "x.qcow2"], 1, &["xz -dk packed.raw"]),
        (&["convert", "disk.raw", "no/such/x.qcow2"], 2, &["there is no folder no/such"]),
        (&["convert", "disk.raw", "glance:x"], 2, &["Did you `source` the openrc"]),
        (&["convert", "-c", "disk.raw", "x.qcow2"], 2, &["--compress zlib"]),
        (&["convert", "disk.raw", "x.qcow2", "--scratch-limit", "1G"], 2, &["--scratch"]),
    ] {
        ends(place, arguments, code, texts);
    }
    let left: Vec<_> = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("x.")), "{left:?}");
}

#[test]
fn names_as_long_as_the_file_system_takes_work() {
    let folder = folder_with_disk();
    let name = format!("{}.qcow2", "n".repeat(249));
    ends(folder.path(), &["convert", "disk.raw", &name], 0, &[]);
    assert_is_the_disk(folder.path(), &name);
}

#[test]
fn a_full_disk_is_told_with_its_path_and_leaves_nothing() {
    // a file-size limit fails a write as a full disk does
    let folder = folder_with_disk();
    let script = format!("ulimit -f 64; exec {} convert disk.raw x.qcow2", env!("CARGO_BIN_EXE_virta"));
    let output =
        Command::new("bash").args(["-c", &script]).current_dir(folder.path()).env("HOME", folder.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("writing x.qcow2") && text.contains("write at host offset"), "{text}");
    assert!(!folder.path().join("x.qcow2").exists() && !folder.path().join("x.qcow2.partial").exists());
}

#[test]
fn a_terabyte_of_hole_takes_no_memory_and_no_time_to_speak_of() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    fs::File::create(place.join("hole.raw")).unwrap().set_len(1 << 40).unwrap();
    ends(place, &["convert", "hole.raw", "hole.qcow2", "--report", "r.json"], 0, &["256.0 KiB"]);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(place.join("r.json")).unwrap()).unwrap();
    assert!(report["rss_peak_bytes"].as_u64().unwrap() < 100 << 20, "{report}");
    assert_eq!(report["data_bytes"], 0);
}

/// A pipe that is full, and that nobody reads.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    use std::io::Write;
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

#[test]
fn nobody_who_stands_still_at_stderr_holds_a_conversion_up_or_an_interrupt() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.raw"), vec![7; 1 << 20]).unwrap();
    let virta = |arguments: &[&str], stderr: std::io::PipeWriter| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virta"));
        command.args(arguments).current_dir(folder.path()).env("XDG_STATE_HOME", folder.path().join("state"));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
    };
    let (_reader, stderr) = full_pipe();
    let mut child = virta(&["convert", "disk.raw", "disk.qcow2", "--progress", "json"], stderr);
    assert!(child.wait().unwrap().success());
    assert!(folder.path().join("disk.qcow2").exists());
    // and one that waits for its source: the first interrupt ends it
    let (_reader, stderr) = full_pipe();
    let mut child = virta(&["convert", "-", "piped.qcow2", "--source-size", "1M", "--progress", "json"], stderr);
    let _stdin = child.stdin.take();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!folder.path().join("piped.qcow2").exists());
}

#[test]
fn a_named_pipe_is_no_place_for_a_report() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.raw"), vec![7; 1 << 20]).unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    ends(folder.path(), &["convert", "disk.raw", "x.qcow2", "--report", "fifo"], 2, &["a named pipe"]);
    assert!(!folder.path().join("x.qcow2").exists());
    ends(folder.path(), &["bench", "--no-cloud", "--quick", "--sample", "fifo"], 2, &["no ordinary file"]);
    // what is open already has its reader
    ends(folder.path(), &["convert", "disk.raw", "x.qcow2", "--report", "/dev/stdout"], 0, &[]);
}
