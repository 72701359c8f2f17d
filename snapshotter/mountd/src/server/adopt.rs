//! How a server begins: from a server that runs, from a guard whose server died, or anew.
//!
//! Invariant: at most one server listens at a socket. A server that starts holds the lock of
//! `<socket>.lock` until it listens. What is adopted is served without having been unmounted.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::layer::Served;
use super::{Config, Shared};
use crate::client::Connection;
use crate::guard::{self, Keeper};
use crate::state::MOUNTS_MAX;
use crate::wire::{Handed, Message, Role};
use crate::{Error, Result, log, sys};

/// One mount and its descriptors: session, data, number.
pub(crate) type Holding = (Handed, [OwnedFd; 3]);

/// What a server begins with.
pub(super) struct Adopted {
    pub(super) handed: Vec<Holding>,
    pub(super) next_mount: u64,
    pub(super) listener: OwnedFd,
    pub(super) guard: Keeper,
}

/// `None` when another server runs and is not to be replaced.
pub(super) fn begin(config: &Config) -> Result<Option<Adopted>> {
    let socket = &config.socket;
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    }
    let lock = lock(socket)?;
    let running = match Connection::connect(socket) {
        Ok(running) => Some(running),
        Err(Error::Closed) => None,
        Err(error) => return Err(error),
    };
    let adopted = match running {
        Some(running) if config.take_over => succeed(&running, socket)?,
        Some(_) => return Ok(None),
        None => begin_anew(socket)?,
    };
    drop(lock);
    Ok(Some(adopted))
}

fn lock(socket: &Path) -> Result<File> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(|e| Error::io("open", &path, e))?;
    // Bounded: whoever holds it is starting, and that waits for nobody for long.
    file.lock().map_err(|e| Error::io("lock", &path, e))?;
    Ok(file)
}

fn succeed(running: &Connection, socket: &Path) -> Result<Adopted> {
    running.send(&Message::Hello(Role::Successor), &[])?;
    let mut handed = Vec::new();
    loop {
        match take(running, &mut handed)? {
            Some((Message::HandedAll { next_mount, .. }, fds)) => {
                let mut fds = fds.into_iter();
                let listener = fds.next();
                let listener = listener.ok_or(Error::Protocol("there is no listener"))?;
                let guard = Keeper::of(fds.next(), socket);
                running.send(&Message::Taken, &[])?;
                return Ok(Adopted {
                    handed,
                    next_mount,
                    listener,
                    guard,
                });
            }
            Some(_) => return Err(Error::Protocol("it hands over what it should not")),
            None => {}
        }
    }
}

fn begin_anew(socket: &Path) -> Result<Adopted> {
    let (handed, next_mount, guard) = guard::meet(socket)?;
    match fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", socket, e));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = listen(socket)?;
    Ok(Adopted {
        handed,
        next_mount,
        listener,
        guard,
    })
}

/// Listens at `path`, for root alone.
pub(crate) fn listen(path: &Path) -> Result<OwnedFd> {
    let listener = sys::listen_at(path).map_err(|e| Error::io("listen at", path, e))?;
    let only_root = Permissions::from_mode(0o600);
    fs::set_permissions(path, only_root).map_err(|e| Error::io("protect", path, e))?;
    Ok(listener)
}

/// Takes one message of a hand-over: a mount goes into `handed`, another message comes back.
pub(crate) fn take(
    from: &Connection,
    handed: &mut Vec<Holding>,
) -> Result<Option<(Message, Vec<OwnedFd>)>> {
    match from.receive()? {
        (Message::Handed(mount), fds) => {
            let fds = <[OwnedFd; 3]>::try_from(fds);
            let fds = fds.map_err(|_| Error::Protocol("a mount lacks descriptors"))?;
            if handed.len() >= MOUNTS_MAX {
                return Err(Error::Protocol("too many mounts are handed over"));
            }
            handed.push((mount, fds));
            Ok(None)
        }
        other => Ok(Some(other)),
    }
}

impl Shared {
    /// Serves what was handed over.
    pub(super) fn take_over(self: &Arc<Self>, all: Vec<Holding>, next_mount: u64) -> Result<()> {
        self.state.lock().skip_to(next_mount);
        for (handed, fds) in all {
            let [fuse, data, evictions] = fds.map(File::from);
            let path = PathBuf::from(OsString::from_vec(handed.listed.path.clone()));
            let meta = data.metadata();
            let meta = meta.map_err(|e| Error::io("inspect", &path, e))?;
            let served = Served {
                mount: handed.listed.mount,
                size: handed.listed.size,
                data_len: meta.len(),
                fuse,
                data,
                evictions,
                path,
            };
            self.state.lock().adopt(handed);
            let served = self.insert(served)?;
            match served.resend() {
                Ok(()) => self.resends.store(true, Ordering::Relaxed),
                Err(error) => log::say(&format!(
                    "requests of {} that were under way may be lost: {error}",
                    served.path.display()
                )),
            }
        }
        Ok(())
    }
}
