//! Mounts that show other owners: user namespaces that exist for their maps, and mounts that
//! are given them.
//!
//! Invariant: a process that is made here runs nothing but system calls, has no descriptor, and
//! is gone before the function returns, also where this process is killed meanwhile.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::sys::wait::{Id, WaitPidFlag, waitid};

/// A user namespace with these maps, in the form of `/proc/<pid>/uid_map`; it has no process.
pub(crate) fn user_namespace(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let child = Child::start()?;
    let of = |name| Path::new("/proc").join(child.pid.to_string()).join(name);
    fs::write(of("uid_map"), users)?;
    fs::write(of("gid_map"), groups)?;
    Ok(File::open(of("ns/user"))?.into())
}

/// Has a mount that is nowhere attached show owners as `namespace` maps them, and takes writing
/// through it away. Nothing that is mounted on its original is ever seen on it.
#[expect(
    unsafe_code,
    reason = "mount_setattr has no safe wrapper in our dependencies"
)]
pub(crate) fn map_owners(mount: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd,
    };
    // SAFETY: the descriptors are open, the path is a string with its NUL, and the size is that
    // of the structure, which lives until the call returns and is only read.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A process in a user namespace of its own, that waits for its end.
struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Child {
    #[expect(unsafe_code, reason = "clone3 has no safe wrapper in our dependencies")]
    fn start() -> io::Result<Self> {
        let parent = nix::unistd::getpid().as_raw();
        let mut pidfd: libc::c_int = -1;
        // SAFETY: a structure of integers, of which zero is "nothing".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        // It tells nobody of its end: whoever in this process waits for children has others.
        args.flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD) as u64;
        args.pidfd = &raw mut pidfd as u64;
        // SAFETY: no memory is shared with the child, which has a copy of this stack; the kernel
        // writes to `pidfd`, which lives. Other threads do not exist in the child, and may have
        // held locks: it only makes system calls.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of_val(&args)) };
        match pid {
            0 => wait_to_be_killed(parent),
            1.. => Ok(Self {
                pid: libc::pid_t::try_from(pid).map_err(io::Error::other)?,
                // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
                pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        use rustix::process::{Signal, pidfd_send_signal};
        // Both fail only where it is gone.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        // It is waited for by nobody who waits for any child, as it tells of its end by no signal.
        let how = WaitPidFlag::WEXITED | WaitPidFlag::__WALL;
        while waitid(Id::PIDFd(self.pidfd.as_fd()), how) == Err(nix::Error::EINTR) {}
    }
}

/// What the child does: it holds nothing of its parent's open, and does not outlive it.
#[expect(
    unsafe_code,
    reason = "between clone and its end only system calls are allowed"
)]
fn wait_to_be_killed(parent: libc::pid_t) -> ! {
    // SAFETY: system calls that touch no memory. Descriptors are closed that nobody here uses
    // any more.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, 0_u32);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // It may have died before it was asked for.
        while libc::getppid() == parent {
            libc::pause();
        }
        libc::_exit(0)
    }
}
