//! One store used by several at once: two handles in a process, several processes, and
//! processes that are killed.
//!
//! The tests run this binary again as children, which work on the store until they are
//! done or killed and say what they were promised; the parent looks at what is left.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, SystemTime};

use lazarette_fetcher::Error;
use lazarette_fetcher::index::ingest::LayerSink as _;
use lazarette_fetcher::index::{ChunkId, LayerIndex};
use lazarette_fetcher::store::{Bounds, LayerFile, PIN_TIME, Store};
use lazarette_fetcher::test_util::disk::CrashDisk;
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, layer_of, put_chunk};
use lazarette_fetcher::types::Digest;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

const DIR: &str = "LAZARETTE_SHARED_STORE_DIR";
const WORK: &str = "LAZARETTE_SHARED_STORE_WORK";
const SEED: &str = "LAZARETTE_SHARED_STORE_SEED";

/// Enough that the bitmap has several words, the last one not full.
const CHUNKS: u32 = 300;
const BLOCK: u64 = 4096;
const KILLS: u64 = 20;

/// A layer of one file per chunk, with padding between them.
fn index(name: &str) -> LayerIndex {
    let payloads: Vec<Vec<u8>> = (0..CHUNKS).map(chunk_bytes).collect();
    layer_of(name, &payloads)
}

/// Whatever is present reads as it should; returns what is.
fn check(file: &LayerFile) -> BTreeSet<ChunkId> {
    let mut present = BTreeSet::new();
    for id in 0..CHUNKS {
        if read(file, id) {
            present.insert(id);
        }
    }
    present
}

/// Whether the chunk can be read; then it reads as it should.
fn read(file: &LayerFile, id: ChunkId) -> bool {
    let mut buf = vec![0xee; CHUNK_LEN as usize];
    let read = file.read_at(u64::from(id) * BLOCK, &mut buf).unwrap();
    assert!(
        !read || buf == chunk_bytes(id),
        "chunk {id} is present but wrong"
    );
    read
}

/// What a store opened now finds of a layer.
fn found(root: &Path, name: &str) -> BTreeSet<ChunkId> {
    let store = Store::open(root).unwrap();
    let file = store.open_layer(&index(name).blob_digest).unwrap();
    file.map(|file| check(&file)).unwrap_or_default()
}

fn all() -> BTreeSet<ChunkId> {
    (0..CHUNKS).collect()
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// Fills the layer in an order of its own; reports each flush.
fn fill(store: &Arc<Store>, name: &str, seed: u64, mut flushed: impl FnMut(&[ChunkId])) {
    let file = store.create_layer(index(name)).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<ChunkId> = (0..CHUNKS).collect();
    order.shuffle(&mut rng);
    let mut rest = &order[..];
    while !rest.is_empty() {
        let (batch, tail) = rest.split_at(rng.random_range(1..=rest.len().min(20)));
        for id in batch {
            put_chunk(&file, *id).unwrap();
        }
        file.flush().unwrap();
        flushed(batch);
        rest = tail;
    }
}

#[test]
fn a_flush_merges_what_others_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        Store::open(dir.path()).unwrap(),
        Store::open(dir.path()).unwrap(),
    );
    let digest = index("shared").blob_digest;
    let first = a.create_layer(index("shared")).unwrap();
    let second = b.open_layer(&digest).unwrap().unwrap();
    put_chunk(&first, 1).unwrap();
    first.flush().unwrap();
    put_chunk(&second, 299).unwrap();
    second.flush().unwrap();
    assert_eq!(check(&second), [1, 299].into());
    assert_eq!(check(&first), [1].into(), "it has not looked yet");
    put_chunk(&first, 64).unwrap();
    first.flush().unwrap();
    for file in [&*first, &*a.open_layer(&digest).unwrap().unwrap()] {
        assert_eq!(check(file), [1, 64, 299].into());
        assert_eq!(file.present_bytes(), 3 * u64::from(CHUNK_LEN));
    }
    assert_eq!(found(dir.path(), "shared"), [1, 64, 299].into());
}

