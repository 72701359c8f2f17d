//! What is evicted together, and what it takes on the device.
//!
//! An extent is a MiB of a data file, and all chunks that begin in it. It is there if it
//! takes room, not only if it has chunks that are present: a process that was killed leaves
//! bytes that no bit speaks of, of chunks that it had not recorded, or had evicted and not yet
//! made a hole of. Nobody reads those, so they count as never read; but a store that looked
//! only at bits would never get them back, and would evict what is read in their place.
//!
//! Bytes of another process that has not recorded them yet look the same. They are not chosen
//! sooner than others that came with them, and whoever wrote them finds out, as with any
//! eviction by another.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::index::{Chunk, ChunkId, DATA_ALIGN, align_up};
use crate::store::LayerFile;
use crate::store::file::EXTENT_BYTES;

/// What a file system may count of a file beside its contents: a part of these, and a few
/// blocks. Below that nobody looks for what was left, which takes two calls for each stretch.
const BESIDE_PART: u64 = 256;
const BESIDE_BYTES: u64 = 2 * DATA_ALIGN;

/// Which extent a chunk belongs to.
pub(in crate::store) fn extent_of(chunk: &Chunk) -> u32 {
    u32::try_from(chunk.data_offset / EXTENT_BYTES).unwrap_or(u32::MAX)
}

/// Bytes of the device that chunks occupy which can be evicted, by extent; rather too
/// many of those that are present, so that no more is chosen than must be.
pub(super) fn occupied(file: &LayerFile) -> BTreeMap<u32, u64> {
    let mut extents = BTreeMap::new();
    let (mut known, mut counted) = (0_u64, 0_u64);
    for (id, chunk) in (0..).zip(&file.index().chunks) {
        if !file.is_present(id) {
            continue;
        }
        let blocks = blocks_of(chunk);
        known += blocks.end.saturating_sub(blocks.start.max(counted));
        counted = counted.max(blocks.end);
        if chunk.is_refetchable() {
            *extents.entry(extent_of(chunk)).or_default() +=
                u64::from(chunk.len).next_multiple_of(DATA_ALIGN);
        }
    }
    let beside = known / BESIDE_PART + BESIDE_BYTES;
    let allocated = file.usage().map_or(0, |usage| usage.allocated);
    if allocated > known.saturating_add(beside) {
        for (extent, bytes) in left_behind(file) {
            *extents.entry(extent).or_default() += bytes;
        }
    }
    extents
}

/// Chunks that begin in these extents (ascending).
pub(super) fn chunks_of(file: &LayerFile, extents: &[u32]) -> Vec<ChunkId> {
    (0..)
        .zip(&file.index().chunks)
        .filter(|(_, chunk)| extents.binary_search(&extent_of(chunk)).is_ok())
        .map(|(id, _)| id)
        .collect()
}

/// Bytes of the device in blocks of nobody but chunks that are absent, by extent.
fn left_behind(file: &LayerFile) -> Vec<(u32, u64)> {
    let Ok(stretches) = file.stretches() else {
        return Vec::new();
    };
    let chunks = &file.index().chunks;
    let next = chunks.iter().skip(1).map(|chunk| chunk.data_offset);
    let next = next.chain(std::iter::once(u64::MAX));
    let (mut left, mut rest) = (Vec::new(), &stretches[..]);
    for ((id, chunk), next) in (0..).zip(chunks).zip(next) {
        if file.is_present(id) || !chunk.is_refetchable() {
            continue;
        }
        let own = own_blocks(chunk, next);
        while let [first, others @ ..] = rest
            && first.end <= own.start
        {
            rest = others;
        }
        let reached = rest.iter().take_while(|stretch| stretch.start < own.end);
        let bytes: u64 = reached.map(|stretch| common(stretch, &own)).sum();
        if bytes > 0 {
            left.push((extent_of(chunk), bytes));
        }
    }
    left
}

/// All blocks with bytes of a chunk.
fn blocks_of(chunk: &Chunk) -> Range<u64> {
    let end = chunk.data_offset.saturating_add(chunk.len.into());
    let start = chunk.data_offset / DATA_ALIGN * DATA_ALIGN;
    start..align_up(end).unwrap_or(end)
}

/// Those that have bytes of no other chunk, where the next begins at `next`.
fn own_blocks(chunk: &Chunk, next: u64) -> Range<u64> {
    let blocks = blocks_of(chunk);
    let start = align_up(chunk.data_offset).unwrap_or(blocks.end);
    let end = match next < blocks.end {
        true => next / DATA_ALIGN * DATA_ALIGN,
        false => blocks.end,
    };
    start..end.max(start)
}

/// Bytes of blocks that are in both; a file may end within its last one.
fn common(stretch: &Range<u64>, blocks: &Range<u64>) -> u64 {
    let end = align_up(stretch.end).unwrap_or(stretch.end);
    let end = end.min(blocks.end);
    end.saturating_sub(stretch.start.max(blocks.start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::test_util::layers::{layer_of, put_bytes};

    /// Blocks that are nobody's but a chunk's, of chunks that begin and end within blocks.
    #[test]
    fn blocks_are_whose_bytes_they_have_alone() {
        let chunk = |data_offset, len| Chunk {
            data_offset,
            len,
            ..layer_of("x", &[vec![1]]).chunks.remove(0)
        };
        // A chunk, where the next begins; its blocks, and its own.
        let table = [
            (chunk(0, 5000), 8192, 0..8192, 0..8192),
            (chunk(0, 5000), 5000, 0..8192, 0..4096),
            (chunk(5000, 5000), 10_000, 4096..12_288, 8192..8192),
            (chunk(5000, 9000), u64::MAX, 4096..16_384, 8192..16_384),
            (chunk(100, 50), 150, 0..4096, 4096..4096),
        ];
        for (chunk, next, blocks, own) in table {
            assert_eq!(blocks_of(&chunk), blocks, "{chunk:?}");
            assert_eq!(own_blocks(&chunk, next), own, "{chunk:?}");
        }
    }

    #[test]
    fn what_takes_room_is_there_whether_or_not_it_is_present() {
        let dir = tempfile::tempdir().unwrap();
        let payloads: Vec<_> = (1..=6).map(|byte| vec![byte; 400_000]).collect();
        let index = layer_of("layer", &payloads);
        let put = |ids: &[u32], recorded| {
            let store = Store::open(dir.path()).unwrap();
            let file = store.create_layer(index.clone()).unwrap();
            for id in ids {
                put_bytes(&file, *id, payloads[*id as usize].clone()).unwrap();
            }
            if recorded {
                file.flush().unwrap();
            }
            occupied(&file)
        };
        // Three of them begin in the first MiB, and all others in the second.
        let bytes = 400_000_u64.next_multiple_of(DATA_ALIGN);
        assert_eq!(put(&[0], true), [(0, bytes)].into());
        assert_eq!(put(&[2, 4, 5], false).get(&1), Some(&(2 * bytes)));
        // Another process sees what the last one left.
        assert_eq!(put(&[], true), [(0, 2 * bytes), (1, 2 * bytes)].into());
    }
}
