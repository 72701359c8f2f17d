//! Evictions beside readers, fillers and other evictions, in threads and processes.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use lazarette_fetcher::store::{Bounds, LayerFile, PIN_TIME, Store};
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, put_chunk};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::support::{
    BLOCK, CHUNKS, KILLS, StopOnDrop, all, check, disturb, evict_at_random, fill, found, index,
    read,
};
use crate::worker::Worker;

#[test]
fn a_flush_brings_nothing_back_that_another_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|_| Store::open(dir.path()).unwrap());
    fill(&stores[0], "shared", 1, |_| {});
    let digest = index("shared").blob_digest;
    let [mine, other] = stores
        .each_ref()
        .map(|store| store.open_layer(&digest).unwrap().unwrap());
    let before = mine.usage().unwrap();
    let evicted = other.evict(&[5, 7, 100]).unwrap();
    assert_eq!(
        (evicted.chunks, evicted.bytes),
        (3, 3 * u64::from(CHUNK_LEN))
    );
    let after = mine.usage().unwrap();
    assert_eq!(before.allocated - after.allocated, 3 * BLOCK, "{after:?}");
    // It has not looked; what it reads is right all the same.
    assert!(mine.is_present(7) && !read(&mine, 7) && !mine.is_present(7));
    put_chunk(&mine, 7).unwrap();
    mine.flush().unwrap();
    let mut left = all();
    left.retain(|id| ![5, 100].contains(id));
    assert_eq!(found(dir.path(), "shared"), left);
    left.remove(&7);
    assert_eq!(check(&other), left, "it has not looked for what came back");
}

#[test]
fn what_only_one_process_knows_another_may_punch() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|_| Store::open(dir.path()).unwrap());
    stores[0].create_layer(index("shared")).unwrap();
    let digest = index("shared").blob_digest;
    for reads_first in [true, false] {
        let [mine, other] = stores
            .each_ref()
            .map(|store| store.open_layer(&digest).unwrap().unwrap());
        for file in [&mine, &other] {
            put_chunk(file, 7).unwrap();
            put_chunk(file, 8).unwrap();
        }
        other.flush().unwrap();
        other.evict(&[7]).unwrap();
        if reads_first {
            assert!(!read(&mine, 7) && read(&mine, 8));
        }
        mine.flush().unwrap();
        assert!(!mine.is_present(7) && read(&mine, 8));
        assert_eq!(found(dir.path(), "shared"), [8].into());
        other.evict_all().unwrap();
        assert_eq!(check(&mine), BTreeSet::new());
        assert_eq!(mine.usage().unwrap().allocated, 0, "nothing is left behind");
    }
}

/// Puts all chunks of a layer, and records none.
fn leave_behind(root: &Path, name: &str) {
    let store = Store::open(root).unwrap();
    let file = store.create_layer(index(name)).unwrap();
    for id in 0..CHUNKS {
        put_chunk(&file, id).unwrap();
    }
    assert!(store.space().unwrap().used >= u64::from(CHUNKS) * BLOCK);
}

#[test]
fn what_a_process_that_died_had_not_recorded_counts_and_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    leave_behind(dir.path(), "left");
    let store = Store::open(dir.path()).unwrap();
    fill(&store, "read", 1, |_| {});
    let read = store
        .open_layer(&index("read").blob_digest)
        .unwrap()
        .unwrap();
    assert_eq!(check(&read), all());
    // Room for one of them: it goes that nobody can read.
    let whole = u64::from(CHUNKS) * BLOCK;
    let trim = store.trim(whole + whole / 2).unwrap();
    assert_eq!(trim.evicted.chunks, 0, "{trim:?}");
    assert!(trim.freed_bytes >= whole / 2, "{trim:?}");
    assert_eq!(check(&read), all());
    leave_behind(dir.path(), "another");
    let trim = store.trim(0).unwrap();
    assert_eq!(trim.evicted.chunks, u64::from(CHUNKS), "{trim:?}");
    assert_eq!(store.space().unwrap().used, 0, "{trim:?}");
}

#[test]
fn no_reader_gets_zeros_while_threads_and_processes_evict() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|_| Store::open(dir.path()).unwrap());
    fill(&stores[0], "shared", 1, |_| {});
    let digest = index("shared").blob_digest;
    let files = stores
        .each_ref()
        .map(|store| store.open_layer(&digest).unwrap().unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for (seed, file) in [(1, &files[0]), (2, &files[0]), (3, &files[1])] {
            let stop = &stop;
            threads.spawn(move || disturb(file, seed, stop));
        }
        let _stop = StopOnDrop(&stop);
        let child = Worker::start(dir.path(), "evict", 4);
        evict_at_random(&files[0], 5, 100);
        child.finish();
    });
    // Whatever was recorded is there; a claim over a hole would be noticed as damage.
    for file in &files {
        file.flush().unwrap();
    }
    let store = Store::open(dir.path()).unwrap();
    let file = store.open_layer(&digest).unwrap().unwrap();
    let found = file.check_all().unwrap();
    assert_eq!((found.dropped, found.bitmap_lost), (vec![], false));
    assert!(found.chunks > 0);
}

