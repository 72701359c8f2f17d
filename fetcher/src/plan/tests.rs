//! What a plan promises, by table and by property.

use proptest::prelude::*;

use super::*;
use crate::index::Encoding;
use crate::index::LayerFormat;
use crate::types::Digest;

/// A layer of members given as (gap before, encoded length, chunks inside).
fn layer(shape: &[(u64, u64, u32)]) -> LayerIndex {
    let mut chunks = Vec::new();
    let (mut blob_at, mut data_at) = (0, 0);
    for (gap, len, inside) in shape {
        let blob = ByteRange::at(blob_at + gap, *len).unwrap();
        blob_at = blob.end();
        for n in 0..*inside {
            chunks.push(Chunk {
                encoding: Encoding::GzipMember {
                    blob,
                    skip: u64::from(n) * 10,
                },
                data_offset: data_at,
                len: 10,
                chunk_digest: Some([0; 32]),
            });
            data_at += 10;
        }
    }
    LayerIndex {
        blob_digest: Digest::sha256(b"layer"),
        blob_size: blob_at,
        format: LayerFormat::Estargz,
        files: Vec::new(),
        chunks,
        spans: Vec::new(),
        data_len: data_at,
    }
}

fn limits(gap: u64, request: u64, total: u64) -> PlanLimits {
    PlanLimits {
        gap_bytes_max: gap,
        wanted_per_gap: 0,
        parts_max: 1,
        request_bytes_max: request,
        total_bytes_max: total,
    }
}

fn ranges(plan: &Plan) -> Vec<(u64, u64)> {
    let parts = plan.requests.iter().flat_map(|request| &request.parts);
    parts.map(|part| (part.start(), part.end())).collect()
}

#[test]
fn merges_by_gap_and_length() {
    let index = layer(&[(0, 100, 1), (0, 100, 1), (50, 100, 1), (0, 1000, 1)]);
    let all = [0, 1, 2, 3];
    let table: [(PlanLimits, &[(u64, u64)]); 4] = [
        (limits(50, 5000, 9000), &[(0, 1350)]),
        (limits(49, 5000, 9000), &[(0, 200), (250, 1350)]),
        (
            limits(0, 100, 9000),
            &[(0, 100), (100, 200), (250, 350), (350, 1350)],
        ),
        (limits(50, 349, 9000), &[(0, 200), (250, 350), (350, 1350)]),
    ];
    for (limits, expected) in table {
        let plan = plan(&index, &all, limits).unwrap();
        assert_eq!(ranges(&plan), expected, "{limits:?}");
        assert!(plan.rest.is_empty());
    }
}

#[test]
fn gaps_are_a_small_part_where_they_must_be() {
    let index = layer(&[(0, 100, 1), (20, 60, 1), (5, 40, 1), (1, 400, 1)]);
    let all = [0, 1, 2, 3];
    let table: [(u64, &[(u64, u64)]); 5] = [
        (0, &[(0, 626)]),
        (8, &[(0, 626)]),
        (9, &[(0, 100), (120, 626)]),
        (21, &[(0, 100), (120, 180), (185, 626)]),
        (441, &[(0, 100), (120, 180), (185, 225), (226, 626)]),
    ];
    for (wanted_per_gap, expected) in table {
        let limits = PlanLimits {
            wanted_per_gap,
            ..limits(64, 5000, 9000)
        };
        assert_eq!(ranges(&plan(&index, &all, limits).unwrap()), expected);
    }
}

/// The link makes requests tighter, and never looser than the base.
#[test]
fn limits_follow_the_link() {
    use crate::layer::Priority::{Background, OnDemand, Profile};
    use crate::link::Link;
    use std::time::Duration;
    let link = |micros, bytes_per_second| Link {
        round_trip: Duration::from_micros(micros),
        bytes_per_second,
    };
    let (near, usual, far) = (
        link(100, 125_000_000),
        Link::GUESS,
        link(40_000, 12_500_000),
    );
    let fast = link(20_000, 1_250_000_000);
    // Gap, request, wanted bytes per gap.
    let table = [
        (near, OnDemand, (8 << 10, 1 << 20, 0)),
        (near, Profile, (8 << 10, 1 << 20, 8)),
        (usual, OnDemand, (64 << 10, 1_250_000, 0)),
        (usual, Background, (64 << 10, 1_250_000, 8)),
        (far, Profile, (64 << 10, 1 << 20, 8)),
        (fast, OnDemand, (64 << 10, 8 << 20, 0)),
        (link(0, 1), Profile, (8 << 10, 1 << 20, 8)),
        (link(u64::MAX, u64::MAX), OnDemand, (64 << 10, 8 << 20, 0)),
    ];
    for (link, priority, (gap, request, wanted_per_gap)) in table {
        let expected = PlanLimits {
            gap_bytes_max: gap,
            wanted_per_gap,
            request_bytes_max: request,
            ..PlanLimits::default()
        };
        let limits = PlanLimits::default().on(link, 1, priority);
        assert_eq!(limits, expected, "{link:?} {priority:?}");
    }
    let tight = limits(0, 1, 1);
    assert_eq!(tight.on(fast, 1, OnDemand), tight);
    // Parts are cheaper than gaps, but not for readers.
    for (priority, parts, gap) in [(OnDemand, 1, 64 << 10), (Profile, 48, 8 << 10)] {
        let limits = PlanLimits::default().on(usual, 48, priority);
        assert_eq!((limits.parts_max, limits.gap_bytes_max), (parts, gap));
    }
}

