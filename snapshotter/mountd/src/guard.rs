//! The guard: a second process that holds on to every mount when the server dies.
//!
//! Invariant: while the guard lives, a session outlives its server, and nobody who reads from
//! it hangs or sees a byte that was not granted: without a server every read is answered with
//! `EIO`, and so is what the server was asked and did not answer. It serves no data, ever. The
//! next server gets all sessions back, still mounted.
//!
//! It learns of a server's death from the connection between them, which the kernel closes
//! with the last process that has the server's end: so a server that is replaced by its
//! successor is not dead. It ends by itself when there is neither a server nor a mount.

mod keeper;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::client::{Connection, TAKE_WAIT};
use crate::fanotify::{Group, QUESTIONS_BYTES};
use crate::fuse::answer::{self, Reaction, react};
use crate::fuse::{self, REQUEST_BYTES};
use crate::server::{Holding, guard_socket, listen};
use crate::wire::{Handed, Message, Role};
use crate::{Error, Result, log, sys};

pub(crate) use keeper::{Keeper, meet};

/// How long the guard waits for the first server, and for each message of a hand-over.
const SERVER_WAIT: Duration = Duration::from_secs(30);

/// How long a guard that cannot take a connection, for want of a descriptor, does nothing.
const DEAF_PAUSE: Duration = Duration::from_millis(20);

/// How long after the last of its mounts a guard without a server may end.
const LOOK_PAUSE: Duration = Duration::from_secs(10);

const EIO: i32 = 5;
const ENODEV: i32 = 19;