#[test]
fn two_stores_of_one_process_fill_one_layer_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|seed| (seed, Store::open(dir.path()).unwrap()));
    let begin = Barrier::new(2);
    std::thread::scope(|threads| {
        for (seed, store) in &stores {
            threads.spawn(|| {
                begin.wait();
                let mut acked = BTreeSet::new();
                fill(store, "shared", *seed, |batch| {
                    acked.extend(batch);
                    let now = found(dir.path(), "shared");
                    assert!(acked.is_subset(&now), "what one flushed, the other dropped");
                });
            });
        }
    });
    for (_, store) in &stores {
        let file = store.open_layer(&index("shared").blob_digest).unwrap();
        assert!(file.unwrap().is_complete());
    }
    assert_eq!(found(dir.path(), "shared"), all());
}

#[test]
fn removal_while_another_handle_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, other) = (
        Store::open(dir.path()).unwrap(),
        Store::open(dir.path()).unwrap(),
    );
    let digest = index("shared").blob_digest;
    for round in 0..30 {
        let held = other.create_layer(index("shared")).unwrap();
        let begin = Barrier::new(2);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                begin.wait();
                for id in 0..20 {
                    put_chunk(&held, id).unwrap();
                    held.flush().unwrap();
                }
            });
            begin.wait();
            assert!(mine.remove_layer(&digest).unwrap());
            let again = mine.create_layer(index("shared")).unwrap();
            put_chunk(&again, 200 + round).unwrap();
            again.flush().unwrap();
        });
        // The flushes of the old layer went nowhere near the new one.
        assert_eq!(found(dir.path(), "shared"), [200 + round].into());
        assert_eq!(check(&held).len(), 20, "an open layer stays readable");
        assert!(mine.remove_layer(&digest).unwrap());
        drop(held);
        assert_eq!(entries(&dir.path().join("layers")), 0);
        assert_eq!(entries(&dir.path().join("trash")), 0);
        // This process' other store still names the removed layer until nobody holds it.
        assert!(other.open_layer(&digest).unwrap().is_none());
    }
}

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

/// Reads, fills and evicts at random until told to stop; every read asserts its bytes.
fn disturb(file: &LayerFile, seed: u64, stop: &AtomicBool) {
    let mut rng = StdRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let id = rng.random_range(0..CHUNKS);
        if !read(file, id) {
            put_chunk(file, id).unwrap();
        }
    }
}

/// Tells the threads of a test to end when it goes, so a failed test ends too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Evicts random chunks, many times, with flushes in between.
fn evict_at_random(file: &LayerFile, seed: u64, times: u32) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..times {
        let ids: Vec<ChunkId> = (0..150).map(|_| rng.random_range(0..CHUNKS)).collect();
        file.evict(&ids).unwrap();
        if rng.random_bool(0.3) {
            file.flush().unwrap();
        }
    }
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
    drop(evictor);
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

#[test]
fn a_check_drops_what_is_not_right_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    fill(&store, "shared", 3, |_| {});
    let blobs = [&b"a manifest"[..], b"a config"];
    for blob in blobs {
        store.put_blob(&Digest::sha256(blob), blob).unwrap();
    }
    let digest = index("shared").blob_digest;
    let path = dir.path().join("layers").join(digest.file_name());
    let data = std::fs::File::options().write(true).open(path.join("data"));
    data.unwrap()
        .write_all_at(&[0xff; 3], 9 * BLOCK + 17)
        .unwrap();
    let blob = dir.path().join("content");
    let blob = blob.join(Digest::sha256(blobs[1]).file_name());
    std::fs::write(blob, b"a c0nfig").unwrap();
    let found = store.check().unwrap();
    let (of, layer) = &found.layers[0];
    let layer = layer.as_ref().unwrap();
    assert_eq!((*of, &layer.dropped[..]), (digest, &[9][..]));
    assert_eq!(layer.chunks, u64::from(CHUNKS));
    assert_eq!(found.blobs.right, 1);
    assert_eq!(found.blobs.dropped, [Digest::sha256(blobs[1])]);
    let again = store.check().unwrap();
    let layer = again.layers[0].1.as_ref().unwrap();
    assert!(layer.dropped.is_empty() && again.blobs.dropped.is_empty());
    assert_eq!(layer.chunks, u64::from(CHUNKS) - 1);
    // A record that is lost is said to be.
    drop(store);
    std::fs::write(path.join("bitmap"), b"LAZ").unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(
        store.check().unwrap().layers[0]
            .1
            .as_ref()
            .unwrap()
            .bitmap_lost
    );
    assert!(
        !store.check().unwrap().layers[0]
            .1
            .as_ref()
            .unwrap()
            .bitmap_lost
    );
}