#[test]
fn what_is_apart_comes_in_parts() {
    // At 0, 120, 185 and 1200.
    let index = layer(&[(0, 100, 1), (20, 60, 1), (5, 15, 1), (1000, 200, 1)]);
    type Requests = &'static [&'static [(u64, u64)]];
    let table: [(usize, u64, u64, Requests); 6] = [
        (1, 8, 5000, &[&[(0, 100)], &[(120, 200)], &[(1200, 1400)]]),
        (2, 8, 5000, &[&[(0, 100), (120, 200)], &[(1200, 1400)]]),
        (3, 8, 5000, &[&[(0, 100), (120, 200), (1200, 1400)]]),
        (9, 50, 5000, &[&[(0, 200), (1200, 1400)]]),
        (9, 50, 399, &[&[(0, 200)], &[(1200, 1400)]]),
        (
            9,
            4,
            175,
            &[&[(0, 100), (120, 180), (185, 200)], &[(1200, 1400)]],
        ),
    ];
    for (parts_max, gap, request, expected) in table {
        let limits = PlanLimits {
            parts_max,
            ..limits(gap, request, 9000)
        };
        let plan = plan(&index, &[0, 1, 2, 3], limits).unwrap();
        let parts = plan.requests.iter().map(|request| {
            let parts = request.parts.iter();
            parts.map(|part| (part.start(), part.end())).collect()
        });
        let parts: Vec<Vec<(u64, u64)>> = parts.collect();
        assert_eq!(parts, expected, "{parts_max} {gap} {request}");
    }
}

#[test]
fn chunks_of_one_member_share_its_bytes() {
    let index = layer(&[(0, 100, 3), (0, 100, 1)]);
    let plan = plan(&index, &[3, 2, 0], limits(0, 1000, 1000)).unwrap();
    assert_eq!(ranges(&plan), [(0, 200)]);
    assert_eq!(plan.requests[0].members[0].chunks, [0, 2]);
    assert_eq!(plan.requests[0].chunks().collect::<Vec<_>>(), [0, 2, 3]);
}

#[test]
fn what_exceeds_the_total_is_left() {
    let index = layer(&[(0, 100, 1), (0, 100, 1), (0, 10, 1)]);
    let first = plan(&index, &[0, 1, 2], limits(0, 1000, 150)).unwrap();
    assert_eq!((ranges(&first), first.rest), (vec![(0, 100)], vec![1, 2]));
    let alone = plan(&index, &[1], limits(0, 1000, 50)).unwrap();
    assert_eq!(ranges(&alone), [(100, 200)]);
}

