//! Which bytes before a place the deflate data behind it refers to.
//!
//! Reads the symbols of blocks (RFC 1951, 3.2) and makes nothing of them: a copy that begins
//! before the place says which bytes it wants, and all others are only counted. A fraction
//! of what decoding takes. Invariant: reads no byte behind its
//! input, whatever that is; data that is none ends it with `None`.
#![warn(clippy::indexing_slicing)]

/// Longest code, in bits.
const CODE_LEN_MAX: usize = 15;
/// Codes of at most so many bits, which nearly all are, take one look into a table.
const NEAR_BITS: u32 = 10;
/// Symbols of literals and lengths in the fixed code, of which the last two are never used.
const LITERALS_MAX: usize = 288;
/// Distances in the fixed code, of which the last two are never used.
const DISTANCES_MAX: usize = 32;
const END_OF_BLOCK: u16 = 256;
/// In which order a block tells the lengths of the codes that tell its codes.
const ORDER: [usize; 19] = [
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
];
/// The shortest length of each symbol, and the bits that add to it.
#[rustfmt::skip]
const LENGTHS: [(u16, u32); 29] = [
    (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (10, 0),
    (11, 1), (13, 1), (15, 1), (17, 1), (19, 2), (23, 2), (27, 2), (31, 2),
    (35, 3), (43, 3), (51, 3), (59, 3), (67, 4), (83, 4), (99, 4), (115, 4),
    (131, 5), (163, 5), (195, 5), (227, 5), (258, 0),
];
/// The same of distances.
#[rustfmt::skip]
const DISTANCES: [(u16, u32); 30] = [
    (1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (7, 1), (9, 2), (13, 2),
    (17, 3), (25, 3), (33, 4), (49, 4), (65, 5), (97, 5), (129, 6), (193, 6),
    (257, 7), (385, 7), (513, 8), (769, 8), (1025, 9), (1537, 9), (2049, 10), (3073, 10),
    (4097, 11), (6145, 11), (8193, 12), (12289, 12), (16385, 13), (24577, 13),
];

/// `window` with zeros for what the first `reach` decoded bytes of `encoded` are not copied
/// from. Of its first byte only the `bits` highest bits count unless `bits` is 0. `None` where
/// `encoded` ends before so many bytes and before its last block, or is no deflate data.
pub(super) fn referred(encoded: &[u8], bits: u8, window: &[u8], reach: usize) -> Option<Vec<u8>> {
    let mut reader = Reader {
        bits: Bits::new(encoded, bits)?,
        at: 0,
        reach,
        window,
        needed: vec![0; window.len()],
    };
    while reader.at < reach {
        let head = reader.bits.take(3)?;
        match head >> 1 {
            0 => reader.stored()?,
            1 => reader.fixed()?,
            2 => reader.dynamic()?,
            _ => return None,
        }
        if head & 1 == 1 {
            break;
        }
    }
    Some(reader.needed)
}

struct Reader<'a> {
    bits: Bits<'a>,
    /// Decoded bytes so far.
    at: usize,
    reach: usize,
    window: &'a [u8],
    needed: Vec<u8>,
}

impl Reader<'_> {
    fn stored(&mut self) -> Option<()> {
        self.bits.align();
        let (len, not_len) = (self.bits.take(16)?, self.bits.take(16)?);
        if len ^ not_len != 0xffff {
            return None;
        }
        let len = usize::try_from(len).ok()?;
        self.at = self.at.saturating_add(len);
        if self.at < self.reach {
            self.bits.skip_bytes(len)?;
        }
        Some(())
    }

    fn fixed(&mut self) -> Option<()> {
        let mut lens = [8; LITERALS_MAX];
        lens.get_mut(144..256)?.fill(9);
        lens.get_mut(256..280)?.fill(7);
        let literals = Code::new(&lens)?;
        let distances = Code::new(&[5; DISTANCES_MAX])?;
        self.symbols(&literals, &distances)
    }

    fn dynamic(&mut self) -> Option<()> {
        let mut count = |bits, least: u64| usize::try_from(self.bits.take(bits)? + least).ok();
        let (literals, distances, codes) = (count(5, 257)?, count(5, 1)?, count(4, 4)?);
        let mut lens = [0; ORDER.len()];
        for at in ORDER.iter().take(codes) {
            *lens.get_mut(*at)? = u8::try_from(self.bits.take(3)?).ok()?;
        }
        let code = Code::new(&lens)?;
        let mut lens = [0; LITERALS_MAX + DISTANCES_MAX];
        let lens = lens.get_mut(..literals.checked_add(distances)?)?;
        self.lengths(&code, lens)?;
        let (literals, distances) = lens.split_at_checked(literals)?;
        self.symbols(&Code::new(literals)?, &Code::new(distances)?)
    }

    /// Fills `lens` with the lengths of a block's codes.
    fn lengths(&mut self, code: &Code, lens: &mut [u8]) -> Option<()> {
        let (mut at, mut last) = (0_usize, None);
        while at < lens.len() {
            self.bits.fill();
            let symbol = code.next(&mut self.bits)?;
            let (len, times) = match symbol {
                0..16 => (u8::try_from(symbol).ok()?, 1),
                16 => (last?, 3 + self.bits.take(2)?),
                17 => (0, 3 + self.bits.take(3)?),
                _ => (0, 11 + self.bits.take(7)?),
            };
            let end = at.checked_add(usize::try_from(times).ok()?)?;
            lens.get_mut(at..end)?.fill(len);
            (at, last) = (end, Some(len));
        }
        Some(())
    }

    /// Reads a block up to its end, or as far as it matters.
    fn symbols(&mut self, literals: &Code, distances: &Code) -> Option<()> {
        // Of its own, so that all of it stays in registers.
        let (mut bits, mut at) = (self.bits, self.at);
        let mut symbol;
        while at < self.reach {
            bits.fill();
            symbol = literals.next(&mut bits)?;
            // What is there is enough for a second one.
            if symbol < END_OF_BLOCK {
                at = at.wrapping_add(1);
                if at >= self.reach {
                    break;
                }
                symbol = literals.next(&mut bits)?;
                if symbol < END_OF_BLOCK {
                    at = at.wrapping_add(1);
                    continue;
                }
                bits.fill();
            }
            if symbol == END_OF_BLOCK {
                break;
            }
            let symbol_of_length = usize::from(symbol.wrapping_sub(END_OF_BLOCK + 1));
            let length = bits.add(*LENGTHS.get(symbol_of_length)?)?;
            symbol = distances.next(&mut bits)?;
            let distance = bits.add(*DISTANCES.get(usize::from(symbol))?)?;
            if distance > at {
                self.keep(distance.wrapping_sub(at), length)?;
            }
            at = at.wrapping_add(length);
        }
        (self.bits, self.at) = (bits, at);
        Some(())
    }

    /// Keeps `len` bytes of the window, or fewer where it ends, from so many before its end on.
    fn keep(&mut self, before: usize, len: usize) -> Option<()> {
        let from = self.window.len().checked_sub(before)?;
        let place = from..from.saturating_add(len).min(self.window.len());
        let bytes = self.window.get(place.clone())?;
        self.needed.get_mut(place)?.copy_from_slice(bytes);
        Some(())
    }
}

