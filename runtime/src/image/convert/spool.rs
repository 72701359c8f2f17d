//! Spool files: what a conversion keeps of a layer on disk meanwhile.
//!
//! Invariant: a spool file has no name, so nothing is left of it however a conversion ends;
//! it is made and written through the store's [`Disk`], from its start on, and never synced:
//! nobody looks for it after a crash.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use lazarette_fetcher::store::disk::Disk;
use lazarette_fetcher::{Error, Result};

use super::ConvertOptions;

/// Bytes collected before a write to a spool file.
const WRITE_BYTES: usize = 1 << 20;

/// A file that is written, and its length in bytes.
#[derive(Debug)]
pub(super) struct Spooled {
    pub(super) file: File,
    pub(super) len: u64,
}

/// Where spool files are made, and how.
#[derive(Clone)]
pub(super) struct SpoolDir {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
}

impl SpoolDir {
    /// That of a conversion.
    pub(super) fn of(options: &ConvertOptions) -> Self {
        Self {
            dir: options.spool_dir.clone(),
            disk: Arc::clone(&options.disk),
        }
    }

    /// A new file, to be written.
    pub(super) fn create(&self) -> Result<BufWriter<SpoolFile>> {
        let file = self.disk.create_nameless(&self.dir);
        let file = file.map_err(|e| Error::io("create a spool file in", &self.dir, e))?;
        let spool = SpoolFile {
            disk: Arc::clone(&self.disk),
            file,
            len: 0,
        };
        Ok(BufWriter::with_capacity(WRITE_BYTES, spool))
    }

    /// Writes what is left in the buffer.
    pub(super) fn finish(&self, spool: BufWriter<SpoolFile>) -> Result<Spooled> {
        let spool = spool.into_inner();
        let SpoolFile { file, len, .. } = spool.map_err(|e| self.failed(e.into_error()))?;
        Ok(Spooled { file, len })
    }

    /// The error of a write.
    pub(super) fn failed(&self, error: io::Error) -> Error {
        Error::io("write to a spool file in", &self.dir, error)
    }
}

/// A file that is being written. Its own position stays at its start.
pub(super) struct SpoolFile {
    disk: Arc<dyn Disk>,
    file: File,
    len: u64,
}

impl Write for SpoolFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.write_at(&self.file, self.len, bytes)?;
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
