//! System calls of these tests.

use std::path::Path;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

pub(crate) fn kill_by_id(pid: i32) {
    // One that is gone needs no killing.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

pub(crate) fn detach(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
}
