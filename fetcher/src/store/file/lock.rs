//! The lock of a layer on disk, between processes and within one.
//!
//! Invariant: who holds it holds the lock of the data file that the layer's directory
//! names, so no flush, eviction or removal of the layer is under way elsewhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::{DATA, LayerFile};
use crate::lock::{LockFile, lock_within};
use crate::store::LOCK_WAIT;
use crate::{Error, Result};

/// The lock of a layer's directory: flushes and removals of it exclude each other. Held
/// until dropped.
pub(in crate::store) struct LayerLock {
    _data: LockFile,
    inode: u64,
}

/// Locks the layer that `dir` names now; `None` when there is none.
pub(in crate::store) fn lock_layer(dir: &Path) -> Result<Option<LayerLock>> {
    let busy = || {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "another process holds it; see which one with lslocks",
        )
    };
    match take(dir, LOCK_WAIT)? {
        Taken::Busy => Err(Error::io("lock", dir.join(DATA), busy())),
        Taken::Locked(lock) => Ok(Some(lock)),
        Taken::Nothing => Ok(None),
    }
}

/// The same if nobody holds it; never waits.
pub(in crate::store) fn try_lock_layer(dir: &Path) -> Result<Option<LayerLock>> {
    match take(dir, Duration::ZERO)? {
        Taken::Locked(lock) => Ok(Some(lock)),
        Taken::Busy | Taken::Nothing => Ok(None),
    }
}

enum Taken {
    Locked(LayerLock),
    Busy,
    Nothing,
}

fn take(dir: &Path, wait: Duration) -> Result<Taken> {
    let path = dir.join(DATA);
    let err = |e| Error::io("lock", dir.join(DATA), e);
    loop {
        let data = match File::open(&path) {
            Ok(data) => data,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Taken::Nothing),
            Err(e) => return Err(err(e)),
        };
        if !lock_within(&data, wait).map_err(err)? {
            return Ok(Taken::Busy);
        }
        let inode = data.metadata().map_err(err)?.ino();
        // The name may have moved on while we waited; then the lock guards nothing.
        match std::fs::metadata(&path) {
            Ok(meta) if meta.ino() == inode => {
                let _data = data.into();
                return Ok(Taken::Locked(LayerLock { _data, inode }));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Taken::Nothing),
            Err(e) => return Err(err(e)),
        }
    }
}

impl LayerLock {
    /// Whether it is the lock of this very file.
    pub(in crate::store) fn is_of(&self, data: &File) -> bool {
        data.metadata().is_ok_and(|meta| meta.ino() == self.inode)
    }
}

impl LayerFile {
    /// The layer's lock, unless the directory is another layer's by now, or gone.
    pub(super) fn lock_own(&self) -> Result<Option<LayerLock>> {
        let lock = lock_layer(&self.dir)?;
        Ok(lock.filter(|lock| lock.inode == self.inode))
    }
}
