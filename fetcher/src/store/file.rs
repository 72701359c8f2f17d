//! One layer on disk: its index, its sparse data file and the bitmap of what is present.
//!
//! Invariant: a byte leaves [`LayerFile::read_at`] only if its chunk is present, and a
//! chunk is present only if verified bytes of it were written whole. On disk the order is
//! bytes, sync, bit: a crash at any point loses at most what no flush has recorded.
//!
//! Disks rot between two starts. So bytes that this process did not write itself are
//! compared with their digest before they leave for the first time; what does not match
//! is absent again, and fetched again.
//!
//! Several processes may fill one layer: they write the same verified bytes at the same
//! places, and flushes merge their bits under a lock of the data file. Any of them may
//! evict chunks meanwhile; how no reader notices is told in `evict`.
//!
//! Lock order: `flushing` (held across the syscalls of a flush or an eviction, which it
//! serialises; a reader takes it only after somebody evicted), then the file lock between
//! processes, then `holes`, then `due`.

mod check;
mod evict;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::bitmap::{self, Bitmap, Stored};
use super::details::Details;
use super::disk::Disk;
use super::evictions::Evictions;
use super::lock::lock_within;
use super::{LOCK_WAIT, Store};
use crate::codec::{ChunkHasher, VerifiedBytes};
use crate::index::details::SpanDetails;
use crate::index::{Chunk, ChunkId, Encoding, LayerIndex, Span};
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

pub use check::LayerCheck;

/// Names inside a layer's directory.
pub(super) const DATA: &str = "data";
pub(super) const INDEX: &str = "index";
pub(super) const BITMAP: &str = "bitmap";
const BITMAP_NEW: &str = "bitmap.new";
pub(super) const TOUCHED: &str = "touched";

/// Bytes read at a time while a chunk is checked.
const CHECK_BYTES: usize = 128 << 10;
/// How often a `put` writes again because a sync failed while it was writing.
const PUT_ATTEMPTS_MAX: u32 = 4;
/// How often a read begins again because somebody evicted meanwhile. Each time takes
/// another eviction in the microseconds of a read.
const READ_ATTEMPTS_MAX: u32 = 100;
/// What is noted as read together, in bytes of the data file.
pub(super) const EXTENT_BYTES: u64 = 1 << 20;

/// What a layer takes on this node, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerUsage {
    /// Decoded bytes of the chunks that are present.
    pub present: u64,
    /// Bytes of the device that the data file occupies.
    pub allocated: u64,
    /// Decoded bytes of all chunks.
    pub total: u64,
}

/// When unrecorded chunks are worth a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushPolicy {
    /// Decoded bytes written since the last flush.
    pub bytes: u64,
    /// Time since the first of them was noticed.
    pub age: Duration,
}

impl Default for FlushPolicy {
    /// What a crash may cost: 32 MiB or 5 s of fetching. Smaller means more syncs while
    /// an image starts, when the disk has better things to do.
    fn default() -> Self {
        Self {
            bytes: 32 << 20,
            age: Duration::from_secs(5),
        }
    }
}

/// A layer on disk. Shared by all its readers and fillers in this process.
pub struct LayerFile {
    index: Arc<LayerIndex>,
    details: Details,
    dir: PathBuf,
    data: File,
    inode: u64,
    disk: Arc<dyn Disk>,
    bits: Bitmap,
    /// Chunks whose bytes this process wrote, or read and found right.
    sound: Bitmap,
    present_bytes: AtomicU64,
    dirty_bytes: AtomicU64,
    failed_syncs: AtomicU64,
    removed: AtomicBool,
    flushing: Mutex<Recorded>,
    due: Mutex<Option<Instant>>,
    /// The store's number of evictions that `bits` has heard of.
    evictions: Arc<Evictions>,
    seen: AtomicU64,
    /// Held shared from before the first byte of a `put` until its bit is set, and whole
    /// while chunks are found gone or made so.
    holes: RwLock<()>,
    /// Extents that were read since the store last asked.
    touched: Bitmap,
    store: Weak<Store>,
}

