//! Every block end of many streams is entered, with as much of the window as was kept.
#![expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;
use crate::codec::pieces::Pieces;
use crate::codec::stream::{Compression as Kind, Decoder, Stop};

/// Where a stream can be entered.
pub(super) struct Place {
    pub(super) at: usize,
    pub(super) bits: u8,
    pub(super) window: Vec<u8>,
    pub(super) decoded: usize,
}

pub(super) fn places(blob: &[u8], piece: usize) -> Vec<Place> {
    let mut decoder = Decoder::new(Kind::Gzip, u64::MAX).unwrap();
    let (mut consumed, mut decoded, mut found) = (0, 0, Vec::new());
    for piece in blob.chunks(piece) {
        decoder
            .push(piece, &mut |run| {
                consumed += run.encoded.len();
                decoded += run.decoded.len();
                if let Stop::Block(end) = &run.stop {
                    found.push(Place {
                        at: consumed - usize::from(end.bits > 0),
                        bits: end.bits,
                        window: end.window(),
                        decoded,
                    });
                }
                Ok(())
            })
            .unwrap();
    }
    decoder.finish().unwrap();
    found
}

/// Members of different levels, cut by flushes into blocks of every kind.
pub(super) fn stream(seed: u32, levels: &[u32]) -> (Vec<u8>, Vec<u8>) {
    let (mut plain, mut blob) = (Vec::new(), Vec::new());
    let mut state = seed | 1;
    for level in levels {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(*level));
        for part in 0..4 {
            let mut text = Vec::new();
            while text.len() < 40_000 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                match part % 3 {
                    0 => text.extend_from_slice(&state.to_le_bytes()),
                    1 => text.extend_from_slice(format!("word{} ", state >> 24).as_bytes()),
                    _ => text.extend(std::iter::repeat_n(0, 5000)),
                }
            }
            encoder.write_all(&text).unwrap();
            encoder.flush().unwrap();
            plain.extend(text);
        }
        blob.extend(encoder.finish().unwrap());
    }
    (plain, blob)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn every_block_end_can_be_entered(
        seed in any::<u32>(),
        levels in prop::collection::vec(0_u32..=9, 1..4),
        piece in 1_usize..50_000,
    ) {
        let (plain, blob) = stream(seed, &levels);
        let places = places(&blob, piece);
        prop_assert!(places.len() > levels.len());
        for place in places {
            let rest = &plain[place.decoded..];
            let window = sparse_window(&blob[place.at..], place.bits, &place.window);
            // By what was decoded alone, and of what was before in other members too.
            let before = &plain[place.decoded.saturating_sub(REACH)..place.decoded];
            let likely = likely_window(before, rest);
            for window in [window, likely] {
                prop_assert!([place.window.len(), before.len()].contains(&window.len()));
                let mut pieces = Pieces::span(&blob[place.at..], place.bits, &window).unwrap();
                let len = u32::try_from(rest.len().min(100_000)).unwrap();
                let decoded = pieces.take(0, len).unwrap();
                prop_assert!(rest.starts_with(&decoded));
            }
        }
    }
}

#[test]
fn a_likely_window_keeps_what_is_again_near_enough() {
    let mut window = vec![0_u8; REACH];
    window[..4].copy_from_slice(b"abcd");
    window[100..104].copy_from_slice(b"efgh");
    window[REACH - 2..].copy_from_slice(b"xy");
    let kept = |next: &[u8]| {
        let kept = likely_window(&window, next);
        assert!(
            kept.iter()
                .zip(&window)
                .all(|(kept, was)| *kept == 0 || kept == was)
        );
        let places = kept.iter().enumerate().filter(|(_, byte)| **byte != 0);
        places.map(|(at, _)| at).collect::<Vec<_>>()
    };
    let table: [(&[u8], &[usize]); 7] = [
        (b"", &[]),
        (b"ab", &[]),
        (b"abc", &[0, 1, 2]),
        // One further on it is out of reach.
        (b"1abcd", &[]),
        (b"12bcd efgh", &[100, 101, 102, 103]),
        // A copy that begins before the place and ends behind it.
        (b"xxyxx", &[REACH - 2, REACH - 1]),
        (b"zzz", &[]),
    ];
    for (next, expected) in table {
        assert_eq!(kept(next), expected, "{}", next.escape_ascii());
    }
    // One that begins within reach and ends behind it.
    let noise = noise(REACH);
    let xy = [&noise[..REACH - 2], b"xy", &noise[..1]].concat();
    assert_eq!(kept(&xy), [REACH - 2, REACH - 1]);
    let y = [&noise[..REACH - 1], b"y", &noise[..2]].concat();
    assert_eq!(kept(&y), [REACH - 1]);
}

