//! From an image reference to verified bytes on this node.
//!
//! Data flows one way: a [`source`] yields untrusted bytes of a blob by range, an
//! [`index`] says which ranges decode to which chunk of a layer, [`codec`] decodes and
//! hashes, and [`store`] keeps what was verified. [`layer`] joins them: it is what a
//! file system reads from. Nothing unverified leaves this crate, and this crate knows
//! nothing of mounts, snapshots or containers.

pub mod codec;
pub mod db;
pub mod elf;
mod error;
pub mod index;
pub mod layer;
pub mod link;
pub mod lock;
pub mod plan;
pub mod prefetch;
pub mod source;
pub mod store;
pub mod task;
#[cfg(feature = "test-util")]
pub mod test_util;
pub mod trust;
pub mod types;

pub use error::{Error, Result};
