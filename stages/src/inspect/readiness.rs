//! Is a Linux system ready to be started many times in a cloud? What CSC's documentation tells users to look after, looked for in the files of its root file
//! system.
//!
//! Files are read through the `ext4-view` crate, which replays a journal in memory and forbids unsafe code. For XFS there was no such crate (2026-11-24: `xfs-core` 0.1 reads
//! superblocks and inodes, no directories), so an XFS root is named and not looked into.

use ext4_view::{Ext4, Ext4Read};
use serde::Serialize;

use super::{
    filesystem::ext_super,
    looking::Part,
    partition::{Role, Table},
};
use crate::{
    read_at::ReadAt,
    text::{printable, shell_word},
};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Groups of a file system that is looked into: 128 TiB with the usual 128 MiB each.
const GROUPS_MAX: u64 = 1 << 20;
/// Accounts that are named.
const LISTED_MAX: usize = 50;
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 4096;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Note,
    /// To be mended before others use the image.
    Finding,
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// A short name, for programs.
    pub check: &'static str,
    /// What is the matter.
    pub what: String,
    /// The file that shows it.
    pub file: Option<String>,
    /// What mends it.
    pub mend: Option<String>,
}

/// A system that was looked into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct System {
    /// `Debian GNU/Linux 12 (bookworm)`.
    pub name: Option<String>,
    /// What was found.
    pub findings: Vec<Finding>,
}

struct Reader<R>(R);

impl<R: ReadAt> Ext4Read for Reader<R> {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.0.read_exact_at(start_byte, dst)?)
    }
}

/// The root file system's files.
struct Files {
    fs: Ext4,
}

impl Files {
    fn read(&self, path: &str) -> Option<String> {
        let metadata = self.fs.metadata(path).ok()?;
        if metadata.is_dir() || metadata.len() > FILE_BYTES_MAX {
            return None;
        }
        self.fs.read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn has(&self, path: &str) -> bool {
        self.fs.exists(path).unwrap_or(false) || self.fs.symlink_metadata(path).is_ok()
    }

    fn any<'a>(&self, paths: &[&'a str]) -> Option<&'a str> {
        paths.iter().copied().find(|path| self.has(path))
    }

    fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = self.fs.read_dir(path) else { return Vec::new() };
        // the first error ends it: behind it may be nothing but more of them
        let names = entries
            .take(ENTRIES_MAX)
            .map_while(Result::ok)
            .filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned));
        names.filter(|name| name != "." && name != "..").collect()
    }
}

/// Looks into a file system; `Ok(None)` for one that is no system's root.
///
/// # Errors
/// Why it cannot be looked into.
pub fn look(
    part: &Part<'_>,
    reader: impl ReadAt + 'static,
    table: &Table,
    number: Option<u32>,
) -> Result<Option<System>, String> {
    let superblock = ext_super(part).ok_or("there is no ext4 superblock")?;
    if superblock.groups > GROUPS_MAX || superblock.blocks.saturating_mul(superblock.block_bytes) > part.len_bytes().unwrap_or(0)
    {
        return Err("its superblock claims more than its partition has".to_owned());
    }
    let fs = Ext4::load(Box::new(Reader(reader))).map_err(|error| printable(&error.to_string()))?;
    let files = Files { fs };
    if !(files.has("/etc/passwd") || files.has("/etc/os-release") || (files.has("/etc") && files.has("/usr"))) {
        return Ok(None);
    }
    let release = files.read("/etc/os-release").or_else(|| files.read("/usr/lib/os-release"));
    let name = release.as_deref().and_then(|text| setting(text, "PRETTY_NAME")).map(|name| printable(&name));
    let mut findings = Vec::new();
    cloud_init(&files, &mut findings);
    ssh(&files, &mut findings);
    accounts(&files, &mut findings);
    network(&files, &mut findings);
    identity(&files, &mut findings);
    power(&files, &mut findings);
    hotplug(&files, &mut findings);
    partitions(table, number, &mut findings);
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok(Some(System { name, findings }))
}

