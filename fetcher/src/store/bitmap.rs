//! Which chunks of a layer are present, in memory and on disk.
//!
//! Invariant: a bit is set only after its chunk's bytes are in the data file, and is on
//! disk only after they are on the device. A bitmap that does not check out means
//! "nothing present": never wrong, at worst fetched again.
//!
//! On disk, little endian:
//!
//! ```text
//!  0  magic     "LAZBITS\0"
//!  8  version     u32, 2
//! 12  count       u32, number of chunks
//! 16  checksum    u32, CRC-32 of bytes 0..16 and of all from byte 20 on
//! 20  generation  u32, another one after each eviction from this layer
//! 24  words       u64 each, count / 64 rounded up; bits past count are zero
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use crate::index::ChunkId;

const MAGIC: [u8; 8] = *b"LAZBITS\0";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 24;
const WORD_BITS: u32 = 64;

/// A fixed number of bits that many threads set and read without a lock.
#[derive(Debug)]
pub(super) struct Bitmap {
    words: Vec<AtomicU64>,
    count: u32,
}

impl Bitmap {
    /// `count` clear bits.
    pub(super) fn empty(count: u32) -> Self {
        Self::from_words(count, &vec![0; words_for(count)])
    }

    /// `count` set bits.
    pub(super) fn full(count: u32) -> Self {
        let bitmap = Self::empty(count);
        for id in 0..count {
            bitmap.set(id);
        }
        bitmap
    }

    fn from_words(count: u32, words: &[u64]) -> Self {
        let words = words.iter().copied().map(AtomicU64::new).collect();
        Self { words, count }
    }

    /// Whether the bit is set; `false` for an id that does not exist.
    pub(super) fn get(&self, id: ChunkId) -> bool {
        let Some((word, mask)) = self.at(id) else {
            return false;
        };
        // Pairs with the release in `set`: who sees the bit sees the write before it.
        word.load(Ordering::Acquire) & mask != 0
    }

    /// Sets the bit; `true` if it was clear.
    pub(super) fn set(&self, id: ChunkId) -> bool {
        self.at(id)
            .is_some_and(|(word, mask)| word.fetch_or(mask, Ordering::AcqRel) & mask == 0)
    }

    /// Clears the bit; `true` if it was set.
    pub(super) fn clear(&self, id: ChunkId) -> bool {
        self.at(id)
            .is_some_and(|(word, mask)| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }

    /// The words as they are now, each read on its own.
    pub(super) fn snapshot(&self) -> Vec<u64> {
        let load = |word: &AtomicU64| word.load(Ordering::Acquire);
        self.words.iter().map(load).collect()
    }

    /// Sets every bit that `words` has.
    pub(super) fn merge(&self, words: &[u64]) {
        for (own, other) in self.words.iter().zip(words) {
            own.fetch_or(*other, Ordering::AcqRel);
        }
    }

    /// Clears every bit that `words` lacks.
    pub(super) fn retain(&self, words: &[u64]) {
        for (own, other) in self.words.iter().zip(words) {
            own.fetch_and(*other, Ordering::AcqRel);
        }
    }

    /// Number of bits.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Ids of the set bits, ascending.
    pub(super) fn ones(&self) -> impl Iterator<Item = ChunkId> + '_ {
        (0..self.count).filter(|id| self.get(*id))
    }

    fn at(&self, id: ChunkId) -> Option<(&AtomicU64, u64)> {
        if id >= self.count {
            return None;
        }
        let word = self.words.get(usize::try_from(id / WORD_BITS).ok()?)?;
        Some((word, 1 << (id % WORD_BITS)))
    }
}

/// What a bitmap file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    /// Counts the evictions from this layer, as far as telling two apart.
    pub(super) generation: u32,
    /// The bits.
    pub(super) words: Vec<u64>,
}

impl Stored {
    /// Nothing present, nothing ever evicted.
    pub(super) fn nothing(count: u32) -> Self {
        Self {
            generation: 0,
            words: vec![0; words_for(count)],
        }
    }
}

/// The file of `stored` for `count` chunks.
pub(super) fn encode(count: u32, stored: &Stored) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + stored.words.len() * 8);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    let mut body = stored.generation.to_le_bytes().to_vec();
    body.extend(stored.words.iter().flat_map(|word| word.to_le_bytes()));
    let sum = checksum(&out, &body);
    out.extend_from_slice(&sum.to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// What a bitmap file of `count` chunks says, or `None` if anything about it is off.
pub(super) fn decode(count: u32, bytes: &[u8]) -> Option<Stored> {
    let (named, rest) = bytes.split_at_checked(16)?;
    let (sum, body) = rest.split_at_checked(4)?;
    let (generation, words) = body.split_at_checked(4)?;
    let mut expected = MAGIC.to_vec();
    expected.extend_from_slice(&VERSION.to_le_bytes());
    expected.extend_from_slice(&count.to_le_bytes());
    let sum_is_right = sum == checksum(named, body).to_le_bytes();
    if named != expected || !sum_is_right || words.len() != words_for(count) * 8 {
        return None;
    }
    let generation = u32::from_le_bytes(generation.try_into().ok()?);
    let words: Vec<u64> = words
        .chunks_exact(8)
        .map(|word| word.try_into().map(u64::from_le_bytes))
        .collect::<Result<_, _>>()
        .ok()?;
    let used = count % WORD_BITS;
    let stray = used != 0 && words.last().is_some_and(|last| last >> used != 0);
    (!stray).then_some(Stored { generation, words })
}

/// Size of the bitmap file of `count` chunks.
pub(super) fn file_bytes(count: u32) -> u64 {
    HEADER_BYTES as u64 + u64::from(count.div_ceil(WORD_BITS)) * 8
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

fn words_for(count: u32) -> usize {
    count.div_ceil(WORD_BITS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_set_clear_and_stay_in_bounds() {
        let bits = Bitmap::empty(65);
        assert!(bits.set(64) && !bits.set(64) && bits.get(64));
        assert!(!bits.set(65) && !bits.get(65) && !bits.get(u32::MAX));
        assert!(bits.clear(64) && !bits.clear(64));
        assert_eq!(Bitmap::full(130).ones().count(), 130);
    }

    #[test]
    fn the_file_is_golden_and_round_trips() {
        let stored = |word| Stored {
            generation: 9,
            words: vec![word],
        };
        let bytes = encode(3, &stored(0b101));
        let golden = [
            b"LAZBITS\0".as_slice(),
            &[2, 0, 0, 0, 3, 0, 0, 0],
            &bytes[16..20],
            &[9, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(bytes, golden.concat());
        assert_eq!(bytes.len() as u64, file_bytes(3));
        assert_eq!(decode(3, &bytes), Some(stored(0b101)));
        assert_eq!(decode(4, &bytes), None, "another layer's bitmap");
        assert_eq!(
            decode(3, &encode(3, &stored(0b1101))),
            None,
            "a bit past the count"
        );
    }

    #[test]
    fn any_torn_or_flipped_byte_means_nothing() {
        let stored = Stored {
            generation: 3,
            words: vec![u64::MAX, 7],
        };
        let bytes = encode(100, &stored);
        for cut in 0..bytes.len() {
            assert_eq!(decode(100, &bytes[..cut]), None, "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(decode(100, &bad), None, "flipped at {at}");
        }
    }
}
