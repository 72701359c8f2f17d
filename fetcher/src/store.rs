//! The content-addressed store: what this node has verified and kept.
//!
//! Invariant: whatever has a name under `content/` or `layers/` was whole and on the
//! device before it got that name. Everything is made under `ingest/` and renamed;
//! everything goes by a rename into `trash/`. Several processes may use one store.
//! Blocks on the device: call it from blocking threads. Never touches the network.
//!
//! ```text
//! <root>/store.lock                       held for moments: drafts, publishing, removal
//! <root>/evict.lock                       held by the one process that evicts
//! <root>/evictions                        how processes learn of each other's evictions
//! <root>/chunks                           a hint: where the bytes of a digest may be
//! <root>/content/<algorithm>-<hex>        a small blob (manifest, config), whole
//! <root>/layers/<algorithm>-<hex>/index   file and chunk tables
//! <root>/layers/<algorithm>-<hex>/index.plain  the index as it was made, where it was shaped
//! <root>/layers/<algorithm>-<hex>/seams   a help: what shaping the index takes
//! <root>/layers/<algorithm>-<hex>/origin  where details are that the index lacks
//! <root>/layers/<algorithm>-<hex>/bitmap  which chunks are present
//! <root>/layers/<algorithm>-<hex>/data    payloads of files, sparse
//! <root>/layers/<algorithm>-<hex>/image   what an EROFS over the whole of `data` is made of
//! <root>/layers/<algorithm>-<hex>/learned digests of chunks, where the index lacks them
//! <root>/layers/<algorithm>-<hex>/entries a help: where decoding pieces of members can begin
//! <root>/layers/<algorithm>-<hex>/touched a hint: which parts were read lately
//! <root>/layers/<algorithm>-<hex>/pinned  a hint: which parts start-ups read
//! <root>/layers/<algorithm>-<hex>/copied  a hint: how much came from other layers
//! <root>/ingest/<n>/                      being made; `data` locked by its maker
//! <root>/trash/<n>/                       being removed
//! ```
//!
//! Lock order: `store.lock` or `evict.lock`, then a layer's lock, then `open`, which is never held across
//! a system call.

mod bitmap;
mod blobs;
mod check;
pub(crate) mod chunks;
mod copy;
mod details;
pub mod disk;
mod entries;
mod evict;
mod evictions;
pub(crate) mod file;
mod ingest;
mod learned;
pub(crate) mod origin;
mod recover;
mod sys;
mod taken;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use self::chunks::ChunkTable;
use self::details::Provided;
use self::disk::{Disk, RealDisk};
use self::evict::Keeper;
use self::evictions::Evictions;
use crate::index::LayerIndex;
use crate::lock::{LockFile, lock_within};
use crate::types::Digest;
use crate::{Error, Result};

pub use blobs::BLOB_BYTES_MAX;
pub use check::{BlobCheck, StoreCheck};
pub use copy::Copied;
pub use details::PartialIndex;
pub use evict::{Bounds, Evicted, Hides, Space, Trim};
pub use file::{
    FlushPolicy, Kept, LayerCheck, LayerFile, LayerUsage, Lent, PIN_TIME, Shaped, Vouched, Whole,
};
pub use ingest::LayerIngest;
pub use taken::Taken;

/// Longest wait for another process that publishes or removes. Those take milliseconds;
/// one that takes this long is stopped, or its disk is.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// Deepest directory that removal descends into. Ours are flat.
const TREE_DEPTH_MAX: u32 = 4;

/// A store in a directory.
pub struct Store {
    root: PathBuf,
    disk: Arc<dyn Disk>,
    evictions: Arc<Evictions>,
    chunks: ChunkTable,
    /// Whether there were layers when this process opened the store: then a new one may
    /// well have chunks in common with them.
    had_layers: AtomicBool,
    /// Whether the file system was found unable to share blocks between files.
    cannot_share: AtomicBool,
    next: AtomicU64,
    open: Mutex<HashMap<Digest, Weak<LayerFile>>>,
    keeper: Keeper,
    me: Weak<Store>,
}

impl Store {
    /// Opens the store in `root`, made if absent, and clears what dead processes left.
    pub fn open(root: impl AsRef<Path>) -> Result<Arc<Self>> {
        Self::open_on(root, Arc::new(RealDisk))
    }

    /// Says that chunks will be looked up soon, so that what that reads comes from the disk
    /// meanwhile: some MiB, which go before what is read after this. Never waits.
    pub fn expect_lookups(&self) {
        // A store without layers has nothing to be found.
        if self.had_layers.load(Ordering::Relaxed) {
            self.chunks.read_soon();
        }
    }

