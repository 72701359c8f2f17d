//! Members good and bad.
#![expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]

use std::io::Write as _;

use flate2::{Compression, GzBuilder, write::GzEncoder};

use super::*;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn sample() -> Vec<u8> {
    (0..200_000_u32)
        .flat_map(|i| (i.wrapping_mul(i) >> 7).to_le_bytes())
        .collect()
}

#[test]
fn takes_a_window_across_members() {
    let data = sample();
    let (head, tail) = data.split_at(300_000);
    let blob = [gzip(head), gzip(b""), gzip(tail)].concat();
    for (skip, len) in [
        (0, 0),
        (0, 10),
        (299_990, 20),
        (300_000, 5),
        (0, 800_000),
        (799_999, 1),
    ] {
        let start = usize::try_from(skip).unwrap();
        let end = start + usize::try_from(len).unwrap();
        assert_eq!(
            decode_member(&blob, skip, len).unwrap(),
            data[start..end],
            "{skip}+{len}"
        );
    }
}

#[test]
fn reads_every_optional_header_field() {
    let mut encoder = GzBuilder::new()
        .filename("name")
        .comment("comment")
        .extra(vec![7; 300])
        .write(Vec::new(), Compression::best());
    encoder.write_all(b"payload").unwrap();
    let mut blob = encoder.finish().unwrap();
    assert_eq!(decode_member(&blob, 0, 7).unwrap(), b"payload");
    // The same with a header CRC, which no encoder at hand writes.
    let mut with_crc = gzip(b"payload");
    with_crc[3] |= FLAG_HEADER_CRC;
    with_crc.splice(10..10, [0xaa, 0xbb]);
    blob.extend(with_crc);
    assert_eq!(decode_member(&blob, 7, 7).unwrap(), b"payload");
}

#[test]
fn every_truncation_is_an_error() {
    let blob = gzip(b"some payload that is not very long");
    for cut in 0..blob.len() {
        assert!(decode_member(&blob[..cut], 0, 35).is_err(), "{cut}");
    }
}

#[test]
fn says_what_is_wrong() {
    let good = gzip(b"0123456789");
    let edit = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        bad
    };
    let end = good.len();
    let table: [(Vec<u8>, u64, u32, &str); 9] = [
        (Vec::new(), 0, 1, "0 bytes cannot hold 1 decoded bytes"),
        (vec![0; 40], 0, 1, "does not begin with a gzip header"),
        (edit(2, 7), 0, 1, "unknown compression method 7"),
        (edit(3, 0x80), 0, 1, "reserved header flags 0x80"),
        (edit(10, 0x07), 0, 1, "deflate data is damaged"),
        (edit(end - 8, good[end - 8] ^ 1), 10, 1, "CRC-32"),
        (edit(end - 4, 11), 10, 1, "length of a member"),
        (
            [&good[..], b"ten bytes!"].concat(),
            10,
            1,
            "after 1 members comes something",
        ),
        (good.clone(), 5, 6, "ends after 10 of 11 decoded bytes"),
    ];
    for (blob, skip, len, expected) in table {
        let error = decode_member(&blob, skip, len).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    let error = decode_member(&good, u64::MAX, u32::MAX)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot hold"), "{error}");
}