/// A Huffman code.
struct Code {
    /// What the next [`NEAR_BITS`] bits begin with: the symbol times 16 plus the length of
    /// its code, or 0 if that is longer.
    near: [u16; 1 << NEAR_BITS],
    /// Codes of each length.
    counts: [u16; CODE_LEN_MAX + 1],
    /// In the order of their codes.
    symbols: [u16; LITERALS_MAX],
}

impl Code {
    /// The code of symbols whose codes are so long; those of 0 have none.
    fn new(lens: &[u8]) -> Option<Self> {
        let mut code = Self {
            near: [0; 1 << NEAR_BITS],
            counts: [0; CODE_LEN_MAX + 1],
            symbols: [0; LITERALS_MAX],
        };
        for len in lens {
            *code.counts.get_mut(usize::from(*len))? += 1;
        }
        *code.counts.first_mut()? = 0;
        // Where the symbols of each length begin, and the first code of that length.
        let mut next = [(0_u16, 0_u16); CODE_LEN_MAX + 1];
        let (mut place, mut first) = (0_u16, 0_u16);
        for (len, (next, count)) in next.iter_mut().zip(&code.counts).enumerate().skip(1) {
            first = first.checked_mul(2)?;
            *next = (place, first);
            place += count;
            first = first.checked_add(*count)?;
            if u32::from(first) > 1 << len {
                return None;
            }
        }
        for (symbol, len) in (0_u16..).zip(lens).filter(|(_, len)| **len > 0) {
            let (place, value) = next.get_mut(usize::from(*len))?;
            *code.symbols.get_mut(usize::from(*place))? = symbol;
            if u32::from(*len) <= NEAR_BITS {
                code.near(symbol, *len, *value);
            }
            *place += 1;
            *value = value.wrapping_add(1);
        }
        Some(code)
    }

