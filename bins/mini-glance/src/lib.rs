//! A small Identity, Image and Compute service for demos and tests: Keystone's sign-in, Glance v2 and Nova v2.1 as far as
//! `virta` and `openstack image` need them, over a folder of files.
//!
//! It answers as a real Glance 33 and Keystone 30 were seen to answer (statuses, texts, HTML bodies, one response a
//! connection), and it can be told to answer as other clouds do: see [`Faults`]. It listens on loopback only.
//!
//! | module | noun |
//! |---|---|
//! | [`server`] | the service: start, address, stop; routes |
//! | [`identity`] | tokens and the catalog |
//! | [`compute`] | servers: stop, start, snapshot |
//! | [`images`] | records: create, list, change, delete |
//! | `transfer` | GET and PUT of their bytes |
//! | [`data`] | the bytes in the store, ranges, what a body is made of |
//! | [`faults`] | what real clouds do, switched on by a test |
//! | [`answer`] | responses as Glance words them |
//!
//! Not a production service: file reads and writes block its runtime for the length of a page-cache access, and
//! there are two users with a project each.

pub mod answer;
pub mod compute;
pub mod data;
pub mod faults;
pub mod identity;
pub mod images;
pub mod server;
mod transfer;

pub use faults::{Faults, Ranges};
pub use server::{Config, MiniGlance, StartError};
