//! Run directories: everything of one process that must not outlive it.
//!
//! A run directory holds mountpoints, bundles and sockets of one process, and a file
//! `lock` that the process keeps locked (flock) as long as it lives:
//!
//! ```text
//! <state>/lock          held while a directory is made or judged
//! <state>/<id>/lock     held by the process that lives
//! <state>/<id>/...      what it mounted and made
//! ```
//!
//! Invariant: a directory whose lock is held is never touched, and nothing is removed
//! while anything is still mounted below, so no file of a mounted file system is ever
//! deleted. Never touches mounts outside the directory. The kernel drops the lock when
//! the process dies, however it dies.

mod mountinfo;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use lazarette_fetcher::lock::LockFile;

use crate::{Error, Result, sys};

/// Name of the lock files.
const LOCK: &str = "lock";

/// Rounds of unmounting before giving up: mounts lie on top of each other, and each round
/// takes every mount that is listed.
const ROUNDS_MAX: usize = 16;

/// The run directory of a living process. Dropping it cleans it up.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Whether it is left to a sweep.
    is_left: bool,
    /// Held as long as this lives.
    #[cfg_attr(not(test), expect(dead_code, reason = "held, not looked at"))]
    lock: LockFile,
}

/// What a sweep found.
#[derive(Debug, Default)]
pub struct Swept {
    /// Directories of dead processes that are gone now.
    pub removed: Vec<PathBuf>,
    /// Directories of dead processes that could not be removed, and why.
    pub failed: Vec<(PathBuf, Error)>,
}

impl RunDir {
    /// Makes `<state_dir>/<id>` for this process. Only root looks into it: what is mounted
    /// there holds set-uid programs of images. Overlay does not need to be let in, it looks
    /// as whoever mounted it.
    ///
    /// # Errors
    /// `AlreadyExists` when another process lives there or left something that needs a
    /// [`RunDir::sweep`]; `Invalid` when `id` is not one plain path component.
    pub fn create(state_dir: &Path, id: &str) -> Result<Self> {
        if id.is_empty() || id == "." || id == ".." || id == LOCK || id.contains(['/', '\0']) {
            return Err(Error::Invalid {
                what: "run id",
                input: id.to_owned(),
                detail: "it is not a plain file name",
            });
        }
        fs::create_dir_all(state_dir).map_err(|source| Error::io("create", state_dir, source))?;
        let state_dir = canonical(state_dir)?;
        let _guard = lock_state(&state_dir)?;
        let path = state_dir.join(id);
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::AlreadyExists {
                key: path.display().to_string(),
            },
            _ => Error::io("create", &path, source),
        })?;
        let lock = open_lock(&path)?;
        lock.lock()
            .map_err(|source| Error::io("lock", path.join(LOCK), source))?;
        Ok(Self {
            path,
            is_left: false,
            lock,
        })
    }

    /// The directory, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Cleans up the directories of dead processes below `state_dir`. One that cannot be
    /// cleaned is reported and does not keep the others.
    pub fn sweep(state_dir: &Path) -> Result<Swept> {
        Self::sweep_after(state_dir, &|_| Ok(()))
    }

    /// [`Self::sweep`] that lets go of what each directory stands for first: `release` is
    /// called with its id once nothing is mounted there. What cannot be released, or is not
    /// when this process dies, keeps its directory for the next sweep.
    pub fn sweep_after(state_dir: &Path, release: &dyn Fn(&str) -> Result<()>) -> Result<Swept> {
        let mut swept = Swept::default();
        if !state_dir.exists() {
            return Ok(swept);
        }
        let state_dir = canonical(state_dir)?;
        for (path, _lock) in find_dead(&state_dir)? {
            let id = path.file_name().and_then(|name| name.to_str());
            let released = unmount_below(&path).and_then(|()| id.map_or(Ok(()), release));
            match released.and_then(|()| remove_run_dir(&path)) {
                Ok(()) => swept.removed.push(path),
                Err(error) => swept.failed.push((path, error)),
            }
        }
        Ok(swept)
    }

    /// Unmounts everything and leaves the directory to a sweep: something that it stands for
    /// could not be released.
    pub fn leave(mut self) -> Result<()> {
        self.is_left = true;
        unmount_below(&self.path)
    }

    /// Unmounts and removes everything, and says so when that fails.
    pub fn close(self) -> Result<()> {
        // Drop then finds nothing to do.
        remove_run_dir(&self.path)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.is_left
            && self.path.exists()
            && let Err(error) = remove_run_dir(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "run directory cannot be removed");
        }
    }
}

/// Cleans up after crashed runs; the same as [`RunDir::sweep`], with failures logged.
pub fn cleanup_stale(state_dir: &Path) -> Result<()> {
    let swept = RunDir::sweep(state_dir)?;
    for path in &swept.removed {
        tracing::info!(path = %path.display(), "removed what a crashed run left");
    }
    for (path, error) in &swept.failed {
        tracing::warn!(path = %path.display(), %error, "cannot remove what a crashed run left");
    }
    Ok(())
}

/// Unmounts everything below `dir` and `dir` itself, innermost first. What is busy is
/// detached: it ends with its last user.
pub fn unmount_below(dir: &Path) -> Result<()> {
    let dir = canonical(dir)?;
    for _ in 0..ROUNDS_MAX {
        let mounts = mounts_below(&dir)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts {
            match sys::detach(&mount) {
                Ok(()) => {}
                // Gone with an outer one, or no longer there.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::InvalidInput | io::ErrorKind::NotFound
                    ) => {}
                Err(error) => return Err(Error::mount("unmount", &mount, error)),
            }
        }
    }
    Err(Error::Environment {
        op: "unmount everything below a directory",
        detail: format!(
            "{} still has mounts after {ROUNDS_MAX} rounds; see /proc/self/mountinfo",
            dir.display()
        ),
    })
}

/// Mountpoints at or below `dir`, innermost and latest first.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read(table).map_err(|source| Error::io("read", table, source))?;
    Ok(mountinfo::below(&text, dir))
}

/// Unmounts, checks that nothing is mounted, and only then removes.
fn remove_run_dir(path: &Path) -> Result<()> {
    unmount_below(path)?;
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::io("remove", path, source)),
    }
}

/// Directories whose process is dead, with their locks, which keep other sweeps away.
fn find_dead(state_dir: &Path) -> Result<Vec<(PathBuf, LockFile)>> {
    let _guard = lock_state(state_dir)?;
    let fail = |source| Error::io("list", state_dir, source);
    let mut dead = Vec::new();
    for entry in fs::read_dir(state_dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if !entry.file_type().map_err(fail)?.is_dir() {
            continue;
        }
        let path = entry.path();
        let lock = open_lock(&path)?;
        match lock.try_lock() {
            Ok(()) => dead.push((path, lock)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => {
                return Err(Error::io("lock", path.join(LOCK), source));
            }
        }
    }
    Ok(dead)
}

/// Keeps other processes from making or judging run directories meanwhile.
fn lock_state(state_dir: &Path) -> Result<LockFile> {
    let lock = open_lock(state_dir)?;
    lock.lock()
        .map_err(|source| Error::io("lock", state_dir.join(LOCK), source))?;
    Ok(lock)
}

fn open_lock(dir: &Path) -> Result<LockFile> {
    let path = dir.join(LOCK);
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map(LockFile::from)
        .map_err(|source| Error::io("open", &path, source))
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize()
        .map_err(|source| Error::io("resolve", path, source))
}
