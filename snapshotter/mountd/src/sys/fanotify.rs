//! System calls of fanotify, as far as pre-content events need them.
//!
//! Invariant: numbers in, descriptors out; nothing is decided. `libc` does not name the event
//! that is used here, so its number stands here; it is the kernel's and does not change.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// `FAN_PRE_ACCESS`: somebody is about to read, and waits until that is allowed.
pub(crate) const PRE_ACCESS: u64 = 0x0010_0000;
/// The answer that lets it.
pub(crate) const ALLOW: u32 = libc::FAN_ALLOW;
/// The answer that has it fail.
pub(crate) const DENY: u32 = libc::FAN_DENY;
/// What a mark goes on naming when [`PRE_ACCESS`] is taken from it. It never comes to pass for
/// files that are open for reading only, so it costs nothing.
const NEVER: u64 = libc::FAN_CLOSE_WRITE;

/// A group for pre-content events, with no mark yet. Reads from it never block.
pub(crate) fn new_group() -> io::Result<File> {
    let flags = libc::FAN_CLASS_PRE_CONTENT
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let opened = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC;
    init(flags, opened.unsigned_abs()).map(File::from)
}

#[expect(unsafe_code, reason = "no crate in the tree wraps fanotify")]
fn init(flags: u32, opened: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let fd = unsafe { libc::fanotify_init(flags, opened) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(super::owned(fd))
}

/// From now on every file that is opened through the mount of `mounted` is asked about.
pub(crate) fn mark(group: &File, mounted: BorrowedFd<'_>) -> io::Result<()> {
    change(group, libc::FAN_MARK_ADD, PRE_ACCESS | NEVER, mounted)
}

/// From now on none of them is; the mark stays.
pub(crate) fn unmark(group: &File, mounted: BorrowedFd<'_>) -> io::Result<()> {
    change(group, libc::FAN_MARK_REMOVE, PRE_ACCESS, mounted)
}

#[expect(unsafe_code, reason = "no crate in the tree wraps fanotify")]
fn change(group: &File, command: u32, mask: u64, mounted: BorrowedFd<'_>) -> io::Result<()> {
    // By its name, as the descriptor may be one that can only be named.
    let path = CString::new(format!("/proc/self/fd/{}", mounted.as_raw_fd()))?;
    let flags = command | libc::FAN_MARK_MOUNT;
    // SAFETY: the path is a string that ends with a zero and outlives the call; both
    // descriptors are open while they are borrowed. Everything else is numbers.
    let outcome = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            flags,
            mask,
            libc::AT_FDCWD,
            path.as_ptr(),
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The descriptor of an event.
pub(crate) fn opened_by_event(fd: RawFd) -> OwnedFd {
    super::owned(fd)
}

/// A duplicate of `file` with exactly that number; `None` where the number is taken.
pub(crate) fn duplicate_as(file: &File, number: RawFd) -> io::Result<Option<OwnedFd>> {
    let duplicate = super::owned(fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(number))?);
    Ok((duplicate.as_raw_fd() == number).then_some(duplicate))
}

/// Lets this process open as many files as it may, and at most `most`.
pub(crate) fn limit_files(most: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = hard.min(most);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
