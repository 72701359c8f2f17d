//! Things being made: a private directory until they are whole, then one rename.
//!
//! Invariant: nothing under `ingest/` is ever read as content. Whoever makes something
//! holds a lock on its `data` file; a directory whose lock is free belongs to a dead
//! process and is dropped when a store is opened.

mod past;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::past::{BUFFER_LEN, Past, Ways};
use super::bitmap::{Bitmap, Stored};
use super::details::Provided;
use super::disk::Disk;
use super::file::{BITMAP, DATA, LayerFile, SEAMS, chunk_count, write_new};
use super::{Store, bitmap, details, entries, learned, remove_tree};
use crate::index::LayerIndex;
use crate::index::ingest::LayerSink;
use crate::lock::{LockFile, is_held};
use crate::types::Digest;
use crate::{Error, Result};

/// A directory under `ingest/` with a locked, empty `data` file. Dropped, it is removed.
pub(super) struct Draft {
    dir: PathBuf,
    data: LockFile,
    disk: Arc<dyn Disk>,
    published: bool,
}

impl Draft {
    /// Makes one. The store's lock is held meanwhile, so recovery in another process
    /// cannot see it before its `data` is locked.
    pub(super) fn new(store: &Store) -> Result<Self> {
        let _lock = store.lock()?;
        let dir = store.fresh_dir("ingest")?;
        let path = dir.join(DATA);
        let make = || {
            let data = store.disk().create(&path)?;
            if is_held(&data)? {
                return Err(io::Error::other("a new file is locked already"));
            }
            Ok(data.into())
        };
        match make() {
            Ok(data) => Ok(Self {
                dir,
                data,
                disk: Arc::clone(store.disk_arc()),
                published: false,
            }),
            Err(error) => {
                remove_quietly(store.disk(), &dir);
                Err(Error::io("create", path, error))
            }
        }
    }

    pub(super) fn data(&self) -> &File {
        &self.data
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the directory a whole layer, on the device, still under its private name. Of
    /// the data only what `bits` names has to be there: nothing if it names nothing.
    fn complete(
        &self,
        index: &LayerIndex,
        (details, seams): (Provided<'_>, Option<&[u8]>),
        bits: &Bitmap,
    ) -> Result<()> {
        let data = || {
            self.disk.set_len(&self.data, index.data_len)?;
            match bits.ones().next() {
                Some(_) => self.disk.sync_data(&self.data),
                None => Ok(()),
            }
        };
        data().map_err(|e| Error::io("write to", self.path(DATA), e))?;
        learned::create(&*self.disk, &self.dir, index)?;
        entries::create(&*self.disk, &self.dir, index)?;
        let mut stored = Stored::nothing(bits.count());
        stored.words = bits.snapshot();
        let bits = bitmap::encode(bits.count(), &stored);
        write_new(&*self.disk, &self.path(BITMAP), &bits)?;
        if let Some(seams) = seams {
            write_new(&*self.disk, &self.path(SEAMS), seams)?;
        }
        details::create(&*self.disk, &self.dir, index, details)?;
        self.disk
            .sync_dir(&self.dir)
            .map_err(|e| Error::io("sync", &self.dir, e))
    }

    /// Gives the complete directory its name under `layers/`. The store's lock is held.
    fn publish(mut self, to: &Path) -> Result<()> {
        let parent = to.parent().unwrap_or(to);
        self.disk
            .rename(&self.dir, to)
            .map_err(|e| Error::io("create", to, e))?;
        self.published = true;
        self.disk
            .sync_dir(parent)
            .map_err(|e| Error::io("sync", parent, e))
    }

    /// Puts the complete directory where the layer at `to` is, in one step, and drops
    /// that one. The store's lock and the layer's are held.
    fn replace(self, to: &Path) -> Result<()> {
        let parent = to.parent().unwrap_or(to);
        let own_parent = self.dir.parent().unwrap_or(&self.dir);
        let swap = || {
            self.disk.exchange(&self.dir, to)?;
            self.disk.sync_dir(parent)?;
            self.disk.sync_dir(own_parent)
        };
        // Dropping `self` removes what is under the private name now: the old layer.
        swap().map_err(|e| Error::io("replace", to, e))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            remove_quietly(&*self.disk, &self.dir);
        }
    }
}

/// A layer being written as one stream. Dropping it aborts.
///
/// What is written need not be verified chunk by chunk: nobody can read it before
/// [`LayerIngest::commit`], and the caller commits only a stream whose digest it checked.
pub struct LayerIngest {
    store: Arc<Store>,
    digest: Digest,
    draft: Draft,
    seams: Option<Vec<u8>>,
    /// Of a layer that nobody is about to read.
    past: Option<Past<Both>>,
}

impl LayerIngest {
    pub(super) fn new(store: Arc<Store>, digest: Digest) -> Result<Self> {
        let draft = Draft::new(&store)?;
        Ok(Self {
            store,
            digest,
            draft,
            seams: None,
            past: None,
        })
    }

