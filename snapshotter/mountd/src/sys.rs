//! System calls of the mount server.
//!
//! Invariant: with `sys/` the only place here that names `nix` or `libc`, or says `unsafe`.
//! Every function does one thing and decides nothing.

pub(crate) mod fanotify;

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag,
    SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt,
    shutdown, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::ranges::Span;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;
/// The byte of a data file that whoever evicts from it has locked; the store names the same
/// one. No file has such a byte, so no lock on contents can meet it.
const EVICTION_BYTE: i64 = i64::MAX - 1;

/// A socket of datagrams that listens at `path`, which must not exist.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// A connection to whoever listens at `path`; `WouldBlock` if it is not taken in time, or
/// later what is sent.
pub(crate) fn connect_to(path: &Path, time: Duration) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    give_up_after(&socket, time)?;
    let address = UnixAddr::new(path)?;
    not_interrupted(|| connect(socket.as_raw_fd(), &address))?;
    Ok(socket)
}

fn seqpacket() -> io::Result<OwnedFd> {
    let kind = SockType::SeqPacket;
    Ok(socket(
        AddressFamily::Unix,
        kind,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// The next connection; `WouldBlock` if later what is sent is not taken in time. Blocks unless
/// [`wait`] said that there is one.
pub(crate) fn accept(listener: BorrowedFd<'_>, time: Duration) -> io::Result<OwnedFd> {
    let socket = owned(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
    give_up_after(&socket, time)?;
    Ok(socket)
}

/// Has no message wait longer until the other side takes it.
fn give_up_after(socket: &OwnedFd, time: Duration) -> io::Result<()> {
    let time = TimeVal::milliseconds(i64::try_from(time.as_millis()).unwrap_or(i64::MAX));
    Ok(setsockopt(socket, sockopt::SendTimeout, &time)?)
}

/// The process that listened where this connection was made; it can be read once that has ended.
/// Meant for one that lives: the kernel gives its number, which another may have after it.
#[expect(unsafe_code, reason = "no crate in the tree wraps it")]
pub(crate) fn process_at(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let pid = getsockopt(&socket, sockopt::PeerCredentials)?.pid();
    // SAFETY: takes two numbers and no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = nix::errno::Errno::result(fd)?;
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(owned(fd))
}

/// Kills a process.
#[expect(unsafe_code, reason = "no crate in the tree wraps it")]
pub(crate) fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the descriptor is open while it is borrowed; no memory is named.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) };
    Ok(nix::errno::Errno::result(sent).map(drop)?)
}

#[expect(unsafe_code, reason = "the kernel gives numbers")]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a number that the kernel has just made for this process
    // and that nobody else has seen, so it is open and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends one datagram. `WouldBlock` if the other side is slow and `patient` is not set.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    patient: bool,
) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[] } else { &rights[..] };
    let wait = if patient {
        MsgFlags::empty()
    } else {
        MsgFlags::MSG_DONTWAIT
    };
    let flags = wait | MsgFlags::MSG_NOSIGNAL;
    let datagram = [IoSlice::new(bytes)];
    let send = || sendmsg::<UnixAddr>(socket.as_raw_fd(), &datagram, rights, flags, None);
    not_interrupted(send)?;
    Ok(())
}

/// Does it again, with all of its time, whenever a signal comes: where a wait is limited, the kernel restarts
/// nothing by itself.
fn not_interrupted<T>(call: impl Fn() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            done => return done,
        }
    }
}

/// A datagram that was received.
pub(crate) struct Received {
    /// Its length, bytes; 0 when the other side is gone.
    pub(crate) len: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether descriptors of it are missing: this process has as many as it may, or they were
    /// more than any message has.
    pub(crate) lacks: bool,
}

/// Receives one datagram. `WouldBlock` if there is none and `patient` is not set.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    patient: bool,
) -> io::Result<Received> {
    let mut space = cmsg_space!([RawFd; crate::wire::DESCRIPTORS_MAX]);
    let wait = if patient {
        MsgFlags::empty()
    } else {
        MsgFlags::MSG_DONTWAIT
    };
    let flags = wait | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut iov = [IoSliceMut::new(buf)];
    let got = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let (len, flags) = (got.bytes, got.flags);
    let lacks = flags.contains(MsgFlags::MSG_CTRUNC);
    let mut fds = Vec::new();
    if !lacks {
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                fds.extend(raw.into_iter().map(owned));
            }
        }
    } else {
        // Some may have come; nobody else knows of them.
        fds.extend(rights_in(&space).into_iter().map(owned));
    }
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Received { len, fds, lacks })
}

