//! What a daemon says.
//!
//! Invariant: a mount is known to the guard before it is made, and served before its daemon
//! is told of it. What fails half way leaves nothing.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::Control;
use crate::server::layer::{EIO, Served};
use crate::server::link::Link;
use crate::state::Granted;
use crate::wire::{Basis, FileId, Handed, Listed, Message};
use crate::{Error, Result, log, sys};

const ENOENT: u32 = 2;
const ESTALE: u32 = 116;
const EINVAL: i32 = 22;
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
                size,
                name,
                path,
            } => {
                let asked = Listed {
                    mount: 0,
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
    fn answer(&self, mount: u64, granted: Granted) {
        let Some(served) = self.shared.layer(mount) else {
            return;
        };
        let mut buf = Vec::new();
        for read in granted.again {
            self.shared.serve(&served, read, &mut buf);
        }
        if let Some(read) = granted.refused {
            served.refuse(read.unique, EIO);
        }
    }

    /// The new mount's number, or an errno.
    fn mount(&mut self, asked: Listed, fds: Vec<OwnedFd>) -> Result<u64, u32> {
        let errno = |error: &std::io::Error| {
            log::say(&format!("cannot mount {}: {error}", name_of(&asked.name)));
            error
                .raw_os_error()
                .map_or(EIO.unsigned_abs(), i32::unsigned_abs)
        };
        let files: Result<[File; 2], _> =
            <[OwnedFd; 2]>::try_from(fds).map(|fds| fds.map(File::from));
        let [data, evictions] = files.map_err(|_| EIO.unsigned_abs())?;
        let data_len = data.metadata().map_err(|e| errno(&e))?.len();
        if asked.size < data_len || asked.size - data_len >= BLOCK_BYTES {
            return Err(EINVAL.unsigned_abs());
        }
        let fuse = sys::open_fuse().map_err(|e| errno(&e))?;
        let (name, path) = (asked.name.clone(), asked.path.clone());
        let mount = self.shared.state.lock().mount(asked.size, name, path);
        let mount = mount.map_err(i32::unsigned_abs)?;
        let served = Served {
            mount,
            size: asked.size,
            data_len,
            fuse,
            data,
            evictions,
            path: PathBuf::from(std::ffi::OsString::from_vec(asked.path.clone())),
        };
        let handed = Handed {
            listed: Listed {
                mount,
                ..asked.clone()
            },
            basis: Basis::Number(0),
            granted: Vec::new(),
        };
        self.guard
            .keep(&handed, [&served.fuse, &served.data, &served.evictions]);
        let begun = sys::mount_fuse(&served.fuse, &served.path);
        let path = served.path.clone();
        let served = begun.map_err(|e| errno(&e)).and_then(|()| {
            let inserted = self.shared.insert(served);
            inserted.map_err(|_| {
                // What is not served must not be seen; nobody can have opened it yet.
                let _ = sys::detach(&path);
                EIO.unsigned_abs()
            })
        });
        if let Err(errno) = served {
            self.shared.remove(mount);
            self.shared.state.lock().unmount(mount);
            self.guard.drop_mount(mount);
            return Err(errno);
        }
        Ok(mount)
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
        let _ = sys::unlock(&served.data);
        0
    }

    /// 0 or an errno; busy mounts stay.
    fn unmount(&mut self, mount: u64) -> u32 {
        let Some(served) = self.shared.layer(mount) else {
            return ENOENT;
        };
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
