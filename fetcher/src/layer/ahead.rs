//! How far to read ahead of a miss, learned from what became of what came along before.
//!
//! A round trip of a gigabit carries a megabyte or two, so chunks that follow a missing one
//! are cheap to bring along if they are read next, and in a package's directory they are.
//! In the middle of a library that is mapped they are not. One chunk costs a small part of
//! a round trip, so it is worth it where one of many is read.
//!
//! Invariant: between [`BYTES_MIN`] and what the link makes sensible. Memory is bounded.
//! Pure but for its own state.

use std::collections::BTreeMap;

use crate::link::Link;
use crate::types::ByteRange;

/// Encoded bytes that are read ahead before anything is known: what a gigabit carries in
/// two milliseconds.
const BYTES_FIRST: u64 = 256 << 10;
/// Fewest.
const BYTES_MIN: u64 = 64 << 10;
/// Most, on any link. At a gigabit and 10 ms, twice as many save a python start a tenth of
/// its time for a third more bytes.
pub(super) const BYTES_MAX: u64 = 512 << 10;
/// Part of a round trip's bytes that may be read ahead: a reader who needs none of it waits
/// half as long again.
const ROUND_TRIP_PARTS: u64 = 2;
/// Chunks that came along between two decisions.
const SAMPLE: u32 = 64;
/// It becomes more where one in so many was read,
const MORE_ONE_IN: u32 = 12;
/// and less where fewer than one in so many was.
const LESS_ONE_IN: u32 = 48;
/// Chunks that are waited for at most.
const WAITING_MAX: usize = 512;

/// What one layer knows.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes: u64,
    /// Places of the data file that came along and were not read yet: end by start.
    waiting: BTreeMap<u64, u64>,
    brought: u32,
    read: u32,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            bytes: BYTES_FIRST,
            waiting: BTreeMap::new(),
            brought: 0,
            read: 0,
        }
    }
}

impl Ahead {
    /// Encoded bytes to read ahead of the next miss.
    pub(super) fn bytes(&mut self, link: Link) -> u64 {
        if self.brought >= SAMPLE {
            if self.read.saturating_mul(MORE_ONE_IN) >= self.brought {
                self.bytes = self.bytes.saturating_mul(2);
            } else if self.read.saturating_mul(LESS_ONE_IN) < self.brought {
                self.bytes /= 2;
            }
            (self.brought, self.read) = (0, 0);
        }
        let sensible = link.round_trip_bytes() / ROUND_TRIP_PARTS;
        self.bytes = self
            .bytes
            .clamp(BYTES_MIN, sensible.clamp(BYTES_FIRST, BYTES_MAX));
        self.bytes
    }

    /// A chunk came along.
    pub(super) fn brought(&mut self, place: ByteRange) {
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.pop_first();
        }
        self.waiting.insert(place.start(), place.end());
        self.brought = self.brought.saturating_add(1);
    }

    /// Somebody read this part of the data file.
    pub(super) fn read(&mut self, place: ByteRange) {
        while let Some((start, end)) = self.waiting.range(..place.end()).next_back()
            && *end > place.start()
        {
            let start = *start;
            self.waiting.remove(&start);
            self.read = self.read.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const CHUNK: u64 = 4096;

    fn link(round_trip_ms: u64, bytes_per_second: u64) -> Link {
        Link {
            round_trip: Duration::from_millis(round_trip_ms),
            bytes_per_second,
        }
    }

    fn place(number: u64) -> ByteRange {
        ByteRange::at(number * CHUNK, CHUNK).unwrap()
    }

    /// After `misses` that brought eight chunks each, of which `read` were read.
    fn after(misses: u64, read: u64, link: Link) -> u64 {
        let mut ahead = Ahead::default();
        let mut bytes = ahead.bytes(link);
        for miss in 0..misses {
            (0..8).for_each(|n| ahead.brought(place(miss * 8 + n)));
            (0..read).for_each(|n| ahead.read(place(miss * 8 + n)));
            bytes = ahead.bytes(link);
        }
        bytes
    }

    #[test]
    fn it_follows_what_is_read_and_what_the_link_carries() {
        let gigabit = link(15, 125_000_000);
        let near = link(6, 125_000_000);
        let table = [
            (7, 8, gigabit, BYTES_FIRST, "too early to tell"),
            (8, 8, gigabit, 512 << 10, "all of it is read"),
            (80, 1, near, 375_000, "half of a round trip at most"),
            (80, 0, gigabit, BYTES_MIN, "nothing of it is read"),
            (80, 8, link(3, 2_000_000_000), BYTES_MAX, "however fast"),
            (80, 8, link(1, 1_000_000), BYTES_FIRST, "however slow"),
        ];
        for (misses, read, link, bytes, why) in table {
            assert_eq!(after(misses, read, link), bytes, "{why}");
        }
    }

    #[test]
    fn one_read_may_be_of_several_chunks_and_counts_each_once() {
        let mut ahead = Ahead::default();
        (0..6).for_each(|n| ahead.brought(place(n)));
        let middle = ByteRange::new(CHUNK + 1, 4 * CHUNK).unwrap();
        ahead.read(middle);
        ahead.read(middle);
        assert_eq!((ahead.read, ahead.waiting.len()), (3, 3));
        ahead.read(ByteRange::new(6 * CHUNK, 7 * CHUNK).unwrap());
        assert_eq!(ahead.read, 3, "that one did not come along");
    }

    proptest! {
        #[test]
        fn bounds_hold_whatever_happens(
            steps in prop::collection::vec((any::<bool>(), 0_u64..2000, 1_u64..9), 0..3000),
            round_trip in 0_u64..2000, rate in 1_u64..10_000_000_000,
        ) {
            let mut ahead = Ahead::default();
            for (came, number, count) in steps {
                let place = ByteRange::at(number * CHUNK, count * CHUNK).unwrap();
                if came { ahead.brought(place) } else { ahead.read(place) }
                let bytes = ahead.bytes(link(round_trip, rate));
                prop_assert!((BYTES_MIN..=BYTES_MAX).contains(&bytes));
                prop_assert!(ahead.waiting.len() <= WAITING_MAX);
            }
        }
    }
}
