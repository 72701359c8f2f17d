//! The one table from errors to errno.
//!
//! A program that reads a file understands few answers. Almost everything is `EIO`: the
//! bytes are there by name but cannot be had, now or ever. Neither `EACCES` (the program
//! may read the file; it is us the registry refuses), nor `ENOENT` (the file exists), nor
//! `EAGAIN` or `ETIMEDOUT` (a regular file never blocks). A full disk is told apart,
//! because whoever sees the program's "No space left on device" can cure it on the spot.
//! EROFS over FUSE makes `EIO` of that, too; the log has the reason.

use fuser::Errno;
use lazarette_fetcher::Error;

/// What the reader of a file is told about `error`.
pub(super) fn of(error: &Error) -> Errno {
    match error {
        Error::NoSpace { .. } => Errno::ENOSPC,
        Error::NotFound { .. }
        | Error::Denied { .. }
        | Error::RateLimited { .. }
        | Error::Unavailable { .. }
        | Error::Corrupt { .. }
        | Error::Malformed { .. }
        | Error::Limit { .. }
        | Error::Unsupported { .. }
        | Error::Io { .. }
        | Error::Db { .. } => Errno::EIO,
    }
}

/// The number of that.
pub(crate) fn number(error: &Error) -> u32 {
    of(error).code().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_everything_else() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let broken = std::io::Error::from(std::io::ErrorKind::Other);
        assert_eq!(of(&Error::io("write to", "/x", full)), Errno::ENOSPC);
        assert_eq!(of(&Error::io("write to", "/x", broken)), Errno::EIO);
        assert_eq!(of(&Error::malformed("x", "y")), Errno::EIO);
    }
}
