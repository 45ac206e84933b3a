//! HTTP clients: the system's trust store plus the cloud's own authorities, proxies from the environment except for
//! loopback, no redirect followed (a token must not travel to another host), and no total time-out: bodies take as long
//! as they take, and each reader watches for silence itself.

use std::time::Duration;

use reqwest::{Certificate, Client, Identity, Url, redirect::Policy};

use super::config::CloudConfig;
use crate::openstack::ConfigError;

/// To open a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// For a small answer to come completely.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The clients of one cloud. Clones share connections.
#[derive(Clone, Debug)]
pub struct Clients {
    usual: Client,
    loopback: Client,
}

impl Clients {
    /// Clients for this cloud's certificates.
    ///
    /// # Errors
    /// [`ConfigError::File`] for certificate files that cannot be read or understood.
    pub fn new(cloud: &CloudConfig) -> Result<Self, ConfigError> {
        let build = |no_proxy: bool| {
            let mut builder = Client::builder()
                .user_agent(concat!("virta/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .redirect(Policy::none())
                .tcp_keepalive(Duration::from_secs(30));
            if no_proxy {
                builder = builder.no_proxy();
            }
            if cloud.insecure {
                builder = builder.tls_danger_accept_invalid_certs(true);
            }
            let read = |path: &std::path::Path| {
                std::fs::read(path)
                    .map_err(|error| ConfigError::File { file: path.display().to_string(), what: error.to_string() })
            };
            if let Some(path) = &cloud.cacert {
                let bad = |what: String| ConfigError::File { file: path.display().to_string(), what };
                let authorities = Certificate::from_pem_bundle(&read(path)?).map_err(|error| bad(error.to_string()))?;
                if authorities.is_empty() {
                    return Err(bad("has no certificate in it".to_owned()));
                }
                builder = builder.tls_certs_merge(authorities);
            }
            if let Some((cert, key)) = &cloud.client_cert {
                let mut pem = read(cert)?;
                if let Some(key) = key {
                    pem.push(b'\n');
                    pem.extend(read(key)?);
                }
                let bad = |what: String| ConfigError::File { file: cert.display().to_string(), what };
                builder = builder.identity(Identity::from_pem(&pem).map_err(|error| bad(error.to_string()))?);
            }
            builder.build().map_err(|error| ConfigError::File { file: "TLS set-up".to_owned(), what: error.to_string() })
        };
        Ok(Self { usual: build(false)?, loopback: build(true)? })
    }

    /// The client for this address.
    #[must_use]
    pub fn of(&self, url: &Url) -> &Client {
        let loopback = match url.host() {
            Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        };
        if loopback { &self.loopback } else { &self.usual }
    }
}
