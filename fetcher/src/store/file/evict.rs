//! Taking chunks out of a layer that others, here and in other processes, are reading.
//!
//! Invariant: while the store's number of evictions is the one in `seen`, every set bit
//! of `bits` has its bytes in the data file. An eviction, under the layer's lock, goes
//!
//! ```text
//! 1  bitmap file without the chunks and of another generation, on the device
//! 2  own bits cleared
//! 3  the store's number advanced, and `seen` with it
//! 4  holes punched
//! ```
//!
//! so no crash leaves a bit over a hole. All the while it has the right to make holes, which
//! somebody who serves the data file may withhold; see `lent`. Whoever reads
//!
//! ```text
//! 1  notes `seen`      2  looks at the bits      3  reads bytes      4  reads the number
//! ```
//!
//! and serves the bytes only if the number is what it noted: then no hole was begun before
//! the bytes were read. Otherwise it catches up: it takes the layer's lock, so no eviction
//! of this layer is under way, and takes over the bitmap file. Of the chunks that only
//! this process knows, those that are not right any more (another process had them too,
//! and evicted them) become absent. A flush catches up before it merges, so it brings
//! nothing back.
//!
//! Who opens the layer takes that lock too, so it begins between two evictions.
//!
//! A `put` holds `holes` from its first byte until its bit is set. So an eviction of this
//! process, and catching up with another's, come wholly before or after it.
//!
//! A layer that was streamed has all its bytes and no bit when it gets its name, and may be
//! evicted from at once. Who streamed it sets the bits under the layer's lock, all of them only
//! if there was no eviction yet, and else of what it compared.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::record::read_bitmap;
use super::{BITMAP, DATA, LayerFile, Recorded};
use crate::index::{Chunk, ChunkId, DATA_ALIGN, LayerIndex, align_up};
use crate::store::bitmap::{self, Bitmap, Stored};
use crate::store::{Evicted, sys};
use crate::{Error, Result};

/// What becomes of the bytes of chunks that are made absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bytes {
    /// They go; where nobody may make holes now, nothing happens.
    Freed,
    /// They go, or where nobody may make holes they are left, and written over by who fetches
    /// the chunk again: they are wrong, and no wrong ones are better than others.
    MayStay,
}

impl LayerFile {
    /// Makes chunks absent and gives their blocks back to the device; ids in any order.
    /// Who reads them later fetches them again, so those that cannot be fetched alone
    /// stay. Blocks on the device.
    pub fn evict(&self, ids: &[ChunkId]) -> Result<Evicted> {
        let is_refetchable = |id: &ChunkId| self.chunk(*id).is_ok_and(Chunk::is_refetchable);
        let ids: Vec<ChunkId> = ids.iter().copied().filter(is_refetchable).collect();
        self.drop_chunks(&ids, Bytes::Freed)
    }

    /// [`LayerFile::evict`] of every chunk, and of bytes that no bit speaks of.
    pub fn evict_all(&self) -> Result<Evicted> {
        let all: Vec<ChunkId> = (0..self.bits.count()).collect();
        self.evict(&all)
    }

    /// Where the data file is no hole, ascending.
    pub(in crate::store) fn stretches(&self) -> Result<Vec<Range<u64>>> {
        let err = |e| Error::io("inspect", self.dir.join(DATA), e);
        sys::stretches(&self.data).map_err(err)
    }

    /// Makes chunks absent, whether or not they can be fetched again.
    pub(super) fn drop_chunks(&self, ids: &[ChunkId], bytes: Bytes) -> Result<Evicted> {
        let mut recorded = self.recorded.lock();
        if ids.is_empty() || self.is_removed() {
            return Ok(Evicted::default());
        }
        let Some(_lock) = self.lock_own()? else {
            return Ok(Evicted::default());
        };
        let may = match (self.may_make_holes(), bytes) {
            (Err(Error::Unsupported { .. }), Bytes::MayStay) => None,
            (may, _) => Some(may?),
        };
        self.catch_up(&mut recorded)?;
        let victims = Bitmap::empty(self.bits.count());
        for id in ids {
            victims.set(*id);
        }
        let left = without(&recorded.stored, &victims, self.evictions.now()?);
        self.record_anyhow(&left)?;
        recorded.stored = left;
        let _holes = self.holes.write();
        let evicted = self.clear(&victims);
        let now = self.evictions.advance()?;
        self.seen.store(now, Ordering::Release);
        if may.is_none() {
            return Ok(evicted);
        }
        self.remove_image();
        for hole in holes(&self.index, &victims) {
            self.disk
                .punch(&self.data, hole.start, hole.end - hole.start)
                .map_err(|e| Error::io("make a hole in", self.dir.join(DATA), e))?;
        }
        Ok(evicted)
    }

    fn clear(&self, victims: &Bitmap) -> Evicted {
        let mut evicted = Evicted::default();
        for id in victims.ones().filter(|id| self.bits.clear(*id)) {
            evicted.chunks += 1;
            evicted.bytes += self.chunk(id).map_or(0, |chunk| u64::from(chunk.len));
        }
        self.recount();
        evicted
    }

