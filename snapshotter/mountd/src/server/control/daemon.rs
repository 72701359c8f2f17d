//! What a daemon says.
//!
//! Invariant: a mount is known to the guard before it is made, and served before its daemon
//! is told of it. What fails half way leaves nothing. Nothing is mounted with the last
//! descriptors: those are for whoever comes to repair something.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::Control;
use crate::fanotify::Group;
use crate::server::QUESTIONS;
use crate::server::layer::{EIO, Served, Way};
use crate::server::link::Link;
use crate::server::pace::Pace;
use crate::state::Granted;
use crate::wire::{Basis, FileId, Handed, Listed, Message, Through};
use crate::{Error, Result, log, sys};

const ENOENT: u32 = 2;
const ESTALE: u32 = 116;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
/// Descriptors that mounts leave: for a guard that has to be started and met, and for clients.
/// What the kernel asks through fanotify takes of them, too, and is denied where there are none.
const SPARE: usize = 16;
/// What is shown is the data file up to the end of its last block of this size.
const BLOCK_BYTES: u64 = 4096;

impl Control {
    pub(super) fn daemon_says(
        &mut self,
        link: &mut Link,
        message: Message,
        fds: Vec<OwnedFd>,
    ) -> Result<()> {
        let mut done = |request, mount, errno| {
            link.send(&Message::Done {
                request,
                mount,
                errno,
            })
        };
        match message {
            Message::Mount {
                request,
                through,
                size,
                name,
                path,
            } => {
                let asked = Listed {
                    mount: 0,
                    through,
                    size,
                    name,
                    path,
                };
                match self.mount(asked, fds) {
                    Ok(mount) => done(request, mount, 0),
                    Err(errno) => done(request, 0, errno),
                }
            }
            Message::Attach {
                request,
                mount,
                file,
            } => done(request, mount, self.attach(mount, file)),
            Message::Mark { request, mount } => done(request, mount, self.mark(mount, fds)),
            Message::Unmount { request, mount } => done(request, mount, self.unmount(mount)),
            Message::Grant {
                want,
                mount,
                number,
                span,
            } => {
                let granted = self.shared.state.lock().grant(mount, want, number, span);
                self.answer(mount, granted);
                Ok(())
            }
            Message::Failed { want, mount, errno } => {
                let failed = self.shared.state.lock().fail(mount, want);
                if let (Some(read), Some(served)) = (failed, self.shared.layer(mount)) {
                    served.refuse(read.unique, errno_of(errno));
                }
                Ok(())
            }
            _ => Err(Error::Protocol("it says what a daemon does not say")),
        }
    }

    /// Answers the reads that waited for a grant.
    fn answer(&mut self, mount: u64, granted: Granted) {
        let Some(served) = self.shared.layer(mount) else {
            return;
        };
        for read in granted.again {
            self.shared.serve(&served, read, &mut self.buf);
        }
        if let Some(read) = granted.refused {
            served.refuse(read.unique, EIO);
        }
    }

    /// The new mount's number, or an errno.
    fn mount(&mut self, asked: Listed, fds: Vec<OwnedFd>) -> Result<u64, u32> {
        let name = name_of(&asked.name);
        self.try_mount(asked, fds).map_err(|error| {
            log::say(&format!("cannot mount {name}: {error}"));
            errno_in(&error)
        })
    }

    fn try_mount(&mut self, asked: Listed, fds: Vec<OwnedFd>) -> io::Result<u64> {
        let files = <[OwnedFd; 2]>::try_from(fds).map_err(|_| io::ErrorKind::InvalidInput)?;
        let [data, evictions] = files.map(File::from);
        let data_len = data.metadata()?.len();
        let is_whole = asked.size == data_len || asked.through == Through::Fuse;
        if !is_whole || asked.size < data_len || asked.size - data_len >= BLOCK_BYTES {
            return Err(io::Error::from_raw_os_error(EINVAL));
        }
        let mut served = Served {
            mount: 0,
            size: asked.size,
            data_len,
            way: match asked.through {
                Through::Fuse => Way::Fuse(sys::open_fuse()?),
                Through::Fanotify => Way::Fanotify(self.group()?),
            },
            data,
            evictions,
            path: PathBuf::from(std::ffi::OsString::from_vec(asked.path.clone())),
            pace: Pace::new(),
        };
        sys::can_open(SPARE)?;
        let kept = match asked.through {
            Through::Fuse => None,
            Through::Fanotify => Some(keep(&served)?),
        };
        let mount = self.shared.state.lock().mount(asked.clone(), kept);
        served.mount = mount.map_err(io::Error::from_raw_os_error)?;
        let handed = Handed {
            listed: Listed {
                mount: served.mount,
                ..asked
            },
            basis: kept.map_or(Basis::Number(0), Basis::Kept),
            mark: 0,
            granted: Vec::new(),
        };
        self.have_kept(handed, &served);
        self.serve_new(served)
    }