/// The descriptors that the kernel put into the space for them, which had been zeros, where there
/// were more: those are not looked at by nix.
fn rights_in(space: &[u8]) -> Vec<RawFd> {
    const HEAD: usize = size_of::<libc::cmsghdr>();
    let len = space
        .first_chunk()
        .map_or(0, |len| usize::from_ne_bytes(*len));
    let numbers = space.get(HEAD..len).unwrap_or_default();
    let (numbers, _) = numbers.as_chunks();
    numbers.iter().map(|n| RawFd::from_ne_bytes(*n)).collect()
}

/// Ends a connection for both sides.
pub(crate) fn shut_down(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(shutdown(socket.as_raw_fd(), Shutdown::Both)?)
}

/// Which of `fds` are ready to be read, or written where that is said; none after `timeout`.
pub(crate) fn wait(
    fds: &[(BorrowedFd<'_>, bool)],
    timeout: Option<Duration>,
) -> io::Result<Vec<bool>> {
    let flags = |writes: bool| match writes {
        true => PollFlags::POLLIN | PollFlags::POLLOUT,
        false => PollFlags::POLLIN,
    };
    let polled = fds.iter();
    let polled = polled.map(|(fd, writes)| PollFd::new(*fd, flags(*writes)));
    let mut polled: Vec<PollFd<'_>> = polled.collect();
    // Rounded up, so that what was waited for is over.
    let timeout = timeout.map(|time| time.saturating_add(Duration::from_millis(1)));
    let timeout = timeout.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
    });
    match nix::poll::poll(&mut polled, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect())
}

/// A counter that wakes who waits for it.
pub(crate) struct Bell(EventFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_flags(flags)?))
    }

    /// From now on it can be read.
    pub(crate) fn ring(&self) {
        // It fails only where it has been rung 2^64 times.
        let _ = self.0.write(1);
    }

    /// From now on it cannot, until it is rung again.
    pub(crate) fn hush(&self) {
        // It fails only where nobody rang.
        let _ = self.0.read();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What is told once, each time that something comes.
const ONCE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);

/// Descriptors that many threads wait for.
pub(crate) struct Epoll(nix::sys::epoll::Epoll);

impl Epoll {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EpollCreateFlags::EPOLL_CLOEXEC;
        Ok(Self(nix::sys::epoll::Epoll::new(flags)?))
    }

    /// Waits for `fd`, too, as `id`.
    pub(crate) fn add(&self, fd: impl AsFd, id: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, id))?)
    }

    /// The same, and has one thread told each time that something comes, not as long as it is
    /// there: that one reads until there is nothing.
    pub(crate) fn add_once(&self, fd: impl AsFd, id: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(ONCE, id))?)
    }

    /// Has a thread told again if something is there now, which nobody may be about to read.
    pub(crate) fn tell_again(&self, fd: impl AsFd, id: u64) -> io::Result<()> {
        Ok(self.0.modify(fd, &mut EpollEvent::new(ONCE, id))?)
    }

    /// Has nobody told until [`Epoll::tell_again`].
    pub(crate) fn tell_nobody(&self, fd: impl AsFd, id: u64) -> io::Result<()> {
        let nothing = EpollFlags::empty();
        Ok(self.0.modify(fd, &mut EpollEvent::new(nothing, id))?)
    }

    /// Does so no longer.
    pub(crate) fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.0.delete(fd)?)
    }

    /// The id of one that is ready. Blocks.
    pub(crate) fn next(&self) -> io::Result<u64> {
        let mut events = [EpollEvent::empty()];
        match self
            .0
            .wait(&mut events, nix::sys::epoll::EpollTimeout::NONE)
        {
            Ok(_) => Ok(events[0].data()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Gives this process the name that `ps` and `top` show, 15 bytes at most.
pub(crate) fn set_name(name: &CStr) -> io::Result<()> {
    Ok(nix::sys::prctl::set_name(name)?)
}

/// A new session with the kernel's FUSE, not mounted. Reads from it never block.
pub(crate) fn open_fuse() -> io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK).open("/dev/fuse")
}

/// Mounts a session at a directory, read-only. What its file's mode allows is the kernel's to
/// check, also where another user's file system lies above it.
pub(crate) fn mount_fuse(fuse: &File, target: &Path) -> io::Result<()> {
    let fd = fuse.as_raw_fd();
    let data =
        format!("fd={fd},rootmode=40500,user_id=0,group_id=0,allow_other,default_permissions");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let (name, kind) = (Some("lazarette"), Some("fuse.lazarette"));
    Ok(nix::mount::mount(
        name,
        target,
        kind,
        flags,
        Some(data.as_str()),
    )?)
}

/// Unmounts `target`; fails with `EBUSY` while anything in it is open.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    Ok(nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW)?)
}

