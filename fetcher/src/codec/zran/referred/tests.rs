//! Against the decoder: what is kept is all that it needs, and no more.
#![expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]

use std::io::Write as _;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use proptest::prelude::*;

use super::super::tests::{Place, places, stream};
use super::*;
use crate::codec::pieces::Pieces;
use crate::codec::zran::REACH;

/// What decoding from `place` gives with `window` before it, up to where it may be referred to.
fn decoded(blob: &[u8], place: &Place, window: &[u8], len: usize) -> Vec<u8> {
    let mut pieces = Pieces::span(&blob[place.at..], place.bits, window).unwrap();
    let len = u32::try_from(len.min(REACH)).unwrap();
    pieces.take(0, len).unwrap().to_vec()
}

/// `window` with other bytes at the places that `is_other` says.
fn otherwise(window: &[u8], is_other: impl Fn(usize) -> bool) -> Vec<u8> {
    let bytes = window.iter().enumerate();
    bytes
        .map(|(at, byte)| if is_other(at) { !byte } else { *byte })
        .collect()
}

/// Which bytes of a window are kept, whatever they are.
fn kept(blob: &[u8], place: &Place) -> Vec<bool> {
    let marked = vec![1; place.window.len()];
    let kept = referred(&blob[place.at..], place.bits, &marked, REACH).unwrap();
    kept.into_iter().map(|byte| byte == 1).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn all_that_is_needed_is_kept_and_nothing_else(
        seed in any::<u32>(),
        levels in prop::collection::vec(0_u32..=9, 1..4),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 8),
    ) {
        let (plain, blob) = stream(seed, &levels);
        for place in places(&blob, blob.len()) {
            let rest = &plain[place.decoded..];
            let right = &rest[..rest.len().min(REACH)];
            let kept = kept(&blob, &place);
            let others = otherwise(&place.window, |at| !kept[at]);
            prop_assert!(decoded(&blob, &place, &others, rest.len()) == right);
            let needed: Vec<usize> = (0..kept.len()).filter(|at| kept[*at]).collect();
            for pick in picks.iter().filter(|_| !needed.is_empty()) {
                let wrong = otherwise(&place.window, |at| at == *pick.get(&needed));
                prop_assert!(decoded(&blob, &place, &wrong, rest.len()) != right);
            }
        }
    }

    #[test]
    fn no_input_does_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..400), bits in 0_u8..9, len in 0_usize..300,
    ) {
        let window = vec![1; len];
        if let Some(kept) = referred(&bytes, bits, &window, REACH) {
            prop_assert_eq!(kept.len(), len);
        }
    }

    #[test]
    fn codes_of_every_length_are_read(lens in prop::collection::vec(0_u8..=15, 1..=288)) {
        // As many of them as there are codes for.
        let mut room = 1_u32 << CODE_LEN_MAX;
        let lens: Vec<u8> = lens
            .into_iter()
            .map(|len| {
                let takes = if len == 0 { 0 } else { 1 << (CODE_LEN_MAX - usize::from(len)) };
                let is_free = room >= takes;
                room -= if is_free { takes } else { 0 };
                if is_free { len } else { 0 }
            })
            .collect();
        let code = Code::new(&lens).unwrap();
        for (symbol, bytes) in canonical(&lens) {
            let mut bits = Bits::new(&bytes, 0).unwrap();
            bits.fill();
            prop_assert_eq!(code.next(&mut bits), Some(symbol));
        }
    }
}

/// Each symbol with its code (RFC 1951, 3.2.2), as input that has nothing else.
fn canonical(lens: &[u8]) -> Vec<(u16, [u8; 2])> {
    let mut ordered: Vec<(u8, u16)> = lens.iter().copied().zip(0..).collect();
    ordered.retain(|(len, _)| *len > 0);
    ordered.sort_unstable();
    let (mut codes, mut next, mut last) = (Vec::new(), 0_u16, 0);
    for (len, symbol) in ordered {
        next <<= len - last;
        last = len;
        codes.push((symbol, (next.reverse_bits() >> (16 - len)).to_le_bytes()));
        next = next.wrapping_add(1);
    }
    codes
}

#[test]
fn what_is_cut_off_tells_nothing() {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(6));
    let text: Vec<u8> = (0..20_000_u32)
        .flat_map(|n| format!("{} ", n.wrapping_mul(2_654_435_761) >> 20).into_bytes())
        .collect();
    encoder.write_all(&text).unwrap();
    let whole = encoder.finish().unwrap();
    let window = vec![1; REACH];
    let kept = referred(&whole, 0, &window, REACH).unwrap();
    // It began with nothing before it.
    assert!(kept.iter().all(|byte| *byte == 0));
    for len in 0..whole.len() / 8 {
        assert!(
            referred(&whole[..len], 0, &window, REACH).is_none(),
            "{len}"
        );
    }
}

#[test]
fn data_that_is_none_is_told() {
    let table: [(&[u8], u8, &str); 7] = [
        (&[0b111], 0, "a fourth kind of block"),
        (
            &[0b001, 5, 0, 5, 0],
            0,
            "a stored length that is not there twice",
        ),
        (
            &[0b001, 5, 0, 0xfa, 0xff, 1, 2, 3, 4],
            0,
            "five bytes of which four are there",
        ),
        // Fixed codes: length 3 (0000001), distance 1 (00000), with nothing before.
        (&[0b0000_0011, 0b10, 0, 0], 0, "a copy of nothing"),
        (&[0b101, 0, 0], 0, "too few codes of lengths to tell any"),
        (&[], 3, "no byte to begin in"),
        (&[0, 0], 9, "a byte of nine bits"),
    ];
    for (input, bits, what) in table {
        assert_eq!(referred(input, bits, &[], REACH), None, "{what}");
    }
    let stored = [0b001, 5, 0, 0xfa, 0xff, 1, 2, 3, 4, 5];
    assert_eq!(referred(&stored, 0, &[], REACH), Some(Vec::new()));
    // What is behind the reach needs not be there.
    assert_eq!(referred(&stored[..6], 0, &[], 5), Some(Vec::new()));
    assert!(Code::new(&[1, 1, 1]).is_none(), "three codes of one bit");
    assert!(Code::new(&[16]).is_none(), "a code of 16 bits");
}
