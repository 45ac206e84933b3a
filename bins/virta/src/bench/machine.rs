//! What machine this is, and its flavor.

use std::{fs, path::Path, time::Duration};

use rustix::{fs::statfs, system::uname};

use stages::budget::meminfo_bytes;

use super::record::Machine;

/// Nova's metadata service, in the form of EC2: its `instance-type` is the flavor's name.
pub const METADATA: &str = "http://169.254.169.254/latest/meta-data/instance-type";
/// On a machine that is no instance nobody answers there.
const PATIENCE: Duration = Duration::from_millis(700);

/// This machine; `folder` is whose disk is measured.
pub fn this(folder: &Path) -> Machine {
    let system = uname();
    Machine {
        host: system.nodename().to_string_lossy().into_owned(),
        flavor: None,
        flavor_from: None,
        cpu: cpu().unwrap_or_else(|| system.machine().to_string_lossy().into_owned()),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
        memory_bytes: meminfo_bytes("MemTotal:").unwrap_or(0),
        kernel: system.release().to_string_lossy().into_owned(),
        folder: folder.display().to_string(),
        filesystem: filesystem(folder),
        cloud: None,
    }
}

fn cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, name) = text.lines().find(|line| line.starts_with("model name"))?.split_once(':')?;
    Some(name.trim().to_owned())
}

/// statfs(2)'s numbers of file systems that such machines have.
fn filesystem(folder: &Path) -> String {
    let Ok(found) = statfs(folder) else { return "unknown".to_owned() };
    match found.f_type {
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x6969 => "nfs".to_owned(),
        0x00c3_6400 => "ceph".to_owned(),
        other => format!("{other:#x}"),
    }
}

/// The flavor, if the metadata service tells; `None` on any other machine, after [`PATIENCE`] at most.
pub async fn flavor(address: &str) -> Option<String> {
    let client =
        reqwest::Client::builder().no_proxy().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).build().ok()?;
    let response = client.get(address).send().await.ok().filter(|response| response.status().is_success())?;
    let text = response.text().await.ok()?;
    let name = text.trim();
    // an answer of another service is no flavor
    (!name.is_empty() && name.len() < 128 && !name.contains(['\n', '<'])).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Answers one request with `body`.
    fn answer(status: &'static str, body: &'static str) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/latest/meta-data/instance-type", listener.local_addr().unwrap());
        let server = std::thread::Builder::new().name("metadata".to_owned());
        let _ = server.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        });
        address
    }

    #[tokio::test]
    async fn the_flavor_is_what_the_metadata_service_says_and_nothing_else_is() {
        assert_eq!(flavor(&answer("200 OK", "io.340GB\n")).await.as_deref(), Some("io.340GB"));
        assert_eq!(flavor(&answer("404 Not Found", "no")).await, None);
        assert_eq!(flavor(&answer("200 OK", "<html>sign in</html>")).await, None);
        // nobody listens there
        assert_eq!(flavor("http://127.0.0.1:9/").await, None);
    }

    #[test]
    fn this_machine_is_described() {
        let machine = this(Path::new("/"));
        assert!(machine.cores > 0 && machine.memory_bytes > 0 && !machine.kernel.is_empty() && !machine.cpu.is_empty());
    }
}