/// Takes `target` out of the tree of mounts at once.
pub(crate) fn detach(target: &Path) -> io::Result<()> {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    Ok(nix::mount::umount2(target, flags)?)
}

/// Has the kernel write what it caches of a part of a file, and waits for that. It may be lost
/// all the same, should the power go: neither the disk's own cache nor the file's size and places
/// are written.
#[expect(unsafe_code, reason = "no crate in the tree wraps it")]
pub(crate) fn write_out(data: &File, span: Span) -> io::Result<()> {
    let (offset, len) = (signed(span.start())?, signed(span.len())?);
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open while `data` is borrowed; the call touches no memory of ours.
    let done = unsafe { libc::sync_file_range(data.as_raw_fd(), offset, len, flags) };
    Ok(nix::errno::Errno::result(done).map(drop)?)
}

/// Has the kernel forget what it caches of a part of a file, as far as it is on the disk.
pub(crate) fn forget(data: &File, span: Span) -> io::Result<()> {
    let (offset, len) = (signed(span.start())?, signed(span.len())?);
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    Ok(nix::fcntl::posix_fadvise(data, offset, len, advice)?)
}

fn signed(number: u64) -> io::Result<i64> {
    i64::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Fails where this process may not open so many more files.
pub(crate) fn can_open(more: usize) -> io::Result<()> {
    let opened = (0..more).map(|_| Bell::new());
    opened.collect::<io::Result<Vec<_>>>().map(drop)
}

/// Takes the read lock that keeps everybody from evicting from a data file; `false` if
/// somebody is evicting. It belongs to the open file: whoever has a duplicate has the lock.
pub(crate) fn lock_against_evictions(data: &File) -> io::Result<bool> {
    set_lock(data, libc::F_RDLCK)
}

/// Gives it back.
pub(crate) fn unlock(data: &File) -> io::Result<bool> {
    set_lock(data, libc::F_UNLCK)
}

fn set_lock(data: &File, kind: i32) -> io::Result<bool> {
    let short = |number: i32| i16::try_from(number).unwrap_or_default();
    let lock = libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: EVICTION_BYTE,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(data, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::thread::JoinHandleExt as _;
    use std::thread::{sleep, spawn};

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use nix::sys::socket::socketpair;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(120);

    extern "C" fn nothing(_: i32) {}

    /// Has this signal interrupt calls of this process, as those do that a daemon listens to.
    #[expect(unsafe_code, reason = "no crate in the tree wraps it")]
    fn listen_to(signal: Signal) {
        let handler = SigHandler::Handler(nothing);
        let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(signal, &action) }.unwrap();
    }

    #[expect(unsafe_code, reason = "no crate in the tree wraps it")]
    fn interrupt<T>(thread: &std::thread::JoinHandle<T>, signal: Signal) {
        // SAFETY: the thread is not joined yet, so its number is its own.
        let sent = unsafe { libc::pthread_kill(thread.as_pthread_t() as _, signal as i32) };
        assert_eq!(sent, 0);
    }

    #[test]
    fn signals_end_no_wait_for_the_other_side() {
        listen_to(Signal::SIGUSR1);
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        give_up_after(&ours, PATIENCE).unwrap();
        while send(ours.as_fd(), &[1; 64], &[], false).is_ok() {}
        let sender = spawn(move || send(ours.as_fd(), &[2; 64], &[], true));
        for _ in 0..100 {
            interrupt(&sender, Signal::SIGUSR1);
            sleep(Duration::from_millis(1));
        }
        assert!(!sender.is_finished(), "{:?}", sender.join());
        let mut buf = [0; 64];
        while buf != [2; 64] {
            receive(theirs.as_fd(), &mut buf, true).unwrap();
        }
        sender.join().unwrap().unwrap();
    }
}
