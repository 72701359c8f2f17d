//! Where three bytes in a row are first in a text.
//!
//! Invariant: what is found is exact; the hash only tells where to look. A slot has at most the
//! threes that share it, each once, so that no text makes a look-up long: 256 or so of 2^24.

/// Bytes in a row.
pub(super) const LEN: usize = 3;
/// Slots, as a power of two.
const SLOT_BITS: u32 = 16;
/// No place.
const NONE: u32 = u32::MAX;

/// The places of a text.
pub(super) struct Threes<'a> {
    text: &'a [u8],
    /// The first place of each slot.
    slots: Vec<u32>,
    /// Of each place the next one of its slot.
    next: Vec<u32>,
}

impl<'a> Threes<'a> {
    /// Of `text`.
    pub(super) fn new(text: &'a [u8]) -> Self {
        let mut threes = Self {
            text,
            slots: vec![NONE; 1 << SLOT_BITS],
            next: Vec::with_capacity(text.len()),
        };
        for (at, three) in text.windows(LEN).enumerate() {
            let (slot, at) = (slot(three), u32::try_from(at).unwrap_or(NONE));
            let mut next = NONE;
            if threes.find(slot, three).is_none()
                && let Some(first) = threes.slots.get_mut(slot)
            {
                next = std::mem::replace(first, at);
            }
            threes.next.push(next);
        }
        threes
    }

    /// Where `three` is first.
    pub(super) fn first(&self, three: &[u8]) -> Option<usize> {
        self.find(slot(three), three)
    }

    fn find(&self, slot: usize, three: &[u8]) -> Option<usize> {
        let mut place = *self.slots.get(slot)?;
        while place != NONE {
            let at = usize::try_from(place).ok()?;
            if self.text.get(at..)?.starts_with(three) {
                return Some(at);
            }
            place = *self.next.get(at)?;
        }
        None
    }
}

/// The slot of three bytes: the upper bits of a product, which neighbours do not share.
fn slot(three: &[u8]) -> usize {
    let number = three
        .iter()
        .fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    usize::try_from(number.wrapping_mul(0x9E37_79B1) >> (u32::BITS - SLOT_BITS)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::test_util::content::noise;

    #[test]
    fn each_three_is_found_where_it_is_first() {
        let texts = [
            noise(1, 0xff, 40_000),
            noise(2, 3, 9_000),
            vec![0; 5_000],
            b"ab".to_vec(),
            Vec::new(),
        ];
        for text in texts {
            let mut first: HashMap<&[u8], usize> = HashMap::new();
            for (at, three) in text.windows(LEN).enumerate() {
                first.entry(three).or_insert(at);
            }
            let threes = Threes::new(&text);
            for three in noise(3, 0xff, 3_000)
                .chunks_exact(LEN)
                .chain(text.windows(LEN))
            {
                assert_eq!(threes.first(three), first.get(three).copied());
            }
        }
    }

    #[test]
    fn few_threes_share_a_slot() {
        let mut slots = vec![0_u32; 1 << SLOT_BITS];
        for three in 0..1_u32 << 24 {
            let [_, a, b, c] = three.to_be_bytes();
            slots[slot(&[a, b, c])] += 1;
        }
        let most = slots.iter().max().copied();
        assert!(most.is_some_and(|most| most <= 300), "{most:?}");
    }
}