/// `KEY="value"` out of a shell-like file.
fn setting(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.trim_start().strip_prefix('='))?;
    Some(line.trim().trim_matches(['"', '\'']).to_owned())
}

fn sysprep(operations: &str) -> Option<String> {
    Some(format!("virt-sysprep --operations {operations} -a IMAGE"))
}

fn finding(check: &'static str, what: impl Into<String>, file: impl Into<String>, mend: Option<String>) -> Finding {
    Finding { severity: Severity::Finding, check, what: what.into(), file: Some(printable(&file.into())), mend }
}

fn note(check: &'static str, what: impl Into<String>, file: Option<&str>) -> Finding {
    Finding { severity: Severity::Note, check, what: what.into(), file: file.map(printable), mend: None }
}

fn cloud_init(files: &Files, findings: &mut Vec<Finding>) {
    const PLACES: [&str; 4] =
        ["/usr/bin/cloud-init", "/usr/local/bin/cloud-init", "/usr/lib/python3/dist-packages/cloudinit", "/etc/cloud/cloud.cfg"];
    if files.any(&PLACES).is_none() {
        let mend = Some("in the guest: apt install cloud-init, or dnf install cloud-init".to_owned());
        findings.push(finding(
            "cloud-init",
            "cloud-init is not there: servers get no key, no name, and no larger file system",
            "/usr/bin/cloud-init",
            mend,
        ));
        return;
    }
    let disabled = "/etc/cloud/cloud-init.disabled";
    if files.has(disabled) {
        let mend = Some(format!("virt-customize --delete {disabled} -a IMAGE"));
        findings.push(finding("cloud-init-disabled", "cloud-init is switched off", disabled, mend));
    }
    for file in ["/etc/default/grub", "/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"] {
        if files.read(file).is_some_and(|text| text.contains("cloud-init=disabled")) {
            let mend =
                Some("in the guest: take cloud-init=disabled out of the kernel's command line, then update-grub".to_owned());
            findings.push(finding("cloud-init-disabled", "the kernel's command line switches cloud-init off", file, mend));
            break;
        }
    }
}

fn ssh(files: &Files, findings: &mut Vec<Finding>) {
    let keys: Vec<String> =
        files.list("/etc/ssh").into_iter().filter(|name| name.starts_with("ssh_host_") && name.ends_with("_key")).collect();
    if let Some(first) = keys.first() {
        let what = format!(
            "the server's SSH host keys are in the image ({}): every server made of it, and whoever can read it, has the same ones",
            keys.len()
        );
        findings.push(finding("ssh-host-keys", what, format!("/etc/ssh/{first}"), sysprep("ssh-hostkeys")));
    }
}

/// Accounts that cloud images come with, and cloud-init's own.
const USUAL: [&str; 11] =
    ["cloud-user", "ubuntu", "debian", "centos", "rocky", "almalinux", "fedora", "ec2-user", "opensuse", "alpine", "arch"];

