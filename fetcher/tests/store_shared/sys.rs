//! System calls of these tests.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Takes or gives back the read lock that forbids holes; whether it was had.
pub(crate) fn forbid_holes(data: &File, forbid: bool) -> bool {
    let kind = if forbid { libc::F_RDLCK } else { libc::F_UNLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap(),
        l_whence: 0,
        l_start: i64::MAX - 1,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(data, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}
