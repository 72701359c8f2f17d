//! Several processes that fill and ingest, and kills at any point.

use std::collections::BTreeSet;

use lazarette_fetcher::store::Store;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::support::{CHUNKS, KILLS, all, entries, found, index};
use crate::worker::{Worker, ids};

#[test]
fn two_processes_fill_one_layer_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        let store = Store::open(dir.path()).unwrap();
        store.remove_layer(&index("shared").blob_digest).unwrap();
        store.create_layer(index("shared")).unwrap();
        let mut workers = [1, 2].map(|n| Worker::start(dir.path(), "fill", seed * 10 + n));
        let mut acked = BTreeSet::new();
        for _ in 0..8 {
            for worker in &mut workers {
                acked.extend(worker.line().iter().flat_map(|line| ids(line)));
                let now = found(dir.path(), "shared");
                assert!(acked.is_subset(&now), "{acked:?} {now:?}");
            }
        }
        for worker in workers {
            worker.finish();
        }
        assert_eq!(found(dir.path(), "shared"), all());
    }
}

#[test]
fn what_a_live_process_ingests_is_not_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut worker = Worker::start(dir.path(), "ingest", 0);
    assert_eq!(worker.line().as_deref(), Some("begun"));
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(entries(&dir.path().join("ingest")), 1, "it is alive");
    assert!(store.layers().unwrap().is_empty(), "and not done");
    worker.finish();
    assert_eq!(found(dir.path(), "whole"), all());
    // A dead one's is dropped.
    let mut worker = Worker::start(dir.path(), "ingest", 0);
    assert_eq!(worker.line().as_deref(), Some("begun"));
    worker.kill();
    assert_eq!(entries(&dir.path().join("ingest")), 1);
    assert_eq!(found(dir.path(), "whole"), all());
    assert_eq!(entries(&dir.path().join("ingest")), 0);
}

#[test]
fn kills_at_random_points_take_nothing_that_was_flushed() {
    let mut rng = StdRng::seed_from_u64(20);
    let dir = tempfile::tempdir().unwrap();
    let (mut acked, mut lines) = (BTreeSet::new(), 0);
    for round in 0..KILLS {
        if acked.len() == CHUNKS as usize {
            let store = Store::open(dir.path()).unwrap();
            store.remove_layer(&index("shared").blob_digest).unwrap();
            acked.clear();
        }
        let mut worker = Worker::start(dir.path(), "everything", round * 100);
        let mut said: Vec<String> = (0..rng.random_range(0..20))
            .filter_map(|_| worker.line())
            .collect();
        // Some way into whatever comes next.
        for _ in 0..rng.random_range(0..3000) {
            std::thread::yield_now();
        }
        said.extend(worker.kill());
        acked.extend(said.iter().flat_map(|line| ids(line)));
        lines += said.len();
        let store = Store::open(dir.path()).unwrap();
        for leftovers in ["ingest", "trash"] {
            assert_eq!(entries(&dir.path().join(leftovers)), 0, "round {round}");
        }
        drop(store);
        let now = found(dir.path(), "shared");
        assert!(acked.is_subset(&now), "round {round}: {acked:?}, {now:?}");
        for name in ["whole0", "whole1", "whole2"] {
            let whole = found(dir.path(), name);
            assert!(whole.is_empty() || whole == all(), "round {round}: {name}");
        }
        let last = said.iter().rev().find(|line| !line.is_empty());
        if let Some(name) = last.and_then(|line| line.strip_prefix("whole "))
            && name.len() == "whole0".len()
        {
            assert_eq!(found(dir.path(), name), all(), "round {round}");
        }
    }
    assert!(lines > 20, "{lines} lines: the children did something");
}
