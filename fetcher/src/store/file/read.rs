//! Reading what is present, and comparing it with its digest before that.
//!
//! Invariant: bytes leave only if their chunks are present and were written by this process
//! or found right by it, and no eviction began before they were read; see `evict`. Bytes that the
//! disk cannot give are as wrong as others that are not right: their chunk is absent.

use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::{DATA, LayerFile};
use crate::codec::ChunkHasher;
use crate::index::{Chunk, ChunkId};
use crate::store::sys::is_unreadable;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes read at a time while a chunk is checked.
const CHECK_BYTES: usize = 128 << 10;
/// How often a read begins again because somebody evicted meanwhile. Each time takes
/// another eviction in the microseconds of a read.
pub(super) const READ_ATTEMPTS_MAX: u32 = 100;

impl LayerFile {
    /// Fills `buf` from `offset` of the data file if every chunk it touches is present and
    /// sound; `false`, with anything in `buf`, if not. Padding between files reads as zeros.
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
        let ids = touching(&self.index.chunks, range);
        if !self.are_sound(ids.clone())? {
            return Ok(false);
        }
        if self.read_data(buf, range.start())? {
            return Ok(true);
        }
        // Which of them that is shows when each is compared.
        for id in ids.clone() {
            self.sound.clear(id);
        }
        if !self.are_sound(ids)? {
            return Ok(false);
        }
        self.data
            .read_exact_at(buf, range.start())
            .map_err(|e| Error::io("read from", self.dir.join(DATA), e))?;
        Ok(true)
    }

    /// Fills `buf` from the data file; `false` if the disk has those bytes no more.
    fn read_data(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        match self.data.read_exact_at(buf, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof || is_unreadable(&error) => {
                tracing::warn!(digest = %self.index.blob_digest, offset, %error, "stored bytes cannot be read");
                Ok(false)
            }
            Err(error) => Err(Error::io("read from", self.dir.join(DATA), error)),
        }
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
            if !self.read_data(piece, at)? {
                return Ok(false);
            }
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
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::index::Encoding;
    use crate::store::Store;
    use crate::test_util::layers::{chunk_bytes, layer_of, put_chunk};

    /// A layer of so many chunks, all of which this process wrote and recorded.
    fn filled(store: &Arc<Store>, chunks: u32) -> Arc<LayerFile> {
        let payloads: Vec<_> = (0..chunks).map(chunk_bytes).collect();
        let file = store.create_layer(layer_of("layer", &payloads)).unwrap();
        for id in 0..chunks {
            put_chunk(&file, id).unwrap();
        }
        file.flush().unwrap();
        file
    }

    /// Whether the chunk can be read; then it reads as it should.
    fn read(file: &LayerFile, id: ChunkId) -> bool {
        let mut buf = chunk_bytes(id);
        buf.fill(0xee);
        let at = file.chunk(id).unwrap().data_offset;
        let read = file.read_at(at, &mut buf).unwrap();
        assert!(!read || buf == chunk_bytes(id), "{id}");
        read
    }

    #[test]
    fn what_the_disk_has_no_more_is_absent_and_can_be_put_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let file = filled(&store, 4);
        file.data
            .set_len(file.chunk(2).unwrap().data_offset)
            .unwrap();
        assert!(read(&file, 1) && file.is_present(2));
        // All of it at once: what is there yet stays, and the others go in their turn.
        let mut all = vec![0; file.index.data_len.try_into().unwrap()];
        for lost in [2, 3] {
            assert!(!file.read_at(0, &mut all).unwrap());
            let absent: Vec<ChunkId> = file.missing_from(0).collect();
            assert_eq!(absent, [lost]);
            put_chunk(&file, lost).unwrap();
        }
        assert!((0..4).all(|id| read(&file, id)));
        assert!(file.read_at(0, &mut all).unwrap());
    }

    #[test]
    fn a_chunk_that_the_disk_cannot_read_is_absent_and_can_be_put_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut file = Arc::into_inner(filled(&store, 1)).unwrap();
        // Where nothing is mapped the kernel answers as for a sector that cannot be read.
        let unreadable = File::open("/proc/self/mem").unwrap();
        let error = unreadable.read_exact_at(&mut [0], 0).unwrap_err();
        assert!(is_unreadable(&error), "{error}");
        let data = std::mem::replace(&mut file.data, unreadable);
        assert!(!file.is_right(0).unwrap());
        assert!(file.is_present(0) && !read(&file, 0));
        assert!(!file.is_present(0), "whoever reads it fetches it");
        assert!(!read(&file, 0));
        file.data = data;
        put_chunk(&file, 0).unwrap();
        assert!(read(&file, 0));
    }

    #[test]
    fn a_check_looks_at_all_where_some_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let file = filled(&store, 4);
        file.data
            .set_len(file.chunk(3).unwrap().data_offset)
            .unwrap();
        let found = file.check_all().unwrap();
        assert_eq!((found.chunks, &found.dropped[..]), (4, &[3][..]));
        put_chunk(&file, 3).unwrap();
        file.flush().unwrap();
        assert!(file.check_all().unwrap().dropped.is_empty() && read(&file, 3));
    }

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