#[test]
fn a_damaged_blob_is_dropped_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let bytes = b"a manifest";
    let digest = Digest::sha256(bytes);
    let damages: [&[u8]; 4] = [b"a manifesT", b"a manifes", b"", b"a manifest and more"];
    for damage in damages {
        store.put_blob(&digest, bytes).unwrap();
        let path = dir.path().join("content").join(digest.file_name());
        std::fs::write(&path, damage).unwrap();
        assert_eq!(store.get_blob(&digest).unwrap(), None);
        assert!(!path.exists() && store.blobs().unwrap().is_empty());
        assert!(!store.remove_blob(&digest).unwrap());
    }
    store.put_blob(&digest, bytes).unwrap();
    assert_eq!(
        store.get_blob(&digest).unwrap().as_deref(),
        Some(&bytes[..])
    );
}

#[test]
fn a_damaged_layer_is_filled_again_or_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir
        .path()
        .join("layers")
        .join(index("torn").blob_digest.file_name());
    let half = |name: &str| {
        let bytes = std::fs::read(path.join(name)).unwrap();
        std::fs::write(path.join(name), &bytes[..bytes.len() / 2]).unwrap();
    };
    let flip = |name: &str| {
        let mut bytes = std::fs::read(path.join(name)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(path.join(name), &bytes).unwrap();
    };
    let gone = |name: &str| std::fs::remove_file(path.join(name)).unwrap();
    // The file, what happens to it, and whether the layer opens then.
    type Row<'a> = (&'static str, &'a dyn Fn(&str), bool);
    let table: [Row<'_>; 7] = [
        ("bitmap", &half, true),
        ("bitmap", &flip, true),
        ("bitmap", &gone, true),
        ("index", &half, false),
        ("index", &flip, false),
        ("index", &gone, false),
        ("data", &half, false),
    ];
    for (name, damage, opens) in table {
        let store = Store::open(dir.path()).unwrap();
        fill(&store, "torn", 7, |_| {});
        drop(store);
        assert_eq!(found(dir.path(), "torn"), all());
        damage(name);
        let store = Store::open(dir.path()).unwrap();
        match store.open_layer(&index("torn").blob_digest) {
            Ok(file) => {
                assert!(opens, "{name}");
                assert_eq!(check(&file.unwrap()), BTreeSet::new());
            }
            Err(error) => {
                assert!(
                    !opens && matches!(error, Error::Malformed { .. }),
                    "{error}"
                );
                let listed = store.layers().unwrap();
                assert!(listed.iter().all(|(_, usage)| usage.is_err()), "{name}");
            }
        }
        fill(&store, "torn", 8, |_| {});
        assert_eq!(found(dir.path(), "torn"), all(), "{name}");
    }
}

