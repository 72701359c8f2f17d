//! The guard: a second process that holds on to every mount when the server dies.
//!
//! Invariant: while the guard lives, a session outlives its server, and nobody who reads from
//! it hangs or sees a byte that was not granted: without a server every read is answered with
//! `EIO`. It serves no data, ever. The next server gets all sessions back, still mounted.
//!
//! It learns of a server's death from the connection between them, which the kernel closes
//! with the last process that has the server's end: so a server that is replaced by its
//! successor is not dead. It ends by itself when there is neither a server nor a mount.

mod keeper;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::client::Connection;
use crate::fuse::answer::{self, Reaction, react};
use crate::fuse::{self, REQUEST_BYTES};
use crate::server::{guard_socket, listen};
use crate::wire::{Handed, Message, Role};
use crate::{Error, Result, log, sys};

pub(crate) use keeper::{Keeper, meet};

/// How long the guard waits for the first server, and for each message of a hand-over.
const SERVER_WAIT: Duration = Duration::from_secs(30);

const EIO: i32 = 5;
const ENODEV: i32 = 19;

struct Held {
    handed: Handed,
    fuse: File,
    data: File,
    evictions: File,
}

struct Guard {
    listener: OwnedFd,
    /// Whom it guards.
    server: Option<Connection>,
    held: BTreeMap<u64, Held>,
    next_mount: u64,
}

/// Runs the guard of the server at `socket` until there is nothing to be guarded.
pub fn run(socket: &Path) -> Result<()> {
    let path = guard_socket(socket);
    // It was started as /proc/self/exe, which would be its name.
    let named = sys::set_name(c"laz-mountd-grd");
    named.map_err(|e| Error::io("name the guard of", socket, e))?;
    remove(&path)?;
    let mut guard = Guard {
        listener: listen(&path)?,
        server: None,
        held: BTreeMap::new(),
        next_mount: 1,
    };
    log::ready();
    let met = sys::wait(&[(guard.listener.as_fd(), false)], Some(SERVER_WAIT));
    if met.is_ok_and(|met| met == [true]) {
        guard.accept();
    }
    guard.watch(&path)
}

impl Guard {
    fn watch(&mut self, path: &Path) -> Result<()> {
        let mut buf = vec![0; REQUEST_BYTES];
        while self.server.is_some() || !self.held.is_empty() {
            let (first, rest) = self.wait().map_err(|e| Error::io("wait at", path, e))?;
            let [newcomer, server] = first;
            if server {
                self.listen_to_server();
            }
            if newcomer {
                self.accept();
            }
            if self.server.is_none() {
                rest.into_iter()
                    .for_each(|mount| self.deny(mount, &mut buf));
            }
        }
        // A server that comes now finds nobody, and starts a guard of its own.
        remove(path)
    }

    /// Whether somebody connects, whether the server says something, and the mounts with
    /// requests, if there is no server.
    fn wait(&self) -> io::Result<([bool; 2], Vec<u64>)> {
        let mut fds: Vec<(BorrowedFd<'_>, bool)> = vec![(self.listener.as_fd(), false)];
        match &self.server {
            Some(server) => fds.push((server.as_fd(), false)),
            None => fds.extend(self.held.values().map(|held| (held.fuse.as_fd(), false))),
        }
        let mut ready = sys::wait(&fds, None)?.into_iter();
        let newcomer = ready.next().unwrap_or(false);
        if self.server.is_some() {
            return Ok(([newcomer, ready.next().unwrap_or(false)], Vec::new()));
        }
        let mounts = self.held.keys().zip(ready).filter(|(_, ready)| *ready);
        Ok(([newcomer, false], mounts.map(|(mount, _)| *mount).collect()))
    }

    fn listen_to_server(&mut self) {
        while let Some(server) = &self.server {
            match server.try_receive() {
                Ok(None) => return,
                Ok(Some((Message::Handed(handed), fds))) => self.hold(handed, fds),
                Ok(Some((Message::Dropped { mount }, _))) => drop(self.held.remove(&mount)),
                Err(Error::Closed) => self.server_died(),
                // A server of another age, which lives: it notices that its guard is gone,
                // and starts one of its own. Two must not answer for one session.
                Ok(Some(_)) | Err(_) => {
                    log::say("the server says what this guard does not understand: leaving");
                    self.held.clear();
                    self.server = None;
                }
            }
        }
    }

    fn hold(&mut self, handed: Handed, fds: Vec<OwnedFd>) {
        let mount = handed.listed.mount;
        if let Ok([fuse, data, evictions]) = <[OwnedFd; 3]>::try_from(fds) {
            self.next_mount = self.next_mount.max(mount.saturating_add(1));
            let held = Held {
                handed,
                fuse: fuse.into(),
                data: data.into(),
                evictions: evictions.into(),
            };
            self.held.insert(mount, held);
        }
    }

    fn server_died(&mut self) {
        self.server = None;
        if !self.held.is_empty() {
            log::say("the mount server is gone: reads fail until there is another");
        }
        // What it had read and not answered comes to us. An old kernel does not know that;
        // then those requests wait until the mount is gone.
        for held in self.held.values() {
            if let Err(error) = (&held.fuse).write(&answer::resend()) {
                log::say(&format!(
                    "requests that were under way may be lost: {error}"
                ));
            }
        }
    }

    /// Answers one request without data.
    fn deny(&mut self, mount: u64, buf: &mut [u8]) {
        let Some(held) = self.held.get(&mount) else {
            return;
        };
        let len = match (&held.fuse).read(buf) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(ENODEV) => {
                self.held.remove(&mount);
                return;
            }
            Err(_) => return,
        };
        let Ok(request) = fuse::parse(buf.get(..len).unwrap_or_default()) else {
            return;
        };
        let bytes = match react(&request, held.handed.listed.size) {
            Reaction::Send(bytes) => bytes,
            Reaction::Read { .. } => answer::error(request.unique, EIO),
            Reaction::Interrupt(_) | Reaction::Nothing => return,
        };
        // A request that was withdrawn needs no answer.
        let _ = (&held.fuse).write(&bytes);
    }

    /// A server comes: it gets everything, unless there is one.
    fn accept(&mut self) {
        let Ok(socket) = sys::accept(self.listener.as_fd()) else {
            return;
        };
        if self.server.is_some() {
            return;
        }
        let server = Connection::new(socket);
        match self.hand_over(&server) {
            Ok(()) => self.server = Some(server),
            Err(error) => log::say(&format!("a server came and went: {error}")),
        }
    }

    fn hand_over(&self, to: &Connection) -> Result<()> {
        expect(to, &Message::Hello(Role::Successor))?;
        for held in self.held.values() {
            let fds = [held.fuse.as_fd(), held.data.as_fd(), held.evictions.as_fd()];
            to.send(&Message::Handed(held.handed.clone()), &fds)?;
        }
        let next_mount = self.next_mount;
        to.send(&Message::HandedByGuard { next_mount }, &[])?;
        expect(to, &Message::Taken)
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn expect(from: &Connection, message: &Message) -> Result<()> {
    let ready = sys::wait(&[(from.as_fd(), false)], Some(SERVER_WAIT));
    if !ready.is_ok_and(|ready| ready == [true]) {
        return Err(Error::Protocol("it says nothing"));
    }
    match from.receive()? {
        (said, _) if said == *message => Ok(()),
        _ => Err(Error::Protocol(
            "it says what a server does not say to its guard",
        )),
    }
}
