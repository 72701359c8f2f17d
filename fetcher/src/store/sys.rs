//! The one system call of the store that the standard library lacks.
//!
//! Invariant: one call in, one call out; nothing is decided here.

use std::io;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// Swaps the names `a` and `b`, both of which must exist on one file system.
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE).map_err(io::Error::from)
}