struct Guard {
    listener: OwnedFd,
    /// Whom it guards.
    server: Option<Connection>,
    held: BTreeMap<u64, Holding>,
    /// Through which the kernel asks about mounts that have no session.
    group: Option<Group>,
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
        group: None,
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
        let mut buf = vec![0; REQUEST_BYTES.max(QUESTIONS_BYTES)];
        while self.is_needed() {
            let (first, rest) = self.wait().map_err(|e| Error::io("wait at", path, e))?;
            let [newcomer, server] = first;
            if server {
                self.listen_to_server();
            }
            if newcomer {
                self.accept();
            }
            if self.server.is_none() {
                self.deny_questions(&mut buf);
                rest.into_iter()
                    .for_each(|mount| self.deny(mount, &mut buf));
            }
        }
        // A server that comes now finds nobody, and starts a guard of its own.
        remove(path)
    }

    /// Whether there is a server, or a mount that has none. What is mounted through fanotify
    /// ends without a word: the kernel takes its mark away.
    fn is_needed(&mut self) -> bool {
        if self.server.is_some() {
            return true;
        }
        // Where that cannot be found out, all of it may be there.
        let marks = self.group.as_ref().map(Group::marked);
        let Some(Ok(marks)) = marks else {
            return marks.is_some() || !self.held.is_empty();
        };
        self.held
            .retain(|_, held| held.fuse.is_some() || marks.contains(&held.handed.mark));
        !marks.is_empty() || !self.held.is_empty()
    }

    /// Whether somebody connects, whether the server says something, and the mounts with
    /// requests, if there is no server; then questions of the kernel end it, too.
    fn wait(&self) -> io::Result<([bool; 2], Vec<u64>)> {
        let listener = (self.listener.as_fd(), false);
        if let Some(server) = &self.server {
            let ready = sys::wait(&[listener, (server.as_fd(), false)], None)?;
            let at = |index| ready.get(index).copied().unwrap_or(false);
            return Ok(([at(0), at(1)], Vec::new()));
        }
        let sessions = self.held.iter();
        let sessions = sessions.filter_map(|(mount, held)| Some((*mount, held.fuse.as_ref()?)));
        let (mounts, fuses): (Vec<u64>, Vec<&File>) = sessions.unzip();
        let mut fds = vec![listener];
        fds.extend(fuses.into_iter().map(|fuse| (fuse.as_fd(), false)));
        fds.extend(self.group.iter().map(|group| (group.as_fd(), false)));
        let pause = self.group.as_ref().map(|_| LOOK_PAUSE);
        let mut ready = sys::wait(&fds, pause)?.into_iter();
        let newcomer = ready.next().unwrap_or(false);
        let ready = mounts.into_iter().zip(ready);
        let ready = ready.filter(|(_, ready)| *ready);
        Ok(([newcomer, false], ready.map(|(mount, _)| mount).collect()))
    }

    fn listen_to_server(&mut self) {
        while let Some(server) = &self.server {
            match server.try_receive() {
                Ok(None) => return,
                Ok(Some((Message::Handed(handed), fds))) => self.hold(handed, fds),
                Ok(Some((Message::HandedGroup, fds))) => {
                    self.group = fds.into_iter().next().map(|fd| Group::of(fd.into()));
                }
                Ok(Some((Message::Dropped { mount }, _))) => drop(self.held.remove(&mount)),
                Err(Error::Closed) => self.server_died(),
                // Its server has as few, and leaves some of them; this one was given fewer.
                Err(Error::NoDescriptors(message)) if matches!(*message, Message::Handed(_)) => {
                    log::say("as many files are open as may be: a mount goes unguarded");
                }
                // A server of another age, which lives: it notices that its guard is gone,
                // and starts one of its own. Two must not answer for one session.
                Ok(Some(_)) | Err(_) => {
                    log::say("the server says what this guard does not understand: leaving");
                    self.held.clear();
                    self.group = None;
                    self.server = None;
                }
            }
        }
    }

    fn hold(&mut self, handed: Handed, fds: Vec<OwnedFd>) {
        let mount = handed.listed.mount;
        if let Ok(holding) = Holding::new(handed, fds) {
            self.next_mount = self.next_mount.max(mount.saturating_add(1));
            self.held.insert(mount, holding);
        }
    }

    fn server_died(&mut self) {
        self.server = None;
        if !self.held.is_empty() {
            log::say("the mount server is gone: reads fail until there is another");
        }
        // What it had read and not answered comes to us. An old kernel does not know that;
        // then those requests wait until the mount is gone.
        if let Some(group) = &self.group {
            group.deny_all();
        }
        for mut fuse in self.held.values().filter_map(|held| held.fuse.as_ref()) {
            if let Err(error) = fuse.write(&answer::resend()) {
                log::say(&format!(
                    "requests that were under way may be lost: {error}"
                ));
            }
        }
    }

    /// Denies what the kernel asks about now.
    fn deny_questions(&self, buf: &mut [u8]) {
        let Some(group) = &self.group else {
            return;
        };
        // There may be none; and one that could not be read was denied by the kernel.
        for question in group.next(buf).unwrap_or_default() {
            group.deny(question.unique);
        }
    }

    /// Answers one request without data.
    fn deny(&mut self, mount: u64, buf: &mut [u8]) {
        let held = self.held.get(&mount);
        let fuse = held.and_then(|held| Some((held, held.fuse.as_ref()?)));
        let Some((held, mut fuse)) = fuse else {
            return;
        };
        let len = match fuse.read(buf) {
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
        let _ = fuse.write(&bytes);
    }

    /// A server comes: it gets everything, unless there is one.
    fn accept(&mut self) {
        let Ok(socket) = sys::accept(self.listener.as_fd(), TAKE_WAIT) else {
            // It is there still, and would be met again at once.
            return std::thread::sleep(DEAF_PAUSE);
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
        if let Some(group) = &self.group {
            to.send(&Message::HandedGroup, &[group.as_fd()])?;
        }
        for held in self.held.values() {
            to.send(&Message::Handed(held.handed.clone()), &held.fds())?;
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
    match from.receive_within(SERVER_WAIT)? {
        (said, _) if said == *message => Ok(()),
        _ => Err(Error::Protocol(
            "it says what a server does not say to its guard",
        )),
    }
}
