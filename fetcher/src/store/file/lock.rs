//! The lock of a layer on disk, between processes and within one.
//!
//! Invariant: who holds it holds the lock of the data file that the layer's directory
//! names, so no flush, eviction or removal of the layer is under way elsewhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{DATA, LayerFile};
use crate::store::LOCK_WAIT;
use crate::store::lock::lock_within;
use crate::{Error, Result};

/// The lock of a layer's directory: flushes and removals of it exclude each other. Held
/// until dropped.
pub(in crate::store) struct LayerLock {
    _data: File,
    inode: u64,
}

/// Locks the layer that `dir` names now; `None` when there is none.
pub(in crate::store) fn lock_layer(dir: &Path) -> Result<Option<LayerLock>> {
    let path = dir.join(DATA);
    let err = |e| Error::io("lock", dir.join(DATA), e);
    loop {
        let data = match File::open(&path) {
            Ok(data) => data,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(err(e)),
        };
        if !lock_within(&data, LOCK_WAIT).map_err(err)? {
            let e = io::Error::new(
                io::ErrorKind::TimedOut,
                "another process holds it; see which one with lslocks",
            );
            return Err(err(e));
        }
        let inode = data.metadata().map_err(err)?.ino();
        // The name may have moved on while we waited; then the lock guards nothing.
        match std::fs::metadata(&path) {
            Ok(meta) if meta.ino() == inode => return Ok(Some(LayerLock { _data: data, inode })),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(err(e)),
        }
    }
}

impl LayerFile {
    /// The layer's lock, unless the directory is another layer's by now, or gone.
    pub(super) fn lock_own(&self) -> Result<Option<LayerLock>> {
        let lock = lock_layer(&self.dir)?;
        Ok(lock.filter(|lock| lock.inode == self.inode))
    }
}
