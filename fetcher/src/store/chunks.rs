//! Where on this node the bytes of a chunk may be: from chunk digest to places in layers.
//!
//! Invariant: **only a hint**. Whoever follows it hashes the bytes it finds and uses them
//! only if they are the wanted ones, so any content of the file, torn, stale, lost or
//! made up, costs a fetch and never a wrong byte. That is why it needs no sync, no lock
//! and no recovery, and changes outside the [`super::disk::Disk`], like `evictions`: what
//! a crash leaves of it is some file, and every file is a good one.
//!
//! A hash table of fixed size in one sparse file, read and written a bucket at a time:
//!
//! ```text
//! <root>/chunks      0  magic    "LAZCHNKS"
//!                    8  version    u32, 1
//!                   12  buckets    u32
//!                 4096  buckets    128 bytes each; see `bucket`
//! ```
//!
//! The first 8 bytes of a digest choose the bucket, the next 4 are the tag. A place is the
//! first 4 bytes of a blob digest and an offset in that layer's data file: no index of the
//! other layer is read to copy from it. Chosen over a sorted file per layer, because a
//! look-up takes one read however many layers there are, opening the store costs one read
//! and no memory, creating a layer costs nothing (places are noted as chunks come), and
//! what one process puts the others see at once. The price is that it forgets: the oldest
//! place of a full bucket, and after a power cut what the kernel had not written back.
//! A check of the store notes everything again.

mod bucket;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use self::bucket::BUCKET_BYTES;
pub(crate) use self::bucket::Place;
use super::{LOCK_WAIT, sys};
use crate::Result;
use crate::lock::lock_within;
use crate::types::Digest;

const MAGIC: [u8; 8] = *b"LAZCHNKS";
const VERSION: u32 = 1;
/// Bytes before the buckets, and what [`ChunkTable::note_all`] changes at a time.
const PAGE_BYTES: u64 = 4096;
/// 16 MiB at most, for a million chunks: some 20 GiB of usual layers.
const BUCKETS: u32 = 1 << 17;
/// What a header may say: 1 GiB.
const BUCKETS_MAX: u32 = 1 << 23;
const NAME: &str = "chunks";

/// The table of one store.
#[derive(Debug)]
pub(crate) struct ChunkTable {
    layers_dir: PathBuf,
    /// None where it could not be made: then nothing is known, and all goes on.
    file: Option<File>,
    buckets: u32,
    /// Names of layers' directories by the first bytes of their digests.
    names: Mutex<HashMap<u32, String>>,
}

