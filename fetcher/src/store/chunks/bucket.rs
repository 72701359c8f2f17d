//! One bucket of the chunk table: a few places, newest first.
//!
//! Invariant: pure. Any bytes are a bucket; what makes no sense in them is a place where
//! nothing will be found. One digest never takes more than [`COPIES_MAX`] entries, so a
//! chunk that every image has does not push the others out.
//!
//! ```text
//! 8 entries:  tag u32 | layer u32 | data_offset u64      little endian; all zero for none
//! ```

const ENTRY_BYTES: usize = 16;
/// Enough that at half load, a bucket that overflows is one of a hundred.
const ENTRIES: usize = 8;
/// Bytes of a bucket: what a cache line pair holds, and a whole part of a page.
pub(super) const BUCKET_BYTES: usize = ENTRY_BYTES * ENTRIES;
/// Places kept of one digest. More than one, because the newest may be evicted first.
const COPIES_MAX: usize = 3;

/// Where a chunk's bytes were put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    /// The first bytes of the layer's blob digest.
    pub(crate) layer: u32,
    /// Where the chunk begins in the layer's data file.
    pub(crate) data_offset: u64,
}

/// The places that `bucket` has for `tag`, newest first.
pub(super) fn find(bucket: &[u8], tag: u32) -> Vec<Place> {
    let entries = entries(bucket).into_iter();
    entries
        .filter(|(own, _)| *own == tag)
        .map(|(_, place)| place)
        .collect()
}

/// Adds a place; `false` if it was there already, and nothing changed.
pub(super) fn insert(bucket: &mut [u8], tag: u32, place: Place) -> bool {
    let mut entries = entries(bucket);
    if entries.contains(&(tag, place)) {
        return false;
    }
    entries.insert(0, (tag, place));
    let mut copies = 0;
    entries.retain(|(own, _)| {
        copies += usize::from(*own == tag);
        *own != tag || copies <= COPIES_MAX
    });
    entries.truncate(ENTRIES);
    write(bucket, &entries);
    true
}

/// Drops a place; `false` if it was not there.
pub(super) fn remove(bucket: &mut [u8], tag: u32, place: Place) -> bool {
    let mut entries = entries(bucket);
    let before = entries.len();
    entries.retain(|entry| *entry != (tag, place));
    if entries.len() == before {
        return false;
    }
    write(bucket, &entries);
    true
}

fn entries(bucket: &[u8]) -> Vec<(u32, Place)> {
    let (entries, _) = bucket.as_chunks::<ENTRY_BYTES>();
    let used = entries.iter().filter(|entry| **entry != [0; ENTRY_BYTES]);
    used.map(|entry| {
        let [a, b, c, d, e, f, g, h, offset @ ..] = *entry;
        let place = Place {
            layer: u32::from_le_bytes([e, f, g, h]),
            data_offset: u64::from_le_bytes(offset),
        };
        (u32::from_le_bytes([a, b, c, d]), place)
    })
    .collect()
}

fn write(bucket: &mut [u8], entries: &[(u32, Place)]) {
    bucket.fill(0);
    for (to, (tag, place)) in bucket.chunks_exact_mut(ENTRY_BYTES).zip(entries) {
        let entry = (u128::from(place.data_offset) << 64)
            | (u128::from(place.layer) << 32)
            | u128::from(*tag);
        to.copy_from_slice(&entry.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn place(layer: u32, data_offset: u64) -> Place {
        Place { layer, data_offset }
    }

    #[test]
    fn the_layout_is_the_one_that_is_drawn() {
        let mut bucket = [0; BUCKET_BYTES];
        assert!(insert(&mut bucket, 0x0403_0201, place(0x0807_0605, 0x0a09)));
        let mut expected = [0; BUCKET_BYTES];
        expected[..10].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(bucket, expected);
    }

    #[test]
    fn the_oldest_goes_and_no_digest_takes_it_all() {
        let mut bucket = [0; BUCKET_BYTES];
        for layer in 1..=20 {
            assert!(insert(&mut bucket, 7, place(layer, 4096)));
            assert!(!insert(&mut bucket, 7, place(layer, 4096)), "known already");
        }
        let newest = [20, 19, 18].map(|layer| place(layer, 4096));
        assert_eq!(find(&bucket, 7), newest);
        for tag in 100..105 {
            insert(&mut bucket, tag, place(1, 0));
        }
        assert_eq!(find(&bucket, 7), newest, "there was room for five more");
        insert(&mut bucket, 105, place(1, 0));
        assert_eq!(find(&bucket, 7), newest[..2]);
        assert!(remove(&mut bucket, 7, newest[0]) && !remove(&mut bucket, 7, newest[0]));
        assert_eq!(find(&bucket, 7), newest[1..2]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_bucket(
            bytes in prop::collection::vec(any::<u8>(), BUCKET_BYTES),
            tag in 0_u32..3, layer in any::<u32>(), data_offset in 1_u64..,
        ) {
            let mut bucket = bytes;
            let new = place(layer, data_offset);
            insert(&mut bucket, tag, new);
            let found = find(&bucket, tag);
            prop_assert!(found.contains(&new) && found.len() <= ENTRIES);
            prop_assert_eq!(found.iter().collect::<HashSet<_>>().len(), found.len());
            prop_assert!(remove(&mut bucket, tag, new));
            prop_assert!(!find(&bucket, tag).contains(&new));
        }
    }
}
