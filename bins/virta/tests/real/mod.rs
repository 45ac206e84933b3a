//! What the tests against a real Keystone and Glance share.
#![allow(clippy::unwrap_used, dead_code, missing_docs)] // a panic is how a test fails; no test uses all of it

use std::{net::SocketAddr, path::PathBuf, process::Command};

/// The cloud is up and the tools are there?
pub fn ready() -> bool {
    let answers = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let missing = if !answers(Command::new("qemu-img").arg("--version")) {
        "qemu-img is not installed"
    } else if !std::env::var("OS_CLIENT_CONFIG_FILE").is_ok_and(|path| path.contains("openstack")) {
        "OS_CLIENT_CONFIG_FILE names no test cloud: start one with .ci/openstack/up"
    } else if !answers(Command::new("openstack").args(["--os-cloud", "donor", "token", "issue"])) {
        "the test cloud does not answer: start it with .ci/openstack/up"
    } else {
        return true;
    };
    assert!(std::env::var_os("CI_REQUIRE_TOOLS").is_none(), "required here: {missing}");
    println!("skipped: {missing}");
    false
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).env_remove("OS_CLOUD").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub fn openstack(cloud: &str, arguments: &[&str]) -> String {
    run("openstack", &[&["--os-cloud", cloud], arguments].concat())
}

/// Where the test cloud keeps its state.
pub fn state_folder() -> PathBuf {
    PathBuf::from(std::env::var("OS_CLIENT_CONFIG_FILE").unwrap()).parent().unwrap().to_owned()
}

/// Where Glance listens.
pub fn endpoint_of_glance() -> SocketAddr {
    let ini = std::fs::read_to_string(state_folder().join("glance.ini")).unwrap();
    let line = ini.lines().find_map(|line| line.strip_prefix("http-socket = ")).unwrap();
    line.trim().parse().unwrap()
}

pub struct Images {
    pub cloud: &'static str,
    pub ids: Vec<String>,
}

impl Drop for Images {
    fn drop(&mut self) {
        for id in &self.ids {
            let _ = Command::new("openstack").args(["--os-cloud", self.cloud, "image", "delete", id]).output();
        }
    }
}
