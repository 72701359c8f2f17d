//! How layers are mounted.
//!
//! Values only; [`LayerMounts`](super::LayerMounts) does what they say.

use std::thread;

use serde::Deserialize;

/// What shows a layer's files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// EROFS where this kernel mounts it over FUSE, else FUSE. What is tried is the mount
    /// itself; once it was refused it is not tried again.
    #[default]
    Auto,
    /// EROFS that reads the layer's data file itself, and asks the mount server first. Never
    /// without that server; see [`crate::mountd`].
    Fanotify,
    /// EROFS, whose metadata the kernel has to itself and whose data FUSE serves.
    Erofs,
    /// FUSE alone.
    Fuse,
}

/// How layers are mounted.
#[derive(Debug, Clone, Copy)]
pub struct FuseOptions {
    /// What shows them.
    pub backend: Backend,
    /// Threads that answer requests of one mount. They share nothing but the tree.
    pub threads: usize,
}

impl Default for FuseOptions {
    /// Two to four threads by the machine.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            backend: Backend::default(),
            threads: cores.clamp(2, 4),
        }
    }
}
