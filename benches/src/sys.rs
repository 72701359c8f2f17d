//! System calls of the benchmark.
//!
//! Invariant: the only file here that names `rustix`. Decides nothing.

use std::fs::File;
use std::io;

use rustix::fs::{Advice, fadvise};

/// Has the kernel forget what it holds of `file`, of the file system that `file` is of and not of
/// any that lies below it.
pub(crate) fn forget(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}
