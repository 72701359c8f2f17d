//! From images to running tasks: the engine, and the `laz` command over it.
//!
//! The [`engine`] is a library: `laz` runs it in its own process in the foreground, and
//! the daemon `lazd` serves the same one to containerd. It wires [`image`] (references to layers), the
//! snapshotter's trees and overlays, [`spec`] (image config to OCI runtime spec) and the
//! [`executor`] (spec to a running process). Nothing here knows layer formats, FUSE or
//! RocksDB.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
mod error;
pub mod executor;
pub mod image;
pub mod profile;
mod size;
pub mod spec;
mod start;
pub mod stdio;
mod sys;
pub mod trace;

pub use error::{Error, exit};
pub use sys::alloc::Allocator;

/// Result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;
