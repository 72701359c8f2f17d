//! What is held in memory while members are fetched and decoded.

use super::support::{TestSource, bench, bench_within, join, patient, range, sample, unmerged};
use crate::Error;
use crate::index::{Chunk, Encoding};
use crate::layer::{EngineConfig, LayerConfig, fetch};
use crate::store::Store;
use crate::types::Digest;

/// Inflating from the member's start for every part of it would take minutes here.
#[tokio::test]
async fn a_member_of_very_many_chunks_is_decoded_once() {
    let mut sample = sample(&[&[8_000_000, 8_000_000, 8_000_000]]);
    let Encoding::GzipMember { blob, .. } = sample.index.chunks[0].encoding else {
        unreachable!()
    };
    let mut chunks = Vec::new();
    for whole in sample.index.chunks.clone() {
        let Encoding::GzipMember { skip, .. } = whole.encoding else {
            unreachable!()
        };
        for n in 0..2000_u32 {
            let data_offset = whole.data_offset + u64::from(n) * 4000;
            let at = usize::try_from(data_offset).unwrap();
            let digest = Digest::sha256(&sample.data[at..at + 4000]);
            chunks.push(Chunk {
                encoding: Encoding::GzipMember {
                    blob,
                    skip: skip + u64::from(n) * 4000,
                },
                data_offset,
                len: 4000,
                chunk_digest: digest.as_bytes().try_into().ok(),
            });
        }
    }
    sample.index.chunks = chunks;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    // The last one first, which brings all others.
    let last = layer.index().data_len - 1;
    layer.fill(range(last, 1)).await.unwrap();
    layer.fill(range(0, last)).await.unwrap();
    let counters = layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 6000));
    let mut all = vec![0; sample.data.len()];
    assert!(layer.try_read(0, &mut all).unwrap());
    assert!(all == sample.data);
}

#[tokio::test]
async fn a_member_over_the_budget_is_refused_and_takes_no_other_with_it() {
    let bounds = EngineConfig {
        memory_bytes_max: 400 << 10,
        ..patient()
    };
    let bench = bench_within(
        &[&[5000], &[300_000], &[5000]],
        LayerConfig::default(),
        bounds,
    );
    let error = bench.layer.fill(range(8192, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    assert!(error.to_string().contains("pull it again"), "{error}");
    let last = bench.sample.index.data_len - 1;
    bench.layer.fill(range(last, 1)).await.unwrap();
    bench.layer.fill(range(0, 1)).await.unwrap();
    assert!(bench.layer.fill_all().await.is_err());
    // Others of its requests may be under way still.
    bench.layer.close().await.unwrap();
    assert!(bench.layer.shared.inflight.is_empty());
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn pieces_of_a_body_count_as_long_as_they_are() {
    let bench = bench(&[&[3_000_000]], unmerged());
    *bench.source.piece_bytes.lock() = 1 << 20;
    *bench.source.free_bytes.lock() = 1;
    bench.source.gate.send_replace(false);
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut fill).is_pending());
    bench.source.arrived.notified().await;
    while bench.layer.counters().bytes_fetched == 0 {
        tokio::task::yield_now().await;
    }
    let shared = &bench.layer.shared;
    let counted = fetch::memory_of(shared, &[0]);
    let chunk = &bench.layer.index().chunks[0];
    assert_eq!(
        counted,
        fetch::memory_of_one(chunk),
        "which opening goes by"
    );
    assert_eq!(
        shared.engine.memory_bytes(),
        counted + (1 << 20) - (64 << 10)
    );
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn permits_bound_what_is_held_in_memory() {
    let bounds = EngineConfig {
        memory_bytes_max: 512 << 10,
        on_demand_max: 16,
        ..patient()
    };
    let members: Vec<&[u32]> = vec![&[60_000]; 40];
    let bench = bench_within(&members, unmerged(), bounds);
    bench.source.gate.send_replace(false);
    let fill = bench.layer.fill(range(0, bench.sample.index.data_len));
    let mut fill = Box::pin(fill);
    assert!(futures_util::poll!(&mut fill).is_pending());
    bench.source.arrived.notified().await;
    // Each request needs 60,000 bytes decoded, twice, the member, a piece and the decoder.
    let under_way = bench.layer.counters().requests;
    assert_eq!(under_way, 1, "two of them need more than 512 KiB");
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    assert!(bench.read(range(0, bench.sample.index.data_len)));
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}
