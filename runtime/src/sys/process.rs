//! Processes: subreaper, umask, pidfd, wait, exec, poll, what they share, modes of descriptors, what the kernel can.
//!
//! Used by the executor host (a single-threaded process) and, for pidfds, by the engine.
//! Never ends a process by name or group: only by a pidfd, which cannot be reused.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Whether this process acts as root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Lets this process open as many files as it may: a mounted layer takes about eight.
pub(crate) fn raise_open_files() -> io::Result<u64> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(most)
}

/// Ends this process with `code`, now: no destructor of a C or C++ library runs any more.
/// Nothing may be left in buffers.
#[expect(unsafe_code, reason = "_exit has no safe wrapper in our dependencies")]
pub(crate) fn leave(code: u8) -> ! {
    // SAFETY: the call takes an integer and does not return.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Makes this process the one that orphaned descendants are handed to.
pub(crate) fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)
}

/// What this process, and those it starts, leave off the modes of files they make.
pub(crate) fn set_umask(bits: u32) {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(bits));
}

/// Whether this kernel can make a whole tree of mounts read-only at once (Linux 5.12).
#[expect(
    unsafe_code,
    reason = "mount_setattr has no safe wrapper in our dependencies"
)]
pub(crate) fn can_change_mount_trees() -> bool {
    let (path, attr): (_, *const libc::mount_attr) = (c"".as_ptr(), std::ptr::null());
    // SAFETY: a size of 0 is refused before anything is read or changed, where the call exists.
    let outcome = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, path, 0, attr, 0_usize) };
    outcome == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// The file `file` in a mount of its own, in nobody's tree, that nobody can write through (Linux 5.12);
/// close-on-exec. What is executed by [`path_of`] it cannot be written by who runs it.
#[expect(
    unsafe_code,
    reason = "mount_setattr has no safe wrapper in our dependencies"
)]
pub(crate) fn read_only_view(file: &Path) -> io::Result<OwnedFd> {
    use rustix::mount::OpenTreeFlags;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = rustix::mount::open_tree(rustix::fs::CWD, file, flags)?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let (call, fd, size) = (
        libc::SYS_mount_setattr,
        view.as_raw_fd(),
        size_of_val(&attr),
    );
    let (path, attr) = (c"".as_ptr(), &raw const attr);
    // SAFETY: the descriptor is open, the path ends with a NUL byte, and `attr`, of `size` bytes, outlives
    // the call, which only reads it.
    match unsafe { libc::syscall(call, fd, path, libc::AT_EMPTY_PATH, attr, size) } {
        0 => Ok(view),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A name for a descriptor, in this process and what it starts, while it is open.
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Waits for the write lock on `file` and takes it, until this process closes the file or ends. Processes
/// that it forks do not have it.
pub(crate) fn lock_file(file: &File) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "they are 1 and 0")]
    let (write, beginning) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    let whole = libc::flock {
        l_type: write,
        l_whence: beginning,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLKW(&whole))?;
    Ok(())
}

/// Has the kernel kill this process when the one that made it ends. Kept when it executes a program,
/// unless that gives it privileges.
pub(crate) fn die_with_parent() {
    // Nothing but a bad number is refused.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
}

/// What lists of processes call this one.
pub(crate) fn set_name(name: &CStr) {
    // Nothing but a bad pointer is refused.
    let _ = nix::sys::prctl::set_name(name);
}

/// A descriptor for the process `pid`, close-on-exec; readable once the process has ended.
#[expect(
    unsafe_code,
    reason = "pidfd_open has no safe wrapper in our dependencies"
)]
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the syscall takes two integers and touches no memory of ours.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0_u32) };
    let raw = i32::try_from(raw).map_err(io::Error::other)?;
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Sends `signal` to the process behind `pidfd`. A process that is already gone is no error.
#[expect(
    unsafe_code,
    reason = "pidfd_send_signal has no safe wrapper in our dependencies"
)]
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is alive while borrowed; a null siginfo is allowed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0_u32,
        )
    };
    if sent == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        gone if gone.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}

/// Waits for the child `pid` to end; its exit code, or 128 + the signal that ended it.
pub(crate) fn wait_for(pid: i32) -> io::Result<i32> {
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reaps every child that has already ended; never blocks.
pub(crate) fn reap_ended() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}

