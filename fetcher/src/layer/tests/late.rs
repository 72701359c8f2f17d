//! Answers that are late: asked for once more, within a budget.

use std::time::Duration;

use super::support::{Act, bench_within, range, unmerged};
use crate::index::ChunkId;
use crate::layer::{EngineConfig, Priority};

#[tokio::test]
async fn a_reader_is_answered_though_a_request_is_lost() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        ..EngineConfig::default()
    };
    let bench = bench_within(&[&[5000], &[5000], &[5000]], unmerged(), hasty);
    let table: [&[Act]; 3] = [
        &[Act::Stall, Act::Serve],
        &[Act::Stall, Act::Corrupt, Act::Stall, Act::Serve],
        &[Act::Serve],
    ];
    for (chunk, acts) in bench.sample.index.chunks.iter().zip(table) {
        bench.source.script(acts);
        let wanted = range(chunk.data_offset, 5000);
        bench.layer.fill(wanted).await.unwrap();
        assert!(bench.read(wanted));
    }
    bench.layer.close().await.unwrap();
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}

#[tokio::test]
async fn one_error_of_two_is_not_an_answer() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        ..EngineConfig::default()
    };
    let bench = bench_within(&[&[5000]], unmerged(), hasty);
    bench.source.script(&[Act::Stall, Act::Refuse]);
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    while !bench.source.script.lock().is_empty() {
        assert!(futures_util::poll!(&mut fill).is_pending());
        tokio::task::yield_now().await;
    }
    assert!(
        futures_util::poll!(&mut fill).is_pending(),
        "the first may answer"
    );
    bench.layer.close().await.unwrap();
    assert!(fill.await.is_err());
}

#[tokio::test]
async fn nobody_but_readers_asks_again_and_they_not_for_ever() {
    let hasty = EngineConfig {
        late_after_min: Duration::ZERO,
        on_demand_max: 50,
        profile_max: 50,
        ..EngineConfig::default()
    };
    let members: Vec<&[u32]> = vec![&[5000]; 34];
    let bench = bench_within(&members, unmerged(), hasty);
    let ids: Vec<ChunkId> = (0..34).collect();
    bench.source.script(&[Act::Stall; 200]);
    let mut profile = Box::pin(bench.layer.fill_chunks(&ids[..4], Priority::Profile));
    assert!(futures_util::poll!(&mut profile).is_pending());
    let mut readers = Box::pin(bench.layer.fill_chunks(&ids[4..], Priority::OnDemand));
    // 30 first ones; four second ones are saved up, and one is earned by then.
    while bench.layer.counters().requests < 4 + 30 + 4 {
        assert!(futures_util::poll!(&mut readers).is_pending());
        tokio::task::yield_now().await;
    }
    let counters = bench.layer.counters();
    assert!(counters.second_tries <= 4 + 1, "{counters:?}");
    bench.layer.close().await.unwrap();
    assert!(readers.await.is_err() && profile.await.is_err());
    assert_eq!(bench.layer.shared.engine.memory_bytes(), 0);
}