fn accounts(files: &Files, findings: &mut Vec<Finding>) {
    let passwd = files.read("/etc/passwd").unwrap_or_default();
    let default_user = files.read("/etc/cloud/cloud.cfg").and_then(|text| {
        let after = text.split_once("default_user:")?.1.to_owned();
        after.lines().find_map(|line| Some(line.trim().strip_prefix("name:")?.trim().to_owned()))
    });
    let mut people = Vec::new();
    let mut homes = vec![("root".to_owned(), "/root".to_owned())];
    for line in passwd.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let &[name, _, uid, _, _, home, shell] = fields.as_slice() else { continue };
        let id: u32 = uid.parse().unwrap_or(0);
        if !(1000..60_000).contains(&id) || shell.ends_with("/nologin") || shell.ends_with("/false") {
            continue;
        }
        homes.push((name.to_owned(), home.to_owned()));
        if !USUAL.contains(&name) && default_user.as_deref() != Some(name) {
            people.push(printable(name));
        }
    }
    people.truncate(LISTED_MAX);
    if !people.is_empty() {
        let mend = Some(format!(
            "virt-sysprep --operations user-account --remove-user-accounts {} -a IMAGE",
            shell_word(&people.join(","))
        ));
        findings.push(finding("accounts", format!("accounts beyond the usual one: {}", people.join(", ")), "/etc/passwd", mend));
    }
    let shadow = files.read("/etc/shadow").unwrap_or_default();
    let with_password = shadow.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let hash = rest.split(':').next().unwrap_or_default();
        hash.starts_with('$').then(|| printable(name))
    });
    let with_password: Vec<String> = with_password.take(LISTED_MAX).collect();
    if !with_password.is_empty() {
        let locks: Vec<String> =
            with_password.iter().map(|name| format!("--password {}", shell_word(&format!("{name}:locked:disabled")))).collect();
        let mend = Some(format!("virt-customize {} -a IMAGE", locks.join(" ")));
        findings.push(finding("passwords", format!("passwords are set: {}", with_password.join(", ")), "/etc/shadow", mend));
    }
    let empty: Vec<String> = shadow
        .lines()
        .filter_map(|line| line.split_once(':').filter(|(_, rest)| rest.starts_with(':')).map(|(name, _)| printable(name)))
        .take(LISTED_MAX)
        .collect();
    if !empty.is_empty() {
        let mend = Some("in the guest: passwd --lock NAME".to_owned());
        findings.push(finding("passwords", format!("no password is needed for: {}", empty.join(", ")), "/etc/shadow", mend));
    }
    for (name, home) in homes.into_iter().take(LISTED_MAX) {
        let file = format!("{home}/.ssh/authorized_keys");
        let keys = files
            .read(&file)
            .map_or(0, |text| text.lines().filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')).count());
        // what cloud-init writes for root only says whom to sign in as instead
        if keys > 0 && !files.read(&file).is_some_and(|text| text.contains("Please login as the user")) {
            let what = format!(
                "SSH keys that may sign in as {} are there ({keys}): cloud-init adds to them, and takes none away",
                printable(&name)
            );
            findings.push(finding("authorized-keys", what, file, sysprep("ssh-userdir")));
        }
    }
}

fn network(files: &Files, findings: &mut Vec<Finding>) {
    for file in ["/etc/udev/rules.d/70-persistent-net.rules", "/etc/udev/rules.d/75-persistent-net-generator.rules"] {
        let rules = files.read(file).unwrap_or_default();
        if rules.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')) {
            let what = "network cards are bound to the addresses of this server: on another one they get other names";
            findings.push(finding("persistent-net", what, file, sysprep("udev-persistent-net")));
        }
    }
    let folder = "/etc/sysconfig/network-scripts";
    for name in files.list(folder).into_iter().filter(|name| name.starts_with("ifcfg-")) {
        let file = format!("{folder}/{name}");
        if files.read(&file).is_some_and(|text| setting(&text, "HWADDR").is_some()) {
            let what = "a network card is bound to the address of this server's card (HWADDR)";
            findings.push(finding("persistent-net", what, file, sysprep("net-hwaddr")));
        }
    }
}

fn identity(files: &Files, findings: &mut Vec<Finding>) {
    let id = files.read("/etc/machine-id").unwrap_or_default();
    if id.trim().len() == 32 {
        let mut found = note(
            "machine-id",
            "the machine's id is in the image: servers made of it share it, and may get the same address by DHCP",
            Some("/etc/machine-id"),
        );
        found.mend = sysprep("machine-id");
        findings.push(found);
    }
    if files.has("/var/lib/cloud/instance") {
        findings.push(note(
            "cloud-init-ran",
            "cloud-init ran here before: it runs again on a new server, whose id differs",
            Some("/var/lib/cloud/instance"),
        ));
    }
}

