//! Chunks that another layer of the node has.

use std::sync::atomic::{AtomicBool, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::support::{Bench, TestSource, bench, join, join_with, patient, range, sample, unmerged};
use crate::Error;
use crate::layer::{EngineConfig, FetchEngine, LayerConfig};
use crate::store::Store;

#[tokio::test]
async fn what_another_layer_has_is_not_fetched_and_brings_nothing_along() {
    let config = LayerConfig::default();
    let bench = bench(&[&[5000], &[70_000], &[10]], config);
    bench.layer.fill_all().await.unwrap();
    // The same first two files, and another third one; as another process sees them.
    let sample = sample(&[&[5000], &[70_000], &[11]]);
    assert_eq!(
        sample.index.chunks[1].chunk_digest,
        bench.sample.index.chunks[1].chunk_digest
    );
    let source = TestSource::new(sample.blob.clone());
    let store = Store::open(bench.dir.path()).unwrap();
    let other = Bench {
        layer: join(&store, &sample, &source, config),
        sample,
        source,
        store,
        dir: tempfile::tempdir().unwrap(),
    };
    let at = other.sample.index.chunks[1].data_offset;
    other.layer.fill(range(at, 70_000)).await.unwrap();
    assert!(other.read(range(at, 70_000)));
    other.quiet().await;
    let counters = other.layer.counters();
    assert_eq!((counters.requests, counters.chunks_copied), (0, 1));
    assert!(
        !other.layer.file().is_present(2),
        "nothing was fetched ahead"
    );
    // What is fetched does not bring along what is here.
    let last = other.sample.index.chunks[2].data_offset;
    other.layer.fill(range(0, last + 11)).await.unwrap();
    let counters = other.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (1, 1));
    assert_eq!((counters.chunks_copied, counters.bytes_copied), (2, 75_000));
    assert!(other.read(range(0, last + 11)));
    other.layer.close().await.unwrap();
}

#[tokio::test]
async fn what_is_too_long_for_the_memory_for_copies_is_not_copied() {
    let bench = bench(&[&[5000], &[70_000], &[10]], LayerConfig::default());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&[5000], &[70_000], &[11]]);
    let source = TestSource::new(sample.blob.clone());
    // Nothing can be fetched within so little, and the first file be copied.
    let engine = FetchEngine::new(EngineConfig {
        memory_bytes_max: 64 << 10,
        ..patient()
    });
    let layer = join_with(&bench.store, &sample, &source, unmerged(), engine);
    layer.fill(range(0, 5000)).await.unwrap();
    let at = sample.index.chunks[1].data_offset;
    let error = layer.fill(range(at, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
    let counters = layer.counters();
    assert_eq!((counters.chunks_copied, counters.requests), (1, 0));
    layer.close().await.unwrap();
}

#[tokio::test]
async fn more_chunks_than_one_run_are_copied() {
    let many = [3; 100];
    let bench = bench(&[&many, &[10]], LayerConfig::default());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&many, &[11]]);
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&bench.store, &sample, &source, unmerged());
    let end = sample.index.chunks[100].data_offset;
    layer.fill(range(0, end)).await.unwrap();
    let counters = layer.counters();
    assert_eq!((counters.chunks_copied, counters.requests), (100, 0));
    layer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_beside_evictions_and_faults_of_either_layer_are_right() {
    let bench = bench(&[&[5000], &[70_000], &[300, 400]], unmerged());
    bench.layer.fill_all().await.unwrap();
    let sample = sample(&[&[5000], &[70_000], &[300, 401]]);
    let source = TestSource::new(sample.blob.clone());
    *source.random.lock() = Some(StdRng::seed_from_u64(3));
    let layer = join(&bench.store, &sample, &source, unmerged());
    let stop = AtomicBool::new(false);
    let runtime = tokio::runtime::Handle::current();
    std::thread::scope(|threads| {
        let evictor = threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                bench.layer.file().evict_all().unwrap();
                layer.file().evict_all().unwrap();
            }
        });
        let reader = threads.spawn(|| {
            runtime.block_on(async {
                let mut right = 0;
                for n in 0..300 {
                    let id = n % 4;
                    let chunk = &sample.index.chunks[id];
                    let place = range(chunk.data_offset, u64::from(chunk.len));
                    let other = &bench.sample.index.chunks[id];
                    let same = range(other.data_offset, u64::from(other.len));
                    let _ = bench.layer.fill(same).await;
                    let _ = layer.fill(place).await;
                    let mut buf = vec![0; chunk.len as usize];
                    if layer.try_read(place.start(), &mut buf).unwrap() {
                        let at = usize::try_from(place.start()).unwrap();
                        assert!(buf == sample.data[at..at + buf.len()]);
                        right += 1;
                    }
                }
                right
            })
        });
        let right = reader.join();
        stop.store(true, Ordering::Relaxed);
        evictor.join().unwrap();
        assert!(right.unwrap() > 0);
    });
}
