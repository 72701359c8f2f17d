//! Reading what is present, and comparing it with its digest before that.
//!
//! Invariant: bytes leave only if their chunks are present and were written by this process
//! or found right by it, and no eviction began before they were read; see `evict`.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::{DATA, LayerFile};
use crate::codec::ChunkHasher;
use crate::index::{Chunk, ChunkId};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes read at a time while a chunk is checked.
const CHECK_BYTES: usize = 128 << 10;
/// How often a read begins again because somebody evicted meanwhile. Each time takes
/// another eviction in the microseconds of a read.
pub(super) const READ_ATTEMPTS_MAX: u32 = 100;

impl LayerFile {
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
        if !self.are_sound(touching(&self.index.chunks, range))? {
            return Ok(false);
        }
        self.data
            .read_exact_at(buf, range.start())
            .map_err(|e| Error::io("read from", self.dir.join(DATA), e))?;
        Ok(true)
    }

    /// Whether all of these chunks are present and have their digest.
    pub(super) fn are_sound(&self, mut ids: std::ops::Range<ChunkId>) -> Result<bool> {
        ids.try_fold(true, |all, id| {
            Ok(all && self.bits.get(id) && (self.sound.get(id) || self.check(id)?))
        })
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
    pub(super) fn is_right(&self, id: ChunkId) -> Result<bool> {
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
        match self.chunk_digest(id) {
            Ok(digest) => Ok(hasher.finish() == digest),
            // A crash took it; whoever fetches the chunk again fetches its digest, too.
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Ids of the chunks that share a byte with `range`.
pub(super) fn touching(chunks: &[Chunk], range: ByteRange) -> std::ops::Range<ChunkId> {
    if range.is_empty() {
        return 0..0;
    }
    let end_of = |chunk: &Chunk| chunk.data_offset.saturating_add(u64::from(chunk.len));
    let first = chunks.partition_point(|chunk| end_of(chunk) <= range.start());
    let last = chunks.partition_point(|chunk| chunk.data_offset < range.end());
    let id = |at| ChunkId::try_from(at).unwrap_or(ChunkId::MAX);
    id(first)..id(last.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Encoding;

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