#[test]
fn a_stream_chunk_says_what_to_do() {
    let mut index = layer(&[(0, 100, 1)]);
    index.chunks[0].encoding = Encoding::Stream;
    let error = plan(&index, &[0], PlanLimits::default()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(error.to_string().contains("--full"), "{error}");
    let absent = plan(&index, &[7], PlanLimits::default()).unwrap_err();
    assert!(absent.to_string().contains("chunk 7"), "{absent}");
}

#[test]
fn a_member_that_decodes_to_too_much_is_refused() {
    let mut index = layer(&[(0, 100, 1), (0, 100, 1)]);
    let blob = ByteRange::at(0, 100).unwrap();
    for (skip, fits) in [(MEMBER_SPAN_MAX - 10, true), (MEMBER_SPAN_MAX - 9, false)] {
        index.chunks[0].encoding = Encoding::GzipMember { blob, skip };
        let planned = plan(&index, &[0, 1], PlanLimits::default());
        match planned {
            Ok(_) => assert!(fits),
            Err(error) => assert!(!fits && matches!(error, Error::Limit { .. }), "{error}"),
        }
    }
}

#[test]
fn bytes_that_members_have_in_common_are_asked_for_once() {
    let limits = PlanLimits::default();
    // The second member's start and length, what a request may have, and what is asked for.
    type Row<'a> = (u64, u64, u64, &'a [(u64, u64)]);
    let long = 1_000_000;
    let table: [Row<'_>; 6] = [
        (long - 50, 100, 8 << 20, &[(0, long + 50)]),
        (long - 50, 100, long + 50, &[(0, long + 50)]),
        (
            long - 50,
            100,
            long + 49,
            &[(0, long), (long - 50, long + 50)],
        ),
        // All of it: nothing new.
        (long - 50, 50, 8 << 20, &[(0, long)]),
        (long - 50, 40, 8 << 20, &[(0, long), (long - 50, long - 10)]),
        // More than is held for it.
        (
            long - 200_000,
            300_000,
            8 << 20,
            &[(0, long), (long - 200_000, long + 100_000)],
        ),
    ];
    for (start, len, request_bytes_max, expected) in table {
        let mut index = layer(&[(0, long, 1), (0, 100, 1)]);
        let blob = ByteRange::at(start, len).unwrap();
        index.chunks[1].encoding = Encoding::GzipMember { blob, skip: 0 };
        let limits = PlanLimits {
            request_bytes_max,
            ..limits
        };
        let plan = plan(&index, &[0, 1], limits).unwrap();
        assert_eq!(ranges(&plan), expected, "{start}");
        for request in &plan.requests {
            for member in &request.members {
                assert_eq!(request.place(member.blob).unwrap().len(), member.blob.len());
            }
        }
    }
}

/// A quadratic search would take hours here.
#[test]
fn siblings_of_very_many_chunks_are_found_in_one_pass() {
    let index = layer(&[(0, 10, 1), (0, 100, 400_000), (0, 10, 2), (0, 10, 1)]);
    let all: Vec<ChunkId> = (0..400_004).collect();
    let every_third: Vec<ChunkId> = (1..400_000).step_by(3).collect();
    let table: [(&[ChunkId], &[ChunkId]); 6] = [
        (&all, &all),
        (&every_third, &all[1..=400_000]),
        (&[200_000], &all[1..=400_000]),
        (&[0, 400_002], &[0, 400_001, 400_002]),
        (&[400_001, 400_002, 400_003, 9_000_000], &all[400_001..]),
        (&[], &[]),
    ];
    for (n, (wanted, expected)) in table.into_iter().enumerate() {
        assert!(siblings(&index, wanted) == expected, "row {n}");
    }
}

#[test]
fn ahead_stays_near_small_and_missing() {
    // Members at 0..100, 100..140, 150..190, 190..1190, 1190..1200.
    let index = layer(&[
        (0, 100, 1),
        (0, 40, 2),
        (10, 40, 1),
        (0, 1000, 1),
        (0, 10, 1),
    ]);
    // Present ids, bytes, gap; the ids that come along with chunk 0.
    let table: [(&[ChunkId], u64, u64, &[ChunkId]); 10] = [
        (&[], 0, 64, &[]),
        (&[], 39, 64, &[]),
        (&[], 40, 64, &[1, 2]),
        (&[], 90, 64, &[1, 2, 3]),
        (&[], 90, 9, &[1, 2]),
        (&[2], 90, 64, &[1, 3]),
        (&[1, 2], 90, 49, &[]),
        (&[1, 2], 9000, 64, &[]),
        (&[3], 9000, 64, &[1, 2]),
        (&[], 9000, 64, &[1, 2, 3, 4, 5]),
    ];
    for (present, bytes_max, gap, expected) in table {
        let limits = limits(gap, 5000, 5000);
        let found = ahead(&index, 0, bytes_max, limits, |id| !present.contains(&id));
        assert_eq!(found, expected, "{present:?} {bytes_max} {gap}");
    }
    let found = ahead(&index, 0, 9000, self::limits(64, 190, 190), |_| true);
    assert_eq!(found, [1, 2, 3], "one request with the wanted chunk");
    assert!(ahead(&index, 5, 9000, PlanLimits::default(), |_| true).is_empty());
    assert!(ahead(&index, 99, 9000, PlanLimits::default(), |_| true).is_empty());
}

