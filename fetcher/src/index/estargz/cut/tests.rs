//! What is cut, what is not, and that nothing else changes.

use super::*;
use crate::index::{LayerFormat, wire};
use crate::test_util::layers::regular_file;
use crate::types::Digest;

const MIB: u32 = 1 << 20;

/// Start and length in the blob of a chunk, skip, length.
type Place = (u64, u64, u64, u32);

/// A layer of one file for each chunk.
fn layer(chunks: &[Place]) -> LayerIndex {
    let (mut files, mut table, mut at) = (Vec::new(), Vec::new(), 0_u64);
    for (number, (start, blob_len, skip, len)) in chunks.iter().copied().enumerate() {
        at = at.next_multiple_of(4096);
        files.push(regular_file(&format!("file{number}"), len.into(), at));
        table.push(Chunk {
            encoding: Encoding::GzipMember {
                blob: ByteRange::at(start, blob_len).unwrap(),
                skip,
            },
            data_offset: at,
            len,
            chunk_digest: Some([u8::try_from(number).unwrap(); 32]),
        });
        at += u64::from(len);
    }
    let blob = LayerBlob {
        digest: Digest::sha256(b"a layer"),
        size: 1 << 40,
        format: LayerFormat::Estargz,
    };
    LayerIndex::new(blob, files, table).unwrap()
}

fn pieces_of(index: &LayerIndex) -> Vec<usize> {
    let is_piece = |chunk: &Chunk| matches!(chunk.encoding, Encoding::WholeMember { .. });
    let has_pieces = index.chunks.iter().any(is_piece);
    assert_eq!(has_pieces, index.has_whole_members());
    let spans = index.spans.iter();
    spans.map(|span| span.chunk_count as usize).collect()
}

#[test]
fn long_chunks_alone_in_their_member_are_cut() {
    let two = 2 * PIECE_LEN;
    let table: [(&str, &[Place], &[usize]); 9] = [
        ("short", &[(0, 100, 0, two)], &[]),
        ("the first that is not short", &[(0, 100, 0, two + 1)], &[3]),
        ("usual", &[(0, 900, 0, 4 * MIB), (900, 1, 0, 5)], &[64]),
        ("the longest", &[(0, 900, 0, CUT_LEN_MAX)], &[128]),
        ("too long", &[(0, 900, 0, CUT_LEN_MAX + 1)], &[]),
        ("inside a member", &[(0, 900, 512, 4 * MIB)], &[]),
        (
            "with another",
            &[(0, 900, 0, 4 * MIB), (0, 900, u64::from(4 * MIB), 5)],
            &[],
        ),
        ("two", &[(0, 900, 0, MIB), (900, 900, 0, MIB)], &[16, 16]),
        (
            "out of order",
            &[(900, 900, 0, MIB), (0, 900, 0, MIB)],
            &[16],
        ),
    ];
    for (name, chunks, expected) in table {
        let whole = layer(chunks);
        let (index, details) = cut(whole.clone()).unwrap();
        assert_eq!(pieces_of(&index), expected, "{name}");
        assert_eq!(details.len(), expected.len() * 32, "{name}");
        assert_eq!(
            (index.data_len, &index.files),
            (whole.data_len, &whole.files)
        );
        let bytes = wire::encode(&index, &details).unwrap();
        assert_eq!(wire::decode(&bytes).unwrap(), index, "{name}");
        for chunk in &whole.chunks {
            let end = chunk.data_offset + u64::from(chunk.len);
            let inside = |c: &&Chunk| (chunk.data_offset..end).contains(&c.data_offset);
            let pieces: Vec<&Chunk> = index.chunks.iter().filter(inside).collect();
            let len: u32 = pieces.iter().map(|piece| piece.len).sum();
            assert_eq!(len, chunk.len, "{name}");
            assert!(
                pieces
                    .iter()
                    .all(|p| p.encoding.blob() == chunk.encoding.blob())
            );
            assert!(pieces.len() > 1 || pieces == [chunk], "{name}");
        }
    }
}

#[test]
fn pieces_know_what_they_are_verified_with() {
    let (index, details) = cut(layer(&[(0, 9, 0, 5), (9, 900, 0, MIB), (909, 9, 0, 6)])).unwrap();
    assert_eq!(details, [1; 32]);
    for id in 0..18 {
        let (ids, held) = match id {
            0 => (0..1, 5),
            17 => (17..18, 6),
            _ => (1..17, u64::from(MIB)),
        };
        assert_eq!((index.verified_with(id), index.held_for(id)), (ids, held));
    }
    assert_eq!(index.held_for(18), 0);
    assert_eq!(index.digests_of(&index.spans[0]), 1);
}

#[test]
fn pieces_that_make_no_member_are_refused() {
    let (index, _) = cut(layer(&[(0, 900, 0, MIB), (900, 9, 0, 6)])).unwrap();
    let check = |number: usize, change: fn(&mut ByteRange, &mut u64, &mut u32)| {
        let mut chunks = index.chunks.clone();
        if let Encoding::WholeMember { blob, skip, span } = &mut chunks[number].encoding {
            change(blob, skip, span);
        }
        let blob = LayerBlob {
            digest: index.blob_digest,
            size: index.blob_size,
            format: index.format,
        };
        LayerIndex::with_spans(blob, index.files.clone(), chunks, index.spans.clone())
    };
    assert_eq!(check(5, |_, _, _| ()).unwrap(), index);
    assert!(
        check(0, |_, skip, _| *skip = 1).is_err(),
        "not at its start"
    );
    assert!(check(5, |_, skip, _| *skip += 1).is_err(), "a gap");
    assert!(check(5, |_, skip, _| *skip -= 1).is_err(), "twice");
    assert!(check(5, |_, _, span| *span = 1).is_err(), "no such member");
    let longer = |blob: &mut ByteRange, _: &mut u64, _: &mut u32| {
        *blob = ByteRange::at(blob.start(), blob.len() + 1).unwrap();
    };
    assert!(check(5, longer).is_err(), "another end");
}

#[test]
fn who_wants_a_piece_brings_its_member() {
    let (index, _) = cut(layer(&[(0, 9, 0, 5), (9, 90, 0, MIB), (99, 90, 0, MIB)])).unwrap();
    /// What is wanted, and members that come.
    type Row = (&'static [u32], &'static [(u32, u32)]);
    let table: [Row; 5] = [
        (&[], &[]),
        (&[0, 99], &[]),
        (&[0, 3], &[(1, 17)]),
        (&[3, 4, 16], &[(1, 17)]),
        (&[0, 16, 17], &[(1, 17), (17, 33)]),
    ];
    for (wanted, expected) in table {
        let expected: Vec<u32> = expected.iter().flat_map(|(from, to)| *from..*to).collect();
        assert_eq!(
            crate::plan::whole_members(&index, wanted),
            expected,
            "{wanted:?}"
        );
    }
}
