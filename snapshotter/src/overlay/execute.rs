//! Mounts what was planned.
//!
//! Invariant: after an error nothing is mounted at the target. The new mount API is used
//! where the kernel takes single lower directories through it (Linux 6.7): it has no limit
//! of 4,096 bytes for all options together. Which API the kernel has is probed once.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::mount::{FEATURES_OFF, Mount, OverlayMount, PASSING};
use crate::{Error, Result, sys};

/// Most lower directories of one overlay, the kernel's own limit.
const LOWERS_MAX: usize = 500;
/// Longest options of mount(2) in bytes: a page with its NUL.
const OPTIONS_LEN_MAX: usize = 4095;
/// Longest value of one option of the new API in bytes.
const VALUE_LEN_MAX: usize = 255;

/// Which system calls mount overlay on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// fsopen(2) and its kin, one lower directory at a time.
    New,
    /// mount(2), everything in one string.
    Classic,
}

impl Api {
    /// Asks the kernel, once per process.
    fn of_this_kernel() -> Self {
        static API: OnceLock<Api> = OnceLock::new();
        *API.get_or_init(|| {
            let probe = sys::FsContext::open("overlay")
                .and_then(|context| context.set("lowerdir+", Path::new("/")));
            match probe {
                Ok(()) => Self::New,
                Err(error) => {
                    tracing::debug!(%error, "kernel lacks the new mount api for overlay");
                    Self::Classic
                }
            }
        })
    }
}

impl Mount {
    /// Mounts it at the directory `target`.
    ///
    /// # Errors
    /// `Mount` with what the kernel logged, `Limit` when there are too many layers for this
    /// kernel.
    pub fn mount_at(&self, target: &Path) -> Result<()> {
        match self {
            Self::Bind { source, read_only } => bind(source, *read_only, target),
            Self::Overlay(overlay) => overlay.mount_at(target, Api::of_this_kernel()),
        }
    }
}

/// Unmounts what [`Mount::mount_at`] mounted; detaches it when it is busy.
pub fn unmount(target: &Path) -> Result<()> {
    sys::unmount(target)
        .or_else(|_| sys::detach(target))
        .map_err(|source| Error::mount("unmount", target, source))
}

fn bind(source: &Path, read_only: bool, target: &Path) -> Result<()> {
    sys::bind(source, target).map_err(|error| Error::mount("bind to", target, error))?;
    if read_only && let Err(error) = sys::make_read_only(target) {
        // The first error is the one to tell.
        let _ = sys::detach(target);
        return Err(Error::mount("make read-only", target, error));
    }
    Ok(())
}

impl OverlayMount {
    pub(super) fn mount_at(&self, target: &Path, api: Api) -> Result<()> {
        if self.lowers.len() > LOWERS_MAX {
            let detail = format!("{} layers, overlay takes {LOWERS_MAX}", self.lowers.len());
            return Err(too_many(target, detail));
        }
        match api {
            Api::New => self.mount_new(target),
            Api::Classic => self.mount_classic(target),
        }
    }

    /// Makes it and lets it go again. Mounted at `target` for that only where this kernel has
    /// no other way.
    pub(super) fn try_out(&self, target: &Path) -> Result<()> {
        match Api::of_this_kernel() {
            Api::New => self.make(target, |_| Ok(())),
            Api::Classic => self.mount_classic(target).and_then(|()| unmount(target)),
        }
    }

    fn mount_new(&self, target: &Path) -> Result<()> {
        self.make(target, |mount| sys::attach(mount, target))
    }

    /// Makes the file system, mounted nowhere, for `target`, and hands it to `then`.
    fn make(&self, target: &Path, then: impl FnOnce(&OwnedFd) -> io::Result<()>) -> Result<()> {
        const OP: &str = "mount overlay at";
        let context =
            sys::FsContext::open("overlay").map_err(|error| Error::mount(OP, target, error))?;
        let made = self
            .configure(&context)
            // The descriptors that name long paths live until the file system exists.
            .and_then(|_paths| context.create(self.upper.is_none()))
            .and_then(|mount| then(&mount));
        made.map_err(|source| Error::Mount {
            op: OP,
            path: target.to_path_buf(),
            detail: context.log(),
            source,
        })
    }

    fn configure(&self, context: &sys::FsContext) -> io::Result<Vec<OwnedFd>> {
        let mut paths = Vec::new();
        context.set("source", Path::new("overlay"))?;
        for (name, value) in FEATURES_OFF {
            context.set(name, Path::new(value))?;
        }
        for lower in &self.lowers {
            set_path(context, "lowerdir+", lower, &mut paths)?;
        }
        if let Some(upper) = &self.upper {
            set_path(context, "upperdir", &upper.dir, &mut paths)?;
            set_path(context, "workdir", &upper.work, &mut paths)?;
            if upper.passing {
                context.set_flag(PASSING)?;
            }
        }
        Ok(paths)
    }

    /// Kernels before 5.10 know no upper that may be lost: there it is kept like any other.
    fn mount_classic(&self, target: &Path) -> Result<()> {
        let mut kept = self.clone();
        let passing = kept.upper.as_mut().map(|upper| &mut upper.passing);
        let mounted = self.mount_by_options(target);
        match passing.filter(|passing| **passing && mounted.is_err()) {
            Some(passing) => {
                *passing = false;
                kept.mount_by_options(target)
            }
            None => mounted,
        }
    }

    fn mount_by_options(&self, target: &Path) -> Result<()> {
        let data = Mount::Overlay(self.clone()).options().join(",");
        if data.len() > OPTIONS_LEN_MAX {
            let detail = format!(
                "{} layers need {} bytes of mount options, this kernel takes {OPTIONS_LEN_MAX}; \
                 use Linux 6.7 or later, or a shorter --state path",
                self.lowers.len(),
                data.len()
            );
            return Err(too_many(target, detail));
        }
        sys::mount_overlay(target, &data, self.upper.is_none())
            .map_err(|error| Error::mount("mount overlay at", target, error))
    }
}

/// Sets an option to a path, through a descriptor if it is too long for a value.
fn set_path(
    context: &sys::FsContext,
    key: &str,
    path: &Path,
    paths: &mut Vec<OwnedFd>,
) -> io::Result<()> {
    if path.as_os_str().len() <= VALUE_LEN_MAX {
        return context.set(key, path);
    }
    let fd = sys::open_path(path)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    paths.push(fd);
    context.set(key, &short)
}

fn too_many(target: &Path, detail: String) -> Error {
    let what = format!("overlay at {}", target.display());
    lazarette_fetcher::Error::limit(what, detail).into()
}
