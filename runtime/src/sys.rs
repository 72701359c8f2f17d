//! The only place of this crate that talks to the kernel without the standard library.
//!
//! Each function does one thing, takes and returns owned or borrowed descriptors, and
//! decides nothing: policy lives in `spec`, `executor` and `stdio`. All `unsafe` of the
//! crate is here, each block with the reason why it holds.

pub(crate) mod alloc;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod rootfs;
pub(crate) mod socket;
pub(crate) mod terminal;

/// Numbers the kernel knows signals and errors by.
pub(crate) mod number {
    pub(crate) use libc::{EIO, ENOEXEC, ENOSYS, EPERM};
    pub(crate) use libc::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
}