/// Waits until one of two descriptors is readable or hung up; says which.
/// `timeout_ms` of `None` waits without limit.
pub(crate) fn poll_two(
    first: BorrowedFd<'_>,
    second: BorrowedFd<'_>,
    timeout_ms: Option<u16>,
) -> io::Result<(bool, bool)> {
    let timeout = timeout_ms.map_or(PollTimeout::NONE, PollTimeout::from);
    loop {
        let mut fds = [
            PollFd::new(first, PollFlags::POLLIN),
            PollFd::new(second, PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) => {
                let [a, b] = fds;
                return Ok((a.any().unwrap_or(true), b.any().unwrap_or(true)));
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until a descriptor is readable or hung up, without limit.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>) -> io::Result<()> {
    poll_two(fd, fd, None).map(drop)
}

/// A close-on-exec pipe: read end, write end.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)
}

/// An empty file without a name or a place on a disk, close-on-exec. Forked children have
/// it too, and share its offset.
pub(crate) fn nameless_file() -> io::Result<std::fs::File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(memfd_create(c"lazarette", MFdFlags::MFD_CLOEXEC)?.into())
}

/// Gives every signal but the broken-pipe one its default meaning. A process inherits
/// what its starter ignores (`nohup`), and would hand that to the container.
#[expect(
    unsafe_code,
    reason = "resetting a signal disposition is unsafe in general"
)]
pub(crate) fn reset_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for each in Signal::iterator() {
        if matches!(each, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE) {
            continue;
        }
        // SAFETY: the default disposition runs no code of ours.
        unsafe { signal(each, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// Replaces this process by `path` with `args` (first is argv[0]) and the current
/// environment. Gives the broken-pipe signal its default meaning back first, which the
/// Rust runtime had set to "ignore". Returns only on failure.
#[expect(
    unsafe_code,
    reason = "resetting a signal disposition is unsafe in general"
)]
pub(crate) fn exec(path: &CString, args: &[CString]) -> io::Error {
    // SAFETY: the default disposition runs no code of ours.
    let reset = unsafe {
        nix::sys::signal::signal(
            nix::sys::signal::Signal::SIGPIPE,
            nix::sys::signal::SigHandler::SigDfl,
        )
    };
    if let Err(error) = reset {
        return error.into();
    }
    match nix::unistd::execv(path, args) {
        Ok(never) => match never {},
        Err(error) => error.into(),
    }
}

/// The hard limit of open files of this process.
pub(crate) fn nofile_hard() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.1)
}

/// Whether this process may execute the file `path`, by permissions alone.
pub(crate) fn may_execute(path: &Path) -> io::Result<()> {
    Ok(nix::unistd::access(path, nix::unistd::AccessFlags::X_OK)?)
}

/// Host name of this Linux UTS namespace; empty when it is not UTF-8.
pub(crate) fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default()
}

/// Watches a non-blocking `file` for readiness. Must run inside a tokio runtime.
#[expect(
    unsafe_code,
    reason = "tokio asks its callers to vouch for the descriptor"
)]
pub(crate) fn watch(file: std::fs::File) -> io::Result<tokio::io::unix::AsyncFd<std::fs::File>> {
    // SAFETY: a File owns one descriptor, always the same, open until it is dropped.
    Ok(unsafe { tokio::io::unix::AsyncFd::register(file) }?)
}

/// Sets non-blocking mode of the open file description behind `fd`.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = status_flags(&fd)?;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Whether the open file description behind `fd` is in non-blocking mode.
pub(crate) fn is_nonblocking(fd: impl AsFd) -> io::Result<bool> {
    Ok(status_flags(fd)?.contains(OFlag::O_NONBLOCK))
}

/// What is behind `fd` by a description of its own, in blocking mode. Never waits: a named pipe
/// without a reader is refused.
pub(crate) fn open_to_write(fd: BorrowedFd<'_>) -> io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    // A terminal must not become this process's controlling one.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = std::fs::File::options()
        .write(true)
        .custom_flags(flags.bits())
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let flags = status_flags(&file)?;
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(file)
}

fn status_flags(fd: impl AsFd) -> io::Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?))
}