/// A chunk that begins in one span of gzip and ends in the next is no end of it.
#[test]
fn ahead_passes_from_span_to_span() {
    let span = 300_000;
    // Where the second span begins, bytes of it that the last chunk of the first needs.
    let table: [(u64, &[ChunkId]); 4] = [
        (0, &[1, 2]),
        (1, &[1, 2]),
        (OVERLAP_BYTES_MAX, &[1, 2]),
        (OVERLAP_BYTES_MAX + 1, &[1]),
    ];
    for (shared, expected) in table {
        let mut index = layer(&[(0, 1000, 1), (0, 1, 1), (0, 1, 1)]);
        let places = [(0, 1000), (0, span + shared), (span, 150_000)];
        for (chunk, (start, len)) in index.chunks.iter_mut().zip(places) {
            let blob = ByteRange::at(start, len).unwrap();
            chunk.encoding = Encoding::GzipMember { blob, skip: start };
        }
        let found = ahead(&index, 0, 1 << 20, PlanLimits::default(), |_| true);
        assert_eq!(found, expected, "{shared}");
        let wanted: Vec<ChunkId> = [0].into_iter().chain(found).collect();
        let plan = plan(&index, &wanted, PlanLimits::default()).unwrap();
        assert_eq!(plan.requests.len(), 1, "{shared}");
    }
}

proptest! {
    #[test]
    fn covers_everything_once_in_order_within_limits(
        shape in prop::collection::vec((0_u64..300, 1_u64..400, 1_u32..4), 1..40),
        picks in prop::collection::vec(any::<bool>(), 120),
        (gap, request, total) in (0_u64..200, 1_u64..1500, 1_u64..4000),
        (wanted_per_gap, parts_max) in (0_u64..20, 1_usize..6),
    ) {
        let index = layer(&shape);
        let wanted: Vec<ChunkId> = (0..u32::try_from(index.chunks.len()).unwrap())
            .filter(|id| picks[*id as usize])
            .collect();
        let limits = PlanLimits { wanted_per_gap, parts_max, ..limits(gap, request, total) };
        let plan = plan(&index, &wanted, limits).unwrap();
        let mut got: Vec<ChunkId> = plan.requests.iter().flat_map(Request::chunks).collect();
        got.extend(&plan.rest);
        got.sort_unstable();
        prop_assert_eq!(&got, &wanted);
        prop_assert!(plan.requests.is_empty() == wanted.is_empty());
        let all: Vec<ByteRange> = plan.requests.iter().flat_map(|one| one.parts.clone()).collect();
        for pair in all.windows(2) {
            prop_assert!(pair[0].end() <= pair[1].start());
        }
        let sum: u64 = plan.requests.iter().map(Request::len).sum();
        prop_assert!(sum <= total || plan.requests.len() == 1 && plan.requests[0].members.len() == 1);
        for one in &plan.requests {
            prop_assert!(one.len() <= request || one.members.len() == 1);
            prop_assert!((1..=parts_max).contains(&one.parts.len()));
            let (mut at, mut part) = (one.parts[0].start(), 0);
            let mut placed = 0;
            for member in &one.members {
                if !one.parts[part].contains(&member.blob) {
                    prop_assert_eq!(at, one.parts[part].end());
                    part += 1;
                    at = one.parts[part].start();
                    prop_assert_eq!(at, member.blob.start());
                }
                prop_assert!(one.parts[part].contains(&member.blob));
                prop_assert!(member.blob.start() - at <= gap);
                placed += member.blob.start() - at;
                let place = one.place(member.blob).unwrap();
                prop_assert_eq!((place.start(), place.len()), (placed, member.blob.len()));
                placed += member.blob.len();
                at = member.blob.end();
                for id in &member.chunks {
                    let blob = index.chunks[*id as usize].encoding.blob();
                    prop_assert_eq!(blob, Some(member.blob));
                }
                let rest = one.rest(member.blob.start()).unwrap();
                prop_assert_eq!(rest.members.first(), Some(member));
                prop_assert_eq!(rest.parts[0].start(), member.blob.start());
                prop_assert_eq!(rest.len(), one.len() - place.start());
            }
            prop_assert_eq!(at, one.parts[part].end());
            prop_assert_eq!(part + 1, one.parts.len());
            prop_assert_eq!(placed, one.len());
            prop_assert_eq!(one.rest(at), None);
            let wanted: u64 = one.members.iter().map(|member| member.blob.len()).sum();
            prop_assert!((one.len() - wanted) * wanted_per_gap <= wanted);
        }
    }
}
