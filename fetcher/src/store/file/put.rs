//! Writing chunks.
//!
//! Invariant: a chunk's bit is set only after all its verified bytes were written, and their
//! digest where the index has none, and no hole is made between the two. Nothing is promised to survive a crash: a flush does that.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use super::record::try_read_bitmap;
use super::{DATA, LayerFile};
use crate::codec::VerifiedBytes;
use crate::index::{Chunk, ChunkId};
use crate::store::disk::Stretch;
use crate::store::learned::Learned;
use crate::{Error, Result};

/// How often a `put` writes again because a sync failed while it was writing.
const PUT_ATTEMPTS_MAX: u32 = 4;

impl LayerFile {
    /// Writes a chunk's bytes and makes it present. Recorded by the next flush. Writing a
    /// present chunk again is harmless. On a full disk the store first makes room, if it
    /// may. Blocks on the device.
    pub fn put(&self, id: ChunkId, bytes: &VerifiedBytes) -> Result<()> {
        self.put_known(id, bytes, None)
    }

    /// [`Self::put`] of bytes whose SHA-256 the caller computed, if it did.
    pub(crate) fn put_known(
        &self,
        id: ChunkId,
        bytes: &VerifiedBytes,
        digest: Option<[u8; 32]>,
    ) -> Result<()> {
        let chunk = self.chunk(id)?;
        self.check_put(id, chunk, bytes)?;
        let lesson = self.lesson(chunk, bytes, digest);
        let write = || {
            let write = || {
                self.disk.write_at(&self.data, chunk.data_offset, bytes)?;
                self.learn(id, lesson.as_ref())
            };
            self.put_now(id, chunk, &write)
        };
        match self.store.upgrade() {
            Some(store) => store.with_room(write)?,
            None => write()?,
        }
        self.note_place(id, chunk);
        Ok(())
    }

    /// [`Self::put`] by sharing the blocks of `from`, where the verified bytes are and stay
    /// meanwhile. Fails where that cannot be done; makes no room.
    pub(in crate::store) fn put_shared(
        &self,
        id: ChunkId,
        bytes: &VerifiedBytes,
        from: &File,
        stretch: Stretch,
    ) -> Result<()> {
        let chunk = self.chunk(id)?;
        self.check_put(id, chunk, bytes)?;
        let lesson = self.lesson(chunk, bytes, None);
        let share = || {
            self.disk.share(from, &self.data, stretch)?;
            self.learn(id, lesson.as_ref())
        };
        self.put_now(id, chunk, &share)?;
        self.note_place(id, chunk);
        Ok(())
    }

    /// Makes every chunk present that nobody evicted. The caller wrote all of their verified
    /// bytes before the layer had its name, under a bitmap that knew of no eviction; from then on
    /// anybody may have evicted from it, as what no bit speaks of takes room like any other. Then
    /// the data file is compared. Blocks on the device.
    pub(in crate::store) fn adopt_all(&self) -> Result<()> {
        let mut recorded = self.recorded.lock();
        // Held until the bits are set: an eviction comes wholly before or after that. From a layer
        // that is gone nobody evicts any more, but who knows what was before.
        let lock = self.lock_own()?;
        let mut is_as_written = false;
        if lock.is_some() {
            self.catch_up(&mut recorded)?;
            // One that is damaged does not say.
            let stored = try_read_bitmap(&self.dir, self.bits.count())?;
            is_as_written = stored.is_some_and(|stored| stored.generation == 0);
        }
        let _no_holes = self.holes.read();
        for (id, chunk) in (0..).zip(&self.index.chunks) {
            if !is_as_written && !self.is_right(id)? {
                continue;
            }
            self.sound.set(id);
            let len = u64::from(chunk.len);
            if self.bits.set(id) {
                self.present_bytes.fetch_add(len, Ordering::Relaxed);
                self.came.add(len);
            }
        }
        Ok(())
    }

    fn learn(&self, id: ChunkId, lesson: Option<&(&Learned, [u8; 32])>) -> io::Result<()> {
        lesson.map_or(Ok(()), |(learned, digest)| {
            learned.note(&*self.disk, id, digest)
        })
    }

    fn put_now(
        &self,
        id: ChunkId,
        chunk: &Chunk,
        write: &dyn Fn() -> io::Result<()>,
    ) -> Result<()> {
        let _no_holes = self.holes.read();
        for _ in 0..PUT_ATTEMPTS_MAX {
            let failures = self.failed_syncs.load(Ordering::Acquire);
            write().map_err(|e| Error::io("write to", self.dir.join(DATA), e))?;
            self.sound.set(id);
            if self.bits.set(id) {
                self.present_bytes
                    .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
            }
            // A sync that failed meanwhile may have dropped these bytes from the page
            // cache's dirty set; a bit set now would be recorded without them.
            if self.failed_syncs.load(Ordering::Acquire) == failures {
                self.came.add(u64::from(chunk.len));
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
}
