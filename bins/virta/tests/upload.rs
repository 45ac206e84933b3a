//! `virta upload`: what is sent as it is, what becomes a qcow2, what is refused before a byte leaves.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::time::Duration;

use common::{Cloud, MIB, Run, seen, signal};
use rustix::process::Signal;
use serde_json::Value;

async fn cloud() -> Cloud {
    Cloud::start_with(8, mini_glance::Config::default(), |_| {}).await
}

fn write(cloud: &Cloud, name: &str, bytes: &[u8]) {
    std::fs::write(cloud.folder.path().join(name), bytes).unwrap();
}

/// A qcow2 of the cloud's raw disk, made here.
async fn qcow2(cloud: &Cloud) -> Vec<u8> {
    write(cloud, "disk.raw", &cloud.raw);
    cloud.run(&["convert", "disk.raw", "disk.qcow2", "--force"]).await.ends(0, &[]);
    std::fs::read(cloud.folder.path().join("disk.qcow2")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_is_sent_as_it_is_and_a_raw_disk_becomes_one() {
    let cloud = cloud().await;
    let bytes = qcow2(&cloud).await;
    let run = cloud
        .run(&["upload", "disk.qcow2", "finished", "--description", "our base", "--property", "os_distro=debian", "-f", "json"])
        .await;
    run.ends(0, &[]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let image = cloud.others().remove(0);
    assert_eq!(report["destination"], format!("glance:{}", image["id"].as_str().unwrap()));
    assert_eq!(
        (report["image_hash"]["checked"].as_bool(), report["image_hash"]["value"].as_str()),
        (Some(true), image["os_hash_value"].as_str())
    );
    assert_eq!(std::fs::read(cloud.service.data_path(image["id"].as_str().unwrap()).unwrap()).unwrap(), bytes);
    let shown = |key: &str| image[key].as_str().unwrap_or_default();
    assert_eq!(
        (shown("description"), shown("os_distro"), shown("disk_format"), shown("visibility")),
        ("our base", "debian", "qcow2", "private")
    );
    assert_eq!(image["min_disk"], 1, "8 MiB of disk need 1 GiB");

    cloud.run(&["upload", "disk.raw", "compact", "--compress", "zstd"]).await.ends(0, &["proven"]);
    let compact = cloud.others().into_iter().find(|image| image["name"] == "compact").unwrap();
    assert_eq!(compact["disk_format"], "qcow2");
    cloud.assert_is_the_disk(&cloud.service.data_path(compact["id"].as_str().unwrap()).unwrap());
    assert_eq!(std::fs::read_dir(cloud.folder.path()).unwrap().count(), 4, "clouds.yaml, state, and the two disks");

    cloud.run(&["upload", "disk.qcow2", "finished"]).await.ends(2, &["there is an image called finished already", "--force"]);
    cloud.run(&["upload", "disk.qcow2", "finished", "--force"]).await.ends(0, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_glance_would_refuse_or_no_server_would_boot_is_refused_before_a_byte_is_sent() {
    let cloud = cloud().await;
    let good = qcow2(&cloud).await;
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let mut two = good.clone();
    two[510..512].copy_from_slice(&[0x55, 0xaa]);
    let packed = |magic: &[u8]| {
        let mut bytes = vec![9; 100_000];
        bytes[..magic.len()].copy_from_slice(magic);
        bytes
    };
    let mut vdi = vec![0; 70_000];
    vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
    for (name, bytes, texts) in [
        ("cut.qcow2", good[..good.len() - MIB].to_vec(), vec!["is shorter than its own tables say", "Get it again"]),
        ("cut-header.qcow2", good[..60_000].to_vec(), vec!["is shorter than its own tables say"]),
        ("backed.qcow2", with(15, 1), vec!["uses a backing file", "qemu-img convert -O qcow2 backed.qcow2"]),
        ("elsewhere.qcow2", with(79, 4), vec!["uses an external data file"]),
        ("subclusters.qcow2", with(79, 16), vec!["uses extended L2 entries"]),
        ("secret.qcow2", with(35, 2), vec!["is encrypted"]),
        ("corrupt.qcow2", with(79, 2), vec!["is marked as corrupt", "qemu-img check -r all"]),
        ("unknown.qcow2", with(79, 64), vec!["header that QEMU does not accept", "incompatible_features"]),
        ("both", two, vec!["is qcow2 and a disk with a partition table at once"]),
        ("disk.vdi", vdi, vec!["qemu-img convert -f vdi -O qcow2 disk.vdi", "--as-is"]),
        ("disk.vmdk", packed(b"KDMV"), vec!["qemu-img convert -f vmdk"]),
        ("disk.vhdx", packed(b"vhdxfile"), vec!["qemu-img convert -f vhdx"]),
        ("disk.vhd", packed(b"conectix"), vec!["qemu-img convert -f vpc"]),
        ("disk.img.xz", packed(b"\xfd7zXZ\0"), vec!["xz -dk disk.img.xz"]),
        ("disk.img.gz", packed(b"\x1f\x8b\x08"), vec!["gunzip -k disk.img.gz"]),
        ("empty", Vec::new(), vec!["is empty"]),
    ] {
        write(&cloud, name, &bytes);
        cloud.run(&["upload", name, "new"]).await.ends(1, &texts);
    }
    // tables that wrap around the end of all numbers
    let mut wrapped = good.clone();
    wrapped[48..56].copy_from_slice(&0xffff_ffff_ffff_0000_u64.to_be_bytes());
    write(&cloud, "wrapped.qcow2", &wrapped);
    cloud.run(&["upload", "wrapped.qcow2", "new"]).await.ends(1, &["is shorter than its own tables say"]);
    cloud.run(&["upload", "cut.qcow2", "new", "--as-is"]).await.ends(1, &["is shorter than its own tables say"]);
    cloud.run(&["upload", "disk.qcow2", "new", "--verify", "readback"]).await.ends(2, &["--verify is about raw disks"]);
    cloud.run(&["upload", "disk.qcow2", "new", "--disk-format", "rwa"]).await.ends(2, &["rwa is no disk format", "qcow2"]);
    cloud.run(&["upload", "disk.qcow2", ""]).await.ends(2, &["needs a name"]);
    cloud.run(&["upload", "disk.qcow2", "new", "--disk-format", "raw"]).await.ends(2, &["is qcow2 by its bytes, not raw"]);
    cloud.run(&["upload", "disk.qcow2", "new", "--public"]).await.ends(2, &["only administrators", "virta share"]);
    cloud.run(&["upload", "nothing", "new"]).await.ends(2, &["there is no file nothing"]);
    cloud.run(&["upload", "/dev/null", "new"]).await.ends(2, &["is no regular file"]);
    // a file of secrets, a page that says 404: not taken for a disk
    write(&cloud, "clouds.yaml.bak", &vec![b'a'; 1000]);
    cloud.run(&["upload", "clouds.yaml.bak", "new"]).await.ends(1, &["clouds.yaml.bak is no disk", "1000 bytes", "--as-is"]);
    // a disk whose partition table Glance minds: as raw it is refused, as qcow2 it is not
    cloud
        .run(&["upload", "disk.raw", "new", "--keep-format"])
        .await
        .ends(1, &["Glance refuses this disk as raw", "no partition", "becomes a qcow2"]);
    assert!(cloud.service.requests().is_empty(), "not even signed in: {:?}", cloud.service.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn formats_can_be_kept_and_forced() {
    let cloud = cloud().await;
    write(&cloud, "plain.raw", &vec![7; 3 * MIB]);
    cloud
        .run(&["upload", "plain.raw", "kept", "--keep-format", "--disk-format", "raw"])
        .await
        .ends(0, &["3.0 MiB raw, as it is"]);
    let mut iso = vec![0; 70_000];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    iso[510..512].copy_from_slice(&[0x55, 0xaa]);
    write(&cloud, "alpine.img", &iso);
    cloud.run(&["upload", "--private", "alpine.img", "glance:medium"]).await.ends(0, &["iso, as it is"]);
    let mut vdi = vec![0; 70_000];
    vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
    write(&cloud, "disk.vdi", &vdi);
    cloud.run(&["upload", "disk.vdi", "box", "--as-is"]).await.ends(0, &["vdi, as it is"]);
    let formats: Vec<String> = cloud.others().iter().map(|image| image["disk_format"].as_str().unwrap().to_owned()).collect();
    for format in ["raw", "iso", "vdi"] {
        assert!(formats.iter().any(|found| found == format), "{formats:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_fail_are_mended_or_leave_nothing() {
    let cloud = cloud().await;
    let bytes = qcow2(&cloud).await;
    cloud.service.faults(|faults| {
        faults.cut_puts = 2;
        faults.cut_after_bytes = 1 << 20;
        faults.dying_puts = 0;
    });
    cloud.run(&["upload", "disk.qcow2", "mended"]).await.ends(0, &["upload tried again", "proven"]);
    let image = cloud.others().remove(0);
    assert_eq!(std::fs::read(cloud.service.data_path(image["id"].as_str().unwrap()).unwrap()).unwrap(), bytes);
    assert_eq!(cloud.others().len(), 1);
    cloud.service.faults(|faults| faults.corrupt_puts = true);
    cloud.run(&["upload", "disk.qcow2", "damaged"]).await.ends(3, &["did not arrive as it was sent"]);
    cloud.service.faults(|faults| {
        faults.corrupt_puts = false;
        faults.quota_left_bytes = Some(1 << 20);
    });
    cloud.run(&["upload", "disk.qcow2", "large"]).await.ends(1, &["the quota for images has"]);
    cloud.service.faults(|faults| {
        faults.quota_left_bytes = None;
        faults.stalling_puts = 1;
        faults.stall = Duration::from_secs(30);
    });
    let child = cloud.command(&["upload", "disk.qcow2", "stopped"]).spawn().unwrap();
    let puts = || cloud.service.requests().iter().filter(|request| request.starts_with("PUT")).count();
    let before = puts();
    seen(&cloud.service, "PUT").await;
    for _ in 0..400 {
        if puts() > before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    signal(&child, Signal::INT);
    Run::new(child.wait_with_output().await.unwrap(), Duration::ZERO).ends(130, &["nothing half-made is left behind"]);
    assert_eq!(cloud.others().len(), 1, "only the first one is there");
}
