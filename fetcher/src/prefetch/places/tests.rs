//! Places against indexes of every shape, by table and by property.

use proptest::prelude::*;

use super::*;
use crate::index::{Chunk, Encoding, LayerFormat, Span};
use crate::types::Digest;

/// An index of files, each a list of chunk lengths.
fn index(files: &[Vec<u32>]) -> LayerIndex {
    let mut chunks = Vec::new();
    let mut at = 0_u64;
    for lens in files {
        at = at.next_multiple_of(PAGE_BYTES);
        for len in lens {
            chunks.push(Chunk {
                encoding: Encoding::Stream,
                data_offset: at,
                len: *len,
                chunk_digest: Some([0; 32]),
            });
            at += u64::from(*len);
        }
    }
    LayerIndex {
        blob_digest: Digest::sha256(b"layer"),
        blob_size: at,
        format: LayerFormat::Tar,
        files: Vec::new(),
        spans: Vec::new(),
        chunks,
        data_len: at,
    }
}

#[test]
fn a_piece_brings_its_member_at_its_own_rank() {
    let mut index = index(&[vec![10], vec![100, 100, 50], vec![7]]);
    let blob = ByteRange::at(0, 200).unwrap();
    for (skip, chunk) in [0, 100, 200].into_iter().zip(&mut index.chunks[1..4]) {
        chunk.encoding = Encoding::WholeMember {
            blob,
            skip,
            span: 0,
        };
    }
    index.spans = vec![Span {
        start: 0,
        bits: 0,
        first_chunk: 1,
        chunk_count: 3,
        details: ByteRange::at(0, 32).unwrap(),
        details_digest: [0; 32],
    }];
    let wanted = |rank, id, len| Wanted { rank, id, len };
    let all = with_whole_members(
        &index,
        vec![wanted(3, 2, 100), wanted(3, 3, 50), wanted(4, 4, 7)],
    );
    let member = [wanted(3, 1, 100), wanted(3, 2, 100), wanted(3, 3, 50)];
    assert_eq!(all, [&member[..], &[wanted(4, 4, 7)]].concat());
    let alone = vec![wanted(1, 0, 10), wanted(2, 4, 7)];
    assert_eq!(with_whole_members(&index, alone.clone()), alone);
}

fn place(block: u32, pages: u16) -> Place {
    Place { block, pages }
}

fn ids(index: &LayerIndex, places: &[Place]) -> (Vec<(u32, ChunkId)>, u64) {
    let plan = chunks_of(index, (0_u32..).zip(places.iter().copied()));
    let wanted = plan.wanted.iter();
    (
        wanted.map(|wanted| (wanted.rank, wanted.id)).collect(),
        plan.unknown,
    )
}

#[test]
fn pages_find_their_chunks() {
    // Two small files, one of three blocks in two chunks, one small one behind it.
    let index = index(&[vec![100], vec![5000], vec![70_000, 126_608], vec![1]]);
    type Found = &'static [(u32, ChunkId)];
    let table: [(&[Place], Found, u64); 8] = [
        (&[place(0, 1)], &[(0, 0)], 0),
        (&[place(0, 0b110)], &[(0, 1)], 0),
        (&[place(0, 0b1_0001)], &[(0, 0), (0, 2)], 0),
        (&[place(1, u16::MAX)], &[(0, 2), (0, 3)], 0),
        (&[place(2, 1), place(0, 1)], &[(0, 3), (1, 0)], 0),
        // The last file is a page of its own; behind it there is nothing.
        (&[place(3, 0xffff), place(4, 1)], &[(0, 3), (0, 4)], 1),
        (&[place(0, 0), place(u32::MAX, u16::MAX)], &[], 2),
        (&[place(0, 1), place(0, 1)], &[(0, 0)], 0),
    ];
    for (places, expected, unknown) in table {
        assert_eq!(
            ids(&index, places),
            (expected.to_vec(), unknown),
            "{places:?}"
        );
    }
    assert_eq!(ids(&self::index(&[]), &[place(0, 1)]), (Vec::new(), 1));
}

#[test]
fn what_is_decoded_together_comes_together() {
    let mut index = index(&[vec![65_536, 65_536], vec![100], vec![200]]);
    // The first file's second chunk and the two small ones are of one span.
    for (chunk, start) in index.chunks.iter_mut().zip([0, 40_000, 40_000, 40_000]) {
        let end = chunk.data_offset / 2 + 50_000;
        chunk.encoding = Encoding::GzipMember {
            blob: ByteRange::new(start, end).unwrap(),
            skip: 0,
        };
    }
    let places = [place(2, 0b10), place(0, 1), place(1, 1)];
    assert_eq!(ids(&index, &places), (vec![(0, 1), (0, 3), (1, 0)], 0));
}

#[test]
fn ranges_are_runs_of_pages() {
    let ranges = |pages| {
        let ranges = place(2, pages).ranges();
        ranges
            .map(|range| {
                (
                    range.start() / PAGE_BYTES - 32,
                    range.end() / PAGE_BYTES - 32,
                )
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(ranges(0), []);
    assert_eq!(ranges(0xffff), [(0, 16)]);
    assert_eq!(ranges(0b1000_0000_0110_0001), [(0, 1), (5, 7), (15, 16)]);
}

proptest! {
    #[test]
    fn exactly_what_overlaps_at_its_earliest_rank(
        files in prop::collection::vec(prop::collection::vec(1_u32..90_000, 1..4), 0..20),
        places in prop::collection::vec((0_u32..30, any::<u16>()), 0..30),
    ) {
        let index = index(&files);
        let mut expected: Vec<(ChunkId, u32)> = Vec::new();
        let mut unknown = 0;
        for (rank, (block, pages)) in (0_u32..).zip(&places) {
            let mut covered = false;
            for page in (0..16).filter(|page| pages & 1 << page != 0) {
                let start = u64::from(*block) * BLOCK_BYTES + page * PAGE_BYTES;
                for (id, chunk) in (0..).zip(&index.chunks) {
                    let end = chunk.data_offset + u64::from(chunk.len);
                    if chunk.data_offset < start + PAGE_BYTES && end > start {
                        covered = true;
                        if expected.iter().all(|(known, _)| *known != id) {
                            expected.push((id, rank));
                        }
                    }
                }
            }
            unknown += u64::from(!covered);
        }
        let plan = chunks_of(&index, (0_u32..).zip(places.iter().map(|(b, p)| place(*b, *p))));
        prop_assert!(plan.wanted.is_sorted_by_key(|wanted| wanted.rank));
        let mut got: Vec<_> = plan.wanted.iter().map(|wanted| (wanted.id, wanted.rank)).collect();
        got.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(got, expected);
        // A place named twice is known the second time, whatever it covers.
        prop_assert!(plan.unknown <= unknown);
    }

    #[test]
    fn hostile_places_end(places in prop::collection::vec((any::<u32>(), any::<u16>()), 0..200)) {
        let index = index(&[vec![1; 5000], vec![70_000; 3]]);
        let plan = chunks_of(&index, (0_u32..).zip(places.iter().map(|(b, p)| place(*b, *p))));
        prop_assert!(plan.wanted.len() <= index.chunks.len());
    }
}