    /// [`Store::open`] with another way to change files.
    pub fn open_on(root: impl AsRef<Path>, disk: Arc<dyn Disk>) -> Result<Arc<Self>> {
        let root = root.as_ref().to_path_buf();
        // The root and its missing parents are made outside the seam: they hold nothing yet.
        fs::create_dir_all(&root).map_err(|e| Error::io("create", &root, e))?;
        let evictions = Arc::new(Evictions::open(&root)?);
        let chunks = ChunkTable::open(&root);
        evict::prepare(&root)?;
        let store = Arc::new_cyclic(|me| Self {
            root,
            disk,
            evictions,
            chunks,
            had_layers: AtomicBool::new(false),
            cannot_share: AtomicBool::new(false),
            next: AtomicU64::new(0),
            open: Mutex::new(HashMap::new()),
            keeper: Keeper::default(),
            me: me.clone(),
        });
        recover::prepare(&store)?;
        let had_layers = !list(&store.root.join("layers"))?.is_empty();
        store.had_layers.store(had_layers, Ordering::Relaxed);
        Ok(store)
    }

    /// The layer of `index`, made with nothing present if this node does not have it. An
    /// existing layer stays as it is, with its own index.
    pub fn create_layer(self: &Arc<Self>, index: LayerIndex) -> Result<Arc<LayerFile>> {
        self.create_layer_with(index, &[])
    }

    /// [`Self::create_layer`] whose index has spans, with the details of all of them.
    pub fn create_layer_with(
        self: &Arc<Self>,
        index: LayerIndex,
        details: &[u8],
    ) -> Result<Arc<LayerFile>> {
        self.create(&index, Provided::All(details))
    }

    /// [`Self::create_layer`] whose index comes without the details of its spans; see
    /// [`LayerFile::put_details`].
    pub fn create_layer_without_details(
        self: &Arc<Self>,
        partial: &PartialIndex,
    ) -> Result<Arc<LayerFile>> {
        self.create(&partial.index, Provided::Later(partial))
    }

    fn create(
        self: &Arc<Self>,
        index: &LayerIndex,
        details: Provided<'_>,
    ) -> Result<Arc<LayerFile>> {
        match self.open_layer(&index.blob_digest) {
            // Made by someone who may not have got to sync its name.
            Ok(Some(file)) => file.settle().map(|()| file),
            Ok(None) | Err(Error::Malformed { .. }) => ingest::create_lazy(self, index, details),
            Err(error) => Err(error),
        }
    }

