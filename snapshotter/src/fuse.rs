//! Layers mounted through FUSE, their contents arriving when they are read.
//!
//! Any kernel with FUSE serves this way. `fuse/` is the only place that names the `fuser`
//! crate. Of two ways to show a layer ([`Backend`]), `fs` answers for names and attributes
//! from the [`Tree`](crate::tree::Tree) in memory, for the kernel to cache for good; `stack`
//! leaves them to an EROFS, whose data file FUSE serves. Data that is present is answered on
//! the FUSE thread; data that is not is handed to a tokio task in `fuse/miss.rs`, the only
//! hand-over.
//!
//! Invariant: no FUSE thread ever waits for the network. One mount per layer, shared by
//! all its users.

mod attr;
mod device;
mod errno;
mod fs;
mod miss;
mod mounts;
mod options;
mod read_ahead;
mod reader;
mod session;
mod stack;
#[cfg(test)]
mod tests;

pub(crate) use errno::number as errno_of;
pub use mounts::{LayerMount, LayerMounts};
pub use options::{Backend, FuseOptions};
pub(crate) use read_ahead::Knob;
pub use read_ahead::ReadAhead;
pub use reader::FuseStats;
pub(crate) use stack::{create as create_image, make_image, mount_image};