#[test]
fn kills_while_evicting_leave_no_claim_over_a_hole() {
    let mut rng = StdRng::seed_from_u64(30);
    let dir = tempfile::tempdir().unwrap();
    for round in 0..KILLS / 2 {
        let store = Store::open(dir.path()).unwrap();
        fill(&store, "shared", round, |_| {});
        drop(store);
        let mut worker = Worker::start(dir.path(), "evict", round);
        assert_eq!(worker.line().as_deref(), Some("evicting"));
        for _ in 0..rng.random_range(0..5000) {
            std::thread::yield_now();
        }
        worker.kill();
        let store = Store::open(dir.path()).unwrap();
        let digest = index("shared").blob_digest;
        let file = store.open_layer(&digest).unwrap().unwrap();
        let found = file.check_all().unwrap();
        assert_eq!(
            (found.dropped, found.bitmap_lost),
            (vec![], false),
            "round {round}"
        );
    }
}

#[test]
fn a_budget_is_kept_and_what_is_read_often_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let budget = 5 << 20;
    store.keep_within_bounds(Bounds {
        budget: Some(budget),
        free_floor: Some(0),
    });
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut kept = Vec::new();
    for name in names {
        fill(&store, name, 3, |_| {});
        let used = store.space().unwrap().used;
        assert!(used <= budget, "{used} after {name}");
        let hot = store.open_layer(&index("a").blob_digest).unwrap().unwrap();
        assert_eq!(check(&hot).len(), CHUNKS as usize, "after {name}");
        kept.push(store.open_layer(&index(name).blob_digest).unwrap().unwrap());
    }
    let gone = kept.iter().filter(|file| !file.is_complete()).count();
    assert!(gone >= 3, "{gone} gave way");
    // What was evicted comes back.
    for name in names {
        fill(&store, name, 4, |_| {});
    }
    assert!(store.space().unwrap().used <= budget);
}

/// Pins layer "a" with `pin`, ends that process, and lets another trim three layers to one.
/// How many extents of "a" stay.
fn trimmed_with(pin: impl FnOnce(&LayerFile)) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let digest = index("a").blob_digest;
    let store = Store::open(dir.path()).unwrap();
    for name in ["a", "b", "c"] {
        fill(&store, name, 3, |_| {});
    }
    let a = store.open_layer(&digest).unwrap().unwrap();
    pin(&a);
    let of_one = a.usage().unwrap().allocated;
    drop((store, a));
    let store = Store::open(dir.path()).unwrap();
    store.trim(of_one).unwrap();
    assert!(store.space().unwrap().used <= of_one);
    let a = store.open_layer(&digest).unwrap().unwrap();
    let extents: BTreeSet<u64> = check(&a)
        .into_iter()
        .map(|id| (u64::from(id) * BLOCK) >> 20)
        .collect();
    let trim = store.trim(0).unwrap();
    assert_eq!(
        a.present_bytes(),
        0,
        "pinned chunks yield when nothing is left"
    );
    assert!(trim.kept.is_empty() && store.space().unwrap().used == 0);
    extents.len()
}

#[test]
fn what_starts_read_yields_last_to_every_process_for_a_time() {
    let now = SystemTime::now();
    // 300 blocks are two extents; "a" is the oldest and goes first.
    assert_eq!(trimmed_with(|_| {}), 0);
    assert_eq!(trimmed_with(|a| a.pin(0..CHUNKS, now)), 2);
    assert_eq!(trimmed_with(|a| a.pin([0, 299], now)), 2, "a chunk of each");
    assert_eq!(
        trimmed_with(|a| a.pin([CHUNKS, 9999], now)),
        0,
        "no such chunks"
    );
    assert_eq!(trimmed_with(|a| a.pin([299], now)), 1);
    let two = |a: &LayerFile| {
        a.pin([299], now);
        a.pin([0], now);
    };
    assert_eq!(trimmed_with(two), 2, "one pin does not undo another");
    let day = PIN_TIME + Duration::from_secs(3600);
    assert_eq!(trimmed_with(|a| a.pin(0..CHUNKS, now - day)), 0, "over");
    assert_eq!(
        trimmed_with(|a| a.pin(0..CHUNKS, now + day)),
        0,
        "not to be"
    );
}

#[test]
fn who_finds_another_evicting_lets_it_do_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for name in ["a", "b", "c", "d"] {
        fill(&store, name, 3, |_| {});
    }
    let used = store.space().unwrap().used;
    let budget = used - (1 << 20);
    store.keep_within_bounds(Bounds {
        budget: Some(budget),
        free_floor: Some(0),
    });
    let file = store.open_layer(&index("a").blob_digest).unwrap().unwrap();
    let evictor = std::fs::File::open(dir.path().join("evict.lock")).unwrap();
    evictor.lock().unwrap();
    file.flush().unwrap();
    assert_eq!(store.space().unwrap().used, used);
    evictor.unlock().unwrap();
    file.flush().unwrap();
    assert!(store.space().unwrap().used <= budget);
    // Many at once evict the excess once: it, a sixteenth of the budget, an extent more.
    fill(&store, "a", 3, |_| {});
    let stores = [1, 2, 3].map(|_| Store::open(dir.path()).unwrap());
    let budget = store.space().unwrap().used - (1 << 20);
    let begin = Barrier::new(stores.len());
    std::thread::scope(|threads| {
        for store in &stores {
            threads.spawn(|| {
                store.keep_within_bounds(Bounds {
                    budget: Some(budget),
                    free_floor: Some(0),
                });
                let file = store.open_layer(&index("d").blob_digest).unwrap().unwrap();
                begin.wait();
                file.flush().unwrap();
            });
        }
    });
    let left = stores[0].space().unwrap().used;
    let least = budget - budget / 16 - (1 << 20);
    assert!(
        left <= budget && left >= least,
        "{least} <= {left} <= {budget}"
    );
}
