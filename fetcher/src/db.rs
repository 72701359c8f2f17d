//! Typed tables over RocksDB: the facts that must survive.
//!
//! Invariant: a batch is on the device whole when [`Db::commit`] returns, and never in
//! part; after an error it is there whole or not at all. Values read back are untrusted:
//! what does not decode is an error that names the table and the key. Blocks on the device:
//! call it from blocking threads.
//!
//! RocksDB lets one process have a directory open. Several processes share a root, so
//! the database opens on first use, holds a lock file with the holder's pid meanwhile,
//! and [`Db::release`] gives it up again. First it is opened to be read, which is several
//! times faster and is all that most starts wait for, and then to write if somebody commits;
//! the lock is held from one to the other, so nobody else writes in between.
//!
//! Lock order: `opening`, then `handle`; only the first is held while files are opened.
//!
//! A value is one version byte (1) followed by JSON; unknown fields are ignored, so an
//! older build reads what a newer one added.

mod commits;
mod handle;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use self::commits::Straight;
use self::handle::{Access, Handle, Lock};
use crate::{Error, Result};

pub use commits::Commits;
pub use table::{Batch, Key, Scan, Table};

/// How long opening waits for another process. A whole `laz pull` of facts takes less.
const OPEN_WAIT: Duration = Duration::from_secs(30);

/// A database in a directory, open or not.
pub struct Db {
    path: PathBuf,
    families: Vec<String>,
    wait: Duration,
    commits: Arc<dyn Commits>,
    /// Held while it is opened: others need the same handle and would wait for it anyway.
    opening: Mutex<()>,
    handle: Mutex<Option<Arc<Handle>>>,
}

impl Db {
    /// The database in `path`, made if absent, with a table of each of these names. Opens
    /// it now, to fail now, and waits up to 30 s for another process that has it open.
    pub fn open(path: impl AsRef<Path>, families: &[&str]) -> Result<Self> {
        Self::open_within(path, families, OPEN_WAIT)
    }

    /// [`Db::open`] with another bound on every wait for another process.
    pub fn open_within(path: impl AsRef<Path>, families: &[&str], wait: Duration) -> Result<Self> {
        Self::of(path.as_ref(), families, wait, Arc::new(Straight))
    }

    /// [`Db::open`] with something between batches and the database.
    pub fn open_on(
        path: impl AsRef<Path>,
        families: &[&str],
        commits: Arc<dyn Commits>,
    ) -> Result<Self> {
        Self::of(path.as_ref(), families, OPEN_WAIT, commits)
    }

    fn of(
        path: &Path,
        families: &[&str],
        wait: Duration,
        commits: Arc<dyn Commits>,
    ) -> Result<Self> {
        let db = Self {
            path: path.to_path_buf(),
            families: families.iter().map(|name| (*name).to_owned()).collect(),
            wait,
            commits,
            opening: Mutex::new(()),
            handle: Mutex::new(None),
        };
        db.handle(Access::Read)?;
        Ok(db)
    }

    /// The value of `key`.
    pub fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>> {
        let handle = self.handle(Access::Read)?;
        let bytes = handle.get(T::NAME, &table::key_bytes(key))?;
        bytes
            .map(|bytes| table::decode_value::<T>(key, &bytes))
            .transpose()
    }

    /// Entries whose encoded key starts with `prefix`, in key order. Read in pages, each
    /// as the table is when it is read.
    pub fn scan<T: Table>(&self, prefix: &[u8]) -> Scan<'_, T> {
        Scan::new(self, prefix)
    }

    /// Applies the whole batch, on the device when this returns. After an error it may be
    /// there all the same, whole: the next look tells.
    pub fn commit(&self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let ops = batch.into_ops();
        let handle = self.handle(Access::Write)?;
        self.commits.commit(&|| handle.apply(&ops))
    }

    /// Opens the database to write, which the next commit then need not wait for.
    pub fn prepare_commit(&self) -> Result<()> {
        self.handle(Access::Write).map(drop)
    }

    /// Lets other processes open the database. Closes it once no call is inside; the next
    /// call opens it again.
    pub fn release(&self) {
        let _opening = self.opening.lock();
        let handle = self.handle.lock().take();
        drop(handle);
    }

    fn handle(&self, access: Access) -> Result<Arc<Handle>> {
        let open = || {
            let handle = self.handle.lock();
            let enough = handle.as_ref().filter(|handle| handle.allows(access));
            enough.map(Arc::clone)
        };
        if let Some(handle) = open() {
            return Ok(handle);
        }
        let _opening = self.opening.lock();
        // Somebody else may have opened it meanwhile.
        if let Some(handle) = open() {
            return Ok(handle);
        }
        let held = self.handle.lock().as_ref().map(|handle| handle.lock());
        let lock = match held {
            Some(lock) => lock,
            None => Lock::take(&self.path, self.wait)?,
        };
        let to_read = match access {
            Access::Read => Handle::read(&self.path, &self.families, &lock),
            Access::Write => None,
        };
        let handle = match to_read {
            Some(handle) => handle,
            None => Handle::write(&self.path, &self.families, &lock)?,
        };
        let handle = Arc::new(handle);
        let before = self.handle.lock().replace(Arc::clone(&handle));
        // Closed while nobody waits for it, unless somebody still reads through it.
        drop(before);
        Ok(handle)
    }

    fn page(&self, name: &str, from: &[u8], prefix: &[u8], max: usize) -> Result<table::Page> {
        self.handle(Access::Read)?.page(name, from, prefix, max)
    }

    fn error(&self, detail: impl Into<String>) -> Error {
        Error::Db {
            path: self.path.clone(),
            detail: detail.into(),
        }
    }
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
