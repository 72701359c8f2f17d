//! Blobs of the reference writer.

use super::support::{blob_ref, open};
use crate::codec::gzip;
use crate::index::estargz::{parse_toc, read_footer};
use crate::index::{Encoding, FileEntry, FileKind, LayerIndex, Timestamp};
use crate::test_util::content::noise;
use crate::types::{ByteRange, Digest};
use crate::{Error, codec};

/// Made by the reference writer: 1024-byte chunks, one file prioritised.
const PLAIN: &[u8] = include_bytes!("../../../../tests/fixtures/estargz/plain.esgz");
const PLAIN_TOC: &str = "sha256:35ca35b45d961cf651d513be99a20f0b34ecd80fad1f2e793bc85a3b794bd503";

/// The same files with several chunks per gzip member.
const PACKED: &[u8] = include_bytes!("../../../../tests/fixtures/estargz/packed.esgz");
const PACKED_TOC: &str = "sha256:fc8d50758b11a3318af08518446ade450f20a4438fc5daae1db5487734bec0db";

/// Decodes every chunk from the blob and checks its digest; returns the data file.
fn data_file(bytes: &[u8], index: &LayerIndex) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(index.data_len).unwrap()];
    for chunk in &index.chunks {
        let Encoding::GzipMember { blob, skip } = chunk.encoding else {
            panic!("eStargz chunks are in gzip members");
        };
        let member =
            &bytes[usize::try_from(blob.start()).unwrap()..usize::try_from(blob.end()).unwrap()];
        let decoded = gzip::decode_member(member, skip, chunk.len).unwrap();
        let verified =
            codec::verify_chunk(|| "chunk".to_owned(), &chunk.chunk_digest.unwrap(), decoded)
                .unwrap();
        let at = usize::try_from(chunk.data_offset).unwrap();
        data[at..at + verified.len()].copy_from_slice(&verified);
    }
    data
}

fn find<'a>(index: &'a LayerIndex, path: &str) -> &'a FileEntry {
    index
        .files
        .iter()
        .find(|f| f.path == path.as_bytes())
        .unwrap_or_else(|| panic!("no {path}"))
}

/// What the fixtures' generator puts into `bin/big`.
fn pattern(len: usize) -> Vec<u8> {
    noise(1, 0x0f, len)
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn reads_what_the_reference_writer_makes() {
    for (bytes, toc_digest) in [(PLAIN, PLAIN_TOC), (PACKED, PACKED_TOC)] {
        let layer = open(bytes, toc_digest).unwrap();
        let index = &layer.index;
        let data = data_file(bytes, index);
        let content = |path: &str| match find(index, path).kind {
            FileKind::Regular { size, data_offset } => {
                let at = usize::try_from(data_offset).unwrap();
                &data[at..at + usize::try_from(size).unwrap()]
            }
            ref other => panic!("{path} is {other:?}"),
        };
        assert_eq!(content("bin/big"), pattern(3000));
        assert_eq!(content("bin/small"), b"small file\n");
        assert_eq!(content("bin/empty"), b"");
        assert_eq!(content("etc/a"), b"aaaa");
        assert_eq!(content("etc/b"), b"bbbbbbbb");
        assert_eq!(content("etc/.wh.gone"), b"");
        assert_eq!(content("etc/.wh..wh..opq"), b"");
        assert_eq!(index.files.len(), 14, "landmarks are hidden");
        let big = find(index, "bin/big");
        assert_eq!((big.mode, big.uid, big.gid), (0o4755, 10, 20));
        assert_eq!(
            big.mtime,
            Timestamp {
                secs: 1_700_000_000,
                nanos: 0
            }
        );
        let mut xattrs = big.xattrs.clone();
        xattrs.sort();
        assert_eq!(
            xattrs,
            [
                (
                    b"security.capability".to_vec(),
                    b"\x01\0\0\x02\0\x20\0\0".to_vec()
                ),
                (b"user.note".to_vec(), b"hello".to_vec()),
            ]
        );
        assert_eq!(find(index, "bin").kind, FileKind::Directory);
        assert_eq!(
            find(index, "bin/sh").kind,
            FileKind::Symlink {
                target: b"../bin/big".to_vec()
            }
        );
        assert_eq!(
            find(index, "bin/hard").kind,
            FileKind::Hardlink {
                target: b"bin/big".to_vec()
            }
        );
        assert_eq!(
            find(index, "dev/null").kind,
            FileKind::CharDevice { major: 1, minor: 3 }
        );
        assert_eq!(
            find(index, "dev/sda").kind,
            FileKind::BlockDevice { major: 8, minor: 0 }
        );
        assert_eq!(find(index, "dev/pipe").kind, FileKind::Fifo);
    }
    assert_eq!(
        open(PLAIN, PLAIN_TOC).unwrap().prefetch,
        ByteRange::new(0, 223)
    );
    assert_eq!(open(PACKED, PACKED_TOC).unwrap().prefetch, None);
    let packed = open(PACKED, PACKED_TOC).unwrap().index;
    assert!(
        packed
            .chunks
            .iter()
            .any(|c| matches!(c.encoding, Encoding::GzipMember { skip, .. } if skip > 0))
    );
}

#[test]
fn a_toc_with_another_digest_is_corrupt() {
    let error = open(PLAIN, PACKED_TOC).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }));
    assert!(
        error.to_string().contains("TOC of layer sha256:"),
        "{error}"
    );
}

#[test]
fn damaged_toc_bytes_are_errors() {
    let footer = read_footer(PLAIN, PLAIN.len() as u64).unwrap().unwrap();
    let start = usize::try_from(footer.toc_offset()).unwrap();
    let digest = Digest::parse(PLAIN_TOC).unwrap();
    let blob = blob_ref(PLAIN);
    let toc = &PLAIN[start..];
    for cut in [0, 1, 20, 200, toc.len() - 52] {
        let error = parse_toc(&blob, &footer, &toc[..cut], &digest)
            .unwrap_err()
            .to_string();
        assert!(error.contains("bytes are there"), "{error}");
    }
    let good = parse_toc(&blob, &footer, toc, &digest).unwrap();
    let mut refused = 0;
    for at in (0..toc.len() - 51).step_by(7) {
        let mut bad = toc.to_vec();
        bad[at] ^= 0x10;
        // Where damage hits what says nothing (a time stamp, padding), nothing changes.
        match parse_toc(&blob, &footer, &bad, &digest) {
            Err(_) => refused += 1,
            Ok(layer) => assert_eq!(layer, good, "{at}"),
        }
    }
    assert!(refused > 100, "{refused}");
}
