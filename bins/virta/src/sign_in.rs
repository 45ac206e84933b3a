//! Signing in, with a password asked for where there is none and somebody to ask.

use std::io::IsTerminal;

use engine::CancelToken;
use stages::{
    error::JobError,
    openstack::{
        CloudConfig, CloudFlags, Session,
        config::{Environment, Secret},
    },
    reporter::Reporter,
    text::printable,
};

use crate::flags::CloudArgs;

/// Signs in to the chosen cloud and says where it is; `what` begins the line (`cloud`, `destination: cloud`).
pub async fn sign_in(
    what: &str,
    arguments: &CloudArgs,
    environment: &Environment,
    reporter: &dyn Reporter,
    cancel: &CancelToken,
) -> Result<Session, JobError> {
    let flags = CloudFlags {
        cloud: arguments.os_cloud.clone(),
        region_name: arguments.os_region_name.clone(),
        interface: arguments.os_interface.clone(),
        cacert: arguments.os_cacert.clone(),
        insecure: arguments.insecure,
    };
    let mut cloud = CloudConfig::resolve(&flags, environment)?;
    for notice in &cloud.notices {
        reporter.warn(notice);
    }
    if let Some(user) = cloud.wants_password_of()
        && std::io::stdin().is_terminal()
        && std::io::stderr().is_terminal()
    {
        let prompt = format!("Password of {} for cloud {}: ", printable(&user), printable(&cloud.name));
        if let Ok(password) = rpassword::prompt_password(prompt) {
            cloud.set_password(Secret::new(password));
        }
    }
    let session = match cancel.guard(Session::sign_in(cloud)).await {
        Ok(result) => result?,
        Err(_) => return Err(JobError::Interrupted("interrupted".to_owned())),
    };
    let who = session.whoami();
    let region = who.region.as_ref().map(|region| format!(", region {region}")).unwrap_or_default();
    reporter.note(&format!("{what} {}{region}, project {}, user {}", who.cloud, who.project, who.user));
    Ok(session)
}
