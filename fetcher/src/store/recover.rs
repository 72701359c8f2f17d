//! What a store does before its first use: make its directories, drop leftovers.
//!
//! Invariant: only what has no name under `content/` or `layers/` is dropped, and never
//! what a live process is making.

use std::io;
use std::sync::Arc;

use super::{Store, ingest, list, remove_tree};
use crate::{Error, Result};

const DIRS: [&str; 4] = ["content", "layers", "ingest", "trash"];

/// Makes the directories and clears leftovers, under the store's lock.
pub(super) fn prepare(store: &Arc<Store>) -> Result<()> {
    let _lock = store.lock()?;
    make_dirs(store)?;
    for dir in list(&store.root.join("ingest"))? {
        if !ingest::has_owner(&dir)? {
            tracing::info!(path = %dir.display(), "dropping an unfinished ingest");
            remove_tree(&*store.disk, &dir)?;
        }
    }
    for dir in list(&store.root.join("trash"))? {
        remove_tree(&*store.disk, &dir)?;
    }
    Ok(())
}

fn make_dirs(store: &Arc<Store>) -> Result<()> {
    for name in DIRS {
        let dir = store.root.join(name);
        match store.disk.create_dir(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io("create", dir, e)),
        }
    }
    store
        .disk
        .sync_dir(&store.root)
        .map_err(|e| Error::io("sync", &store.root, e))
}
