//! Whole blobs in every compression, in pieces of every size.
#![expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]

use std::io::Write as _;

use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd_frame(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

fn skippable(payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_le_bytes();
    [&[0x53, 0x2a, 0x4d, 0x18], &len[..], payload].concat()
}

fn decode(blob: &[u8], piece: usize, out_max: u64) -> Result<Vec<u8>> {
    let (mut out, mut consumed) = (Vec::new(), 0);
    let mut decoder = Decoder::new(detect(blob), out_max)?;
    for piece in blob.chunks(piece.max(1)) {
        decoder.push(piece, &mut |run| {
            out.extend_from_slice(run.decoded);
            consumed += run.encoded.len();
            Ok(())
        })?;
    }
    assert_eq!(decoder.decoded_len(), out.len() as u64);
    assert_eq!(consumed, blob.len());
    decoder.finish()?;
    Ok(out)
}

#[test]
fn detects_by_magic() {
    assert_eq!(detect(&gzip(b"x")), Compression::Gzip);
    assert_eq!(detect(&zstd_frame(b"x")), Compression::Zstd);
    assert_eq!(detect(&skippable(b"x")), Compression::Zstd);
    assert_eq!(detect(b"etc/passwd"), Compression::Stored);
    assert_eq!(detect(b""), Compression::Stored);
}

#[test]
fn joins_members_and_frames() {
    let (a, b) = (vec![1; 300_000], b"second".to_vec());
    let whole = [&a[..], &b].concat();
    let blobs = [
        [gzip(&a), gzip(b""), gzip(&b)].concat(),
        [
            skippable(b"toc"),
            zstd_frame(&a),
            zstd_frame(b""),
            zstd_frame(&b),
            skippable(&[9; 70_000]),
        ]
        .concat(),
        whole.clone(),
    ];
    for blob in blobs {
        for piece in [1, 3, 1000, blob.len()] {
            assert_eq!(decode(&blob, piece, 1 << 30).unwrap(), whole, "{piece}");
        }
    }
}

#[test]
fn truncation_and_garbage_are_errors() {
    for blob in [gzip(b"some payload"), zstd_frame(b"some payload")] {
        for cut in 4..blob.len() {
            let error = decode(&blob[..cut], 7, 1 << 20).unwrap_err().to_string();
            assert!(error.contains("is cut off after"), "{error}");
        }
        let mut garbage = blob.clone();
        garbage.extend_from_slice(b"garbage after the end");
        assert!(matches!(
            decode(&garbage, 64, 1 << 20),
            Err(Error::Malformed { .. })
        ));
    }
}

#[test]
fn a_bomb_stops_at_the_limit() {
    let zeros = vec![0; 4 << 20];
    for blob in [gzip(&zeros), zstd_frame(&zeros), zeros] {
        let error = decode(&blob, 1 << 20, 1 << 20).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
        assert!(
            error.to_string().contains("larger than 1048576 bytes"),
            "{error}"
        );
    }
}

#[test]
fn a_window_over_the_limit_is_refused() {
    // A frame header that asks for a window of 2^28 bytes: no single-segment flag, window
    // descriptor (28 - 10) << 3, then one empty raw block.
    let blob = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 18 << 3, 0x01, 0x00, 0x00];
    let error = decode(&blob, 64, 1 << 20).unwrap_err().to_string();
    assert!(error.contains("too much memory"), "{error}");
}

#[test]
fn the_error_of_the_sink_comes_back() {
    let mut decoder = Decoder::new(Compression::Gzip, 100).unwrap();
    let error = decoder
        .push(&gzip(b"x"), &mut |_| Err(Error::limit("disk", "full")))
        .unwrap_err();
    assert_eq!(error.to_string(), "disk exceeds the limit: full");
}

proptest! {
    #[test]
    fn any_split_decodes_alike(data in proptest::collection::vec(any::<u8>(), 0..5000), piece in 1_usize..600) {
        for blob in [gzip(&data), zstd_frame(&data)] {
            prop_assert_eq!(&decode(&blob, piece, 1 << 20).unwrap(), &data);
        }
    }

    #[test]
    fn any_damage_is_an_error_or_harmless(
        data in proptest::collection::vec(any::<u8>(), 0..500),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u32,
    ) {
        for mut blob in [gzip(&data), zstd_frame(&data)] {
            let at = at.index(blob.len());
            blob[at] ^= 1_u8 << bit;
            let _ = decode(&blob, 100, 1 << 20);
        }
    }
}
