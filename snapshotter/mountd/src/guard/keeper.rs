//! The server's end of its guard.
//!
//! Invariant: whatever happens to the guard, the server goes on; it says so when it goes on
//! without one, and gets another.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::client::Connection;
use crate::fanotify::Group;
use crate::log::{self, READY};
use crate::server::{Estate, guard_socket, take};
use crate::wire::{Handed, Message, Role};
use crate::{Error, Result};

/// A guard that has not noticed yet that its server died refuses the next one; that is a
/// matter of microseconds.
const ATTEMPTS_MAX: u32 = 100;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// A guard, while there is one.
pub(crate) struct Keeper {
    link: Option<Connection>,
    socket: PathBuf,
}

impl Keeper {
    /// The guard at the other end of `link`.
    pub(crate) fn of(link: Option<OwnedFd>, socket: &Path) -> Self {
        Self {
            link: link.map(Connection::new),
            socket: socket.to_path_buf(),
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

    /// The guard is gone.
    pub(crate) fn lost(&mut self, error: &Error) {
        log::say(&format!("the guard is gone: {error}"));
        self.link = None;
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        self.link.is_some()
    }

    /// Starts another one, which holds nothing yet.
    pub(crate) fn renew(&mut self) -> Result<()> {
        start(&self.socket)?;
        let link = Connection::connect(&guard_socket(&self.socket))?;
        receive_all(&link)?;
        self.link = Some(link);
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
    for _ in 0..ATTEMPTS_MAX {
        let link = match Connection::connect(&path) {
            Ok(link) => link,
            Err(Error::Closed) => {
                start(socket)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        match receive_all(&link) {
            Ok((estate, next_mount)) => {
                let socket = socket.to_path_buf();
                let link = Some(link);
                return Ok((estate, next_mount, Keeper { link, socket }));
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

/// Starts a guard and waits until it listens.
fn start(socket: &Path) -> Result<()> {
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
    let out = guard.stdout.as_mut();
    let out = out.ok_or_else(|| err(io::ErrorKind::BrokenPipe.into()))?;
    out.read_exact(&mut said).map_err(err)
}
