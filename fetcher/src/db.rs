//! Typed tables over RocksDB: the facts that must survive.
//!
//! Invariant: a batch is on the device whole when [`Db::commit`] returns, and never in
//! part. Values read back are untrusted: what does not decode is an error that names the
//! table and the key. Blocks on the device: call it from blocking threads.
//!
//! RocksDB lets one process have a directory open. Several processes share a root, so
//! the database opens on first use, holds a lock file with the holder's pid meanwhile,
//! and [`Db::release`] gives it up again.
//!
//! A value is one version byte (1) followed by JSON; unknown fields are ignored, so an
//! older build reads what a newer one added.

mod handle;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use self::handle::Handle;
use crate::{Error, Result};

pub use table::{Batch, Key, Scan, Table};

/// How long opening waits for another process. A whole `laz pull` of facts takes less.
const OPEN_WAIT: Duration = Duration::from_secs(30);

/// A database in a directory, open or not.
pub struct Db {
    path: PathBuf,
    families: Vec<String>,
    wait: Duration,
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
        let db = Self {
            path: path.as_ref().to_path_buf(),
            families: families.iter().map(|name| (*name).to_owned()).collect(),
            wait,
            handle: Mutex::new(None),
        };
        db.handle()?;
        Ok(db)
    }

    /// The value of `key`.
    pub fn get<T: Table>(&self, key: &T::Key) -> Result<Option<T::Value>> {
        let handle = self.handle()?;
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

    /// Applies the whole batch, on the device when this returns.
    pub fn commit(&self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        self.handle()?.write(batch.into_ops())
    }

    /// Lets other processes open the database. Closes it once no call is inside; the next
    /// call opens it again.
    pub fn release(&self) {
        let handle = self.handle.lock().take();
        drop(handle);
    }

    fn handle(&self) -> Result<Arc<Handle>> {
        let mut slot = self.handle.lock();
        if let Some(handle) = &*slot {
            return Ok(Arc::clone(handle));
        }
        // Held while opening: others need the same handle and would wait for it anyway.
        let handle = Arc::new(Handle::open(&self.path, &self.families, self.wait)?);
        *slot = Some(Arc::clone(&handle));
        Ok(handle)
    }

    fn page(&self, name: &str, from: &[u8], prefix: &[u8], max: usize) -> Result<table::Page> {
        self.handle()?.page(name, from, prefix, max)
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