    /// The layer of this digest if the node has it, complete or not; the same object for
    /// everyone in this process. Changes nothing on the device: who records elsewhere that
    /// the node has the layer calls [`LayerFile::settle`] first.
    pub fn open_layer(&self, digest: &Digest) -> Result<Option<Arc<LayerFile>>> {
        if let Some(file) = self.already_open(digest) {
            return Ok(Some(file));
        }
        let dir = self.layer_dir(digest);
        let (index, details) = match details::open(&dir.join(file::INDEX)) {
            Ok(opened) => opened,
            Err(error @ Error::Malformed { .. }) if dir.join(file::PLAIN).exists() => {
                tracing::warn!(%digest, %error, "going back to the index as it was made");
                details::open(&dir.join(file::PLAIN)).map_err(|e| details::unusable(digest, e))?
            }
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return self.absent_or_damaged(&dir);
            }
            Err(error) => return Err(details::unusable(digest, error)),
        };
        if index.blob_digest != *digest {
            let detail = format!("it is of {}; remove the layer", index.blob_digest);
            return Err(Error::malformed(format!("index of layer {digest}"), detail));
        }
        let opened = Arc::new(LayerFile::open(&dir, index, details, self)?);
        Ok(Some(self.share(digest, opened)))
    }

    /// The index file of a layer that the node has, from its start; see
    /// [`crate::index::wire`].
    pub fn open_index(&self, digest: &Digest) -> Result<Option<File>> {
        let path = self.layer_dir(digest).join(file::INDEX);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("open", path, e)),
        }
    }

    /// Starts writing a whole layer as one stream.
    pub fn begin_ingest(self: &Arc<Self>, digest: &Digest) -> Result<LayerIngest> {
        LayerIngest::new(Arc::clone(self), *digest)
    }

    /// Removes a layer; `false` if there was none. Whoever has it open goes on reading.
    pub fn remove_layer(&self, digest: &Digest) -> Result<bool> {
        let _lock = self.lock()?;
        self.remove_layer_locked(digest)
    }

    /// Every layer and what it takes, or why it cannot be opened. Only reads.
    pub fn layers(&self) -> Result<Vec<(Digest, Result<LayerUsage>)>> {
        let usage = |digest: &Digest| match self.open_layer(digest) {
            Ok(Some(file)) => Some(file.usage()),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        };
        let digests = self.digests_in("layers")?;
        Ok(digests
            .into_iter()
            .filter_map(|digest| Some((digest, usage(&digest)?)))
            .collect())
    }

    fn already_open(&self, digest: &Digest) -> Option<Arc<LayerFile>> {
        let file = self.open.lock().get(digest)?.upgrade()?;
        (!file.is_removed()).then_some(file)
    }

    /// Everyone gets the object that was shared first.
    fn share(&self, digest: &Digest, opened: Arc<LayerFile>) -> Arc<LayerFile> {
        let mut open = self.open.lock();
        open.retain(|_, file| file.strong_count() > 0);
        let known = open.get(digest).and_then(Weak::upgrade);
        if let Some(file) = known.filter(|file| !file.is_removed()) {
            return file;
        }
        open.insert(*digest, Arc::downgrade(&opened));
        opened
    }

    fn forget_layer(&self, digest: &Digest) {
        self.open.lock().remove(digest);
    }

    fn absent_or_damaged(&self, dir: &Path) -> Result<Option<Arc<LayerFile>>> {
        if dir.exists() && dir.join(file::DATA).exists() {
            let what = format!("layer directory {}", dir.display());
            return Err(Error::malformed(
                what,
                "it has no index; remove the layer and pull again",
            ));
        }
        Ok(None)
    }

    fn remove_layer_locked(&self, digest: &Digest) -> Result<bool> {
        let dir = self.layer_dir(digest);
        let lock = file::lock_layer(&dir)?;
        if lock.is_none() && !dir.exists() {
            return Ok(false);
        }
        let trash = self.discard(&dir)?;
        if let Some(file) = self.open.lock().remove(digest).and_then(|f| f.upgrade()) {
            file.mark_removed();
        }
        drop(lock);
        remove_tree(&*self.disk, &trash)?;
        Ok(true)
    }

    /// Moves `path` into the trash, for good; returns where it is now, in a directory of
    /// its own. The store's lock is held.
    fn discard(&self, path: &Path) -> Result<PathBuf> {
        let trash = self.fresh_dir("trash")?;
        let parent = path.parent().unwrap_or(path);
        self.disk
            .rename(path, &trash.join("removed"))
            .map_err(|e| Error::io("remove", path, e))?;
        for dir in [&trash, parent] {
            self.disk
                .sync_dir(dir)
                .map_err(|e| Error::io("sync", dir, e))?;
        }
        Ok(trash)
    }

    /// Takes the lock that all processes on this store share; dropped, it is free.
    fn lock(&self) -> Result<LockFile> {
        let path = self.root.join("store.lock");
        let err = |e| Error::io("lock", &path, e);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(err)?;
        if lock_within(&file, LOCK_WAIT).map_err(err)? {
            return Ok(file.into());
        }
        let busy = "another process has held it for 30 s; see which one with lslocks";
        Err(err(io::Error::new(io::ErrorKind::TimedOut, busy)))
    }

    /// A new directory with a number for a name under `ingest` or `trash`.
    fn fresh_dir(&self, parent: &str) -> Result<PathBuf> {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let dir = self.root.join(parent).join(n.to_string());
            match self.disk.create_dir(&dir) {
                Ok(()) => return Ok(dir),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create", dir, e)),
            }
        }
    }

    fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    fn disk_arc(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    fn layer_dir(&self, digest: &Digest) -> PathBuf {
        self.root.join("layers").join(digest.file_name())
    }

    /// Digests that name the entries of a directory, sorted.
    fn digests_in(&self, name: &str) -> Result<Vec<Digest>> {
        let mut digests: Vec<Digest> = list(&self.root.join(name))?
            .iter()
            .filter_map(|path| Digest::from_file_name(path.file_name()?.to_str()?).ok())
            .collect();
        digests.sort_unstable();
        Ok(digests)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

/// The file at `path`, refused when longer than `max` bytes.
fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let err = |e| Error::io("read", path, e);
    let file = File::open(path).map_err(err)?;
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(err)?;
    if bytes.len() as u64 > max {
        let detail = format!("more than {max} bytes");
        return Err(Error::limit(path.display().to_string(), detail));
    }
    Ok(bytes)
}

/// Paths in a directory; none if it is gone.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let err = |e| Error::io("list", dir, e);
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| Ok(entry.map_err(err)?.path()))
            .collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(err(e)),
    }
}

/// Removes a file, or a directory with what is in it. Gone already is fine: another
/// process may be emptying the same trash.
fn remove_tree(disk: &dyn Disk, path: &Path) -> Result<()> {
    remove_below(disk, path, TREE_DEPTH_MAX)
}

fn remove_below(disk: &dyn Disk, path: &Path, depth: u32) -> Result<()> {
    let gone_is_fine = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| Error::io("remove", path, e)),
    };
    let is_dir = match fs::symlink_metadata(path) {
        Ok(meta) => meta.is_dir(),
        Err(e) => return gone_is_fine(Err(e)),
    };
    if !is_dir {
        return gone_is_fine(disk.remove_file(path));
    }
    let Some(depth) = depth.checked_sub(1) else {
        let what = path.display().to_string();
        return Err(Error::limit(
            what,
            "nested too deeply to be ours; remove it by hand",
        ));
    };
    for entry in list(path)? {
        remove_below(disk, &entry, depth)?;
    }
    gone_is_fine(disk.remove_dir(path))
}
