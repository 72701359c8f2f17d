//! Members come apart into right pieces that can be decoded alone, or not at all.
#![expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]

use proptest::prelude::*;

use super::*;
use crate::codec::deflate::MemberCompressor;
use crate::codec::pieces::Pieces;

/// Text of which some repeats.
fn text(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match state >> 30 {
            0 => out.extend(state.to_le_bytes()),
            1 => out.extend(format!("word{} ", state >> 24 & 15).as_bytes()),
            _ if out.len() > 300 => out.extend_from_within(out.len() - 300..out.len() - 260),
            _ => out.push(b'x'),
        }
    }
    out.truncate(len);
    out
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Digest::sha256_bytes(bytes)
}

fn lens(len: usize, piece: usize) -> Vec<u32> {
    let parts = vec![0_u8; len];
    let parts = parts.chunks(piece);
    parts.map(|p| u32::try_from(p.len()).unwrap()).collect()
}

/// Decodes piece number `at` with nothing but what is known of it.
fn alone(encoded: &[u8], plain: &[u8], found: &[Piece], at: usize, lens: &[u32]) -> Vec<u8> {
    let (piece, begin) = (
        &found[at],
        lens[..at].iter().map(|n| u64::from(*n)).sum::<u64>(),
    );
    let decoded = usize::try_from(piece.entry.decoded).unwrap();
    let window = &plain[decoded.saturating_sub(32 << 10)..decoded];
    let start = usize::try_from(piece.entry.start).unwrap();
    let end = usize::try_from(piece.encoded_end).unwrap();
    let mut pieces = Pieces::span(&encoded[start..end], piece.entry.bits, window).unwrap();
    let skip = begin - piece.entry.decoded;
    pieces.take(skip, lens[at]).unwrap().to_vec()
}

#[test]
fn what_is_not_promised_does_not_come_out() {
    let plain = text(200_000, 3);
    let encoded = MemberCompressor::new(6).compress(&plain);
    let (right, lens) = (sha256(&plain), lens(plain.len(), 64 << 10));
    let take = |expected: &[u8; 32], encoded: &[u8], lens: &[u32]| {
        let what = || "a member".to_owned();
        pieces(what, expected, encoded, lens.iter().copied()).map(|found| found.len())
    };
    assert_eq!(take(&right, &encoded, &lens).unwrap(), 4);
    let error = take(&[7; 32], &encoded, &lens).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let fewer = take(&right, &encoded, &lens[..3]).unwrap_err();
    assert!(matches!(fewer, Error::Corrupt { .. }), "{fewer}");
    let more = [&lens[..], &[1]].concat();
    for (encoded, lens) in [
        (&encoded[..], &more[..]),
        (&encoded[..1000], &lens),
        (&[], &lens),
        (b"no gzip at all", &lens),
        (&encoded, &[u32::MAX]),
    ] {
        let error = take(&right, encoded, lens).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
    for at in (0..encoded.len()).step_by(977) {
        let mut bad = encoded.clone();
        bad[at] ^= 0x10;
        // Of the header not every byte counts.
        assert!(
            take(&right, &bad, &lens).is_err() || at < 10,
            "flipped at {at}"
        );
    }
}

#[test]
fn bytes_that_are_here_come_apart_alike() {
    let plain = Bytes::from(text(150_000, 9));
    let right = sha256(&plain);
    let lens = lens(plain.len(), 64 << 10);
    let take = |expected: &[u8; 32], lens: &[u32]| {
        split(
            || "a copy".to_owned(),
            expected,
            &plain,
            lens.iter().copied(),
        )
    };
    let found = take(&right, &lens).unwrap();
    for ((bytes, digest), part) in found.iter().zip(plain.chunks(64 << 10)) {
        assert_eq!((&**bytes, *digest), (part, sha256(part)));
    }
    assert!(matches!(take(&[7; 32], &lens), Err(Error::Corrupt { .. })));
    assert!(matches!(
        take(&right, &lens[1..]),
        Err(Error::Corrupt { .. })
    ));
    let longer = [&lens[..], &[1]].concat();
    assert!(matches!(
        take(&right, &longer),
        Err(Error::Malformed { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_piece_can_be_decoded_from_its_entry(
        seed in any::<u32>(),
        len in 1_usize..400_000,
        piece in 1000_usize..100_000,
        level in 1_u32..10,
        tail in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let plain = text(len, seed);
        // As before the next file's chunk: the padding and header between them.
        let encoded = MemberCompressor::new(level).compress(&[&plain[..], &tail].concat());
        let lens = lens(len, piece);
        let digest = sha256(&plain);
        let found = pieces(String::new, &digest, &encoded, lens.iter().copied()).unwrap();
        prop_assert_eq!(found.len(), lens.len());
        let mut at = 0;
        for (number, piece) in found.iter().enumerate() {
            let part = &plain[at..at + lens[number] as usize];
            prop_assert!(&*piece.bytes == part);
            prop_assert_eq!(piece.digest, sha256(part));
            prop_assert!(piece.entry.decoded <= at as u64);
            prop_assert!(alone(&encoded, &plain, &found, number, &lens) == part);
            at += part.len();
        }
    }
}
