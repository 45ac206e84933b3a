//! What a snapshot of a server will do, told before it is begun.

use std::time::Duration;

use crate::{
    error::JobError,
    openstack::{Compute, Server},
    text::{printable, shell_word},
};

/// Nova cuts a guest off that has not shut down by then, unless the image says otherwise (`shutdown_timeout`).
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// What is going to be done to a server, checked before anything is.
#[derive(Clone, Debug)]
pub struct SnapshotPlan {
    /// The server.
    pub server: Server,
    /// What the image will be called.
    pub name: String,
    /// It is stopped first.
    pub stops: bool,
    /// What people should read before they agree.
    pub lines: Vec<String>,
    /// What they should think about.
    pub warnings: Vec<String>,
}

impl SnapshotPlan {
    /// Looks at a server. `live`: a running one stays running.
    ///
    /// # Errors
    /// [`JobError::Refused`] for a server that no image with bytes can be made of just now: its root disk is a volume, it is locked, busy, or in a
    /// state that Nova makes no images of.
    pub async fn new(compute: &Compute, server: Server, name: &str, live: bool) -> Result<Self, JobError> {
        let shown = format!("server {} ({})", server.shown(), printable(&server.id));
        if server.image_id.is_none() {
            return Err(JobError::Refused(volume_backed(&server, name, &shown)));
        }
        if server.locked == Some(true) {
            return Err(JobError::Refused(format!(
                "{shown} is locked, so nothing can be done with it: openstack server unlock {}",
                printable(&server.id)
            )));
        }
        if let Some(task) = &server.task_state {
            return Err(JobError::Refused(format!("{shown} is busy ({}): wait until that is over", printable(task))));
        }
        let stops = match server.status.as_str() {
            "ACTIVE" => !live,
            "SHUTOFF" | "PAUSED" | "SUSPENDED" => false,
            other => {
                return Err(JobError::Refused(format!(
                    "{shown} is {}: images can be made of servers that are ACTIVE, SHUTOFF, PAUSED or SUSPENDED",
                    printable(other)
                )));
            }
        };
        let mut lines = vec![match stops {
            true => {
                format!("{shown} is running: it is stopped, image {} is made of it, and it is started again", printable(name))
            }
            false => format!("{shown} is {}, and stays so while image {} is made of it", server.status, printable(name)),
        }];
        let disks = compute.disks(&server).await;
        let mut left_out = Vec::new();
        if let Some(disks) = disks {
            lines.push(format!("in the image: the root disk, {} GiB", disks.root_gib));
            if disks.ephemeral_gib > 0 {
                left_out.push(format!("the ephemeral disk of {} GiB", disks.ephemeral_gib));
            }
            if disks.swap_mib > 0 {
                left_out.push(format!("the swap disk of {} MiB", disks.swap_mib));
            }
        }
        if !server.volumes.is_empty() {
            left_out.push(format!("{} attached volumes ({})", server.volumes.len(), printable(&server.volumes.join(", "))));
        }
        let mut warnings = Vec::new();
        if !left_out.is_empty() {
            warnings.push(format!("not in the image: {}", left_out.join("; ")));
        }
        match (server.status.as_str(), live) {
            ("ACTIVE", true) => warnings.push(
                "--live: the image will look as after a power cut: file systems are not clean, databases may be in the middle of something".to_owned(),
            ),
            ("PAUSED" | "SUSPENDED", _) => warnings.push(
                "what is in the guest's memory is not in the image: its file systems are not clean. Resume it first for an image that is".to_owned(),
            ),
            _ => {}
        }
        Ok(Self { server, name: name.to_owned(), stops, lines, warnings })
    }
}

pub(super) fn volume_backed(server: &Server, name: &str, shown: &str) -> String {
    let volume = server.volumes.first().map_or_else(|| "VOLUME".to_owned(), |id| printable(id));
    format!(
        "the root disk of {shown} is a volume: Nova would make an image without bytes, and a snapshot of each volume. Stop the server and make the image from its \
         volume instead: openstack server stop {}; openstack image create --volume {volume} --force --disk-format qcow2 --container-format bare {}",
        printable(&server.id),
        shell_word(name)
    )
}