/// What is known to be on disk.
struct Recorded {
    stored: Stored,
    /// Whether the names of the layer and of its bitmap are on the device. Whoever made
    /// them may have died or failed before its sync. Reading needs no such promise, so
    /// opening a layer syncs nothing; a flush makes the promise, so it syncs them once.
    named: bool,
}

impl LayerFile {
    /// Opens the layer in `dir`, whose index has been decoded.
    pub(super) fn open(
        dir: &Path,
        index: LayerIndex,
        details: Details,
        store: &Store,
    ) -> Result<Self> {
        let path = dir.join(DATA);
        let err = |op| move |e| Error::io(op, dir.join(DATA), e);
        let count = chunk_count(&index)?;
        let data = File::options().read(true).write(true).open(&path);
        let data = data.map_err(err("open"))?;
        let meta = data.metadata().map_err(err("inspect"))?;
        if meta.len() != index.data_len {
            let detail = format!(
                "it has {} bytes where the index says {}; remove the layer and pull again",
                meta.len(),
                index.data_len
            );
            return Err(Error::malformed(path.display().to_string(), detail));
        }
        // Not in the middle of an eviction: its holes could still come over what is put here.
        let lock = lock_layer(dir)?;
        let seen = store.evictions.now()?;
        let stored = read_bitmap(dir, count)?;
        drop(lock);
        let extents = u32::try_from(index.data_len / EXTENT_BYTES).unwrap_or(u32::MAX - 1);
        let file = Self {
            bits: Bitmap::empty(count),
            sound: Bitmap::empty(count),
            inode: meta.ino(),
            index: Arc::new(index),
            details,
            dir: dir.to_path_buf(),
            data,
            disk: Arc::clone(&store.disk),
            present_bytes: AtomicU64::new(0),
            dirty_bytes: AtomicU64::new(0),
            failed_syncs: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            due: Mutex::new(None),
            evictions: Arc::clone(&store.evictions),
            seen: AtomicU64::new(seen),
            holes: RwLock::new(()),
            touched: Bitmap::empty(extents + 1),
            store: store.me.clone(),
            flushing: Mutex::new(Recorded {
                stored: stored.clone(),
                named: false,
            }),
        };
        file.bits.merge(&stored.words);
        file.recount();
        Ok(file)
    }

    /// The file and chunk tables.
    pub fn index(&self) -> &Arc<LayerIndex> {
        &self.index
    }

    /// Digest of the layer's blob.
    pub fn digest(&self) -> &Digest {
        &self.index.blob_digest
    }

    /// Whether the chunk can be read.
    pub fn is_present(&self, id: ChunkId) -> bool {
        self.bits.get(id)
    }

    /// Whether every chunk can be read.
    pub fn is_complete(&self) -> bool {
        (0..self.bits.count()).all(|id| self.bits.get(id))
    }

    /// Ids of the chunks that touch `range` of the data file and are not present,
    /// ascending. Looks only at memory.
    pub fn missing(&self, range: ByteRange) -> Vec<ChunkId> {
        touching(&self.index.chunks, range)
            .filter(|id| !self.bits.get(*id))
            .collect()
    }

