//! How a server begins: from a server that runs, from a guard whose server died, or anew.
//!
//! Invariant: at most one server listens at a socket. A server that starts holds the lock of
//! `<socket>.lock` until it listens. What is adopted is served without having been unmounted.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::layer::{self, Served, Way};
use super::pace::Pace;
use super::{Config, QUESTIONS, Shared};
use crate::client::Connection;
use crate::fanotify::Group;
use crate::guard::{self, Keeper};
use crate::ranges::Span;
use crate::state::{MOUNTS_MAX, Read};
use crate::wire::{FileId, Handed, Message, Role};
use crate::{Error, Result, log, sys};

/// One mount and its descriptors.
pub(crate) struct Holding {
    pub(crate) handed: Handed,
    pub(crate) data: File,
    pub(crate) evictions: File,
    /// Its session, of a mount through FUSE.
    pub(crate) fuse: Option<File>,
}

impl Holding {
    /// From a message and what was beside it.
    pub(crate) fn new(handed: Handed, fds: Vec<OwnedFd>) -> Result<Self> {
        let mut files = fds.into_iter().map(File::from);
        let (Some(data), Some(evictions)) = (files.next(), files.next()) else {
            return Err(Error::Protocol("a mount lacks descriptors"));
        };
        let fuse = files.next();
        Ok(Self {
            handed,
            data,
            evictions,
            fuse,
        })
    }

    /// What travels beside the message.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let files = [&self.data, &self.evictions].into_iter();
        files.chain(&self.fuse).map(AsFd::as_fd).collect()
    }
}

/// A question of the kernel that another server had not answered.
struct Inherited {
    mount: u64,
    unique: u64,
    waited: Duration,
    span: Span,
}

/// Everything that is handed over.
#[derive(Default)]
pub(crate) struct Estate {
    group: Option<Group>,
    questions: Vec<Inherited>,
    mounts: Vec<Holding>,
}

/// What a server begins with.
pub(super) struct Adopted {
    pub(super) estate: Estate,
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
    let mut estate = Estate::default();
    loop {
        match take(running, &mut estate)? {
            Some((Message::HandedAll { next_mount, .. }, fds)) => {
                let mut fds = fds.into_iter();
                let listener = fds.next();
                let listener = listener.ok_or(Error::Protocol("there is no listener"))?;
                let guard = Keeper::of(fds.next(), socket);
                running.send(&Message::Taken, &[])?;
                return Ok(Adopted {
                    estate,
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
    let (estate, next_mount, guard) = guard::meet(socket)?;
    match fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", socket, e));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = listen(socket)?;
    Ok(Adopted {
        estate,
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

/// Takes one message of a hand-over: what belongs to `estate` goes there, another message
/// comes back.
pub(crate) fn take(
    from: &Connection,
    estate: &mut Estate,
) -> Result<Option<(Message, Vec<OwnedFd>)>> {
    match from.receive()? {
        (Message::HandedGroup, fds) => {
            let group = fds.into_iter().next().map(|fd| Group::of(fd.into()));
            estate.group = group;
        }
        (
            Message::HandedRead {
                mount,
                number,
                waited_ms,
                span,
            },
            _,
        ) => {
            let group = estate.group.as_ref();
            let group = group.ok_or(Error::Protocol("a question lacks its group"))?;
            // At once: of what follows, nothing may take its number.
            estate
                .questions
                .extend(group.inherit(number).map(|unique| Inherited {
                    mount,
                    unique,
                    waited: Duration::from_millis(waited_ms),
                    span,
                }));
        }
        (Message::Handed(mount), fds) => {
            if estate.mounts.len() >= MOUNTS_MAX {
                return Err(Error::Protocol("too many mounts are handed over"));
            }
            estate.mounts.push(Holding::new(mount, fds)?);
        }
        other => return Ok(Some(other)),
    }
    Ok(None)
}

impl Shared {
    /// Serves what was handed over.
    pub(super) fn take_over(self: &Arc<Self>, estate: Estate, next_mount: u64) -> Result<()> {
        self.state.lock().skip_to(next_mount);
        if let Some(group) = estate.group {
            self.marked.adopt(Arc::new(group));
        }
        for holding in estate.mounts {
            self.take_over_mount(holding)?;
        }
        for question in estate.questions {
            self.take_over_question(&question);
        }
        if let Some(group) = self.marked.group() {
            let added = self.epoll.add(group.as_ref(), QUESTIONS);
            added.map_err(|e| Error::io("wait for", "questions of the kernel", e))?;
        }
        Ok(())
    }

    fn take_over_mount(&self, holding: Holding) -> Result<()> {
        let Holding {
            handed,
            data,
            evictions,
            fuse,
        } = holding;
        let path = PathBuf::from(OsString::from_vec(handed.listed.path.clone()));
        let err = |e| Error::io("inspect", &path, e);
        let (data_len, file) = (data.metadata().map_err(err)?.len(), FileId::of(&data));
        let mount = handed.listed.mount;
        let way = match (fuse, self.marked.group()) {
            (Some(fuse), _) => Way::Fuse(fuse),
            (None, Some(group)) => Way::Fanotify(Arc::clone(group)),
            (None, None) => return Err(Error::Protocol("a mount lacks its group")),
        };
        if let Way::Fanotify(_) = way {
            // The lock came with the file. Should it not be there, nothing may be allowed, and
            // of a mount that is not known nothing is.
            if !matches!(sys::lock_against_evictions(&data), Ok(true)) {
                log::say(&format!(
                    "{} cannot be kept: its reads fail",
                    path.display()
                ));
                return Ok(());
            }
            self.marked.insert(file.map_err(err)?, mount, handed.mark);
        }
        let served = Served {
            mount,
            size: handed.listed.size,
            data_len,
            way,
            data,
            evictions,
            path,
            pace: Pace::new(),
        };
        self.state.lock().adopt(handed);
        let served = self.insert(served)?;
        match served.fuse().map_or(Ok(()), layer::resend) {
            Ok(()) => self.resends.store(true, Ordering::Relaxed),
            Err(error) => log::say(&format!(
                "requests of {} that were under way may be lost: {error}",
                served.path.display()
            )),
        }
        Ok(())
    }

    fn take_over_question(&self, question: &Inherited) {
        let Some(served) = self.layer(question.mount) else {
            if let Some(group) = self.marked.group() {
                group.deny(question.unique);
            }
            return;
        };
        let now = Instant::now();
        let read = Read {
            thread: None,
            mount: question.mount,
            unique: question.unique,
            span: question.span,
            zeros: 0,
            since: now.checked_sub(question.waited).unwrap_or(now),
        };
        self.serve(&served, read, &mut []);
    }
}