fn power(files: &Files, findings: &mut Vec<Finding>) {
    const LISTENERS: [&str; 4] =
        ["/usr/sbin/acpid", "/sbin/acpid", "/lib/systemd/systemd-logind", "/usr/lib/systemd/systemd-logind"];
    if files.any(&LISTENERS).is_none() {
        let mend = Some("in the guest: apt install acpid, or dnf install acpid".to_owned());
        let what = "nothing listens to the power button (no acpid, no systemd-logind): a server is cut off when it is stopped";
        findings.push(finding("acpid", what, "/usr/sbin/acpid", mend));
    }
}

/// Volumes and network cards are attached while a server runs: kernels whose driver for that is a module have to load it.
fn hotplug(files: &Files, findings: &mut Vec<Finding>) {
    let root = if files.has("/usr/lib/modules") { "/usr/lib/modules" } else { "/lib/modules" };
    for kernel in files.list(root).into_iter().take(8) {
        let list = |name: &str| files.read(&format!("{root}/{kernel}/{name}")).unwrap_or_default();
        if list("modules.builtin").contains("acpiphp") || !list("modules.dep").contains("acpiphp") {
            continue;
        }
        let loads = |file: &str| files.read(file).is_some_and(|text| text.lines().any(|line| line.trim() == "acpiphp"));
        let loaded = loads("/etc/modules")
            || files.list("/etc/modules-load.d").iter().any(|name| loads(&format!("/etc/modules-load.d/{name}")));
        if !loaded {
            let what = format!(
                "kernel {} has acpiphp as a module that nothing loads: volumes cannot be attached to a running server",
                printable(&kernel)
            );
            let mend = Some("virt-customize --append-line /etc/modules:acpiphp -a IMAGE".to_owned());
            findings.push(finding("acpiphp", what, format!("{root}/{kernel}/modules.dep"), mend));
        }
    }
}

/// The root has to be able to grow, and wants to be alone.
fn partitions(table: &Table, number: Option<u32>, findings: &mut Vec<Finding>) {
    let Some(number) = number else {
        findings.push(Finding {
            severity: Severity::Finding,
            check: "partitions",
            what: "the root is a logical volume, or the whole disk: cloud-init does not make it larger on a larger disk"
                .to_owned(),
            file: None,
            mend: Some("in the guest, on each new server: growpart, pvresize, lvextend --resizefs".to_owned()),
        });
        return;
    };
    let Some(root) = table.partitions.iter().find(|partition| partition.number == number) else { return };
    let behind = table.partitions.iter().find(|partition| partition.start > root.start && partition.role != Role::Extended);
    if let Some(behind) = behind {
        findings.push(Finding {
            severity: Severity::Finding,
            check: "partitions",
            what: format!(
                "partition {} lies behind the root, partition {number}: the root cannot grow on a larger disk",
                behind.number
            ),
            file: None,
            mend: Some("virt-resize makes a copy in another order; or move what is there onto a volume of its own".to_owned()),
        });
    }
    for other in table.partitions.iter().filter(|partition| partition.number != number) {
        match other.role {
            Role::Esp => {
                findings.push(note("partitions", format!("partition {} is the EFI system partition", other.number), None))
            }
            Role::BiosBoot => {
                findings.push(note("partitions", format!("partition {} is GRUB's (BIOS boot)", other.number), None))
            }
            Role::PrepBoot => {
                findings.push(note("partitions", format!("partition {} is the PReP boot partition", other.number), None))
            }
            Role::Extended => {}
            Role::Data | Role::Swap | Role::Lvm => findings.push(Finding {
                severity: Severity::Finding,
                check: "partitions",
                what: format!("the root is not the only partition: partition {} is beside it", other.number),
                file: None,
                mend: Some("put what is there into the root, or onto a volume of its own".to_owned()),
            }),
        }
    }
}
