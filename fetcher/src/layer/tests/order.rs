//! Who goes first: readers, then profiles, then the background.

use std::sync::Arc;
use std::time::Duration;

use super::support::{
    Act, TestSource, bench, bench_within, join, join_with, patient, range, sample, unmerged,
};
use crate::index::{ChunkId, Encoding};
use crate::layer::{EngineConfig, LayerConfig, Priority, fetch};
use crate::plan::PlanLimits;
use crate::store::Store;
use crate::types::ByteRange;

#[tokio::test]
async fn a_reader_does_not_wait_for_a_background_fill() {
    let members: Vec<&[u32]> = vec![&[5000]; 40];
    let bounds = EngineConfig {
        background_max: 1,
        ..patient()
    };
    let bench = bench_within(&members, unmerged(), bounds);
    let index = bench.sample.index.clone();
    let start_of = |id: usize| index.chunks[id].encoding.blob().unwrap().start();
    // The source never answers for what the background asks first.
    bench.source.gate.send_replace(false);
    *bench.source.gated_to.lock() = start_of(1);
    let layer = Arc::clone(&bench.layer);
    let background = tokio::spawn(async move { layer.fill_all().await });
    bench.source.arrived.notified().await;
    for id in [39, 1, 20] {
        let wanted = range(index.chunks[id].data_offset, 5000);
        let filled = tokio::time::timeout(Duration::from_secs(60), bench.layer.fill(wanted));
        filled.await.expect("it must not wait").unwrap();
        assert!(bench.read(wanted));
    }
    let asked: Vec<u64> = bench
        .source
        .asked
        .lock()
        .iter()
        .map(ByteRange::start)
        .collect();
    assert_eq!(
        asked,
        [0, 39, 1, 20].map(start_of),
        "one request of the background"
    );
    // A reader of the very chunk it fetches waits for that one request, no more.
    let mut same = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut same).is_pending());
    bench.source.gate.send_replace(true);
    same.await.unwrap();
    background.await.unwrap().unwrap();
    assert!(bench.layer.file().is_complete());
    assert_eq!(
        bench.layer.counters().requests,
        40,
        "nothing was fetched twice"
    );
    assert!(bench.read(range(0, index.data_len)));
}

#[tokio::test]
async fn a_background_fill_has_several_requests_under_way() {
    let members: Vec<&[u32]> = vec![&[5000]; 12];
    let bench = bench(&members, unmerged());
    bench.source.gate.send_replace(false);
    let mut fill = Box::pin(bench.layer.fill_all());
    while bench.source.asked.lock().len() < 3 {
        assert!(futures_util::poll!(&mut fill).is_pending());
        tokio::task::yield_now().await;
    }
    bench.source.gate.send_replace(true);
    fill.await.unwrap();
    assert!(bench.layer.file().is_complete());
    let mut asked = bench.asked();
    // They begin in order. Of those under way at once any may be sent first, and one may be
    // overtaken by many that begin and end meanwhile.
    for (place, number) in asked.iter().enumerate() {
        let sent = asked[..place].iter().filter(|other| *other < number);
        assert!(number - sent.count() < 3, "about in order: {asked:?}");
    }
    asked.sort_unstable();
    assert_eq!(asked, (0..12).collect::<Vec<_>>(), "once");
}

#[tokio::test]
async fn a_reader_hurries_on_what_a_profile_has_in_line() {
    let members: Vec<&[u32]> = vec![&[5000]; 60];
    let bounds = EngineConfig {
        profile_max: 1,
        ..patient()
    };
    let bench = bench_within(&members, unmerged(), bounds);
    bench.source.gate.send_replace(false);
    let all: Vec<ChunkId> = (0..60).collect();
    let mut profile = Box::pin(bench.layer.fill_chunks(&all, Priority::Profile));
    assert!(futures_util::poll!(&mut profile).is_pending());
    bench.source.arrived.notified().await;
    // One is in line, the other one of those that have no place in it yet.
    let at = |id: usize| bench.sample.index.chunks[id].data_offset;
    let mut readers = [7, 55].map(|id| Box::pin(bench.layer.fill(range(at(id), 1))));
    for reader in &mut readers {
        assert!(futures_util::poll!(reader).is_pending());
    }
    bench.source.arrived.notified().await;
    assert_eq!(bench.asked(), [0, 7], "at once, beside the other");
    bench.source.gate.send_replace(true);
    futures_util::future::try_join_all(readers).await.unwrap();
    profile.await.unwrap();
    assert_eq!(bench.asked().len(), 60, "nothing was fetched twice");
    let place = bench.asked().iter().position(|id| *id == 55).unwrap();
    assert!(place < 5, "it went {place}th");
}