/// Bytes that are no ASCII.
fn noise(len: usize) -> Vec<u8> {
    let mut noise = crate::test_util::content::noise(1, 0x7f, len);
    noise.iter_mut().for_each(|byte| *byte |= 0x80);
    noise
}

#[test]
fn the_farthest_copy_of_the_last_place_decodes() {
    let mut window = noise(REACH);
    window[REACH - 2..].copy_from_slice(b"xy");
    let mut next = noise(REACH - 2);
    // A stored block of all of it; then three bytes from 32768 before, as Go's writer does.
    let len = u16::try_from(next.len()).unwrap();
    let mut blob = vec![0];
    blob.extend(len.to_le_bytes());
    blob.extend((!len).to_le_bytes());
    blob.extend(&next);
    let last = "110" // The last block, of the fixed codes.
        .chars()
        .chain("0000001".chars()) // Three bytes,
        .chain("11101".chars()) // from 24577 before at least,
        .chain("1".repeat(13).chars().collect::<Vec<_>>()) // and 8191 more.
        .chain("0000000".chars())
        .collect::<Vec<_>>();
    for bits in last.chunks(8) {
        let bits = bits.iter().rev();
        blob.push(bits.fold(0, |byte, bit| byte << 1 | u8::from(*bit == '1')));
    }
    next.extend([b'x', b'y', next[0]]);
    let likely = likely_window(&window, &next);
    for window in [&window, &likely] {
        let mut pieces = Pieces::span(&blob, 0, window).unwrap();
        let decoded = pieces.take(0, u32::try_from(next.len()).unwrap()).unwrap();
        assert!(decoded == next);
    }
}

#[test]
fn little_of_a_window_is_kept_where_little_is_needed() {
    // Text that repeats one old line and is else new.
    let noise: Vec<u8> = (0..32_768_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&noise).unwrap();
    encoder.flush().unwrap();
    encoder
        .write_all(&noise[noise.len() - 20_000..noise.len() - 19_900])
        .unwrap();
    encoder.write_all(&vec![b'x'; 100_000]).unwrap();
    let blob = encoder.finish().unwrap();
    let places = places(&blob, blob.len());
    // The last block but one ends a byte or two before the noise does.
    let before = |place: &&Place| place.decoded <= noise.len();
    let place = places.iter().rfind(before).unwrap();
    assert!(noise.len() - place.decoded < 10);
    let window = sparse_window(&blob[place.at..], place.bits, &place.window);
    let kept = window.iter().filter(|byte| **byte != 0).count();
    assert!((90..400).contains(&kept), "{kept}");
}

#[test]
fn places_that_are_none_are_errors() {
    let (_, blob) = stream(5, &[6]);
    for bits in 0..=16 {
        let bad = Pieces::span(&blob[1000..], bits, &[0; 100]);
        // An error now or later; wrong bytes are for the digest to find.
        if let Ok(mut pieces) = bad {
            let _ = pieces.take(0, 100_000);
        } else {
            assert!(bits > 7);
        }
    }
    assert!(Pieces::span(&[], 3, &[]).unwrap().take(0, 1).is_err());
}
