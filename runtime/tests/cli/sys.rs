//! System calls of these tests.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// Has the kernel forget the contents of a file, as far as nobody maps it.
pub(crate) fn forget(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Blocks of 512 bytes that a file takes once all of it is written: until then, what the file
/// system needs to find them comes and goes.
pub(crate) fn blocks_of(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks()
}

/// Ends a process without giving it a say; one that has ended is none.
pub(crate) fn kill_by_id(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Has a process do nothing until [`go_on`].
pub(crate) fn stop(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
}

/// Has it go on; one that has ended does not.
pub(crate) fn go_on(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
}

/// Asks a process to end.
pub(crate) fn terminate(pid: u32) {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM).unwrap();
}

/// Stops or continues a process; returns when it is so.
pub(crate) fn pause(pid: u32, paused: bool) {
    let signal = if paused {
        Signal::SIGSTOP
    } else {
        Signal::SIGCONT
    };
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    let threads = format!("/proc/{pid}/task");
    let is_stopped = |thread: &Path| {
        let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().unwrap_or_default();
        state.starts_with('T')
    };
    let is_so = || {
        let mut threads = fs::read_dir(&threads).unwrap();
        threads.all(|thread| is_stopped(&thread.unwrap().path()) == paused)
    };
    while !is_so() {
        std::thread::yield_now();
    }
}

/// A new terminal: the user's end, and that of the user's programs.
pub(crate) fn terminal() -> (File, File) {
    let pair = nix::pty::openpty(None, None).unwrap();
    (pair.master.into(), pair.slave.into())
}

/// Whether every key goes to the program as it is.
pub(crate) fn is_raw(terminal: &File) -> bool {
    let flags = tcgetattr(terminal).unwrap().local_flags;
    !flags.contains(LocalFlags::ICANON)
}

/// Takes a mount out of the tree of mounts, if there is one.
pub(crate) fn detach(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
}

/// Lets this process open as many files as it may.
pub(crate) fn raise_open_files() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}