    /// Serves a mount that is known; where that fails, it is known no more.
    fn serve_new(&mut self, served: Served) -> io::Result<u64> {
        let (mount, path) = (served.mount, served.path.clone());
        let begun = match &served.way {
            Way::Fuse(fuse) => sys::mount_fuse(fuse, &path),
            Way::Fanotify(_) => FileId::of(&served.data).map(|file| {
                // Who asks about it is known from here on; nobody does before it is marked.
                self.shared.marked.insert(file, mount, 0);
            }),
        };
        let served = begun.and_then(|()| {
            self.shared.insert(served).map_err(|error| {
                // What is not served must not be seen; nobody can have opened it yet.
                let _ = sys::detach(&path);
                io::Error::other(error)
            })
        });
        if let Err(error) = served {
            self.shared.remove(mount);
            self.shared.state.lock().unmount(mount);
            self.guard.drop_mount(mount);
            return Err(error);
        }
        Ok(mount)
    }

    /// The group through which the kernel asks, made if there is none. The guard has it, too:
    /// the kernel allows everything once nobody has.
    fn group(&mut self) -> io::Result<Arc<Group>> {
        if !self.guard.is_there() {
            self.renew_guard();
        }
        if !self.guard.is_there() {
            return Err(io::Error::other("there is no guard"));
        }
        if let Some(group) = self.shared.marked.group() {
            return Ok(Arc::clone(group));
        }
        let group = Arc::new(Group::new()?);
        self.guard.keep_group(&group);
        if !self.guard.is_there() {
            return Err(io::Error::other("there is no guard"));
        }
        self.shared.epoll.add(group.as_ref(), QUESTIONS)?;
        self.shared.marked.adopt(Arc::clone(&group));
        Ok(group)
    }

    /// Has the kernel ask before it reads the data of a mount through what is given. 0 or an
    /// errno.
    fn mark(&mut self, mount: u64, fds: Vec<OwnedFd>) -> u32 {
        let (Some(served), Some(mounted)) = (self.shared.layer(mount), fds.into_iter().next())
        else {
            return ENOENT;
        };
        let marked =
            is_of(&served, &mounted).and_then(|()| self.shared.marked.mark(mount, mounted.as_fd()));
        if let Err(error) = marked {
            log::say(&format!("cannot mark {}: {error}", served.path.display()));
            return errno_in(&error);
        }
        let (all, _) = self.shared.state.lock().hand_over();
        let handed = all.into_iter().find(|one| one.listed.mount == mount);
        if let Some(handed) = handed {
            self.have_kept(handed, &served);
        }
        0
    }

    /// 0 or an errno.
    fn attach(&self, mount: u64, file: FileId) -> u32 {
        let Some(served) = self.shared.layer(mount) else {
            return ENOENT;
        };
        if FileId::of(&served.data).ok() != Some(file) {
            return ESTALE;
        }
        let Ok(number) = served.number_now() else {
            return EIO.unsigned_abs();
        };
        if !self.shared.state.lock().attach(mount, number) {
            return ENOENT;
        }
        // After the state stands on the number, and not before. It fails only where there
        // are no locks.
        if served.fuse().is_some() {
            let _ = sys::unlock(&served.data);
        }
        0
    }

    /// Ends a mount through fanotify; 0 or an errno. One that something may still read stays:
    /// a container that has it under its own file system, for one.
    fn forget(&mut self, mount: u64) -> u32 {
        match self.shared.marked.is_used(mount) {
            Ok(false) => {}
            Ok(true) => return EBUSY.unsigned_abs(),
            Err(error) => return errno_in(&error),
        }
        self.shared.remove(mount);
        self.guard.drop_mount(mount);
        0
    }

    /// 0 or an errno; busy mounts stay.
    fn unmount(&mut self, mount: u64) -> u32 {
        let Some(served) = self.shared.layer(mount) else {
            return ENOENT;
        };
        if served.fuse().is_none() {
            return self.forget(mount);
        }
        if let Err(error) = sys::unmount(&served.path) {
            let errno = error.raw_os_error().unwrap_or(EIO);
            // It is no mount any more: somebody was faster.
            if errno != EINVAL && errno != ENOENT.cast_signed() {
                return errno.unsigned_abs();
            }
        }
        self.shared.remove(mount);
        self.guard.drop_mount(mount);
        0
    }
}

/// Keeps everybody from evicting; the store's number after that.
fn keep(served: &Served) -> io::Result<u64> {
    if !sys::lock_against_evictions(&served.data)? {
        return Err(io::Error::from_raw_os_error(EBUSY));
    }
    served.number_now()
}

/// Whether what is to be marked is the mount's data, and the mount one that needs it.
fn is_of(served: &Served, mounted: &OwnedFd) -> io::Result<()> {
    let named = File::from(mounted.try_clone()?);
    let is_kept = served.fuse().is_none();
    if !is_kept || FileId::of(&named)? != FileId::of(&served.data)? {
        return Err(io::Error::from_raw_os_error(EINVAL));
    }
    Ok(())
}

fn errno_in(error: &io::Error) -> u32 {
    error
        .raw_os_error()
        .map_or(EIO.unsigned_abs(), i32::unsigned_abs)
}

/// Largest errno that the kernel takes.
const ERRNO_MAX: u32 = 511;

/// What a daemon says that went wrong, if it is an errno.
fn errno_of(errno: u32) -> i32 {
    match errno {
        1..=ERRNO_MAX => errno.cast_signed(),
        _ => EIO,
    }
}

fn name_of(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