#[test]
fn opening_and_listing_layers_changes_nothing_on_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
    for name in ["one", "two", "three"] {
        let file = store.create_layer(index(name)).unwrap();
        put_chunk(&file, 3).unwrap();
        file.flush().unwrap();
    }
    drop(store);
    let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
    let before = disk.ops();
    for _ in 0..2 {
        let layers = store.layers().unwrap();
        assert_eq!(layers.len(), 3);
        for (digest, usage) in layers {
            let usage = usage.unwrap();
            assert_eq!(usage.present, u64::from(CHUNK_LEN));
            assert_eq!(usage.total, u64::from(CHUNKS * CHUNK_LEN));
            assert!(store.open_layer(&digest).unwrap().is_some());
        }
    }
    assert_eq!(disk.ops(), before);
    // A flush promises that the layer is there after a crash, so it must ask once.
    let file = store
        .open_layer(&index("one").blob_digest)
        .unwrap()
        .unwrap();
    file.flush().unwrap();
    assert_eq!(
        disk.ops(),
        before + 2,
        "the layer's directory and its parent"
    );
    file.flush().unwrap();
    file.settle().unwrap();
    assert_eq!(disk.ops(), before + 2);
}

/// What the children do; see [`work`].
#[test]
#[ignore = "the child process of the tests below"]
fn child() {
    let var = |name| std::env::var(name).expect("the parent sets it");
    let seed = var(SEED).parse().unwrap();
    work(Path::new(&var(DIR)), &var(WORK), seed);
    eprintln!("end");
}

fn work(root: &Path, work: &str, seed: u64) {
    let store = Store::open(root).unwrap();
    let say = |batch: &[ChunkId]| eprintln!("flushed {batch:?}");
    match work {
        "fill" => fill(&store, "shared", seed, say),
        "evict" => {
            let file = store.open_layer(&index("shared").blob_digest);
            let file = file.unwrap().unwrap();
            let stop = AtomicBool::new(false);
            eprintln!("evicting");
            std::thread::scope(|threads| {
                threads.spawn(|| disturb(&file, seed + 1, &stop));
                let _stop = StopOnDrop(&stop);
                evict_at_random(&file, seed, 100);
            });
        }
        "ingest" => ingest(&store, "whole", || {
            eprintln!("begun");
            // Until the parent says so by closing its end.
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }),
        "everything" => {
            for n in 0_u32.. {
                let name = format!("whole{}", n % 3);
                ingest(&store, &name, || {});
                eprintln!("whole {name}");
                fill(&store, "shared", seed + u64::from(n), say);
                store.remove_layer(&index(&name).blob_digest).unwrap();
            }
        }
        other => panic!("unknown work {other}"),
    }
}

fn ingest(store: &Arc<Store>, name: &str, halfway: impl FnOnce()) {
    let index = index(name);
    let mut ingest = store.begin_ingest(&index.blob_digest).unwrap();
    for id in 0..CHUNKS {
        ingest
            .write_at(u64::from(id) * BLOCK, &chunk_bytes(id))
            .unwrap();
    }
    halfway();
    ingest.commit(index, &[]).unwrap();
}

/// A child and the lines it says.
struct Worker {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStderr>>,
}

impl Worker {
    fn start(root: &Path, work: &str, seed: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .args(["--test-threads", "1"])
            .env(DIR, root)
            .env(WORK, work)
            .env(SEED, seed.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next line; `None` at the end of its work.
    fn line(&mut self) -> Option<String> {
        let line = self.lines.next().expect("it says when it ends").unwrap();
        assert!(!line.contains("panicked"), "{line}");
        (line != "end").then_some(line)
    }

    fn finish(mut self) {
        drop(self.child.stdin.take());
        while self.line().is_some() {}
        assert!(self.child.wait().unwrap().success());
    }

    /// SIGKILL, wherever it is; returns what it had said before it died.
    fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut said = String::new();
        for line in self.lines {
            said.push_str(&line.unwrap());
            said.push('\n');
        }
        assert!(!said.contains("panicked"), "{said}");
        // A line cut short by the kill has not been said.
        said.lines().map(str::to_owned).collect()
    }
}

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

/// The ids in a line "flushed [1, 2]"; none in any other or in one cut short.
fn ids(line: &str) -> Vec<ChunkId> {
    let list = line.strip_prefix("flushed [");
    let list = list.and_then(|list| list.strip_suffix(']'));
    list.map(|list| list.split(", ").map(|id| id.parse().unwrap()).collect())
        .unwrap_or_default()
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
