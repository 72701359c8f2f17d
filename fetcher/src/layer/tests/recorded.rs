//! When what was fetched is recorded.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::support::{Bench, bench, range};
use crate::index::ChunkId;
use crate::layer::LayerConfig;
use crate::store::{FlushPolicy, Store};

/// Longest wait for what has to happen, on a machine that does much else.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How soon things are recorded here.
const AGE: Duration = Duration::from_millis(20);

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

/// Waits until a chunk would be there after a crash.
async fn wait_until_recorded(bench: &Bench, id: ChunkId) {
    let since = Instant::now();
    let is_recorded = || {
        let store = Store::open(bench.dir.path()).unwrap();
        let digest = bench.sample.index.blob_digest;
        let file = store.open_layer(&digest).unwrap().unwrap();
        file.is_present(id)
    };
    while !is_recorded() {
        assert!(since.elapsed() < WAIT_MAX, "chunk {id} never is");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_came_last_is_recorded_though_nothing_comes_after_it() {
    let bench = bench(&[&[5000], &[5000]], after(AGE));
    for (id, chunk) in (0..).zip(&bench.sample.index.chunks) {
        bench.layer.fill(range(chunk.data_offset, 1)).await.unwrap();
        wait_until_recorded(&bench, id).await;
    }
    bench.layer.close().await.unwrap();
}

#[tokio::test]
async fn what_could_not_be_recorded_is_tried_again_though_nothing_comes_after_it() {
    let bench = bench(&[&[5000]], after(AGE));
    // Where the new bitmap is to be written.
    let layers = bench.dir.path().join("layers");
    let layer = layers.join(bench.sample.index.blob_digest.file_name());
    let obstacle = layer.join("bitmap.new");
    fs::create_dir(&obstacle).unwrap();
    bench.layer.fill(range(0, 1)).await.unwrap();
    bench.layer.flush().await.unwrap_err();
    assert!(bench.layer.file().is_dirty());
    // The task that waits has tried, too, more than once.
    tokio::time::sleep(20 * AGE).await;
    fs::remove_dir(&obstacle).unwrap();
    wait_until_recorded(&bench, 0).await;
    bench.layer.close().await.unwrap();
    assert!(!bench.layer.file().is_dirty());
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
