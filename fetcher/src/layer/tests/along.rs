//! What comes along with a wanted chunk.

use std::time::Instant;

use super::support::{bench, range};
use crate::index::Encoding;
use crate::layer::LayerConfig;

#[tokio::test]
async fn chunks_of_one_member_come_together_and_neighbours_merge() {
    let config = LayerConfig {
        read_ahead_encoded_bytes_max: 0,
        ..LayerConfig::default()
    };
    let bench = bench(&[&[5000, 6000, 7000], &[100], &[9000]], config);
    let second = bench.sample.index.chunks[1].data_offset;
    bench.layer.fill(range(second, 1)).await.unwrap();
    bench.layer.fill_all().await.unwrap();
    let counters = bench.layer.counters();
    assert_eq!((counters.requests, counters.chunks_filled), (2, 5));
    assert_eq!(counters.bytes_fetched, bench.sample.index.blob_size);
    assert!(bench.layer.file().is_complete());
    assert!(bench.read(range(0, bench.sample.index.data_len)));
}

/// The table of chunks still names their places, which are holes now.
#[tokio::test]
async fn evicted_neighbours_come_along_again() {
    let bench = bench(
        &[&[3000], &[3000], &[3000], &[3000]],
        LayerConfig::default(),
    );
    let begin = bench.sample.index.chunks[0].data_offset;
    let counters = || bench.layer.counters();
    for round in 1..4 {
        bench.layer.fill(range(begin, 1)).await.unwrap();
        while !bench.layer.file().is_complete() {
            tokio::task::yield_now().await;
        }
        assert_eq!((counters().requests, counters().chunks_copied), (round, 0));
        bench.layer.flush().await.unwrap();
        bench.layer.file().evict_all().unwrap();
    }
}

#[tokio::test]
async fn small_followers_come_in_the_same_request_and_are_not_waited_for() {
    let bench = bench(
        &[&[3000], &[3000], &[3000], &[400_000], &[3000]],
        LayerConfig::default(),
    );
    let index = &bench.sample.index;
    // Let the wanted member through, and a little of the next; hold back the rest.
    let Encoding::GzipMember { blob, .. } = index.chunks[0].encoding else {
        unreachable!()
    };
    *bench.source.free_bytes.lock() = usize::try_from(blob.len()).unwrap() + 100;
    bench.source.gate.send_replace(false);
    bench.layer.fill(range(0, 1)).await.unwrap();
    assert!(bench.read(range(0, 3000)));
    assert!(!bench.read(range(4096, 3000)));
    let mut second = Box::pin(bench.layer.fill(range(4096, 1)));
    assert!(futures_util::poll!(&mut second).is_pending());
    bench.source.gate.send_replace(true);
    second.await.unwrap();
    bench.layer.fill(range(8192, 1)).await.unwrap();
    assert_eq!(bench.layer.counters().requests, 1, "all three in one");
    // The large one was not taken along, and takes the one behind it along.
    bench.layer.fill(range(12_288, 1)).await.unwrap();
    bench.quiet().await;
    assert_eq!(bench.layer.counters().requests, 2);
    assert!(bench.read(range(0, index.data_len)));
}

/// What a burst of small reads costs with and without followers. Prints, asserts counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_reads_in_a_row_cost_fewer_requests() {
    let members: Vec<&[u32]> = vec![&[4000]; 400];
    for (bytes, requests_max) in [(0, 400), (128 << 10, 30)] {
        let config = LayerConfig {
            read_ahead_encoded_bytes_max: bytes,
            ..LayerConfig::default()
        };
        let bench = bench(&members, config);
        let began = Instant::now();
        for n in 0..400 {
            let wanted = range(n * 4096, 4000);
            bench.layer.fill(wanted).await.unwrap();
            assert!(bench.read(wanted));
        }
        let (requests, took) = (bench.layer.counters().requests, began.elapsed());
        println!("ahead {bytes:>6}: 400 reads of 4000 bytes, {requests} requests, {took:?}");
        assert!(requests <= requests_max, "{requests}");
    }
}
