//! What a layer takes on disk, as du(1) counts it.
//!
//! Invariant: only looks at metadata of files; opens none, and no lock is needed: what goes
//! or comes meanwhile is counted or not. Blocks that files share are counted for each.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use super::{Store, list};
use crate::types::Digest;
use crate::{Error, Result};

/// Bytes of a block in `st_blocks`, whatever the file system's are.
const STAT_BLOCK_BYTES: u64 = 512;

/// What something takes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// Bytes that are allocated.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

impl Taken {
    fn add(&mut self, one: &Metadata) {
        self.bytes += one.blocks() * STAT_BLOCK_BYTES;
        self.inodes += 1;
    }
}

impl Store {
    /// What a layer takes: its files and their directory. Nothing if there is none.
    pub fn taken(&self, digest: &Digest) -> Result<Taken> {
        let dir = self.layer_dir(digest);
        let mut taken = Taken::default();
        for path in std::iter::once(dir.clone()).chain(list(&dir)?) {
            match fs::symlink_metadata(&path) {
                Ok(one) => taken.add(&one),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("inspect", path, e)),
            }
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests;
