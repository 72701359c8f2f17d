//! Limits on what a layer may make this node hold in memory.
//!
//! Invariant: every parser of a layer format spends from one [`Budget`] before it keeps
//! anything, so the tables of one layer stay under about 1 GiB whatever the layer claims.

use crate::{Error, Result};

/// Entries of one layer's file table. The largest images in use have some hundred
/// thousand files; each entry takes about 120 bytes here and again in the inode tree.
pub const ENTRIES_MAX: u64 = 2_000_000;
/// Bytes of paths, link targets and xattrs of one layer together.
pub const METADATA_LEN_MAX: u64 = 512 << 20;
/// Decoded length of one chunk. A chunk is decoded in memory as a whole; eStargz tools
/// write 4 MiB.
pub const CHUNK_LEN_MAX: u32 = 64 << 20;
/// Length of a layer's data file: what ext4 can hold in one file.
pub const DATA_LEN_MAX: u64 = 1 << 44;
/// Bytes of a path or of a link target, as Linux limits them (`PATH_MAX` with its NUL).
pub const PATH_LEN_MAX: usize = 4095;
/// Bytes of one part of a path (`NAME_MAX`).
pub(super) const NAME_LEN_MAX: usize = 255;
/// Bytes of an xattr name (`XATTR_NAME_MAX`).
pub(super) const XATTR_NAME_LEN_MAX: usize = 255;
/// Bytes of an xattr value (`XATTR_SIZE_MAX`).
pub(super) const XATTR_VALUE_LEN_MAX: usize = 64 << 10;
/// Xattrs of one file. Linux can list some thousands, images have one or two.
pub(super) const XATTRS_MAX: usize = 1024;
/// Bytes of all xattr names of a file with their NULs (`XATTR_LIST_MAX`).
pub(super) const XATTR_LIST_LEN_MAX: usize = 64 << 10;
/// Decoded bytes before a chunk in its member: what reading it costs on top.
pub(super) const SKIP_MAX: u64 = 64 << 20;

/// What one layer has spent of its limits.
#[derive(Debug, Default)]
pub(super) struct Budget {
    entries: u64,
    metadata: u64,
}

impl Budget {
    /// Counts one entry of the layer `what`.
    pub(super) fn entry(&mut self, what: &str) -> Result<()> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(Error::limit(
                what,
                format!("it has more than {ENTRIES_MAX} entries"),
            ));
        }
        Ok(())
    }

    /// Counts `len` bytes of names, targets or xattrs of the layer `what`.
    pub(super) fn metadata(&mut self, what: &str, len: usize) -> Result<()> {
        self.metadata = self.metadata.saturating_add(len as u64);
        if self.metadata > METADATA_LEN_MAX {
            return Err(Error::limit(
                what,
                format!("its names and attributes exceed {METADATA_LEN_MAX} bytes"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_allowed_passes_and_the_next_does_not() {
        let mut budget = Budget::default();
        for _ in 0..ENTRIES_MAX {
            budget.entry("layer").unwrap();
        }
        let error = budget.entry("layer").unwrap_err().to_string();
        assert_eq!(
            error,
            "layer exceeds the limit: it has more than 2000000 entries"
        );
        budget.metadata("layer", 512 << 20).unwrap();
        assert!(budget.metadata("layer", 1).is_err());
    }
}
