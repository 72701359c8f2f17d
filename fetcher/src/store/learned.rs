//! Digests of chunks that were learned when the chunks were decoded.
//!
//! A span that is verified whole ([`Encoding::WholeSpan`]) vouches for its encoded bytes, of
//! which nothing is kept, and a member that is ([`Encoding::WholeMember`]) for all its chunks
//! together. So that disks may rot under single chunks all the same, the digest of
//! each is written down when its bytes are, in a file beside the data file:
//!
//! ```text
//! SHA-256 of each chunk of the layer, in order; zeros until it is known    32 each
//! ```
//!
//! Invariant: a digest is written before the bit of its chunk is set, and is on the device
//! before that bit is recorded. A digest that is lost, torn or rotten matches no bytes: its
//! chunk is then absent, and fetched and verified again. Decoding is a function of verified
//! bytes, so whoever writes a digest again writes the same one.
//!
//! [`Encoding::WholeSpan`]: crate::index::Encoding::WholeSpan
//! [`Encoding::WholeMember`]: crate::index::Encoding::WholeMember

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::file::chunk_count;
use crate::index::{ChunkId, LayerIndex};
use crate::{Error, Result};

/// Name inside a layer's directory.
const LEARNED: &str = "learned";
/// Bytes of one digest.
const DIGEST_LEN: u64 = 32;

/// The file of one layer.
pub(super) struct Learned {
    file: File,
    path: PathBuf,
}

/// Makes the file of a layer in `dir`, if its index needs one, with no digest in it, synced.
pub(super) fn create(disk: &dyn Disk, dir: &Path, index: &LayerIndex) -> Result<()> {
    if !index.has_whole_spans() {
        return Ok(());
    }
    let (path, len) = (dir.join(LEARNED), file_len(index)?);
    let make = || {
        let file = disk.create(&path)?;
        disk.set_len(&file, len)?;
        disk.sync_data(&file)
    };
    make().map_err(|error| Error::io("write", &path, error))
}

/// Opens the file of the layer in `dir`, if its index needs one.
pub(super) fn open(dir: &Path, index: &LayerIndex) -> Result<Option<Learned>> {
    if !index.has_whole_spans() {
        return Ok(None);
    }
    let path = dir.join(LEARNED);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(damaged(&path, "it is gone"));
        }
        Err(error) => return Err(Error::io("open", &path, error)),
    };
    let len = file.metadata();
    let len = len
        .map_err(|error| Error::io("inspect", &path, error))?
        .len();
    if len != file_len(index)? {
        return Err(damaged(&path, "it does not have the length it should"));
    }
    Ok(Some(Learned { file, path }))
}

impl Learned {
    /// The digest of a chunk; zeros, which no bytes have, where none is known.
    pub(super) fn read(&self, id: ChunkId) -> Result<[u8; 32]> {
        let mut digest = [0; 32];
        let read = self.file.read_exact_at(&mut digest, place(id));
        read.map_err(|error| Error::io("read", &self.path, error))?;
        Ok(digest)
    }

    /// Writes down the digest of a chunk's verified bytes.
    pub(super) fn note(&self, disk: &dyn Disk, id: ChunkId, digest: &[u8; 32]) -> io::Result<()> {
        disk.write_at(&self.file, place(id), digest)
    }

    /// Returns once what was noted is on the device.
    pub(super) fn sync(&self, disk: &dyn Disk) -> io::Result<()> {
        disk.sync_data(&self.file)
    }
}

fn place(id: ChunkId) -> u64 {
    u64::from(id) * DIGEST_LEN
}

fn file_len(index: &LayerIndex) -> Result<u64> {
    chunk_count(index).map(place)
}

fn damaged(path: &Path, how: &str) -> Error {
    Error::malformed(
        path.display().to_string(),
        format!("{how}; remove the layer and pull again"),
    )
}
