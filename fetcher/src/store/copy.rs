//! Filling chunks from what other layers on this node hold already.
//!
//! Invariant: bytes are hashed before they are put, and only those with the digest that
//! the wanting layer's index has for the chunk are. So the other layer may be evicted,
//! removed or rotten meanwhile: the chunk is then not copied. Nothing here fails a read:
//! what cannot be copied is left for whoever fetches.
//!
//! Where the file system can, blocks are shared instead of written (`FICLONERANGE`, not
//! `copy_file_range`: that copies silently where it cannot share, and then gains nothing
//! over writing what is in memory anyway). Shared are whole blocks that nobody else has a
//! part of, under the other layer's lock: no eviction of it comes between the hashing and
//! the sharing. Whoever holds that lock is not waited for; the chunk is written then.
//!
//! Memory: one chunk at a time, or one member that is verified whole. Pieces of those are
//! written, never shared.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::chunks::{Place, short};
use super::disk::Stretch;
use super::file::{DATA, LayerFile, LayerLock, try_lock_layer};
use super::{Store, sys};
use crate::codec::{self, VerifiedBytes};
use crate::index::{Chunk, ChunkId, DATA_ALIGN, Encoding, LayerIndex, align_up, details};
use crate::types::Digest;
use crate::{Error, Result};

/// Chunks below this are written: sharing costs a transaction of the file system, and
/// writing this little costs less.
const SHARE_BYTES_MIN: u32 = 32 << 10;
/// Data files of other layers held open by one call.
const SOURCES_MAX: usize = 64;

/// What was copied from other layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Chunks.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
}

impl LayerFile {
    /// Makes those of `ids` present whose bytes some layer of this node has, and says each,
    /// with its length, to `done`. Blocks on the device.
    pub fn copy_local(&self, ids: &[ChunkId], mut done: impl FnMut(ChunkId, u64)) -> Copied {
        let mut copied = Copied::default();
        let Some(store) = self.store() else {
            return copied;
        };
        let mut sources = Sources::of(&store);
        let mut member = 0..0;
        for id in ids {
            if member.contains(id) {
                continue;
            }
            match self.copy_member(&mut sources, *id) {
                Ok(ids) => member = ids,
                Err(error) => {
                    tracing::debug!(digest = %self.digest(), %error, "cannot copy a member");
                }
            }
            if member.contains(id) {
                for (id, len) in member.clone().zip(self.lens(member.clone())) {
                    copied.chunks += 1;
                    copied.bytes += u64::from(len);
                    done(id, len.into());
                }
                continue;
            }
            match self.copy_one(&mut sources, *id) {
                Ok(0) => {}
                Ok(bytes) => {
                    copied.chunks += 1;
                    copied.bytes += bytes;
                    done(*id, bytes);
                }
                Err(error) => {
                    tracing::debug!(digest = %self.digest(), %error, "cannot copy a chunk");
                }
            }
        }
        self.note_copied(copied.bytes);
        copied
    }

    /// Whether this layer came to a node that had others. Looks only at memory.
    pub fn has_neighbours(&self) -> bool {
        let store = self.store();
        store.is_some_and(|store| store.had_layers.load(Ordering::Relaxed))
    }

    /// Those of `ids` whose bytes some layer of this node may have. Blocks on the device.
    pub fn maybe_local(&self, ids: &[ChunkId]) -> Vec<ChunkId> {
        let Some(store) = self.store() else {
            return Vec::new();
        };
        let mut sources = Sources::of(&store);
        let mut may_be = |id: &ChunkId| {
            let digest = match self.is_unlearned(*id) {
                Ok(true) => self.member_digest(*id),
                _ => self.chunk_digest(*id).map(Some),
            };
            let Ok(Some(digest)) = digest else {
                return false;
            };
            let mut places = store.chunks.find(&digest).into_iter();
            places.any(|place| sources.get(&digest, place).is_some_and(|s| s.has(place)))
        };
        ids.iter().copied().filter(|id| may_be(id)).collect()
    }

