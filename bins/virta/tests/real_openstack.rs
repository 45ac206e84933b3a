//! The main job against a real Keystone and Glance, checked with the tools that it replaces: `openstack image show`,
//! `openstack image save`, `qemu-img check`, `qemu-img compare`.
//!
//! Start them with `.ci/openstack/up` and paste what it prints. Without them, or without `qemu-img`, the tests say
//! `skipped: …`, and fail where `CI_REQUIRE_TOOLS=1` is set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod real;

use std::{os::unix::fs::FileExt, path::Path};

use real::{Images, openstack, ready, run};

fn virta(arguments: &[&str]) -> String {
    run(env!("CARGO_BIN_EXE_virta"), arguments)
}

/// 200 MiB with a partition table, some data, an odd end.
fn write_raw(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len((200 << 20) + 1024).unwrap();
    let mut boot = vec![0x90_u8; 512];
    boot[440..].fill(0);
    boot[446..462].copy_from_slice(&[0x80, 0x20, 0x21, 0, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0x38, 6, 0]);
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&boot, 0).unwrap();
    let block: Vec<u8> = (0..1_500_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for start in [1_u64 << 20, 33 << 20, 90 << 20, (170 << 20) + 777] {
        file.write_all_at(&block, start).unwrap();
    }
    file.write_all_at(b"the end", (200 << 20) + 1017).unwrap();
}

#[test]
fn the_main_job_on_a_real_glance_agrees_with_the_tools_it_replaces() {
    if !ready() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let raw = path("disk.raw");
    write_raw(Path::new(&raw));
    // an application credential, and a password: both sign in
    for (number, cloud) in ["donor", "donor-appcred"].into_iter().enumerate() {
        let mut images = Images { cloud, ids: Vec::new() };
        let name = format!("snap-{number}-{}", std::process::id());
        let arguments = [
            "image",
            "create",
            "--disk-format",
            "raw",
            "--file",
            &raw,
            "--property",
            "hw_disk_bus=virtio",
            "-f",
            "value",
            "-c",
            "id",
            &name,
        ];
        let snapshot = openstack(cloud, &arguments);
        images.ids.push(snapshot.clone());
        let report = path("report.json");
        let source = format!("glance:{name}");
        let target = format!("glance:{name}-qcow2");
        let made = virta(&["convert", &source, &target, "--os-cloud", cloud, "-f", "value", "--report", &report]);
        images.ids.push(made.clone());

        let show: serde_json::Value = serde_json::from_str(&openstack(cloud, &["image", "show", &made, "-f", "json"])).unwrap();
        assert_eq!(
            (show["status"].as_str(), show["disk_format"].as_str(), show["visibility"].as_str()),
            (Some("active"), Some("qcow2"), Some("private"))
        );
        assert_eq!(show["properties"]["hw_disk_bus"], "virtio");
        let said: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
        assert_eq!(said["image_bytes"], show["size"]);
        assert_eq!(said["image_hash"]["value"], show["properties"]["os_hash_value"]);
        assert_eq!(said["source_hash"]["checked"], true);

        let back = path("back.qcow2");
        openstack(cloud, &["image", "save", "--file", &back, &made]);
        run("qemu-img", &["check", "-f", "qcow2", &back]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &back]);
        // the same into a local file; this Glance serves ranges, but a loaded machine may deliver the image before it answers the probe
        let local = path("local.qcow2");
        let access = (0..10).find_map(|_| {
            virta(&["convert", &format!("glance:{snapshot}"), &local, "--os-cloud", cloud, "--report", &report, "--force"]);
            let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
            (report["access"] == "random").then_some(())
        });
        assert!(access.is_some(), "ranges were never used");
        run("qemu-img", &["check", "-f", "qcow2", &local]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &local]);
        std::fs::remove_file(local).unwrap();
    }
}