    /// The same, whose bytes go to the device past the page cache as far as it takes them as
    /// fast as they come: for a layer that nobody is about to read. Called before the first write.
    pub fn past_page_cache(mut self) -> Result<Self> {
        let path = self.draft.path(DATA);
        let disk = &self.draft.disk;
        let opened = disk
            .open_past(&path)
            .map_err(|e| Error::io("open", &path, e))?;
        if let Some(past) = opened {
            let data = self.draft.data().try_clone();
            let both = Both {
                store: Arc::clone(&self.store),
                data: data.map_err(|e| Error::io("open", &path, e))?,
                path,
                past,
            };
            self.past = Some(Past::new(both, BUFFER_LEN));
        }
        Ok(self)
    }

    /// The same, that keeps `seams` ([`crate::index::seams`]) with the layer.
    #[must_use]
    pub fn with_seams(self, seams: Option<Vec<u8>>) -> Self {
        Self { seams, ..self }
    }

    /// Makes the layer visible, complete, on the device. A layer of this digest that is
    /// complete already stays, unless a zTOC says what is in it; another is replaced in one step,
    /// and whoever has it open goes on reading the old one. Blocks on the device.
    /// `details` are those of the index's spans.
    pub fn commit(self, index: LayerIndex, details: &[u8]) -> Result<Arc<LayerFile>> {
        let bits = Bitmap::full(chunk_count(&index)?);
        self.complete(index, details, &bits).map(|(file, _)| file)
    }

    /// Makes the layer visible, complete for this process, and records nothing of its data:
    /// the next flush does. A crash before that leaves a layer of which nothing is present.
    /// So nobody has to wait for the device, which may take as long as all the rest. What somebody
    /// evicts meanwhile is absent. A layer with pieces that could not be fetched again is
    /// committed instead.
    pub fn publish(self, index: LayerIndex, details: &[u8]) -> Result<Arc<LayerFile>> {
        if index
            .chunks
            .iter()
            .any(|chunk| chunk.encoding.blob().is_none())
        {
            return self.commit(index, details);
        }
        let bits = Bitmap::empty(chunk_count(&index)?);
        let (file, is_ours) = self.complete(index, details, &bits)?;
        if is_ours {
            file.adopt_all()?;
        }
        Ok(file)
    }

    /// The layer, and whether its data is what was written here.
    fn complete(
        mut self,
        index: LayerIndex,
        details: &[u8],
        bits: &Bitmap,
    ) -> Result<(Arc<LayerFile>, bool)> {
        // Before the file gets its length, which is no whole number of blocks.
        self.past.take().map_or(Ok(()), Past::finish)?;
        if index.blob_digest != self.digest {
            return Err(Error::Corrupt {
                what: "the index of an ingested layer".to_owned(),
                expected: self.digest,
                actual: index.blob_digest,
            });
        }
        let extra = (Provided::All(details), self.seams.as_deref());
        self.store
            .with_room(|| self.draft.complete(&index, extra, bits))?;
        // Tens of MiB, and the file that is opened now has its own.
        drop(index);
        let (file, is_ours) = publish_layer(
            &self.store,
            self.draft,
            &self.digest,
            Existing::ReplacePartial,
        )?;
        // Another that was there noted its own.
        if is_ours {
            self.store.note_places(file.index(), details);
        }
        Ok((file, is_ours))
    }
}

impl LayerSink for LayerIngest {
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        if let Some(past) = &mut self.past {
            return past.write_at(data_offset, bytes);
        }
        let write = || {
            let disk = &self.draft.disk;
            disk.write_at(self.draft.data(), data_offset, bytes)
                .map_err(|e| Error::io("write to", self.draft.path(DATA), e))
        };
        self.store.with_room(write)
    }
}

