//! Which splits are worth it, what is made of them, and what is refused.

use super::*;
use crate::index::estargz;
use crate::index::{LayerFormat, wire};
use crate::test_util::layers::regular_file;
use crate::types::Digest;

const PIECE: u64 = 64 << 10;
/// Encoded bytes of a piece.
const ENCODED: u64 = 30 << 10;
const HEADER: u64 = 10;

/// Two files of 512 KiB, a member each, and what would be learned of them.
fn layer() -> (LayerIndex, OldDetails, Vec<LearnedMember>) {
    let (len, blob_len) = (8 * PIECE, 8 * ENCODED + HEADER);
    let chunk = |number: u64| Chunk {
        encoding: Encoding::GzipMember {
            blob: ByteRange::at(number * blob_len, blob_len).unwrap(),
            skip: 0,
        },
        data_offset: number * len,
        len: u32::try_from(len).unwrap(),
        chunk_digest: Some([9; 32]),
    };
    let blob = LayerBlob {
        digest: Digest::sha256(b"a layer"),
        size: 10 * blob_len,
        format: LayerFormat::Estargz,
    };
    let files = vec![regular_file("a", len, 0), regular_file("b", len, len)];
    let index = LayerIndex::new(blob, files, vec![chunk(0), chunk(1)]).unwrap();
    let (index, details) = estargz::cut(index).unwrap();
    let old = OldDetails::new(&index, &details.into()).unwrap();
    let members = [0, 8].map(|first| LearnedMember::new(&index, first, learned(&index, first)));
    let members = members.into_iter().map(Option::unwrap).collect();
    (index, old, members)
}

fn learned(index: &LayerIndex, first: ChunkId) -> Vec<LearnedPiece> {
    let blob = index.chunks[first as usize].encoding.blob().unwrap();
    let piece = |n: u64| LearnedPiece {
        entry: Seam {
            start: blob.start() + HEADER + n * ENCODED,
            bits: u8::try_from(n).unwrap(),
            decoded: (n * PIECE).saturating_sub(1000),
        },
        end: blob.start() + HEADER + (n + 1) * ENCODED,
        digest: [u8::try_from(n + 1).unwrap(); 32],
    };
    (0..8).map(piece).collect()
}

#[test]
fn a_split_saves_what_is_before_it() {
    let (_, _, members) = layer();
    /// What starts read, where there would be splits, and pieces that each saves.
    type Row = (&'static [ChunkId], &'static [(ChunkId, u64)]);
    let table: [Row; 7] = [
        (&[], &[]),
        (&[0], &[]),
        (&[0, 1, 2], &[]),
        (&[1], &[(1, 1)]),
        (&[0, 1, 4, 5, 7], &[(4, 2), (7, 1)]),
        (&[8, 15, 99], &[]),
        (&[3, 4, 15], &[(3, 3)]),
    ];
    for (hot, expected) in table {
        let splits = members[0].splits(hot);
        let found: Vec<_> = splits.iter().map(|s| (s.id, s.saved / ENCODED)).collect();
        assert_eq!(found, expected, "{hot:?}");
    }
    let found = members[1].splits(&[0, 8, 15]);
    assert_eq!(found.iter().map(|s| s.id).collect::<Vec<_>>(), [15]);
}

#[test]
fn spans_begin_at_members_and_where_there_are_windows() {
    let (index, old, members) = layer();
    let windows = BTreeMap::from([(3, vec![1, 2, 3]), (12, vec![4])]);
    for (members, starts) in [
        (&members[..], vec![0, 3, 8, 12]),
        (&members[1..], vec![0, 8, 12]),
        (&members[..1], vec![0, 3, 8]),
        (&[], vec![0, 8]),
    ] {
        let (made, details) = build(&index, &old, members, &windows).unwrap();
        let begin: Vec<_> = made.spans.iter().map(|span| span.first_chunk).collect();
        assert_eq!(begin, starts);
        let bytes = wire::encode(&made, &details).unwrap();
        assert_eq!(wire::decode(&bytes).unwrap(), made);
        let old = OldDetails::new(&made, &details.into()).unwrap();
        for (id, (new, old_chunk)) in (0..).zip(made.chunks.iter().zip(&index.chunks)) {
            assert_eq!(
                (new.len, new.data_offset),
                (old_chunk.len, old_chunk.data_offset)
            );
            let is_learned = members.iter().any(|member| member.ids().contains(&id));
            match new.encoding {
                Encoding::WholeMember { span, .. } => {
                    assert!(!is_learned && old.digest(span, 0) == Some([9; 32]));
                }
                Encoding::GzipSpan { span, skip, blob } => {
                    let of = &made.spans[span as usize];
                    let number = id - of.first_chunk;
                    let byte = u8::try_from(id % 8 + 1).unwrap();
                    assert!(is_learned && old.digest(span, number) == Some([byte; 32]));
                    let first = u64::from(of.first_chunk % 8) * PIECE;
                    let entry = first.saturating_sub(1000);
                    assert_eq!(skip, u64::from(id % 8) * PIECE - entry);
                    assert_eq!(blob.start(), of.start);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(fetched_of(&index, &old, &members, &windows) < 4 * ENCODED);
}

/// Encoded bytes for two pieces that have spans of their own.
fn fetched_of(
    index: &LayerIndex,
    old: &OldDetails,
    members: &[LearnedMember],
    windows: &BTreeMap<ChunkId, Vec<u8>>,
) -> u64 {
    let (made, _) = build(index, old, members, windows).unwrap();
    super::super::fetched_bytes(&made, &[3, 12])
}

#[test]
fn what_no_member_can_be_is_refused() {
    let (index, _, _) = layer();
    let right = learned(&index, 8);
    assert!(LearnedMember::new(&index, 8, right.clone()).is_some());
    assert!(
        LearnedMember::new(&index, 0, right.clone()).is_none(),
        "another's"
    );
    assert!(LearnedMember::new(&index, 9, right.clone()).is_none());
    assert!(LearnedMember::new(&index, 8, right[..7].to_vec()).is_none());
    type Spoil = fn(&mut LearnedPiece);
    let wrong: [(&str, Spoil); 7] = [
        ("unknown digest", |piece| piece.digest = [0; 32]),
        ("behind the piece", |piece| piece.entry.decoded += PIECE),
        ("no byte has them", |piece| piece.entry.bits = 8),
        ("backwards", |piece| piece.entry.start -= 2 * ENCODED),
        ("empty", |piece| piece.end = piece.entry.start),
        ("past the member", |piece| piece.end += 9 * ENCODED),
        ("before the member", |piece| piece.entry.start = 0),
    ];
    for (name, spoil) in wrong {
        let mut pieces = right.clone();
        spoil(&mut pieces[5]);
        assert!(LearnedMember::new(&index, 8, pieces).is_none(), "{name}");
    }
}