    /// Copies the member that chunk `id` is a piece of, where nothing is known of the piece
    /// alone; its chunks, or none if it was not found.
    fn copy_member(&self, sources: &mut Sources<'_>, id: ChunkId) -> Result<Range<ChunkId>> {
        if !self.is_unlearned(id)? {
            return Ok(0..0);
        }
        let (ids, store) = (self.index().verified_with(id), sources.store);
        let len = u32::try_from(self.index().held_for(id)).unwrap_or(u32::MAX);
        let Some(digest) = self.member_digest(id)? else {
            return Ok(0..0);
        };
        for place in store.chunks.find(&digest) {
            let source = sources.get(&digest, place);
            let source = source.filter(|source| source.has(place));
            let found = source.and_then(|source| source.read(place.data_offset, len));
            let what = || format!("a copy of chunks {ids:?} of layer {}", self.digest());
            let lens = self.lens(ids.clone());
            let pieces =
                found.map(|bytes| codec::member::split(what, &digest, &bytes.into(), lens));
            let Some(Ok(pieces)) = pieces else {
                if place.layer != short(self.digest()) {
                    store.chunks.forget(&digest, place);
                }
                continue;
            };
            for (id, (bytes, digest)) in ids.clone().zip(pieces) {
                self.put_known(id, &bytes, Some(digest))?;
            }
            self.note_whole(ids.start);
            return Ok(ids);
        }
        Ok(0..0)
    }

    /// Copies one chunk; its length, or 0 if it was not found.
    fn copy_one(&self, sources: &mut Sources<'_>, id: ChunkId) -> Result<u64> {
        let digest = self.chunk_digest(id)?;
        let chunk = self.chunk(id)?;
        let store = sources.store;
        for place in store.chunks.find(&digest) {
            let Some(source) = sources.get(&digest, place) else {
                continue;
            };
            if !source.has(place) {
                // What this layer lost is about to come back.
                if place.layer != short(self.digest()) {
                    store.chunks.forget(&digest, place);
                }
                continue;
            }
            let stretch = self.stretch(store, id, place);
            let lock = stretch.and_then(|stretch| Some((stretch, source.lock()?)));
            let what = || format!("a copy of chunk {id} of layer {}", self.digest());
            let Some(bytes) = source.read(place.data_offset, chunk.len) else {
                store.chunks.forget(&digest, place);
                continue;
            };
            let Ok(bytes) = codec::verify_chunk(what, &digest, bytes) else {
                store.chunks.forget(&digest, place);
                continue;
            };
            if let Some((stretch, _lock)) = lock
                && source.is_padded(stretch, chunk.len)
                && self.share(store, (id, &bytes), source, stretch)
            {
                return Ok(u64::from(chunk.len));
            }
            // The lock is free again: on a full disk, making room may need it.
            self.put(id, &bytes)?;
            return Ok(u64::from(chunk.len));
        }
        Ok(0)
    }

    /// Whether the chunk was put by sharing blocks.
    fn share(
        &self,
        store: &Store,
        (id, bytes): (ChunkId, &VerifiedBytes),
        source: &Source,
        stretch: Stretch,
    ) -> bool {
        match self.put_shared(id, bytes, &source.data, stretch) {
            Ok(()) => true,
            Err(Error::NoSpace { .. }) => false,
            Err(error) => {
                tracing::debug!(%error, "chunks are written, not shared, from now on");
                store.cannot_share.store(true, Ordering::Relaxed);
                false
            }
        }
    }

    /// The blocks to share for a chunk: the whole ones that it alone is in.
    fn stretch(&self, store: &Store, id: ChunkId, place: Place) -> Option<Stretch> {
        if store.cannot_share.load(Ordering::Relaxed) || place.layer == short(self.digest()) {
            return None;
        }
        stretch(self.index(), id, place.data_offset)
    }

    /// Notes in the table where a chunk is. A failure costs a fetch some day.
    pub(super) fn note_place(&self, id: ChunkId, chunk: &Chunk) {
        if let (Some(store), Ok(digest)) = (self.store(), self.chunk_digest(id)) {
            store.chunks.note(&digest, self.place(chunk));
        }
    }

    /// Notes where all present chunks are.
    pub(super) fn note_present(&self) {
        let Some(store) = self.store() else {
            return;
        };
        let ids = (0..).zip(&self.index().chunks);
        let present = ids.filter(|(id, _)| self.is_present(*id));
        let places = present
            .filter_map(|(id, chunk)| Some((self.chunk_digest(id).ok()?, self.place(chunk))));
        store.chunks.note_all(places);
    }

    fn place(&self, chunk: &Chunk) -> Place {
        Place {
            layer: short(self.digest()),
            data_offset: chunk.data_offset,
        }
    }
}

impl Store {
    /// Notes that bytes with this digest are at `data_offset` of a layer's data file.
    pub(super) fn note_at(&self, digest: &[u8; 32], layer: &Digest, data_offset: u64) {
        let layer = short(layer);
        self.chunks.note(digest, Place { layer, data_offset });
    }

