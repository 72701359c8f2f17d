//! The server's end of its guard.
//!
//! Invariant: whatever happens to the guard, the server goes on; it says so when it goes on
//! without one, and tries for another until there is one. A guard that the server has given up
//! is killed: two must not answer for one session, nor one remove the other's socket.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Connection;
use crate::fanotify::Group;
use crate::log::{self, READY};
use crate::server::{Estate, guard_socket, take};
use crate::wire::{Handed, Message, Role};
use crate::{Error, Result, sys};

/// A guard that has not noticed yet that its server died refuses the next one; that is a
/// matter of microseconds.
const ATTEMPTS_MAX: u32 = 100;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// From one try to start another guard to the next, at least: what keeps one from starting, as a
/// lack of memory does, may last.
const RENEW_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for the end of a guard that was killed.
const END_WAIT: Duration = Duration::from_secs(1);

/// A guard, while there is one.
pub(crate) struct Keeper {
    link: Option<Connection>,
    /// Its process, where that can be had.
    process: Option<OwnedFd>,
    /// The same, if it was started here.
    child: Option<Child>,
    socket: PathBuf,
    /// When another was last tried for.
    tried: Option<Instant>,
    /// Whether that failed, which is said once.
    is_failing: bool,
}

impl Keeper {
    /// The guard at the other end of `link`.
    pub(crate) fn of(link: Option<OwnedFd>, socket: &Path) -> Self {
        let link = link.map(Connection::new);
        Self {
            process: link.as_ref().and_then(process_at),
            link,
            child: None,
            socket: socket.to_path_buf(),
            tried: None,
            is_failing: false,
        }
    }

    /// Has the guard hold the group through which the kernel asks.
    pub(crate) fn keep_group(&mut self, group: &Group) {
        self.tell(&Message::HandedGroup, &[group.as_fd()]);
    }

    /// Has the guard hold a mount: data, number, and its session if it has one.
    pub(crate) fn keep(&mut self, handed: &Handed, files: &[&File]) {
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.tell(&Message::Handed(handed.clone()), &fds);
    }

    /// Has the guard forget a mount.
    pub(crate) fn drop_mount(&mut self, mount: u64) {
        self.tell(&Message::Dropped { mount }, &[]);
    }

    fn tell(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) {
        let told = self.link.as_ref().map(|link| link.send(message, fds));
        if let Some(Err(error)) = told {
            self.lost(&error);
        }
    }

    /// The guard is gone, or is of no use any more.
    pub(crate) fn lost(&mut self, error: &Error) {
        log::say(&format!("the guard is gone: {error}"));
        self.link = None;
        if let Some(process) = self.process.take() {
            // It fails where there is none any more.
            let _ = sys::kill(process.as_fd());
            let _ = sys::wait(&[(process.as_fd(), false)], Some(END_WAIT));
        }
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        self.link.is_some()
    }

    /// Where there is none: how long no other one is to be tried for.
    pub(crate) fn missing_for(&self) -> Option<Duration> {
        let passed = self.tried.map_or(RENEW_PAUSE, |tried| tried.elapsed());
        (!self.is_there()).then(|| RENEW_PAUSE.saturating_sub(passed))
    }

    /// Starts another one, which holds nothing yet; `false` if that cannot be had now.
    pub(crate) fn renew(&mut self) -> bool {
        self.tried = Some(Instant::now());
        match self.try_renew() {
            Ok(()) if self.is_failing => log::say("there is a guard again"),
            Err(error) if !self.is_failing => {
                log::say(&format!("going on without a guard: {error}"));
            }
            Ok(()) | Err(_) => {}
        }
        self.is_failing = !self.is_there();
        self.is_there()
    }

    fn try_renew(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            // Else it would be in the table of processes for as long as this one is.
            let _ = child.try_wait();
        }
        let mut child = start(&self.socket)?;
        let link = Connection::connect(&guard_socket(&self.socket));
        let link = link.and_then(|link| receive_all(&link).map(|_| link));
        let link = link.inspect_err(|_| end(&mut child))?;
        self.process = process_at(&link);
        (self.link, self.child) = (Some(link), Some(child));
        Ok(())
    }

    /// For a successor, and to notice its end.
    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(AsFd::as_fd)
    }
}

/// Finds the guard of a server at `socket` that died, or starts one. What it held, and the
/// number of the next mount.
pub(crate) fn meet(socket: &Path) -> Result<(Estate, u64, Keeper)> {
    let path = guard_socket(socket);
    let mut child = None;
    for _ in 0..ATTEMPTS_MAX {
        let link = match Connection::connect(&path) {
            Ok(link) => link,
            Err(Error::Closed) => {
                child = Some(start(socket)?);
                continue;
            }
            Err(error) => return Err(error),
        };
        match receive_all(&link) {
            Ok((estate, next_mount)) => {
                let mut keeper = Keeper::of(None, socket);
                keeper.process = process_at(&link);
                (keeper.link, keeper.child) = (Some(link), child);
                return Ok((estate, next_mount, keeper));
            }
            Err(Error::Closed) => std::thread::sleep(ATTEMPT_PAUSE),
            Err(error) => return Err(error),
        }
    }
    Err(Error::Protocol("the guard has another server"))
}

fn receive_all(link: &Connection) -> Result<(Estate, u64)> {
    link.send(&Message::Hello(Role::Successor), &[])?;
    let mut estate = Estate::default();
    loop {
        match take(link, &mut estate)? {
            Some((Message::HandedByGuard { next_mount }, _)) => {
                link.send(&Message::Taken, &[])?;
                return Ok((estate, next_mount));
            }
            Some(_) => return Err(Error::Protocol("it says what a guard does not say")),
            None => {}
        }
    }
}

/// The guard at the other end of a connection.
fn process_at(link: &Connection) -> Option<OwnedFd> {
    let process = sys::process_at(link.as_fd()).ok()?;
    // A guard says nothing, but ends; then the number may have been another's already.
    let ended = sys::wait(&[(link.as_fd(), false)], Some(Duration::ZERO));
    ended.is_ok_and(|ended| ended == [false]).then_some(process)
}

/// Starts a guard and waits until it listens.
fn start(socket: &Path) -> Result<Child> {
    let err = |e| Error::io("start the guard of", socket, e);
    // This very program, also where its file was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg("guard").arg("--socket").arg(socket);
    // Of its own, so that nobody's Ctrl-C reaches it.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut guard = command.spawn().map_err(err)?;
    let mut said = vec![0; READY.len()];
    let out = guard.stdout.take();
    let listens = out.ok_or_else(|| io::ErrorKind::BrokenPipe.into());
    let listens = listens.and_then(|mut out| out.read_exact(&mut said));
    listens
        .inspect_err(|_| end(&mut guard))
        .map_err(err)
        .map(|()| guard)
}

/// Ends a guard that nobody has met: when it ends by itself, it may remove another's socket.
fn end(guard: &mut Child) {
    // Both fail only where it has ended and that was noticed.
    let _ = guard.kill();
    let _ = guard.wait();
}
