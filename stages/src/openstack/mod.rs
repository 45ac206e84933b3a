//! OpenStack as far as Virta calls it: sign-in as `openstack` does it, and the Image service's records.
//!
//! | module | noun |
//! |---|---|
//! | [`config`] | which cloud, whose credentials: clouds.yaml, secure.yaml, `OS_*`, flags |
//! | [`environment`] | the files and variables that say so |
//! | [`http`] | clients: trust store, `OS_CACERT`, proxies, no total time-out |
//! | [`session`] | a token that renews itself, the catalog, requests with it |
//! | [`image`] | images: find, create, change, delete; what carries over to a converted one |
//! | [`rate`] | a limit for image data, shared by all transfers |
//! | [`member`] | sharing: an image's members, and their side of it |
//! | [`server`] | Nova: servers, and images of them |
//! | [`error`] | what a service answered, ready to paste into a support ticket |
//!
//! # Decisions
//! - 2026-11-24 The sign-in is our own, not `openstack_sdk`'s (0.22.8 was tried). Its reading of the configuration
//!   would have had to be replaced (no `OS_CLIENT_CONFIG_FILE`, no client certificate, other precedence), and then
//!   what is left of it is one POST. As published, its build script finds none of its authentication plugins, so
//!   that application credentials fail until each plugin crate's anchor is named by hand; it brings 266 crates and
//!   1 min 40 s of release build on two cores; its default total time-out of 30 s cuts bodies; it writes tokens to
//!   `~/.osc`. Kept from it: nothing on disk, renewal two minutes before the end.
//! - 2026-11-24 Flags go before the cloud that `OS_CLOUD` names, `OS_REGION_NAME`, `OS_INTERFACE`, `OS_CACERT` and
//!   `OS_PASSWORD` before what its file says, as python-openstackclient has it.

pub mod carry_over;
pub mod config;
mod config_error;
pub mod environment;
pub mod error;
pub mod http;
pub mod image;
pub mod marks;
pub mod member;
mod moment;
pub mod rate;
pub mod server;
pub mod session;

pub use config::{CloudConfig, CloudFlags};
pub use config_error::ConfigError;
pub use error::ApiError;
pub use image::{Change, Image};
pub(crate) use moment::Moment;
pub use server::{Compute, Server};
pub use session::Session;