    /// Writes a symbol wherever its code may be followed by anything.
    fn near(&mut self, symbol: u16, len: u8, value: u16) {
        // Codes come with their highest bit first, and all else with the lowest.
        let reversed = value.reverse_bits() >> (16 - len);
        let entries = self.near.iter_mut().skip(usize::from(reversed));
        for entry in entries.step_by(1 << len) {
            *entry = symbol << 4 | u16::from(len);
        }
    }

    /// The next symbol of what was filled in.
    #[inline]
    fn next(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let at = bits.hold & ((1 << NEAR_BITS) - 1);
        let mut entry = *self.near.get(usize::try_from(at).ok()?)?;
        if entry == 0 {
            // By value: what somebody else may write to is kept in memory.
            entry = self.far(bits.hold)?;
        }
        bits.discard(u32::from(entry & 15))?;
        Some(entry >> 4)
    }

    /// What would be in `near` if that knew all bits, found bit by bit.
    #[cold]
    fn far(&self, mut hold: u64) -> Option<u16> {
        let (mut code, mut first, mut place) = (0_u16, 0_u16, 0_u16);
        for (len, count) in (0..).zip(&self.counts).skip(1) {
            code = code << 1 | u16::from(hold & 1 == 1);
            hold >>= 1;
            let of_len = code.checked_sub(first)?;
            if of_len < *count {
                let symbol = self.symbols.get(usize::from(place + of_len))?;
                return Some(symbol << 4 | len);
            }
            place += count;
            first = (first + count) << 1;
        }
        None
    }
}

/// Input, lowest bits first.
#[derive(Clone, Copy)]
struct Bits<'a> {
    rest: &'a [u8],
    /// The next bits. Those above `count` are the ones that follow, or 0.
    hold: u64,
    /// How many of them are taken from `rest`.
    count: u32,
}

impl<'a> Bits<'a> {
    /// Of whose first byte only the `first` highest bits count, unless that is 0.
    fn new(input: &'a [u8], first: u8) -> Option<Self> {
        let mut bits = Self {
            rest: input,
            hold: 0,
            count: 0,
        };
        if first > 0 {
            bits.fill();
            bits.discard(8_u32.checked_sub(u32::from(first))?)?;
        }
        Some(bits)
    }

    /// Takes as many whole bytes of the input as there is room for: 56 bits are there then,
    /// or all.
    #[inline]
    fn fill(&mut self) {
        if let Some(bytes) = self.rest.first_chunk() {
            self.hold |= u64::from_le_bytes(*bytes).wrapping_shl(self.count);
            let taken = 63_u32.wrapping_sub(self.count) / 8;
            let taken = usize::try_from(taken).unwrap_or_default();
            self.rest = self.rest.get(taken..).unwrap_or_default();
            self.count |= 56;
            return;
        }
        while let (Some((byte, rest)), true) = (self.rest.split_first(), self.count < 56) {
            self.hold |= u64::from(*byte).wrapping_shl(self.count);
            self.count += 8;
            self.rest = rest;
        }
    }

    #[inline]
    fn discard(&mut self, bits: u32) -> Option<()> {
        self.count = self.count.checked_sub(bits)?;
        self.hold = self.hold.wrapping_shr(bits);
        Some(())
    }

    /// The next bits, at most 16.
    fn take(&mut self, bits: u32) -> Option<u64> {
        self.fill();
        self.filled(bits)
    }

    /// The next bits of what was filled in.
    #[inline]
    fn filled(&mut self, bits: u32) -> Option<u64> {
        let value = self.hold & 1_u64.wrapping_shl(bits).wrapping_sub(1);
        self.discard(bits)?;
        Some(value)
    }

    /// A least value and the bits that add to it, of what was filled in.
    #[inline]
    fn add(&mut self, (least, bits): (u16, u32)) -> Option<usize> {
        let more = usize::try_from(self.filled(bits)?).ok()?;
        Some(usize::from(least).wrapping_add(more))
    }

    /// Drops what is left of the byte that is being read.
    fn align(&mut self) {
        let bits = self.count % 8;
        self.hold >>= bits;
        self.count -= bits;
    }

    /// Drops whole bytes, where a byte begins.
    fn skip_bytes(&mut self, len: usize) -> Option<()> {
        let held = usize::try_from(self.count / 8).ok()?;
        if let Some(beyond) = len.checked_sub(held) {
            self.rest = self.rest.get(beyond..)?;
            (self.hold, self.count) = (0, 0);
            return Some(());
        }
        let bits = u32::try_from(len).ok()?.checked_mul(8)?;
        self.discard(bits)
    }
}

#[cfg(test)]
mod tests;
