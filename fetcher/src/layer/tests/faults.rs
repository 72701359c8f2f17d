//! Faults of the source, and reads under them against a plain copy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::support::{Act, Bench, TestSource, bench, bench_within, join, range, sample, unmerged};
use crate::Error;
use crate::index::{Encoding, LayerFormat};
use crate::layer::{EngineConfig, LayerConfig};
use crate::plan::PlanLimits;
use crate::store::Store;

#[tokio::test]
async fn corrupt_bytes_are_fetched_once_more_and_then_an_error() {
    let bench = bench(&[&[5000], &[6000]], unmerged());
    bench.source.script(&[Act::Corrupt]);
    bench.layer.fill(range(0, 1)).await.unwrap();
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_corrupt), (2, 1));
    let distrusted = &bench.source.distrusted;
    assert_eq!(distrusted.load(Ordering::Relaxed), 1, "the source is told");
    assert!(bench.read(range(0, 5000)));
    bench.source.script(&[Act::Corrupt, Act::Corrupt]);
    let error = bench.layer.fill(range(8192, 1)).await.unwrap_err();
    let corrupt = matches!(error, Error::Corrupt { .. } | Error::Malformed { .. });
    assert!(corrupt, "{error}");
    assert!(!bench.read(range(8192, 1)));
    bench.layer.fill(range(8192, 1)).await.unwrap();
    assert!(bench.read(range(8192, 6000)), "errors are not kept");
}

#[tokio::test]
async fn one_bad_chunk_of_a_member_does_not_take_the_others() {
    let mut sample = sample(&[&[5000, 6000, 7000]]);
    sample.index.chunks[1].chunk_digest = Some([9; 32]);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    layer.fill(range(0, 1)).await.unwrap();
    layer.fill(range(16_384, 1)).await.unwrap();
    let error = layer.fill(range(8192, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(
        error.to_string().contains("chunk 1 of layer sha256:"),
        "{error}"
    );
}

#[tokio::test]
async fn every_waiter_gets_the_error_and_what_to_do() {
    let table: [(Act, &str); 4] = [
        (Act::Truncate, "the body ended after"),
        (Act::Break, "scripted"),
        (Act::Refuse, "scripted"),
        (Act::NoRanges, "--full"),
    ];
    for (act, says) in table {
        let bench = bench(&[&[5000]], unmerged());
        bench.source.gate.send_replace(false);
        bench.source.script(&[act]);
        let mut first = Box::pin(bench.layer.fill(range(0, 10)));
        let mut second = Box::pin(bench.layer.fill(range(20, 10)));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert!(futures_util::poll!(&mut second).is_pending());
        bench.source.gate.send_replace(true);
        for waiter in [first, second] {
            let error = waiter.await.unwrap_err().to_string();
            assert!(error.contains(says), "{act:?}: {error}");
        }
        assert_eq!(bench.layer.counters().requests, 1);
        assert!(bench.layer.shared.inflight.is_empty());
    }
}

#[tokio::test]
async fn a_layer_that_can_only_be_streamed_says_so() {
    let mut sample = sample(&[&[5000]]);
    sample.index.format = LayerFormat::Gzip;
    sample.index.chunks[0].encoding = Encoding::Stream;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let layer = join(&store, &sample, &source, unmerged());
    let error = layer.fill(range(0, 1)).await.unwrap_err();
    assert!(error.to_string().contains("--full"), "{error}");
    assert_eq!(layer.counters().requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn random_reads_under_faults_equal_a_plain_copy() {
    for seed in 0..24 {
        let mut rng = StdRng::seed_from_u64(seed);
        let members = random_members(&mut rng);
        let members: Vec<&[u32]> = members.iter().map(Vec::as_slice).collect();
        let config = LayerConfig {
            plan: PlanLimits {
                parts_max: 1,
                gap_bytes_max: rng.random_range(0..70_000),
                wanted_per_gap: rng.random_range(0..10),
                request_bytes_max: rng.random_range(1..300_000),
                total_bytes_max: rng.random_range(1..600_000),
            },
            read_ahead_encoded_bytes_max: rng.random_range(0..200_000),
            ..LayerConfig::default()
        };
        let bounds = EngineConfig {
            on_demand_max: rng.random_range(1..5),
            profile_max: rng.random_range(1..5),
            background_max: rng.random_range(1..5),
            memory_bytes_max: rng.random_range(800_000..2_000_000),
            pause_max: Duration::from_millis(rng.random_range(0..3)),
            quiet: Duration::from_millis(rng.random_range(0..3)),
            late_after_min: Duration::from_micros(rng.random_range(0..300)),
        };
        let bench = Arc::new(bench_within(&members, config, bounds));
        *bench.source.piece_bytes.lock() = rng.random_range(1..100_000);
        *bench.source.random.lock() = Some(StdRng::seed_from_u64(seed));
        let background = Arc::clone(&bench.layer);
        let has_time = rng.random();
        let background = tokio::spawn(async move {
            match has_time {
                true => drop(background.fill_when_quiet().await),
                false => drop(background.fill_all().await),
            }
        });
        let readers: Vec<_> = (0..4)
            .map(|reader| tokio::spawn(random_reads(Arc::clone(&bench), seed * 10 + reader)))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        background.await.unwrap();
        bench.quiet().await;
        *bench.source.random.lock() = None;
        bench.layer.fill_all().await.unwrap();
        assert!(bench.read(range(0, bench.sample.index.data_len)));
        reopened_equals(&bench);
    }
}

/// Mostly small files, as in an image, with a large one here and there.
fn random_members(rng: &mut StdRng) -> Vec<Vec<u32>> {
    let file = |rng: &mut StdRng| match rng.random_range(0..10) {
        0 => rng.random_range(1..100_000),
        1..4 => 4096,
        _ => rng.random_range(1..6000),
    };
    (0..rng.random_range(1..40))
        .map(|_| {
            let files = rng.random_range(1..4);
            (0..files).map(|_| file(rng)).collect()
        })
        .collect()
}

async fn random_reads(bench: Arc<Bench>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..40 {
        let start = rng.random_range(0..bench.sample.index.data_len);
        let len = rng.random_range(0..=(bench.sample.index.data_len - start).min(9000));
        let wanted = range(start, len);
        match bench.layer.fill(wanted).await {
            Ok(()) => assert!(bench.read(wanted), "filled {wanted} is not present"),
            // Whatever is present is right all the same.
            Err(_) => drop(bench.read(wanted)),
        }
    }
}

/// A second process on the same root sees all of it.
fn reopened_equals(bench: &Bench) {
    let other = Store::open(bench.dir.path()).unwrap();
    let file = other.open_layer(&bench.sample.index.blob_digest);
    let file = file.unwrap().unwrap();
    let mut buf = vec![0; bench.sample.data.len()];
    assert!(file.read_at(0, &mut buf).unwrap());
    assert!(buf == bench.sample.data);
    drop(Arc::clone(&bench.store));
}