    /// Notes where all chunks of a complete layer are. `details` are those of its spans.
    pub(super) fn note_places(&self, index: &LayerIndex, details: &[u8]) {
        let layer = short(&index.blob_digest);
        let places = (0..).zip(&index.chunks).filter_map(|(id, chunk)| {
            let digest = digest_of(index, details, (id, chunk))?;
            let data_offset = chunk.data_offset;
            Some((digest, Place { layer, data_offset }))
        });
        self.chunks.note_all(places);
    }
}

/// Digest of a chunk, from the index or the details.
fn digest_of(
    index: &LayerIndex,
    details: &[u8],
    (id, chunk): (ChunkId, &Chunk),
) -> Option<[u8; 32]> {
    let Encoding::GzipSpan { span, .. } = chunk.encoding else {
        return chunk.chunk_digest;
    };
    let span = index.spans.get(usize::try_from(span).ok()?)?;
    let number = usize::try_from(id.checked_sub(span.first_chunk)?).ok()?;
    details::digest_in(details, span, number)
}

/// Data files of other layers.
struct Sources<'a> {
    store: &'a Store,
    open: HashMap<u32, Source>,
    /// Layers that are gone: nobody lists the store's for each chunk that one had. As many as
    /// places speak of, each four bytes.
    gone: HashSet<u32>,
}

struct Source {
    dir: PathBuf,
    data: File,
}

impl<'a> Sources<'a> {
    fn of(store: &'a Store) -> Self {
        Self {
            store,
            open: HashMap::new(),
            gone: HashSet::new(),
        }
    }

    /// Where bytes with this digest may be, if the layer can be read. A place in a layer that is
    /// gone is forgotten.
    fn get(&mut self, digest: &[u8; 32], place: Place) -> Option<&Source> {
        let layer = place.layer;
        if !self.open.contains_key(&layer) && !self.gone.contains(&layer) {
            match self.open(layer) {
                Ok(Some(source)) => {
                    if self.open.len() >= SOURCES_MAX {
                        self.open.clear();
                    }
                    self.open.insert(layer, source);
                }
                Ok(None) => {
                    self.gone.insert(layer);
                }
                // Too many open files, for one: that says nothing about the place.
                Err(error) => {
                    tracing::debug!(%error, "cannot look into another layer");
                    return None;
                }
            }
        }
        if self.gone.contains(&layer) {
            self.store.chunks.forget(digest, place);
        }
        self.open.get(&layer)
    }

    /// The layer's data file; `None` if there is no such layer.
    fn open(&self, layer: u32) -> Result<Option<Source>> {
        let Some(dir) = self.store.chunks.layer_dir(layer)? else {
            return Ok(None);
        };
        let path = dir.join(DATA);
        match File::open(&path) {
            Ok(data) => Ok(Some(Source { dir, data })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("open", path, e)),
        }
    }
}

impl Source {
    /// Whether there is something else than a hole. An evicted chunk would be read as zeros
    /// and hashed for nothing.
    fn has(&self, place: Place) -> bool {
        sys::has_data(&self.data, place.data_offset)
    }

    fn read(&self, offset: u64, len: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        self.data.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes)
    }

    /// The lock of this very data file, if it is free.
    fn lock(&self) -> Option<LayerLock> {
        let lock = try_lock_layer(&self.dir).ok()??;
        lock.is_of(&self.data).then_some(lock)
    }

    /// Whether nothing but zeros follows the first `len` bytes of the stretch.
    fn is_padded(&self, stretch: Stretch, len: u32) -> bool {
        let padding = stretch.len.saturating_sub(u64::from(len));
        let end = stretch.from.saturating_add(u64::from(len));
        let padding = u32::try_from(padding).ok();
        let bytes = padding.and_then(|padding| self.read(end, padding));
        bytes.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    }
}

/// The blocks of chunk `id`, if they are whole, no other chunk's, within the data file, and
/// worth sharing.
fn stretch(index: &LayerIndex, id: ChunkId, from: u64) -> Option<Stretch> {
    let at = usize::try_from(id).ok()?;
    let chunk = index.chunks.get(at)?;
    let (to, len) = (chunk.data_offset, align_up(u64::from(chunk.len))?);
    let end = to.checked_add(len)?;
    let limit = match index.chunks.get(at.checked_add(1)?) {
        Some(next) => next.data_offset,
        None => index.data_len,
    };
    let is_aligned = to.is_multiple_of(DATA_ALIGN) && from.is_multiple_of(DATA_ALIGN);
    let is_worth_it = chunk.len >= SHARE_BYTES_MIN;
    (is_aligned && is_worth_it && end <= limit).then_some(Stretch { from, to, len })
}

#[cfg(test)]
mod tests;
