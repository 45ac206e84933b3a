//! Why no cloud could be chosen or signed in to.

/// Why no cloud could be chosen or signed in to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nothing is configured at all.
    #[error(
        "no cloud is configured: neither OS_AUTH_URL nor a clouds.yaml is there. Did you `source` the openrc file in this shell? \
         Or put a clouds.yaml into ~/.config/openstack/ (Horizon: API Access, Download)"
    )]
    Nothing,
    /// Several are, and none is chosen.
    #[error("{file} has several clouds: choose one with --os-cloud or OS_CLOUD ({})", .names.join(", "))]
    Choose {
        /// The file.
        file: String,
        /// Their names.
        names: Vec<String>,
    },
    /// The chosen one is not there.
    #[error("cloud {name} is in none of the configuration files{}", known(.names))]
    NoSuchCloud {
        /// Its name.
        name: String,
        /// What is there.
        names: Vec<String>,
    },
    /// A file that was named cannot be read or understood.
    #[error("{file}: {what}")]
    File {
        /// The file.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// Something is missing.
    #[error("cloud {cloud}: {what} is missing: set it in clouds.yaml{}", variable(.env))]
    Missing {
        /// The cloud.
        cloud: String,
        /// What.
        what: &'static str,
        /// The variable for it.
        env: Option<&'static str>,
    },
    /// There is no password and nobody to ask.
    #[error(
        "cloud {cloud}: there is no password for {user}. Set OS_PASSWORD, or put it into secure.yaml beside clouds.yaml \
         (clouds: {cloud}: auth: password: …)"
    )]
    NoPassword {
        /// The cloud.
        cloud: String,
        /// Whose.
        user: String,
    },
    /// A way to sign in that is not built.
    #[error(
        "cloud {cloud}: auth_type {auth_type} is not supported. Make an application credential (Horizon: Identity, Application \
         Credentials) or use a password or a ready token (OS_TOKEN)"
    )]
    AuthType {
        /// The cloud.
        cloud: String,
        /// The type.
        auth_type: String,
    },
}

fn known(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; there are: {}", names.join(", ")) }
}

fn variable(env: &Option<&'static str>) -> String {
    env.map(|env| format!(" or {env}")).unwrap_or_default()
}