/// The data file of a draft, for both ways to write it.
struct Both {
    store: Arc<Store>,
    path: PathBuf,
    data: File,
    past: File,
}

impl Both {
    fn write(&self, to: &File, (start, bytes): (u64, &[u8])) -> Result<()> {
        let disk = self.store.disk();
        let write = || {
            let written = disk.write_at(to, start, bytes);
            written.map_err(|e| Error::io("write to", &self.path, e))
        };
        self.store.with_room(write)
    }
}

impl Ways for Both {
    fn past(&self, start: u64, blocks: &[u8]) -> Result<bool> {
        match self.write(&self.past, (start, blocks)) {
            // Not every file system that opens a file for it does it.
            Err(Error::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
            {
                Ok(false)
            }
            written => written.map(|()| true),
        }
    }

    fn through(&self, start: u64, bytes: &[u8]) -> Result<()> {
        self.write(&self.data, (start, bytes))
    }
}

/// What to do about a layer that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    Keep,
    ReplacePartial,
}

/// Makes a layer of which nothing is present, unless there is one.
pub(super) fn create_lazy(
    store: &Arc<Store>,
    index: &LayerIndex,
    details: Provided<'_>,
) -> Result<Arc<LayerFile>> {
    let bits = Bitmap::empty(chunk_count(index)?);
    let draft = Draft::new(store)?;
    store.with_room(|| draft.complete(index, (details, None), &bits))?;
    publish_layer(store, draft, &index.blob_digest, Existing::Keep).map(|(file, _)| file)
}

/// Whether a layer that is here is as good as one that was streamed: that one is checked
/// against its diff_id.
fn is_as_good(file: &LayerFile) -> bool {
    file.is_complete() && !file.index().is_by_ztoc()
}

/// The layer, and whether it is the draft and not one that was there.
fn publish_layer(
    store: &Arc<Store>,
    draft: Draft,
    digest: &Digest,
    existing: Existing,
) -> Result<(Arc<LayerFile>, bool)> {
    let to = store.layer_dir(digest);
    let _lock = store.lock()?;
    let current = match store.open_layer(digest) {
        Ok(current) => current,
        Err(Error::Malformed { detail, .. }) => {
            tracing::warn!(%digest, error = detail, "layer is damaged, making it again");
            store.remove_layer_locked(digest)?;
            None
        }
        Err(error) => return Err(error),
    };
    match current {
        Some(file) if existing == Existing::Keep || is_as_good(&file) => {
            file.settle()?;
            return Ok((file, false));
        }
        Some(file) => {
            let _layer = super::file::lock_layer(&to)?;
            draft.replace(&to)?;
            store.forget_layer(digest);
            file.mark_removed();
        }
        None => draft.publish(&to)?,
    }
    let file = store.open_layer(digest)?.ok_or_else(|| Error::NotFound {
        what: format!("layer {digest}, which was just stored,"),
        host: String::new(),
    })?;
    Ok((file, true))
}

/// Whether the process that makes the thing in `dir` still lives.
pub(super) fn has_owner(dir: &Path) -> Result<bool> {
    let path = dir.join(DATA);
    match File::open(&path) {
        Ok(data) => is_held(&data).map_err(|e| Error::io("lock", path, e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("open", path, e)),
    }
}

/// What cannot be removed now is removed when a store is opened next.
fn remove_quietly(disk: &dyn Disk, dir: &Path) {
    if let Err(error) = remove_tree(disk, dir) {
        tracing::debug!(%error, "left an unfinished ingest for the next start");
    }
}

#[cfg(test)]
mod tests;
