//! Batches and claims on a real Keystone and Glance: what mini-glance says of ids, states and marks has to be so.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod real;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use real::{Images, openstack, ready, run, state_folder};
use serde_json::Value;
use stages::ownership::{Content, Family};

const VIRTA: &str = env!("CARGO_BIN_EXE_virta");
const MIB: usize = 1 << 20;

/// A disk: noise, zeros, an odd end.
fn raw(path: &Path, seed: u64, mib: usize) {
    let mut bytes = vec![0_u8; mib * MIB + 512];
    let mut state = seed;
    for start in (0..mib * MIB).step_by(6 * MIB) {
        for word in bytes[start + 600..start + MIB].chunks_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_be_bytes()[..word.len()]);
        }
    }
    std::fs::write(path, bytes).unwrap();
}

struct Place {
    folder: tempfile::TempDir,
    images: Images,
}

impl Place {
    fn upload(&mut self, name: &str, seed: u64, mib: usize) -> String {
        let path = self.folder.path().join(format!("{name}.raw"));
        raw(&path, seed, mib);
        let id = openstack(
            "donor",
            &["image", "create", "--disk-format", "raw", "--file", path.to_str().unwrap(), name, "-f", "value", "-c", "id"],
        );
        self.images.ids.push(id.clone());
        id
    }

    fn command(&self, machine: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(VIRTA);
        command.args(["batch", "--os-cloud", "donor"]).args(arguments).env_remove("OS_CLOUD");
        command.env("XDG_STATE_HOME", self.folder.path().join(machine)).stdin(Stdio::null()).current_dir(self.folder.path());
        command
    }

    fn batch(&self, machine: &str, arguments: &[&str]) -> (Option<i32>, Value, String) {
        let output = self.command(machine, arguments).args(["-f", "json", "--progress", "plain"]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default(), stderr)
    }

    /// What Glance serves of the conversion is the disk.
    fn assert_is(&self, id: &str, name: &str) {
        let saved = self.folder.path().join("saved.qcow2");
        openstack("donor", &["image", "save", "--file", saved.to_str().unwrap(), id]);
        run("qemu-img", &["check", saved.to_str().unwrap()]);
        let raw = self.folder.path().join(format!("{name}.raw"));
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), saved.to_str().unwrap()]);
    }
}

fn show(id: &str) -> Value {
    serde_json::from_str(&openstack("donor", &["image", "show", id, "-f", "json"])).unwrap()
}

fn is_there(id: &str) -> bool {
    let listed = openstack("donor", &["image", "list", "-f", "value", "-c", "ID"]);
    listed.lines().any(|line| line.trim() == id)
}

#[test]
fn claims_hold_on_a_real_glance_and_a_batch_goes_on_after_a_kill() {
    if !ready() {
        return;
    }
    let folder = tempfile::tempdir_in(state_folder()).unwrap();
    let mut place = Place { folder, images: Images { cloud: "donor", ids: Vec::new() } };
    let project = openstack("donor", &["token", "issue", "-f", "value", "-c", "project_id"]);
    let a = place.upload("batch-a", 1, 12);
    let b = place.upload("batch-b", 2, 12);
    let claimed = |source: &str, generation| {
        let name = [(&a, "batch-a-qcow2"), (&b, "batch-b-qcow2")]
            .iter()
            .find(|(id, _)| **id == source)
            .map_or("batch-c-qcow2", |(_, name)| *name);
        Family::of_image(source, &project, name, Content::Exact).id(generation)
    };
    place.images.ids.extend((0..4).flat_map(|generation| [claimed(&a, generation), claimed(&b, generation)]));

    // the id is the claim's, and no mark of it is left
    let (code, report, stderr) = place.batch("one", &["batch-a", "batch-b"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(report["items"].as_array().unwrap().iter().all(|item| item["outcome"] == "done"), "{report}");
    // an upload that Glance answered with 500 goes into the next one
    let generation = |source: &str, item: &Value| {
        let id = item["report"]["destination"].as_str().unwrap().strip_prefix("glance:").unwrap().to_owned();
        (0..4).find(|generation| claimed(source, *generation) == id).unwrap_or_else(|| panic!("{id} is no claim on {source}"))
    };
    let first = generation(&a, &report["items"][0]);
    let made = show(&claimed(&a, first));
    assert_eq!((&made["status"], &made["name"]), (&Value::from("active"), &Value::from("batch-a-qcow2")));
    assert!(made["properties"]["virta_claim_s"].is_null() && made["protected"] == false, "{made}");

    // an id that was deleted stays taken: the next one is made; the other image is known to be done
    openstack("donor", &["image", "delete", &claimed(&a, first)]);
    let (code, report, stderr) = place.batch("two", &["batch-a", "batch-b"]);
    assert_eq!(code, Some(0), "{stderr}");
    let words: Vec<&str> = report["items"].as_array().unwrap().iter().map(|item| item["outcome"].as_str().unwrap()).collect();
    assert_eq!(words, ["done", "earlier"], "{report}");
    let second = generation(&a, &report["items"][0]);
    assert!(second > first && is_there(&claimed(&a, second)) && !is_there(&claimed(&a, first)));

    // a run that is killed leaves its claim; another machine keeps away, its own passes it by, and deletes it
    let c = place.upload("batch-c", 3, 150);
    place.images.ids.extend((0..4).map(|generation| claimed(&c, generation)));
    let mut slow = place
        .command("one", &["batch-c", "--delete-source", "--yes", "--rate-limit", "12M"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !is_there(&claimed(&c, 0)) {
        std::thread::sleep(Duration::from_millis(100));
        assert!(slow.try_wait().unwrap().is_none(), "it is over already");
    }
    slow.kill().unwrap();
    slow.wait().unwrap();
    let left = show(&claimed(&c, 0));
    assert_eq!(left["name"], "batch-c-qcow2 (unfinished)", "{left}");
    assert!(left["properties"]["virta_claim_s"].as_str().unwrap().parse::<u64>().unwrap() >= 3600, "{left}");
    let (code, report, _) = place.batch("two", &["batch-c", "--no-wait"]);
    assert_eq!((code, &report["items"][0]["outcome"]), (Some(4), &Value::from("held")), "{report}");
    let (code, report, stderr) = place.batch("one", &["batch-c", "--delete-source", "--yes"]);
    assert_eq!((code, &report["items"][0]["outcome"]), (Some(0), &Value::from("done")), "{stderr}");
    assert!(!is_there(&c), "the source is gone");
    let taken_over = generation(&c, &report["items"][0]);
    assert!(taken_over > 0);
    let made = claimed(&c, taken_over);
    assert!(!is_there(&claimed(&c, 0)), "what was overtaken is deleted");
    place.assert_is(&made, "batch-c");
    let shown = show(&made);
    assert!(shown["properties"]["virta_claim_s"].is_null() && shown["protected"] == false, "{shown}");
}