impl ChunkTable {
    /// The table of the store in `root`, made if absent. Never fails.
    pub(crate) fn open(root: &Path) -> Self {
        let path = root.join(NAME);
        let (file, buckets) = match open(&path) {
            Ok((file, buckets)) => (Some(file), buckets),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "chunks of other layers will not be found");
                (None, BUCKETS)
            }
        };
        Self {
            layers_dir: root.join("layers"),
            file,
            buckets,
            names: Mutex::default(),
        }
    }

    /// Has the kernel read all of it soon: a start looks at hundreds of places in it, each of
    /// which would wait for the disk.
    pub(super) fn read_soon(&self) {
        let Some(Ok(file)) = self.file.as_ref().map(File::try_clone) else {
            return;
        };
        // Pages for all of it take the kernel milliseconds, beside which a start can go on.
        let reader = std::thread::Builder::new().name("laz-ahead".to_owned());
        if let Err(error) = reader.spawn(move || sys::read_soon(&file)) {
            tracing::debug!(%error, "known chunks are read as they are looked up");
        }
    }

    /// Notes that the bytes with this digest were put there.
    pub(crate) fn note(&self, chunk_digest: &[u8; 32], place: Place) {
        let key = self.key(chunk_digest);
        self.change(key.bucket, |bucket| bucket::insert(bucket, key.tag, place));
    }

    /// [`Self::note`] of very many, a page of the file at a time.
    pub(super) fn note_all(&self, chunks: impl Iterator<Item = ([u8; 32], Place)>) {
        let mut chunks: Vec<(Key, Place)> = chunks
            .map(|(digest, place)| (self.key(&digest), place))
            .collect();
        chunks.sort_unstable_by_key(|(key, place)| (key.bucket, place.data_offset));
        let page = |key: &Key| offset(key.bucket) / PAGE_BYTES;
        for run in chunks.chunk_by(|(a, _), (b, _)| page(a) == page(b)) {
            let Some((first, _)) = run.first() else {
                continue;
            };
            let start = page(first) * PAGE_BYTES;
            self.change_at(start..start + PAGE_BYTES, |bytes| {
                let mut changed = false;
                for (key, place) in run {
                    let at = usize::try_from(offset(key.bucket) - start).unwrap_or(usize::MAX);
                    let bucket = bytes.get_mut(at..).and_then(|b| b.get_mut(..BUCKET_BYTES));
                    changed |= bucket.is_some_and(|b| bucket::insert(b, key.tag, *place));
                }
                changed
            });
        }
    }

    /// Where bytes with this digest may be, likeliest first.
    pub(crate) fn find(&self, chunk_digest: &[u8; 32]) -> Vec<Place> {
        let key = self.key(chunk_digest);
        let mut bytes = [0; BUCKET_BYTES];
        let read = self.file.as_ref().map(|file| {
            file.read_exact_at(&mut bytes, offset(key.bucket))
                .map(|()| bucket::find(&bytes, key.tag))
        });
        read.and_then(io::Result::ok).unwrap_or_default()
    }

    /// Drops a place where they were not.
    pub(crate) fn forget(&self, chunk_digest: &[u8; 32], place: Place) {
        let key = self.key(chunk_digest);
        self.change(key.bucket, |bucket| bucket::remove(bucket, key.tag, place));
    }

    /// The directory of the layer that a place speaks of, if there is one now. Lists all layers
    /// for one that it does not know.
    pub(super) fn layer_dir(&self, layer: u32) -> Result<Option<PathBuf>> {
        let mut names = self.names.lock();
        if !names.contains_key(&layer) {
            let listed = super::list(&self.layers_dir)?;
            names.clear();
            names.extend(listed.iter().filter_map(|path| {
                let name = path.file_name()?.to_str()?;
                let digest = Digest::from_file_name(name).ok()?;
                Some((short(&digest), name.to_owned()))
            }));
        }
        Ok(names.get(&layer).map(|name| self.layers_dir.join(name)))
    }

    fn key(&self, chunk_digest: &[u8; 32]) -> Key {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *chunk_digest;
        let number = u64::from_le_bytes([a, b, c, d, e, f, g, h]) % u64::from(self.buckets);
        Key {
            bucket: u32::try_from(number).unwrap_or(0),
            tag: u32::from_le_bytes([i, j, k, l]),
        }
    }

    fn change(&self, number: u32, change: impl FnOnce(&mut [u8]) -> bool) {
        let start = offset(number);
        self.change_at(start..start + BUCKET_BYTES as u64, change);
    }

    /// Changes bytes of the file. Two at once may lose what one of them notes.
    fn change_at(&self, range: Range<u64>, change: impl FnOnce(&mut [u8]) -> bool) {
        let Some(file) = &self.file else {
            return;
        };
        let len = usize::try_from(range.end - range.start).unwrap_or(0);
        let mut bytes = vec![0; len];
        let write = || {
            file.read_exact_at(&mut bytes, range.start)?;
            if change(&mut bytes) {
                file.write_all_at(&bytes, range.start)?;
            }
            Ok::<_, io::Error>(())
        };
        if let Err(error) = write() {
            tracing::debug!(%error, "cannot note where chunks are");
        }
    }
}

/// Where to look for a digest.
#[derive(Debug, Clone, Copy)]
struct Key {
    bucket: u32,
    tag: u32,
}

/// How places name a layer.
pub(super) fn short(blob_digest: &Digest) -> u32 {
    match blob_digest.as_bytes() {
        [a, b, c, d, ..] => u32::from_le_bytes([*a, *b, *c, *d]),
        _ => 0,
    }
}

fn offset(bucket: u32) -> u64 {
    PAGE_BYTES + u64::from(bucket) * BUCKET_BYTES as u64
}

fn open(path: &Path) -> io::Result<(File, u32)> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    if let Some(buckets) = read_header(&file)? {
        return Ok((file, buckets));
    }
    // Somebody may be making it; it holds the lock then.
    if !lock_within(&file, LOCK_WAIT)? {
        return Err(io::Error::from(io::ErrorKind::TimedOut));
    }
    let buckets = match read_header(&file)? {
        Some(buckets) => buckets,
        None => {
            make(&file, BUCKETS)?;
            BUCKETS
        }
    };
    file.unlock()?;
    Ok((file, buckets))
}

/// Number of buckets, if the file is a table.
fn read_header(file: &File) -> io::Result<Option<u32>> {
    let mut head = [0; 16];
    if file.read_at(&mut head, 0)? < head.len() {
        return Ok(None);
    }
    let [magic @ .., a, b, c, d, e, f, g, h] = head;
    let version = u32::from_le_bytes([a, b, c, d]);
    let buckets = u32::from_le_bytes([e, f, g, h]);
    let is_table = magic == MAGIC && version == VERSION;
    let is_whole =
        (1..=BUCKETS_MAX).contains(&buckets) && file.metadata()?.len() == offset(buckets);
    Ok((is_table && is_whole).then_some(buckets))
}

/// An empty table. The header comes last.
fn make(file: &File, buckets: u32) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(offset(buckets))?;
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend(buckets.to_le_bytes());
    file.write_all_at(&head, 0)
}

#[cfg(test)]
mod tests;
