//! System calls of these tests.
#![expect(unsafe_code, reason = "signals have no safe interface")]

use std::fs::File;
use std::path::Path;

use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Flags of an open that goes past the page cache.
pub(crate) const DIRECT: i32 = libc::O_DIRECT;

/// Takes the write lock that an evictor needs; `false` if somebody else has a lock.
pub(crate) fn lock_to_evict(data: &File) -> bool {
    set_lock(data, libc::F_WRLCK)
}

pub(crate) fn unlock(data: &File) {
    set_lock(data, libc::F_UNLCK);
}

fn set_lock(data: &File, kind: i32) -> bool {
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap(),
        l_whence: 0,
        l_start: i64::MAX - 1,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(data, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

pub(crate) fn punch(file: &File, offset: u64, len: u64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (offset, len) = (i64::try_from(offset).unwrap(), i64::try_from(len).unwrap());
    fallocate(file, flags, offset, len).unwrap();
}

/// Has the kernel forget what it keeps of a file.
pub(crate) fn forget(file: &File) {
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(file, 0, 0, advice).unwrap();
}

/// The calling thread, for [`interrupt`].
pub(crate) fn this_thread() -> Pid {
    nix::unistd::gettid()
}

/// Has a signal do nothing but interrupt who gets it by [`interrupt`].
pub(crate) fn hear_interrupts() {
    extern "C" fn nothing(_: i32) {}
    let handler = SigHandler::Handler(nothing);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which every thread may do at any time.
    unsafe { sigaction(Signal::SIGURG, &action) }.unwrap();
}

/// Sends that signal to a thread of this process.
pub(crate) fn interrupt(thread: Pid) {
    let pid = nix::unistd::getpid().as_raw();
    // SAFETY: takes three numbers and no memory.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, thread.as_raw(), libc::SIGURG) };
    assert_eq!(sent, 0);
}

pub(crate) fn detach(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
}

pub(crate) fn kill_by_id(pid: u32) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

/// Stops or continues a process; returns when it is so.
pub(crate) fn pause(pid: u32, paused: bool) {
    let signal = if paused {
        Signal::SIGSTOP
    } else {
        Signal::SIGCONT
    };
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    let threads = std::path::PathBuf::from(format!("/proc/{pid}/task"));
    let is_stopped = |thread: &Path| {
        let stat = std::fs::read_to_string(thread.join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().unwrap_or_default();
        state.starts_with('T')
    };
    let all = || {
        let mut threads = std::fs::read_dir(&threads).unwrap();
        threads.all(|thread| is_stopped(&thread.unwrap().path()) == paused)
    };
    while !all() {
        std::thread::yield_now();
    }
}
