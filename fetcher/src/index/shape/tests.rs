//! Decisions, on tables small enough to see through. Whole layers are in `tests/layers/shape.rs`.

use super::choose::Window;
use super::*;
use crate::index::{Chunk, LayerFormat};
use crate::test_util::layers::regular_file;
use crate::types::{ByteRange, Digest};

const KIB: u64 = 1 << 10;
/// Decoded bytes of a chunk of these tests; a quarter of that when encoded.
const PIECE: u64 = 64 * KIB;
const SPAN_CHUNKS: u64 = 9;
/// A window of these tests, and what its span takes with it.
const WINDOW: u64 = 3000;

/// A layer of one file of `spans` spans with nothing but payload, and a seam at each chunk.
fn shaper(spans: u64, hot: &[ChunkId]) -> Shaper {
    let count = spans * SPAN_CHUNKS;
    let seam = |at: u64| Seam {
        start: at * PIECE / 4,
        bits: 0,
        decoded: at * PIECE,
    };
    let chunk = |at: u64| {
        let span = at / SPAN_CHUNKS;
        let start = seam(span * SPAN_CHUNKS).start;
        Chunk {
            encoding: Encoding::GzipSpan {
                blob: ByteRange::new(start, seam(at + 1).start).unwrap(),
                skip: (at - span * SPAN_CHUNKS) * PIECE,
                span: u32::try_from(span).unwrap(),
            },
            data_offset: at * PIECE,
            len: u32::try_from(PIECE).unwrap(),
            chunk_digest: None,
        }
    };
    let span = |number: u64| Span {
        start: seam(number * SPAN_CHUNKS).start,
        bits: 0,
        first_chunk: 0,
        chunk_count: 0,
        details: ByteRange::at(
            number * (SPAN_CHUNKS * 32 + WINDOW),
            SPAN_CHUNKS * 32 + WINDOW,
        )
        .unwrap(),
        details_digest: [0; 32],
    };
    let blob = crate::index::LayerBlob {
        digest: Digest::sha256(b"a layer"),
        size: seam(count).start + 1,
        format: LayerFormat::Gzip,
    };
    let file = regular_file("file", count * PIECE, 0);
    let chunks = (0..count).map(chunk).collect();
    let spans_of = (0..spans).map(span).collect();
    let index = LayerIndex::with_spans(blob, vec![file], chunks, spans_of).unwrap();
    Shaper {
        starts: (0..count).map(|at| at * PIECE).collect(),
        spans: (0..spans).map(|at| seam(at * SPAN_CHUNKS)).collect(),
        seams: (0..count).map(seam).collect(),
        index,
        hot: hot.to_vec(),
    }
}

fn places(splits: &[Split]) -> Vec<(u64, u64)> {
    let place = |split: &Split| (split.seam.decoded / PIECE, split.saved / KIB);
    splits.iter().map(place).collect()
}

#[test]
fn spans_are_split_before_each_hot_run_that_is_not_at_their_start() {
    // Hot chunks; where to split, and KiB that it saves.
    type Row<'a> = (&'a [ChunkId], &'a [(u64, u64)], u64);
    let table: [Row<'_>; 6] = [
        (&[], &[], 0),
        (&[0], &[], 16),
        (&[4], &[(4, 64)], 80),
        (&[0, 1, 2], &[], 48),
        (&[1, 2, 5, 8], &[(1, 16), (5, 32), (8, 32)], 144),
        (&[8, 9, 13], &[(8, 128), (13, 48)], 144 + 80),
    ];
    for (hot, expected, kib) in table {
        let shaper = shaper(3, hot);
        assert_eq!(places(&shaper.splits()), expected, "{hot:?}");
        assert_eq!(shaper.fetched(None), kib * KIB, "{hot:?}");
    }
}

/// With the splits of all hot runs, each with a window like the rest.
fn choose(shaper: &Shaper, more: i64) -> Option<(Vec<(u64, bool)>, u64)> {
    let splits: Vec<(Split, u64)> = shaper.splits().iter().map(|s| (*s, WINDOW)).collect();
    let budget = shaper.cost_now().saturating_add_signed(more);
    let (entries, cost) = shaper.choose(&splits, budget)?;
    assert!(cost <= budget);
    let entry = |entry: &Entry| {
        let is_new = matches!(entry.window, Window::OfSplit(_));
        (entry.seam.decoded / PIECE, is_new)
    };
    Some((entries.iter().map(entry).collect(), cost))
}

#[test]
fn windows_of_cold_spans_make_room() {
    // Spans at 0, 9, 18, 27; of the second, chunk 13 is hot.
    let one = shaper(4, &[13]);
    let room = i64::try_from(WINDOW + 40).unwrap();
    let with = |places: &[(u64, bool)]| Some(places.to_vec());
    let chosen = |more| choose(&one, more).map(|(places, _)| places);
    let all = [(0, false), (9, false), (13, true), (18, false), (27, false)];
    assert_eq!(chosen(room), with(&all));
    // What is left of the second span is cold, and goes into the first.
    let merged = [(0, false), (13, true), (18, false), (27, false)];
    assert_eq!(chosen(0), with(&merged));
    // No more than two spans in one.
    let least = [(0, false), (13, true), (27, false)];
    assert_eq!(chosen(-room), with(&least));
    assert_eq!(chosen(-2 * room), None);
    // Nothing is worth a split: nothing changes, whatever room there is.
    assert_eq!(choose(&shaper(4, &[0, 9]), 1 << 20), None);
}

#[test]
fn what_saves_most_is_split_first_and_hot_runs_are_not_torn() {
    // Chunk 17 saves 128 KiB, chunk 28 only 16, and all spans are hot from their start.
    let shaper = shaper(4, &[0, 9, 17, 18, 20, 27, 29]);
    let splits = places(&shaper.splits());
    assert_eq!(splits, [(17, 112), (20, 16), (29, 16)]);
    let (chosen, _) = choose(&shaper, 3040).unwrap();
    let new: Vec<u64> = chosen
        .iter()
        .filter(|(_, new)| *new)
        .map(|(at, _)| *at)
        .collect();
    // One has room, one more for the window of the span at 18: all before it is fetched.
    assert_eq!(new, [17, 20]);
    let old: Vec<u64> = chosen
        .iter()
        .filter(|(_, new)| !*new)
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(old, [0, 9, 27]);
}

#[test]
fn tables_of_other_layers_are_refused() {
    let shaper = shaper(2, &[]);
    let places = |starts: &[u64], seams: &[Seam]| span_places(&shaper.index, starts, seams);
    assert_eq!(places(&shaper.starts, &shaper.seams).unwrap(), shaper.spans);
    let mut moved = shaper.starts.clone();
    moved[5] += 512;
    assert!(places(&moved, &shaper.seams).is_err());
    let mut other = shaper.seams.clone();
    other[9].bits = 4;
    assert!(places(&shaper.starts, &other).is_err());
    assert!(places(&shaper.starts, &other[..9]).is_err());
}