/// Two layers of one engine: what one fills for nobody waits for a reader of the other.
#[tokio::test]
async fn a_background_request_under_way_yields_after_its_chunk() {
    for pause_max in [Duration::ZERO, Duration::from_secs(3600)] {
        let bounds = EngineConfig {
            background_max: 1,
            pause_max,
            ..patient()
        };
        let members: Vec<&[u32]> = vec![&[5000]; 40];
        let bench = bench_within(&members, LayerConfig::default(), bounds);
        let other = sample(&[&[5000]]);
        let source = TestSource::new(other.blob.clone());
        let engine = Arc::clone(&bench.layer.shared.engine);
        let read = join_with(&bench.store, &other, &source, unmerged(), engine);
        // The background's body stops within its third chunk.
        let ends = |id: usize| bench.sample.index.chunks[id].encoding.blob().unwrap().end();
        *bench.source.free_bytes.lock() = usize::try_from(ends(1)).unwrap() + 100;
        bench.source.gate.send_replace(false);
        let layer = Arc::clone(&bench.layer);
        let background = tokio::spawn(async move { layer.fill_all().await });
        while !bench.layer.file().is_present(1) {
            tokio::task::yield_now().await;
        }
        source.gate.send_replace(false);
        let reader = Arc::clone(&read);
        let reader = tokio::spawn(async move { reader.fill(range(0, 1)).await });
        source.arrived.notified().await;
        bench.source.gate.send_replace(true);
        let alone = fetch::memory_of(&read.shared, &[0]);
        let engine = &bench.layer.shared.engine;
        let has_stopped = || match pause_max.is_zero() {
            true => engine.memory_bytes() == alone,
            false => engine.gate.pausing() == 1,
        };
        while !has_stopped() {
            tokio::task::yield_now().await;
        }
        // The one it was within, and none behind it.
        assert!(!bench.layer.file().is_present(3), "it went on regardless");
        source.gate.send_replace(true);
        reader.await.unwrap().unwrap();
        background.await.unwrap().unwrap();
        let left = if pause_max.is_zero() { 2 } else { 1 };
        assert_eq!(bench.layer.counters().requests, left, "{pause_max:?}");
        assert_eq!(
            bench.layer.counters().chunks_filled,
            40,
            "none of them twice"
        );
        assert!(bench.layer.file().is_complete());
    }
}

/// A table may list files in another order than the blob holds them.
#[tokio::test]
async fn a_background_fill_reaches_every_chunk_in_any_order() {
    let mut sample = sample(&[&[5000], &[5000], &[5000], &[5000]]);
    let ends = [0, 3];
    let encodings = ends.map(|id: usize| sample.index.chunks[id].encoding);
    let digests = ends.map(|id| sample.index.chunks[id].chunk_digest);
    for (n, id) in [(0, 3), (1, 0)] {
        sample.index.chunks[id].encoding = encodings[n];
        sample.index.chunks[id].chunk_digest = digests[n];
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let config = LayerConfig {
        plan: PlanLimits {
            parts_max: 1,
            gap_bytes_max: 0,
            wanted_per_gap: 0,
            request_bytes_max: 1,
            total_bytes_max: 1,
        },
        ..LayerConfig::default()
    };
    let layer = join(&store, &sample, &source, config);
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
    assert_eq!(layer.counters().requests, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_brings_what_is_before_the_landmark_and_no_more() {
    let bench = bench(
        &[&[5000], &[5000], &[5000], &[5000]],
        LayerConfig::default(),
    );
    let Encoding::GzipMember { blob, .. } = bench.sample.index.chunks[2].encoding else {
        panic!("the sample is made of members");
    };
    bench.layer.prefetch(blob.start());
    bench.layer.shared.tasks.close();
    bench.layer.shared.tasks.wait().await;
    let present: Vec<bool> = (0..4).map(|id| bench.layer.file().is_present(id)).collect();
    assert_eq!(present, [true, true, false, false]);
    assert_eq!(bench.layer.counters().requests, 1);
}

#[tokio::test]
async fn what_has_time_comes_when_nobody_has_waited_for_a_while() {
    let bounds = EngineConfig {
        quiet: Duration::from_millis(10),
        ..patient()
    };
    let bench = bench_within(&[&[5000], &[5000], &[5000]], unmerged(), bounds);
    bench.layer.fill(range(0, 1)).await.unwrap();
    assert!(bench.layer.fill_when_quiet().await.unwrap());
    assert!(bench.layer.file().is_complete());
}

#[tokio::test]
async fn what_has_time_is_tried_again() {
    let bounds = EngineConfig {
        quiet: Duration::from_millis(1),
        ..patient()
    };
    let bench = bench_within(&[&[5000], &[5000]], unmerged(), bounds);
    bench
        .source
        .script(&[Act::Refuse, Act::Refuse, Act::Refuse]);
    assert!(bench.layer.fill_when_quiet().await.unwrap());
    assert!(bench.layer.file().is_complete());
}

#[tokio::test]
async fn what_has_time_ends_with_its_layer() {
    let bounds = EngineConfig {
        quiet: Duration::from_secs(3600),
        ..patient()
    };
    let bench = bench_within(&[&[5000]], unmerged(), bounds);
    let layer = Arc::clone(&bench.layer);
    let filling = tokio::spawn(async move { layer.fill_when_quiet().await });
    tokio::task::yield_now().await;
    bench.layer.close().await.unwrap();
    assert!(!filling.await.unwrap().unwrap(), "it is not whole");
    assert_eq!(bench.layer.counters().requests, 0);
}
