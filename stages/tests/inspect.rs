//! What `virta inspect` finds, against the tools that made it: e2fsprogs, xfsprogs, util-linux, QEMU.
//!
//! Without them the tests say `skipped: …`, and fail where `CI_REQUIRE_TOOLS=1` is set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use stages::{
    inspect::{Inspection, inspect, looking::Limits, partition::TableKind, readiness::Severity},
    read_at::ReadAt,
};

const MIB: u64 = 1 << 20;

/// Are the tools there? Says so if not.
fn tools(names: &[&str]) -> bool {
    let there = |name: &str| {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        path.split(':').any(|folder| Path::new(folder).join(name).exists())
    };
    let Some(missing) = names.iter().find(|name| !there(name)) else { return true };
    assert!(std::env::var("CI_REQUIRE_TOOLS").is_err(), "{missing} is missing");
    println!("skipped: {missing} is missing");
    false
}

fn run(command: &str, arguments: &[&str], input: &str) -> String {
    use std::io::Write;
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let child = Command::new(command)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn empty(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

fn look(path: &Path) -> Inspection {
    inspect(File::open(path).unwrap(), Limits::local(), None, "disk").unwrap()
}

/// A root file system's files; `bad`: with everything that is to be found.
fn root(folder: &Path, bad: bool) {
    let write = |path: &str, text: &str| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("etc/os-release", "NAME=Testix\nPRETTY_NAME=\"Testix 1\"\n");
    write("usr/bin/true", "");
    if bad {
        write("etc/cloud/cloud-init.disabled", "");
        write("etc/cloud/cloud.cfg", "system_info:\n  default_user:\n    name: deploy\n");
        write(
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\ndeploy:x:1000:1000::/home/deploy:/bin/sh\nalice:x:1001:1::/home/alice:/bin/sh\nd:x:1002:1::/:/usr/sbin/nologin\n",
        );
        write("etc/shadow", "root:*:1::::::\nalice:$6$a$b:1::::::\nbob::1::::::\n");
        write("etc/ssh/ssh_host_ed25519_key", "secret");
        write("home/alice/.ssh/authorized_keys", "# mine\nssh-ed25519 AAAA alice\n");
        write("etc/udev/rules.d/70-persistent-net.rules", "SUBSYSTEM==\"net\", NAME=\"eth0\"\n");
        write("etc/sysconfig/network-scripts/ifcfg-eth0", "HWADDR=fa:16:3e:00:00:01\n");
        write("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        write("usr/lib/modules/2.6.32/modules.dep", "kernel/drivers/pci/hotplug/acpiphp.ko:\n");
    } else {
        write("usr/bin/cloud-init", "");
        write("etc/passwd", "root:x:0:0::/root:/bin/sh\nubuntu:x:1000:1000::/home/ubuntu:/bin/sh\n");
        write("etc/shadow", "root:*:1::::::\nubuntu:!:1::::::\n");
        write("etc/ssh/ssh_host_ed25519_key.pub", "public");
        write("etc/udev/rules.d/70-persistent-net.rules", "# nothing\n");
        write("etc/machine-id", "\n");
        write("usr/lib/systemd/systemd-logind", "");
        write("usr/lib/modules/6.1/modules.builtin", "kernel/drivers/pci/hotplug/acpiphp.ko\n");
        write("root/.ssh/authorized_keys", "command=\"echo 'Please login as the user \\\"ubuntu\\\"'\" ssh-ed25519 AAAA\n");
    }
}

/// A GPT disk: BIOS boot, ESP, the root, and `swap` behind it.
fn disk(folder: &Path, bad: bool) -> std::path::PathBuf {
    let path = folder.join("disk.raw");
    empty(&path, 300 * MIB);
    let swap = if bad { "size=40M,type=S\n" } else { "" };
    let table = format!(
        "label: gpt\nsize=2M,type=21686148-6449-6E6F-744E-656564454649\nsize=20M,type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\nsize=200M,type=L,name=root\n{swap}"
    );
    run("sfdisk", &["-q", path.to_str().unwrap()], &table);
    let tree = folder.join("tree");
    root(&tree, bad);
    let at = format!("offset={}", 23 * MIB);
    run("mkfs.ext4", &["-q", "-F", "-L", "rootfs", "-d", tree.to_str().unwrap(), "-E", &at, path.to_str().unwrap(), "200M"], "");
    if bad {
        let swap = folder.join("swap");
        empty(&swap, 40 * MIB);
        run("mkswap", &["-q", "-L", "paging", swap.to_str().unwrap()], "");
        let bytes = fs::read(&swap).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(&bytes, 223 * MIB).unwrap();
    }
    path
}

#[test]
fn a_system_that_is_not_ready_is_told_in_all_points_and_one_that_is_in_none() {
    if !tools(&["sfdisk", "mkfs.ext4", "mkswap"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let found = look(&disk(folder.path(), true));
    let table = found.table.as_ref().unwrap();
    assert_eq!((table.kind, table.partitions.len(), &table.faults), (TableKind::Gpt, 4, &Vec::new()));
    assert_eq!(table.partitions[2].name.as_deref(), Some("root"));
    let kinds: Vec<(&str, Option<&str>)> =
        found.contents.iter().map(|content| (content.filesystem.kind, content.filesystem.label.as_deref())).collect();
    assert_eq!(kinds, [("unknown", None), ("unknown", None), ("ext4", Some("rootfs")), ("swap", Some("paging"))]);
    let system = &found.systems[0];
    assert_eq!((system.place.as_str(), system.system.name.as_deref()), ("partition 3", Some("Testix 1")));
    let mut checks: Vec<&str> = system
        .system
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Finding)
        .map(|finding| finding.check)
        .collect();
    checks.sort_unstable();
    checks.dedup();
    assert_eq!(
        checks,
        [
            "accounts",
            "acpid",
            "acpiphp",
            "authorized-keys",
            "cloud-init-disabled",
            "partitions",
            "passwords",
            "persistent-net",
            "ssh-host-keys"
        ]
    );
    let accounts = system.system.findings.iter().find(|finding| finding.check == "accounts").unwrap();
    assert_eq!(accounts.what, "accounts beyond the usual one: alice", "deploy is cloud-init's own");
    assert!(accounts.mend.as_ref().unwrap().starts_with("virt-sysprep --operations"));
    assert!(found.read_bytes < 4 * MIB, "{}", found.read_bytes);

    let folder = tempfile::tempdir().unwrap();
    let found = look(&disk(folder.path(), false));
    let findings: Vec<_> =
        found.systems[0].system.findings.iter().filter(|finding| finding.severity == Severity::Finding).collect();
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(found.systems[0].system.findings.len(), 2, "two notes: BIOS boot and ESP");
}

#[test]
fn a_qcow2_shows_what_its_raw_disk_shows() {
    if !tools(&["sfdisk", "mkfs.ext4", "mkswap", "qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = disk(folder.path(), true);
    let expected = serde_json::to_value(look(&raw)).unwrap();
    for flags in [&["-c"][..], &[]] {
        let qcow2 = folder.path().join("disk.qcow2");
        let mut arguments = vec!["convert", "-O", "qcow2"];
        arguments.extend(flags);
        arguments.extend([raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
        run("qemu-img", &arguments, "");
        let found = serde_json::to_value(look(&qcow2)).unwrap();
        for part in ["table", "contents", "systems", "virtual_bytes"] {
            assert_eq!(found[part], expected[part], "{part}");
        }
    }
}

#[test]
fn free_and_used_are_what_e2fsprogs_says_and_a_journal_in_use_is_seen() {
    if !tools(&["mkfs.ext4", "dumpe2fs", "debugfs"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for options in [&["-t", "ext2"][..], &["-t", "ext3"], &["-t", "ext4", "-b", "1024"], &["-t", "ext4", "-O", "^64bit,bigalloc"]]
    {
        let path = folder.path().join("fs.raw");
        empty(&path, 64 * MIB);
        let mut arguments = vec!["-q", "-F"];
        arguments.extend(options);
        arguments.push(path.to_str().unwrap());
        run("mkfs.ext4", &arguments, "");
        let told = run("dumpe2fs", &["-h", path.to_str().unwrap()], "");
        let number = |key: &str| -> u64 {
            let line = told.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        let found = look(&path);
        let filesystem = &found.contents[0].filesystem;
        assert_eq!(filesystem.kind, options[1]);
        assert_eq!(filesystem.bytes, Some(number("Block count:") * number("Block size:")));
        assert_eq!(filesystem.free_bytes, Some(number("Free blocks:") * number("Block size:")));
        assert_eq!(filesystem.clean, Some(true));
    }
    let path = folder.path().join("used.raw");
    empty(&path, 64 * MIB);
    run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap()], "");
    run("debugfs", &["-w", "-f", "-", path.to_str().unwrap()], "jo\njw -b 9 /dev/null\njc\n");
    let found = look(&path);
    assert_eq!(found.contents[0].filesystem.clean, Some(false));
    assert!(found.contents[0].filesystem.notes[0].contains("it was in use when the image was made"));
}

#[test]
fn an_xfs_log_is_told_clean_or_not() {
    if !tools(&["mkfs.xfs"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fs.raw");
    empty(&path, 400 * MIB);
    run("mkfs.xfs", &["-q", "-L", "data", path.to_str().unwrap()], "");
    let found = look(&path);
    let filesystem = &found.contents[0].filesystem;
    assert_eq!((filesystem.kind, filesystem.label.as_deref(), filesystem.clean), ("xfs", Some("data"), Some(true)));
    assert!(filesystem.free_bytes.unwrap() > 300 * MIB && filesystem.free_bytes.unwrap() < 400 * MIB);
    assert!(found.not_looked_at[0].contains("xfs, which is not read here"));
    // the unmount record's flag: byte 9 of its first operation, behind the record's header
    let bytes = fs::read(&path).unwrap();
    let record = bytes.windows(4).position(|word| word == [0xfe, 0xed, 0xba, 0xbe]).unwrap();
    assert_eq!(bytes[record + 512 + 9], 0x20);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0], record as u64 + 512 + 9).unwrap();
    assert_eq!(look(&path).contents[0].filesystem.clean, Some(false));
}

#[test]
fn an_image_that_was_cut_off_says_so() {
    if !tools(&["sfdisk", "mkfs.ext4"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), false);
    File::options().write(true).open(&path).unwrap().set_len(100 * MIB).unwrap();
    let found = look(&path);
    let faults = &found.table.as_ref().unwrap().faults;
    assert!(faults.iter().any(|fault| fault.contains("partition 3 passes the end of the disk")), "{faults:?}");
    assert!(faults.iter().any(|fault| fault.contains("the copy of the GPT at the disk's end is not there")), "{faults:?}");
    assert!(found.contents[2].filesystem.notes.iter().any(|note| note.contains("nothing else that it says is believed")));
    assert!(found.systems.is_empty());
}

/// The first 12 KiB of a physical volume that LVM 2.03.16 made (comments and host blanked): two segments of a linear volume, the second before the first.
#[test]
fn a_linear_volume_of_a_real_lvm_is_found() {
    let mut bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lvm2-pv-head.bin")).unwrap();
    bytes.resize(300 << 20, 0);
    // a swap header where the volume begins: extent 10 of 4 MiB behind the first MiB
    let at = 41 << 20;
    bytes[at + 4086..at + 4096].copy_from_slice(b"SWAPSPACE2");
    bytes[at + 1024] = 1;
    bytes[at + 1028..at + 1032].copy_from_slice(&1000_u32.to_le_bytes());
    let found = inspect(bytes, Limits::local(), None, "disk").unwrap();
    let volume = found.contents.iter().find(|content| content.volume.is_some()).unwrap();
    assert_eq!((volume.volume.as_deref(), volume.bytes, volume.filesystem.kind), (Some("vgtest/root"), 120 << 20, "swap"));
}

/// A disk with some bytes that are others.
struct Damaged {
    whole: Arc<Vec<u8>>,
    changes: BTreeMap<u64, u8>,
}

impl ReadAt for Damaged {
    fn len_bytes(&self) -> std::io::Result<u64> {
        self.whole.len_bytes()
    }

    fn read_exact_at(&self, file_offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        ReadAt::read_exact_at(&*self.whole, file_offset, buf)?;
        for (at, byte) in self.changes.range(file_offset..file_offset + buf.len() as u64) {
            buf[usize::try_from(at - file_offset).unwrap()] = *byte;
        }
        Ok(())
    }
}

#[test]
fn damage_anywhere_is_survived() {
    if !tools(&["sfdisk", "mkfs.ext4", "mkswap"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(disk(folder.path(), true)).unwrap();
    // what matters lies in a few places: the table and its copy, the superblock, descriptors, inodes, folders
    let interesting: Vec<usize> = whole
        .chunks(4096)
        .enumerate()
        .filter(|(_, block)| block.iter().any(|byte| *byte != 0))
        .map(|(at, _)| at * 4096)
        .collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let limits = Limits { block_bytes: 4096, bytes: 16 << 20, reads: 100_000, kept_bytes: 16 << 20 };
    let whole = Arc::new(whole);
    let mut changes = BTreeMap::new();
    for round in 0..400 {
        for _ in 0..=random(20) {
            let at = interesting[random(interesting.len())] + random(4096);
            changes.insert(at as u64, [0, 0xff, 0x7f, 0x80, 1][random(5)]);
        }
        let damaged = Damaged { whole: Arc::clone(&whole), changes: changes.clone() };
        let found = inspect(damaged, limits, None, "disk").unwrap();
        assert!(found.read_bytes <= limits.bytes);
        if round % 40 == 39 {
            changes.clear();
        }
    }
}