    /// Writes the bitmap file, in place where a full disk has no room for another. A crash
    /// in the middle of that leaves one that does not check out: nothing is present then.
    fn record_anyhow(&self, stored: &Stored) -> Result<()> {
        match self.record(stored) {
            Err(Error::NoSpace { .. }) => {}
            outcome => return outcome,
        }
        let path = self.dir.join(BITMAP);
        let write = || {
            let file = std::fs::File::options().write(true).open(&path)?;
            let bytes = bitmap::encode(self.bits.count(), stored);
            self.disk.write_at(&file, 0, &bytes)?;
            self.disk.sync_data(&file)
        };
        write().map_err(|e| Error::io("write to", &path, e))
    }

    /// Learns what other processes evicted from this layer.
    pub(super) fn refresh(&self) -> Result<()> {
        let mut recorded = self.recorded.lock();
        let now = self.evictions.now()?;
        if now == self.seen.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some(_lock) = self.lock_own()? {
            self.catch_up(&mut recorded)?;
        } else {
            // Removed, or another layer's name by now: nobody finds this file to evict from.
            self.seen.store(now, Ordering::Release);
        }
        Ok(())
    }

    /// Takes over the bitmap file if there was an eviction since the last time; `true` if
    /// so. The caller holds the layer's lock.
    pub(super) fn catch_up(&self, recorded: &mut Recorded) -> Result<bool> {
        let now = self.evictions.now()?;
        let stored = read_bitmap(&self.dir, self.bits.count())?;
        let changed = stored.generation != recorded.stored.generation;
        if changed {
            let _holes = self.holes.write();
            let own = self.bits.snapshot();
            let known = own.iter().zip(&recorded.stored.words);
            let unsure: Vec<u64> = known
                .zip(&stored.words)
                .map(|((own, recorded), stored)| own & !recorded & !stored)
                .collect();
            let kept = Bitmap::empty(self.bits.count());
            kept.merge(&unsure);
            for id in kept.ones() {
                if !self.is_right(id)? {
                    kept.clear(id);
                }
            }
            kept.merge(&stored.words);
            let kept = kept.snapshot();
            self.bits.retain(&kept);
            self.bits.merge(&kept);
            self.recount();
            recorded.stored = stored;
        }
        self.seen.store(now, Ordering::Release);
        Ok(changed)
    }
}

/// `stored` after the eviction of `victims`. The generation is one that no process has
/// seen of this layer: above the last one, and above the store's number, which goes on
/// when a bitmap was lost.
fn without(stored: &Stored, victims: &Bitmap, number: u64) -> Stored {
    let number = u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default();
    let words = stored.words.iter().zip(victims.snapshot());
    Stored {
        generation: stored.generation.max(number).wrapping_add(1),
        words: words.map(|(word, victims)| word & !victims).collect(),
    }
}

/// The blocks that hold nothing but victims' bytes and padding, in ranges that are as
/// long as can be.
fn holes(index: &LayerIndex, victims: &Bitmap) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    let mut run: Option<u64> = None;
    let mut close = |start: Option<u64>, end: u64| {
        let start = start.and_then(align_up);
        if let Some(start) = start.filter(|start| *start < end) {
            holes.push(start..end);
        }
    };
    for (id, chunk) in (0..).zip(&index.chunks) {
        if victims.get(id) {
            run.get_or_insert(chunk.data_offset);
        } else {
            close(run.take(), chunk.data_offset / DATA_ALIGN * DATA_ALIGN);
        }
    }
    close(run, align_up(index.data_len).unwrap_or(u64::MAX));
    holes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Encoding, LayerFormat};
    use crate::types::{ByteRange, Digest};

    /// An index with chunks of these offsets and lengths; only the chunk table is looked at.
    fn index(chunks: &[(u64, u32)]) -> LayerIndex {
        let chunk = |(data_offset, len): &(u64, u32)| Chunk {
            encoding: Encoding::Stored {
                blob: ByteRange::at(*data_offset, u64::from(*len)).unwrap(),
            },
            data_offset: *data_offset,
            len: *len,
            chunk_digest: Some([0; 32]),
        };
        let end = chunks.last().map_or(0, |(at, len)| at + u64::from(*len));
        LayerIndex {
            blob_digest: Digest::sha256(b""),
            blob_size: end,
            format: LayerFormat::Tar,
            files: Vec::new(),
            chunks: chunks.iter().map(chunk).collect(),
            spans: Vec::new(),
            data_len: end,
        }
    }

    #[test]
    fn holes_take_whole_blocks_of_victims_and_padding_only() {
        // Two files: one of three chunks that share blocks, one of a chunk.
        let index = index(&[(0, 5000), (5000, 5000), (10_000, 5000), (16_384, 100)]);
        type Row<'a> = (&'a [ChunkId], &'a [(u64, u64)]);
        let table: [Row<'_>; 9] = [
            (&[], &[]),
            (&[0], &[(0, 4096)]),
            (&[1], &[]),
            (&[0, 1], &[(0, 8192)]),
            (&[1, 2], &[(8192, 16_384)]),
            (&[2], &[(12_288, 16_384)]),
            (&[3], &[(16_384, 20_480)]),
            (&[0, 3], &[(0, 4096), (16_384, 20_480)]),
            (&[0, 1, 2, 3], &[(0, 20_480)]),
        ];
        for (ids, expected) in table {
            let victims = Bitmap::empty(4);
            for id in ids {
                victims.set(*id);
            }
            let holes = holes(&index, &victims).into_iter();
            let holes: Vec<(u64, u64)> = holes.map(|hole| (hole.start, hole.end)).collect();
            assert_eq!(holes, expected, "{ids:?}");
        }
    }
}
