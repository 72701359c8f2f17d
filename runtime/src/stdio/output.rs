//! The user's outputs, for async code.
//!
//! Invariant: writes wait for a slow reader, also where another process that shares the pipe
//! or terminal made it non-blocking when this one started. That flag is left as it is: it
//! belongs to all who share the description. Such an output gets one of its own here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use tokio::io::AsyncWrite;

use crate::sys::process;

/// Device number of `/dev/ptmx`, 5:2, the master end of every terminal. Opened anew it would be
/// that of another one.
const PTMX: u64 = (5 << 8) | 2;

/// An output of this process.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// `usual`, which writes to `fd`, unless that would not wait: its "not now" is an error like
/// any other, and what it had taken until then is not known.
pub fn output(fd: impl AsFd, usual: impl AsyncWrite + Send + Unpin + 'static) -> Output {
    match anew(fd.as_fd()) {
        Ok(Some(file)) => Box::new(tokio::fs::File::from_std(file)),
        Ok(None) => Box::new(usual),
        Err(error) => {
            tracing::warn!(%error, "a non-blocking output cannot be opened anew");
            Box::new(usual)
        }
    }
}

/// A blocking description of its own where `fd` is non-blocking, and can have one.
fn anew(fd: BorrowedFd<'_>) -> io::Result<Option<File>> {
    if !process::is_nonblocking(fd)? {
        return Ok(None);
    }
    let metadata = File::from(fd.try_clone_to_owned()?).metadata()?;
    let kind = metadata.file_type();
    let is_device = kind.is_char_device() && metadata.rdev() != PTMX;
    if kind.is_fifo() || is_device {
        return process::open_to_write(fd).map(Some);
    }
    Ok(None)
}
