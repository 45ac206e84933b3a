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

/// Every command of the documentation's chapters, here with `virta` and there with the tools that it replaces; compute has its own tests.
#[test]
fn uploading_sharing_downloading_and_image_care_agree_with_openstack() {
    if !ready() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let donor = |words: &str| {
        let mut words: Vec<&str> = words.split(' ').collect();
        words.extend(["--os-cloud", "donor"]);
        virta(&words)
    };
    let acceptor = |words: &str| {
        let mut words: Vec<&str> = words.split(' ').collect();
        words.extend(["--os-cloud", "acceptor"]);
        virta(&words)
    };
    let mut images = Images { cloud: "donor", ids: Vec::new() };
    let tag = std::process::id();
    let (raw, qcow2) = (path("disk.raw"), path("disk.qcow2"));
    write_raw(Path::new(&raw));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &qcow2]);

    // uploading: a raw disk on its way to qcow2, one as it is, a qcow2 that qemu-img made, an installation medium
    let compact = donor(&format!("upload {raw} up-{tag} --description ours -f value"));
    let plain = donor(&format!("upload {raw} plain-{tag} --keep-format -f value"));
    let finished = donor(&format!("upload {qcow2} finished-{tag} -f value"));
    let mut medium = vec![0; 200_000];
    let sectors =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../stages/tests/fixtures/iso/xorriso-gpt.bin")).unwrap();
    medium[..1024].copy_from_slice(&sectors[..1024]);
    medium[32768..34816].copy_from_slice(&sectors[1024..]);
    std::fs::write(path("medium.img"), &medium).unwrap();
    let iso = donor(&format!("upload {} iso-{tag} -f value", path("medium.img")));
    images.ids.extend([compact.clone(), plain.clone(), finished.clone(), iso.clone()]);
    let show = |id: &str| -> serde_json::Value {
        serde_json::from_str(&openstack("donor", &["image", "show", id, "-f", "json"])).unwrap()
    };
    for (id, format, min_disk) in [(&compact, "qcow2", 1), (&plain, "raw", 1), (&finished, "qcow2", 1), (&iso, "iso", 1)] {
        let shown = show(id);
        assert_eq!((shown["disk_format"].as_str(), shown["visibility"].as_str()), (Some(format), Some("private")), "{shown}");
        assert_eq!((shown["status"].as_str(), shown["min_disk"].as_u64()), (Some("active"), Some(min_disk)));
    }
    assert_eq!(show(&compact)["properties"]["description"], "ours");
    for id in [&compact, &finished] {
        let back = path("back.qcow2");
        openstack("donor", &["image", "save", "--file", &back, id]);
        run("qemu-img", &["check", "-f", "qcow2", &back]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &back]);
    }

    // downloading: what openstack and virta put there comes back byte by byte
    for (id, file) in [(&plain, &raw), (&finished, &qcow2)] {
        let got = path(if file == &raw { "got.raw" } else { "got.qcow2" });
        donor(&format!("download {id} {got} --force"));
        assert!(std::fs::read(&got).unwrap() == std::fs::read(file).unwrap(), "other bytes");
    }
    let theirs = openstack(
        "donor",
        &["image", "create", "--disk-format", "qcow2", "--file", &qcow2, "-f", "value", "-c", "id", &format!("theirs-{tag}")],
    );
    images.ids.push(theirs.clone());
    donor(&format!("download theirs-{tag} {}", path("theirs.qcow2")));
    assert!(std::fs::read(path("theirs.qcow2")).unwrap() == std::fs::read(&qcow2).unwrap(), "other bytes");

    // image care
    let list: serde_json::Value = serde_json::from_str(&donor("image list -f json")).unwrap();
    let ids: Vec<&str> = list.as_array().unwrap().iter().filter_map(|image| image["id"].as_str()).collect();
    let listed = openstack("donor", &["image", "list", "-f", "value", "-c", "ID"]);
    assert!(listed.lines().all(|id| ids.contains(&id)), "openstack lists what virta does not: {listed} {ids:?}");
    donor(&format!("image set {plain} --name renamed-{tag} --tag checked --property os_distro=debian --min-disk 7 --protected"));
    let shown = show(&plain);
    assert_eq!(
        (shown["name"].as_str(), &shown["tags"]),
        (Some(format!("renamed-{tag}").as_str()), &serde_json::json!(["checked"]))
    );
    assert_eq!(
        (shown["min_disk"].as_u64(), shown["protected"].as_bool(), shown["properties"]["os_distro"].as_str()),
        (Some(7), Some(true), Some("debian"))
    );
    donor(&format!("image set {plain} --unprotected --remove-tag checked --remove-property os_distro"));
    assert_eq!(donor(&format!("image show {plain} -f value -c min_disk -c tags")), "7\n[]");
    let inspected: serde_json::Value = serde_json::from_str(&donor(&format!("inspect glance:{plain} -f json"))).unwrap();
    assert_eq!(inspected["table"]["kind"], "mbr");
    assert!(inspected["read_bytes"].as_u64().unwrap() < 4 << 20);

    // sharing, from the donor to the acceptor
    let project = openstack("acceptor", &["token", "issue", "-f", "value", "-c", "project_id"]);
    donor(&format!("share {plain} {project}"));
    let members = openstack("donor", &["image", "member", "list", &plain, "-f", "value", "-c", "Member ID", "-c", "Status"]);
    assert_eq!(members, format!("{project} pending"));
    assert!(acceptor("image list --shared -f value -c id -c member_status").contains(&format!("{plain} pending")));
    acceptor(&format!("accept {plain}"));
    assert_eq!(donor(&format!("members {plain} -f value -c status")), "accepted");
    assert!(openstack("acceptor", &["image", "list", "--shared", "-f", "value", "-c", "ID"]).contains(&plain));
    acceptor(&format!("download {plain} {}", path("shared.raw")));
    assert!(std::fs::read(path("shared.raw")).unwrap() == std::fs::read(&raw).unwrap(), "other bytes");
    acceptor(&format!("reject {plain}"));
    assert_eq!(donor(&format!("members {plain} -f value -c status")), "rejected");
    donor(&format!("unshare {plain} {project}"));
    assert_eq!(donor(&format!("members {plain} -f value")), "");

    // the first look, and the end
    let first: serde_json::Value = serde_json::from_str(&donor("doctor -f json")).unwrap();
    assert_eq!(
        (first["cloud"]["project"].as_str(), first["ranges"].as_bool(), first["compute"].as_bool()),
        (Some("donor"), Some(true), Some(false))
    );
    for id in images.ids.clone() {
        donor(&format!("image delete {id} --yes"));
    }
    let left = openstack("donor", &["image", "list", "-f", "value", "-c", "ID"]);
    assert!(images.ids.iter().all(|id| !left.contains(id.as_str())), "{left}");
    images.ids.clear();
}
