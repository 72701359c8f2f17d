//! Many readers: one fetch per chunk, whoever goes away, and what closing ends.

use std::sync::Arc;

use super::support::{bench, range, unmerged};
use crate::Error;
use crate::index::Encoding;
use crate::layer::LayerConfig;

#[tokio::test]
async fn fifty_readers_of_one_chunk_cost_one_request() {
    let bench = bench(&[&[5000], &[70_000], &[10]], unmerged());
    bench.source.gate.send_replace(false);
    let at = bench.sample.index.chunks[1].data_offset;
    let readers: Vec<_> = (0..50)
        .map(|n| {
            let layer = Arc::clone(&bench.layer);
            tokio::spawn(async move { layer.fill(range(at + n * 100, 50)).await })
        })
        .collect();
    bench.source.arrived.notified().await;
    tokio::task::yield_now().await;
    bench.source.gate.send_replace(true);
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert!(bench.read(range(at, 70_000)));
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 1));
    let Encoding::GzipMember { blob, .. } = bench.sample.index.chunks[1].encoding else {
        unreachable!()
    };
    assert_eq!(counters.bytes_fetched, blob.len());
    assert!(bench.layer.shared.inflight.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_readers_of_a_cold_file_fetch_every_chunk_once() {
    let members: Vec<&[u32]> = vec![&[9000, 300]; 60];
    for (config, is_filled) in [(unmerged(), true), (LayerConfig::default(), false)] {
        let bench = bench(&members, config);
        let background = Arc::clone(&bench.layer);
        let background = tokio::spawn(async move {
            match is_filled {
                true => background.fill_all().await,
                false => Ok(()),
            }
        });
        let end = bench.sample.index.data_len;
        let readers: Vec<_> = (0..50)
            .map(|n| {
                let layer = Arc::clone(&bench.layer);
                tokio::spawn(async move {
                    for at in 0..end / 1000 {
                        // Some forwards, some backwards.
                        let at = if n % 2 == 0 { at } else { end / 1000 - 1 - at };
                        layer.fill(range(at * 1000, 1000)).await?;
                    }
                    Ok::<(), Error>(())
                })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap().unwrap();
        }
        background.await.unwrap().unwrap();
        bench.layer.close().await.unwrap();
        let counters = bench.layer.counters();
        assert_eq!(counters.chunks_filled, 120);
        assert_eq!(counters.bytes_fetched, bench.sample.index.blob_size);
        assert!(bench.read(range(0, end)));
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_stops_nobody_else() {
    let bench = bench(&[&[5000]], unmerged());
    bench.source.gate.send_replace(false);
    let mut first = Box::pin(bench.layer.fill(range(0, 10)));
    assert!(futures_util::poll!(&mut first).is_pending());
    bench.source.arrived.notified().await;
    let second = bench.layer.fill(range(100, 10));
    drop(first);
    bench.source.gate.send_replace(true);
    second.await.unwrap();
    assert_eq!(bench.layer.counters().requests, 1);
    assert!(bench.read(range(0, 5000)));
}

#[tokio::test]
async fn closing_ends_fetches_and_waiters() {
    let bench = bench(&[&[5000]], unmerged());
    bench.source.gate.send_replace(false);
    let mut waiter = Box::pin(bench.layer.fill(range(0, 10)));
    assert!(futures_util::poll!(&mut waiter).is_pending());
    bench.source.arrived.notified().await;
    bench.layer.close().await.unwrap();
    let error = waiter.await.unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
    assert!(bench.layer.shared.inflight.is_empty());
}

/// What is being decoded when a layer is closed would otherwise be written later.
#[tokio::test]
async fn closing_waits_for_what_is_being_stored() {
    let bench = bench(&[&[20_000_000]], unmerged());
    let mut fill = Box::pin(bench.layer.fill(range(0, 1)));
    assert!(futures_util::poll!(&mut fill).is_pending());
    let all = bench.sample.blob.len() as u64;
    while bench.layer.counters().bytes_fetched < all {
        tokio::task::yield_now().await;
    }
    bench.layer.close().await.unwrap();
    assert_eq!(
        Arc::strong_count(&bench.layer.shared),
        1,
        "nobody works on it"
    );
    drop(fill);
}
