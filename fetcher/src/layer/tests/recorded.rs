//! When what was fetched is recorded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::support::{bench, range};
use crate::layer::LayerConfig;
use crate::store::{FlushPolicy, Store};

/// Longest wait for what has to happen, on a machine that does much else.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Never for its size.
fn after(age: Duration) -> LayerConfig {
    LayerConfig {
        flush: FlushPolicy {
            bytes: u64::MAX,
            age,
        },
        ..LayerConfig::default()
    }
}

#[tokio::test]
async fn what_came_last_is_recorded_though_nothing_comes_after_it() {
    let bench = bench(&[&[5000], &[5000]], after(Duration::from_millis(20)));
    let digest = bench.sample.index.blob_digest;
    for (id, chunk) in (0..).zip(&bench.sample.index.chunks) {
        bench.layer.fill(range(chunk.data_offset, 1)).await.unwrap();
        let since = Instant::now();
        // As after a crash.
        let is_recorded = || {
            let store = Store::open(bench.dir.path()).unwrap();
            let file = store.open_layer(&digest).unwrap().unwrap();
            file.is_present(id)
        };
        while !is_recorded() {
            assert!(since.elapsed() < WAIT_MAX, "chunk {id} never is");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    bench.layer.close().await.unwrap();
}

#[tokio::test]
async fn a_layer_that_is_closed_or_dropped_waits_for_no_time_to_pass() {
    let age = Duration::from_secs(3600);
    let bench = bench(&[&[5000]], after(age));
    bench.layer.fill(range(0, 1)).await.unwrap();
    let shared = Arc::downgrade(&bench.layer.shared);
    let closed = tokio::time::timeout(WAIT_MAX, bench.layer.close()).await;
    closed.expect("it does not wait").unwrap();
    assert!(!bench.layer.file().is_dirty());
    drop(bench);
    assert_eq!(shared.strong_count(), 0);
}
