//! The bitmap file of a layer.
//!
//! Invariant: it is replaced whole and on the device; one that does not check out says
//! that nothing is present.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{BITMAP, LayerFile};
use crate::store::bitmap::{self, Stored};
use crate::store::disk::Disk;
use crate::store::read_bounded;
use crate::{Error, Result};

const BITMAP_NEW: &str = "bitmap.new";

impl LayerFile {
    /// Makes the bitmap file say `stored`, on the device. The caller holds the layer's lock.
    pub(super) fn record(&self, stored: &Stored) -> Result<()> {
        let bytes = bitmap::encode(self.bits.count(), stored);
        write_new(&*self.disk, &self.dir.join(BITMAP_NEW), &bytes)?;
        let to = self.dir.join(BITMAP);
        self.disk
            .rename(&self.dir.join(BITMAP_NEW), &to)
            .and_then(|()| self.disk.sync_dir(&self.dir))
            .map_err(|e| Error::io("replace", to, e))
    }
}

/// Makes the file at `path` hold exactly `bytes`, synced.
pub(in crate::store) fn write_new(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<File> {
    let write = || {
        let file = disk.create(path)?;
        disk.write_at(&file, 0, bytes)?;
        disk.sync_data(&file)?;
        Ok(file)
    };
    write().map_err(|e| Error::io("write", path, e))
}

/// The bits on disk; none if the file is absent or does not check out.
pub(super) fn read_bitmap(dir: &Path, count: u32) -> Result<Stored> {
    Ok(try_read_bitmap(dir, count)?.unwrap_or_else(|| {
        let path = dir.join(BITMAP);
        tracing::warn!(path = %path.display(), "bitmap is damaged, fetching its layer again");
        Stored::nothing(count)
    }))
}

/// [`read_bitmap`], but `None` if the file does not check out.
pub(super) fn try_read_bitmap(dir: &Path, count: u32) -> Result<Option<Stored>> {
    match read_bounded(&dir.join(BITMAP), bitmap::file_bytes(count)) {
        Ok(bytes) => Ok(bitmap::decode(count, &bytes)),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Some(Stored::nothing(count)))
        }
        Err(Error::Limit { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
