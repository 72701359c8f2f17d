//! The mount server: a small process that owns FUSE sessions, so that a daemon may die or be
//! upgraded while what it mounted goes on.
//!
//! For each layer it serves a file system of one file, the layer's data file ([`fuse`]), or is
//! asked by the kernel before that is read ([`fanotify`]); what may be served of it is what a
//! daemon granted ([`state`]), over a socket ([`wire`]). [`server`] runs that, [`guard`] holds
//! on to everything when the server dies, [`client`] is the daemon's end. It parses no trees
//! and fetches nothing.

pub mod client;
mod error;
pub mod fanotify;
pub mod fuse;
pub mod guard;
mod log;
pub mod ranges;
pub mod server;
pub mod state;
mod sys;
pub mod table;
pub mod wire;

pub use error::{Error, Result};
pub use log::READY;
