//! Several handles on one store in one process.

use std::collections::BTreeSet;
use std::sync::{Arc, Barrier};

use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::disk::CrashDisk;
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, put_chunk};

use crate::support::{CHUNKS, all, check, entries, fill, found, index};

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
