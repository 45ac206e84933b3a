//! Two runs of one conversion at nearly the same moment, on a real Keystone and Glance: one image each time.
//!
//! Three pairs by itself; `VIRTA_PAIRS` says how many (`.ci/long`: 30).
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod real;

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use real::{Images, openstack, ready, run, state_folder};
use serde_json::Value;
use stages::ownership::{Content, Family};

const MIB: usize = 1 << 20;

/// One of two machines.
fn command(folder: &Path, machine: usize, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virta"));
    command.args(arguments).args(["--os-cloud", "donor", "--progress", "none"]).env_remove("OS_CLOUD");
    command.env("XDG_STATE_HOME", folder.join(format!("machine-{machine}"))).stdin(Stdio::null()).current_dir(folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn told(output: &Output) -> String {
    format!("{:?}: {}{}", output.status.code(), String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn two_runs_of_one_conversion_make_one_image_and_the_other_says_who_holds_it() {
    if !ready() {
        return;
    }
    let pairs = std::env::var("VIRTA_PAIRS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let folder = tempfile::tempdir_in(state_folder()).unwrap();
    let raw = folder.path().join("disk.raw");
    let bytes: Vec<u8> =
        (0..24 * MIB).map(|at| if (at / MIB).is_multiple_of(3) { u8::try_from(at % 251).unwrap() } else { 0 }).collect();
    std::fs::write(&raw, bytes).unwrap();
    let file = raw.to_str().unwrap();
    let create = ["image", "create", "--disk-format", "raw", "--file", file, "pair-source", "-f", "value", "-c", "id"];
    let source = openstack("donor", &create);
    let mut images = Images { cloud: "donor", ids: vec![source.clone()] };
    let project = openstack("donor", &["token", "issue", "-f", "value", "-c", "project_id"]);
    let (mut held, mut done) = (0, 0);
    for pair in 0..pairs {
        let name = format!("pair-{pair}");
        let destination = format!("glance:{name}");
        let from = format!("glance:{source}");
        let family = Family::of_image(&source, &project, &name, Content::Exact);
        images.ids.extend((0..4).map(|generation| family.id(generation)));
        std::fs::write(folder.path().join("list"), format!("{{\"image\":\"{source}\",\"name\":\"{name}\"}}\n")).unwrap();
        let convert = ["convert", from.as_str(), destination.as_str()];
        let batch = ["batch", "--from", "list", "--no-wait", "--journal", "journal"];
        let first = command(folder.path(), 0, &convert).spawn().unwrap();
        // at the same moment, and 0.1 to 2 s later
        std::thread::sleep(Duration::from_millis([0, 0, 100, 300, 700, 2000][pair % 6]));
        let beside: &[&str] = if pair % 2 == 0 { &convert } else { &batch };
        let second = command(folder.path(), 1, beside).spawn().unwrap();
        let (first, second) = (first.wait_with_output().unwrap(), second.wait_with_output().unwrap());
        let shown = format!("pair {pair}: {}\n{}", told(&first), told(&second));
        let codes = [first.status.code().unwrap(), second.status.code().unwrap()];
        // a batch has a code of its own for an image that is held
        let is_held = |code: i32| code == 75 || (code == 4 && pair % 2 == 1);
        assert!(codes.contains(&0) && codes.iter().all(|code| *code == 0 || is_held(*code)), "{shown}");
        held += codes.iter().filter(|code| is_held(**code)).count();
        done += codes.iter().filter(|code| **code == 0).count();
        let listed: Value = serde_json::from_str(&openstack("donor", &["image", "list", "-f", "json"])).unwrap();
        let of_pair: Vec<&Value> = listed
            .as_array()
            .unwrap()
            .iter()
            .filter(|image| image["Name"].as_str().unwrap_or_default().starts_with(&name))
            .collect();
        let of_pair: Vec<&&Value> = of_pair
            .iter()
            .filter(|image| matches!(image["Name"].as_str().unwrap().strip_prefix(&name), Some("" | " (unfinished)")))
            .collect();
        assert!(
            of_pair.len() == 1 && of_pair[0]["Name"] == name.as_str() && of_pair[0]["Status"] == "active",
            "{of_pair:?}\n{shown}"
        );
    }
    let saved = folder.path().join("saved.qcow2");
    openstack("donor", &["image", "save", "--file", saved.to_str().unwrap(), "pair-0"]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", file, saved.to_str().unwrap()]);
    println!("{pairs} pairs: one image each time; {done} runs ended with it, {held} were told that it is held");
}
