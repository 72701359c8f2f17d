//! System calls of these tests.

use std::fs::File;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Has the kernel forget the contents of a file, as far as nobody maps it.
pub(crate) fn forget(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

pub(crate) fn kill_by_id(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Has a process do nothing from now on, or go on.
pub(crate) fn stop(pid: i32, stopped: bool) {
    let signal = if stopped {
        Signal::SIGSTOP
    } else {
        Signal::SIGCONT
    };
    kill(Pid::from_raw(pid), signal).unwrap();
}
