//! Layers mounted through FUSE, their contents arriving when they are read.
//!
//! Any kernel with FUSE serves this way. `fuse/` is the only place that names the `fuser`
//! crate. Metadata is answered from the [`Tree`](crate::tree::Tree) in memory and cached
//! by the kernel for good; data that is present is answered on the FUSE thread; data that
//! is not is handed to a tokio task in `fuse/miss.rs`, the only hand-over.
//!
//! Invariant: no FUSE thread ever waits for the network. One mount per layer, shared by
//! all its users.

mod attr;
mod errno;
mod fs;
mod miss;
mod mounts;
#[cfg(test)]
mod tests;

pub use fs::FuseStats;
pub use mounts::{FuseOptions, LayerMount, LayerMounts, ReadAhead};
