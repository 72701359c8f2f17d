//! What lies below a snapshot, shown with the owners of a user namespace.
//!
//! ```text
//! <dir>/<i>    a mount of the i-th below, the topmost is 0
//! ```
//!
//! Overlay cannot map owners itself, and containerd's code that has it done to what lies below
//! takes one mount for all of it, without those that are our layers. So each is cloned and mapped
//! here, and whoever mounts sees plain directories.
//!
//! Invariant: what is mounted here has its owners mapped from the moment it can be seen, nothing
//! can be written or removed through it, and it shows what it was made of now. A name on which
//! nothing is mounted does not outlast the process that made it: an overlay of it would lack a
//! layer, and nobody would be told. The callers see to it that one of these works on a directory
//! at a time.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::idmap::IdMaps;
use crate::{Error, Result, mountd, sys};

/// Only root looks at what is mounted here from outside.
const PRIVATE: u32 = 0o700;
/// Mounts that may lie on one name: one, and as many as somebody left over it.
const MOUNTS_MAX: usize = 8;

/// Shows each of `lowers` in `dir`, made if absent; where, in their order. What is there already
/// stays as it is.
///
/// # Errors
/// `Environment` where this kernel cannot map owners, or not on the file system of a lower.
pub(super) fn show(dir: &Path, maps: &IdMaps, lowers: &[PathBuf]) -> Result<Vec<PathBuf>> {
    make(dir)?;
    let mut namespace = None;
    let mut shown = Vec::with_capacity(lowers.len());
    for (place, lower) in lowers.iter().enumerate() {
        let target = dir.join(place.to_string());
        let wanted = identity(lower).map_err(|source| Error::io("stat", lower, source))?;
        // What cannot be asked was of a file system that is gone.
        if identity(&target).ok() != Some(wanted) {
            let namespace = match &namespace {
                Some(namespace) => namespace,
                None => namespace.insert(namespace_of(maps)?),
            };
            put(&target, lower, namespace.as_fd())?;
        }
        shown.push(target);
    }
    Ok(shown)
}

/// Ends what is shown in `dir`, and removes it. Whoever has something of it in use keeps that.
///
/// # Errors
/// Where something is left; then it is left mounted, and nothing of it was removed.
pub(super) fn end(dir: &Path) -> Result<()> {
    mountd::clear(dir, &|_| false)?;
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", dir, error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes the names in `dir` on which nothing is mounted: the machine was started anew, or a
/// process ended before it had mounted something.
pub(super) fn forget_unmounted(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // The kernel refuses it where something is mounted.
        let _ = fs::remove_dir(entry.path());
    }
}

fn put(target: &Path, lower: &Path, namespace: BorrowedFd<'_>) -> Result<()> {
    // Of a layer that was mounted anew since.
    for _ in 0..MOUNTS_MAX {
        if sys::detach(target).is_err() {
            break;
        }
    }
    make(target)?;
    let mount = sys::clone_mount(lower);
    let mount = mount.map_err(|source| Error::mount("clone the mount of", lower, source))?;
    sys::map_owners(&mount, namespace).map_err(|error| unmappable(lower, &error))?;
    sys::attach(&mount, target).map_err(|source| Error::mount("mount at", target, source))
}

fn namespace_of(maps: &IdMaps) -> Result<OwnedFd> {
    let [users, groups] = maps.lines();
    sys::user_namespace(&users, &groups).map_err(|error| Error::Environment {
        op: "make a user namespace to map owners with",
        detail: format!("{error}; see sysctl user.max_user_namespaces"),
    })
}

fn unmappable(lower: &Path, error: &io::Error) -> Error {
    Error::Environment {
        op: "map owners for a user namespace",
        detail: format!(
            "this kernel does not do it for the file system at {}: {error}; it takes Linux 5.19, \
             and 6.12 for layers that FUSE alone shows",
            lower.display()
        ),
    }
}

/// What tells a directory from all others, as long as its file system exists.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn make(dir: &Path) -> Result<()> {
    match DirBuilder::new().mode(PRIVATE).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io("create", dir, error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
