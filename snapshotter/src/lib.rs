//! From layer indexes to mountable root file systems.
//!
//! A [`tree`] is the immutable inode tree of one layer, [`erofs`] writes it as an image the
//! kernel can mount, [`fuse`] mounts either with contents that arrive when they are read,
//! [`overlay`] stacks such mounts and local directories into snapshots whose records live in
//! a [`metastore`], with the owners that an [`idmap`] says, and [`cleanup`] leaves nothing behind,
//! also after a crash. [`warm`] reads ahead what a start is known to read. [`grpc`] serves
//! snapshots to containerd, which may let us bring layers by the protocol of [`remote`]. This
//! crate knows nothing of registries, images or containers.

pub mod cleanup;
pub mod data;
pub mod erofs;
mod error;
pub mod fuse;
pub mod grpc;
pub mod idmap;
pub mod metastore;
pub mod mountd;
pub mod overlay;
pub mod remote;
mod sys;
#[cfg(test)]
mod test_util;
pub mod tree;
pub mod warm;

pub use error::{Error, Result};
