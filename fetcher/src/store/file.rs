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
//! Lock order: `flushing` (held for a whole flush, which may take as long as the device does; no
//! reader takes it), then `recorded` (held across the syscalls of an eviction and those that end
//! a flush; a reader takes it only after somebody evicted), then the file lock between
//! processes, then the right to make holes, which is never waited for, then `holes`, then `due`.

mod came;
mod check;
mod copied;
mod digests;
mod evict;
mod flush;
mod lent;
mod lock;
mod member;
pub(crate) mod pinned;
mod put;
mod read;
mod record;
mod shape;
mod touched;
mod whole;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use self::came::Came;
use self::read::touching;
use self::record::read_bitmap;
use super::Store;
use super::bitmap::{Bitmap, Stored};
use super::details::Details;
use super::disk::Disk;
use super::entries::{self, Entries};
use super::evictions::Evictions;
use super::learned::{self, Learned};
use crate::index::{Chunk, ChunkId, LayerIndex, align_up};
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

pub use check::LayerCheck;
pub use flush::FlushPolicy;
pub use lent::{Kept, Lent, Vouched};
pub(super) use lock::{LayerLock, lock_layer, try_lock_layer};
pub use pinned::PIN_TIME;
pub(super) use record::write_new;
pub use shape::Shaped;
pub use whole::Whole;

/// Names inside a layer's directory.
pub(super) const DATA: &str = "data";
pub(super) const INDEX: &str = "index";
/// The index as it was made, where it was shaped since.
pub(super) const PLAIN: &str = "index.plain";
pub(super) const SEAMS: &str = "seams";
pub(super) const BITMAP: &str = "bitmap";
pub(super) const TOUCHED: &str = "touched";

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
    /// Decoded bytes that came from other layers, not from the network.
    pub copied: u64,
}

/// A layer on disk. Shared by all its readers and fillers in this process.
pub struct LayerFile {
    index: Arc<LayerIndex>,
    details: Details,
    /// Digests of chunks that the index has none of.
    learned: Option<Learned>,
    /// Where decoding pieces of members can begin.
    entries: Option<Entries>,
    dir: PathBuf,
    data: File,
    inode: u64,
    disk: Arc<dyn Disk>,
    bits: Bitmap,
    /// Chunks whose bytes this process wrote, or read and found right.
    sound: Bitmap,
    present_bytes: AtomicU64,
    came: Came,
    failed_syncs: AtomicU64,
    removed: AtomicBool,
    /// Whose turn it is to flush.
    flushing: Mutex<()>,
    recorded: Mutex<Recorded>,
    due: Mutex<Option<Instant>>,
    /// The store's number of evictions that `bits` has heard of.
    evictions: Arc<Evictions>,
    seen: AtomicU64,
    /// Held shared from before the first byte of a `put` until its bit is set, and whole
    /// while chunks are found gone or made so.
    holes: RwLock<()>,
    /// Extents that were read since the store last asked.
    touched: Bitmap,
    /// Copied from other layers and not written down yet.
    copied_bytes: AtomicU64,
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
        // Not in the middle of an eviction: its holes could still come over what is put here.
        let lock = lock_layer(dir)?;
        let seen = store.evictions.now()?;
        let stored = read_bitmap(dir, count)?;
        drop(lock);
        let is_empty = stored.words.iter().all(|word| *word == 0);
        if meta.len() < index.data_len && is_empty {
            // Its length is promised only with the first bit; a crash may have come before.
            let disk = &store.disk;
            disk.set_len(&data, index.data_len).map_err(err("extend"))?;
        } else if meta.len() != index.data_len && Some(meta.len()) != align_up(index.data_len) {
            let detail = format!(
                "it has {} bytes where the index says {}; remove the layer and pull again",
                meta.len(),
                index.data_len
            );
            return Err(Error::malformed(path.display().to_string(), detail));
        }
        let extents = u32::try_from(index.data_len / EXTENT_BYTES).unwrap_or(u32::MAX - 1);
        let file = Self {
            bits: Bitmap::empty(count),
            sound: Bitmap::empty(count),
            inode: meta.ino(),
            learned: learned::open(dir, &index)?,
            entries: match index.has_whole_members() {
                true => entries::open(dir)?,
                false => None,
            },
            index: Arc::new(index),
            details,
            dir: dir.to_path_buf(),
            data,
            disk: Arc::clone(&store.disk),
            present_bytes: AtomicU64::new(0),
            came: Came::default(),
            failed_syncs: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            due: Mutex::new(None),
            evictions: Arc::clone(&store.evictions),
            seen: AtomicU64::new(seen),
            holes: RwLock::new(()),
            touched: Bitmap::empty(extents + 1),
            copied_bytes: AtomicU64::new(0),
            store: store.me.clone(),
            flushing: Mutex::default(),
            recorded: Mutex::new(Recorded {
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
            copied: self.copied_bytes(),
        })
    }

    /// Tells this object that its directory is gone. What is open stays readable.
    pub(super) fn mark_removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    /// Whether its directory is gone, by this process.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// The store, while somebody has it.
    pub(super) fn store(&self) -> Option<Arc<Store>> {
        self.store.upgrade()
    }

    pub(super) fn chunk(&self, id: ChunkId) -> Result<&Chunk> {
        let chunk = usize::try_from(id)
            .ok()
            .and_then(|at| self.index.chunks.get(at));
        chunk.ok_or_else(|| Error::NotFound {
            what: format!("chunk {id} of layer {}", self.index.blob_digest),
            host: String::new(),
        })
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

/// Number of chunks as the bitmap counts them.
pub(super) fn chunk_count(index: &LayerIndex) -> Result<u32> {
    u32::try_from(index.chunks.len()).map_err(|_| {
        let what = format!("index of layer {}", index.blob_digest);
        Error::limit(what, format!("{} chunks", index.chunks.len()))
    })
}