    /// Ids of the chunks from `first` on that are not present, ascending.
    pub(crate) fn missing_from(&self, first: ChunkId) -> impl Iterator<Item = ChunkId> + '_ {
        (first..self.bits.count()).filter(|id| !self.bits.get(*id))
    }

    /// Writes a chunk's bytes and makes it present. Recorded by the next flush. Writing a
    /// present chunk again is harmless. On a full disk the store first makes room, if it
    /// may. Blocks on the device.
    pub fn put(&self, id: ChunkId, bytes: &VerifiedBytes) -> Result<()> {
        let chunk = self.chunk(id)?;
        self.check_put(id, chunk, bytes)?;
        match self.store.upgrade() {
            Some(store) => store.with_room(|| self.put_now(id, chunk, bytes)),
            None => self.put_now(id, chunk, bytes),
        }
    }

    fn put_now(&self, id: ChunkId, chunk: &Chunk, bytes: &VerifiedBytes) -> Result<()> {
        let _no_holes = self.holes.read();
        for _ in 0..PUT_ATTEMPTS_MAX {
            let failures = self.failed_syncs.load(Ordering::Acquire);
            self.disk
                .write_at(&self.data, chunk.data_offset, bytes)
                .map_err(|e| Error::io("write to", self.dir.join(DATA), e))?;
            self.sound.set(id);
            if self.bits.set(id) {
                self.present_bytes
                    .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
            }
            // A sync that failed meanwhile may have dropped these bytes from the page
            // cache's dirty set; a bit set now would be recorded without them.
            if self.failed_syncs.load(Ordering::Acquire) == failures {
                self.dirty_bytes
                    .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
                return Ok(());
            }
            if self.bits.clear(id) {
                self.present_bytes
                    .fetch_sub(u64::from(chunk.len), Ordering::Relaxed);
            }
        }
        let error = io::Error::other("the device keeps failing to sync");
        Err(Error::io("write to", self.dir.join(DATA), error))
    }

    /// Fills `buf` from `offset` of the data file if every chunk it touches is present and
    /// sound; `false`, with `buf` untouched, if not. Padding between files reads as zeros.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let range = ByteRange::at(offset, buf.len() as u64)
            .filter(|range| range.end() <= self.index.data_len)
            .ok_or_else(|| {
                let what = format!("a read of layer {}", self.index.blob_digest);
                let detail = format!(
                    "{} bytes at {offset}, but its data ends at {}",
                    buf.len(),
                    self.index.data_len
                );
                Error::limit(what, detail)
            })?;
        for _ in 0..READ_ATTEMPTS_MAX {
            let seen = self.seen.load(Ordering::Acquire);
            let read = self.read_present(range, buf)?;
            if self.evictions.now()? == seen {
                if read {
                    self.touch(offset);
                }
                return Ok(read);
            }
            self.refresh()?;
        }
        Ok(false)
    }

    /// Fills `buf` if every chunk that touches `range` is present and sound: with wrong
    /// bytes, if one was evicted meanwhile.
    fn read_present(&self, range: ByteRange, buf: &mut [u8]) -> Result<bool> {
        for id in touching(&self.index.chunks, range) {
            if !self.bits.get(id) || !self.sound.get(id) && !self.check(id)? {
                return Ok(false);
            }
        }
        self.data
            .read_exact_at(buf, range.start())
            .map_err(|e| Error::io("read from", self.dir.join(DATA), e))?;
        Ok(true)
    }

    fn touch(&self, offset: u64) {
        let extent = u32::try_from(offset / EXTENT_BYTES).unwrap_or(u32::MAX);
        if !self.touched.get(extent) {
            self.touched.set(extent);
        }
    }

    /// SHA-256 of a chunk's bytes. Blocks on the device where it is among the details of
    /// its span.
    pub fn chunk_digest(&self, id: ChunkId) -> Result<[u8; 32]> {
        let chunk = self.chunk(id)?;
        let Encoding::GzipSpan { span, .. } = chunk.encoding else {
            return chunk.chunk_digest.ok_or_else(|| self.no_digest(id));
        };
        let first = self.span(span)?.first_chunk;
        let number = usize::try_from(id.saturating_sub(first)).unwrap_or(usize::MAX);
        let digest = self.span_details(span)?.digest(number);
        digest.ok_or_else(|| self.no_digest(id))
    }

    /// What decoding the chunks of a span takes. Blocks on the device.
    pub fn span_details(&self, number: u32) -> Result<Arc<SpanDetails>> {
        let read = self.details.read(number, self.span(number)?);
        if let Err(Error::Corrupt { .. }) = &read {
            // Nothing of the span can be told right from wrong any more. Without its index
            // the layer counts as damaged, and whoever opens it next makes it again.
            let _ = self.disk.remove_file(&self.dir.join(INDEX));
        }
        read
    }

    fn span(&self, number: u32) -> Result<&Span> {
        let span = usize::try_from(number)
            .ok()
            .and_then(|at| self.index.spans.get(at));
        span.ok_or_else(|| Error::NotFound {
            what: format!("span {number} of layer {}", self.index.blob_digest),
            host: String::new(),
        })
    }

    fn no_digest(&self, id: ChunkId) -> Error {
        let what = format!("index of layer {}", self.index.blob_digest);
        Error::malformed(what, format!("it has no digest of chunk {id}"))
    }

    /// Whether the bytes of a present chunk have its digest; if not, it is absent from
    /// now on.
    fn check(&self, id: ChunkId) -> Result<bool> {
        if self.is_right(id)? {
            self.sound.set(id);
            return Ok(true);
        }
        // A hole that somebody has just made is no damage; the reader will hear of it.
        if self.evictions.now()? == self.seen.load(Ordering::Acquire) && self.bits.get(id) {
            tracing::warn!(digest = %self.index.blob_digest, chunk = id, "stored bytes are damaged, dropping them");
            self.forget(id)?;
        }
        Ok(false)
    }

    fn forget(&self, id: ChunkId) -> Result<()> {
        let len = u64::from(self.chunk(id)?.len);
        if self.bits.clear(id) {
            self.present_bytes.fetch_sub(len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether what the data file has in the chunk's place has the chunk's digest.
    fn is_right(&self, id: ChunkId) -> Result<bool> {
        let chunk = self.chunk(id)?;
        let mut hasher = ChunkHasher::new();
        let mut piece = vec![0; CHECK_BYTES];
        let (mut at, mut left) = (chunk.data_offset, u64::from(chunk.len));
        while left > 0 {
            let len = usize::try_from(left).map_or(CHECK_BYTES, |left| left.min(CHECK_BYTES));
            let piece = piece.get_mut(..len).unwrap_or_default();
            self.data
                .read_exact_at(piece, at)
                .map_err(|e| Error::io("read from", self.dir.join(DATA), e))?;
            hasher.update(piece);
            at = at.saturating_add(len as u64);
            left = left.saturating_sub(len as u64);
        }
        Ok(hasher.finish() == self.chunk_digest(id)?)
    }

    /// Records every chunk that was present when the call began: syncs the data file,
    /// then merges the bits into the bitmap file. Blocks on the device.
    ///
    /// After a failed sync, chunks that no earlier flush recorded are absent again. A
    /// layer that was removed meanwhile has nothing to record, which is no error. Then
    /// the store is brought back within its bounds, if it has any.
    pub fn flush(&self) -> Result<()> {
        let Some(store) = self.store.upgrade() else {
            return self.flush_now();
        };
        store.with_room(|| self.flush_now())?;
        self.note_touched();
        store.keep_within();
        Ok(())
    }

    fn flush_now(&self) -> Result<()> {
        let mut recorded = self.flushing.lock();
        *self.due.lock() = None;
        self.dirty_bytes.store(0, Ordering::Relaxed);
        if self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.bits.snapshot() == recorded.stored.words {
            return self.settle_names(&mut recorded);
        }
        let mut words = self.sync_present(&recorded)?;
        let Some(lock) = self.lock_own()? else {
            return Ok(());
        };
        if self.catch_up(&mut recorded)? {
            // What was synced may be a hole by now, and what is no hole not synced.
            words = self.sync_present(&recorded)?;
        }
        let mut merged = read_bitmap(&self.dir, self.bits.count())?;
        merged
            .words
            .iter_mut()
            .zip(&words)
            .for_each(|(a, b)| *a |= b);
        self.record(&merged)?;
        self.bits.merge(&merged.words);
        self.recount();
        recorded.stored = merged;
        drop(lock);
        self.settle_names(&mut recorded)
    }

    /// Bits of chunks whose bytes are on the device when this returns.
    fn sync_present(&self, recorded: &Recorded) -> Result<Vec<u64>> {
        let words = self.bits.snapshot();
        if let Err(error) = self.disk.sync_data(&self.data) {
            self.failed_syncs.fetch_add(1, Ordering::AcqRel);
            self.bits.retain(&recorded.stored.words);
            self.recount();
            return Err(Error::io("sync", self.dir.join(DATA), error));
        }
        Ok(words)
    }

    /// The layer's lock, unless the directory is another layer's by now, or gone.
    fn lock_own(&self) -> Result<Option<LayerLock>> {
        let lock = lock_layer(&self.dir)?;
        Ok(lock.filter(|lock| lock.inode == self.inode))
    }

    /// Returns once the layer's name and what its bitmap held when it was opened are on
    /// the device: the part of [`LayerFile::flush`] that needs no new chunk. Cheap when
    /// done before. Blocks on the device.
    pub fn settle(&self) -> Result<()> {
        self.settle_names(&mut self.flushing.lock())
    }

    fn settle_names(&self, recorded: &mut Recorded) -> Result<()> {
        if recorded.named || self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        for dir in [Some(&*self.dir), self.dir.parent()].into_iter().flatten() {
            match self.disk.sync_dir(dir) {
                Ok(()) => {}
                // Removed by another process meanwhile: nothing is left to promise.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(e) => return Err(Error::io("sync", dir, e)),
            }
        }
        recorded.named = true;
        Ok(())
    }

    /// Whether `policy` says that [`LayerFile::flush`] is worth it at `now`. Looks only at
    /// memory.
    pub fn is_flush_due(&self, policy: FlushPolicy, now: Instant) -> bool {
        let dirty = self.dirty_bytes.load(Ordering::Relaxed);
        if dirty == 0 {
            return false;
        }
        let since = *self.due.lock().get_or_insert(now);
        dirty >= policy.bytes || now.saturating_duration_since(since) >= policy.age
    }

    /// Decoded bytes of the chunks that are present.
    pub fn present_bytes(&self) -> u64 {
        self.present_bytes.load(Ordering::Relaxed)
    }

    /// What the layer takes now.
    pub fn usage(&self) -> Result<LayerUsage> {
        let meta = self.data.metadata();
        let meta = meta.map_err(|e| Error::io("inspect", self.dir.join(DATA), e))?;
        Ok(LayerUsage {
            present: self.present_bytes.load(Ordering::Relaxed),
            allocated: meta.blocks() * 512,
            total: self.index.chunks.iter().map(|c| u64::from(c.len)).sum(),
        })
    }

    /// Tells this object that its directory is gone. What is open stays readable.
    pub(super) fn mark_removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    fn chunk(&self, id: ChunkId) -> Result<&Chunk> {
        let chunk = usize::try_from(id)
            .ok()
            .and_then(|at| self.index.chunks.get(at));
        chunk.ok_or_else(|| Error::NotFound {
            what: format!("chunk {id} of layer {}", self.index.blob_digest),
            host: String::new(),
        })
    }

    /// The caller verified the bytes against this chunk's digest; a wrong length shows
    /// that it was another's.
    fn check_put(&self, id: ChunkId, chunk: &Chunk, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 == u64::from(chunk.len) {
            return Ok(());
        }
        let what = format!("chunk {id} of layer {}", self.index.blob_digest);
        let detail = format!("{} bytes where the index says {}", bytes.len(), chunk.len);
        Err(Error::malformed(what, detail))
    }

    /// Makes the bitmap file say `stored`, on the device. The caller holds the layer's lock.
    fn record(&self, stored: &Stored) -> Result<()> {
        let bytes = bitmap::encode(self.bits.count(), stored);
        write_new(&*self.disk, &self.dir.join(BITMAP_NEW), &bytes)?;
        let to = self.dir.join(BITMAP);
        self.disk
            .rename(&self.dir.join(BITMAP_NEW), &to)
            .and_then(|()| self.disk.sync_dir(&self.dir))
            .map_err(|e| Error::io("replace", to, e))
    }

    fn recount(&self) {
        let len = |id| self.chunk(id).map_or(0, |chunk| u64::from(chunk.len));
        let sum = self.bits.ones().map(len).sum();
        self.present_bytes.store(sum, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for LayerFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerFile")
            .field("digest", &self.index.blob_digest)
            .field("present_bytes", &self.present_bytes)
            .finish_non_exhaustive()
    }
}

/// The lock of a layer's directory: flushes and removals of it exclude each other. Held
/// until dropped.
pub(super) struct LayerLock {
    _data: File,
    inode: u64,
}

/// Locks the layer that `dir` names now; `None` when there is none.
pub(super) fn lock_layer(dir: &Path) -> Result<Option<LayerLock>> {
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

/// Number of chunks as the bitmap counts them.
pub(super) fn chunk_count(index: &LayerIndex) -> Result<u32> {
    u32::try_from(index.chunks.len()).map_err(|_| {
        let what = format!("index of layer {}", index.blob_digest);
        Error::limit(what, format!("{} chunks", index.chunks.len()))
    })
}

/// Makes the file at `path` hold exactly `bytes`, synced.
pub(super) fn write_new(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<File> {
    let write = || {
        let file = disk.create(path)?;
        disk.write_at(&file, 0, bytes)?;
        disk.sync_data(&file)?;
        Ok(file)
    };
    write().map_err(|e| Error::io("write", path, e))
}

/// Ids of the chunks that share a byte with `range`.
fn touching(chunks: &[Chunk], range: ByteRange) -> std::ops::Range<ChunkId> {
    if range.is_empty() {
        return 0..0;
    }
    let end_of = |chunk: &Chunk| chunk.data_offset.saturating_add(u64::from(chunk.len));
    let first = chunks.partition_point(|chunk| end_of(chunk) <= range.start());
    let last = chunks.partition_point(|chunk| chunk.data_offset < range.end());
    let id = |at| ChunkId::try_from(at).unwrap_or(ChunkId::MAX);
    id(first)..id(last.max(first))
}

/// The bits on disk; none if the file is absent or does not check out.
fn read_bitmap(dir: &Path, count: u32) -> Result<Stored> {
    Ok(try_read_bitmap(dir, count)?.unwrap_or_else(|| {
        let path = dir.join(BITMAP);
        tracing::warn!(path = %path.display(), "bitmap is damaged, fetching its layer again");
        Stored::nothing(count)
    }))
}

/// [`read_bitmap`], but `None` if the file does not check out.
fn try_read_bitmap(dir: &Path, count: u32) -> Result<Option<Stored>> {
    match super::read_bounded(&dir.join(BITMAP), bitmap::file_bytes(count)) {
        Ok(bytes) => Ok(bitmap::decode(count, &bytes)),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Some(Stored::nothing(count)))
        }
        Err(Error::Limit { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_finds_exactly_the_chunks_that_share_a_byte() {
        let chunk = |data_offset, len| Chunk {
            encoding: Encoding::Stream,
            data_offset,
            len,
            chunk_digest: Some([0; 32]),
        };
        let chunks = [chunk(0, 10), chunk(10, 5), chunk(4096, 1), chunk(8192, 100)];
        let table = [
            ((0, 1), 0..1),
            ((9, 11), 0..2),
            ((10, 15), 1..2),
            ((15, 4096), 2..2),
            ((20, 30), 2..2),
            ((14, 4097), 1..3),
            ((5000, 8192), 3..3),
            ((0, 9000), 0..4),
            ((8291, 8292), 3..4),
            ((8292, 8300), 4..4),
            ((5, 5), 0..0),
        ];
        for ((start, end), ids) in table {
            let range = ByteRange::new(start, end).unwrap();
            assert_eq!(touching(&chunks, range), ids, "{range}");
        }
    }
}
