//! Bounds, and what is beyond them.

use super::*;
use crate::test_util::disk::{CrashDisk, Fault};
use crate::test_util::layers::{layer_of, put_bytes};

#[test]
fn the_excess_is_what_brings_the_store_within_both_bounds() {
    let space = |used, budget, free, free_floor| Space {
        used,
        budget,
        free,
        free_floor,
    };
    let table = [
        (space(100, None, 5, 0), 0),
        (space(160, Some(160), 5, 5), 0),
        (space(161, Some(160), 5, 5), 1 + 10),
        (space(100, None, 5, 32), 27 + 2),
        (space(200, Some(160), 0, 32), 50),
    ];
    for (space, excess) in table {
        assert_eq!(space.excess(), excess, "{space:?}");
    }
}

#[test]
fn the_usual_floor_is_a_gib_at_most() {
    let floor = |free_floor, total| {
        let budget = None;
        Bounds { budget, free_floor }.floor(total)
    };
    assert_eq!(floor(None, 1 << 40), 1 << 30);
    assert_eq!(floor(None, 10 << 30), 1 << 29);
    assert_eq!(floor(Some(0), 1 << 40), 0);
    assert_eq!(floor(Some(7), 1 << 40), 7);
    assert_eq!(floor(Some(1 << 41), 1 << 40), 1 << 40);
}

/// Two layers of which one is pinned, on a disk that fails once, at operation `fault`.
fn two_layers(root: &Path, fault: Option<u64>) -> (Arc<CrashDisk>, Arc<Store>) {
    let disk = CrashDisk::new(root, fault.map(|at| (at, Fault::Io)));
    let disk = Arc::new(disk);
    let store = Store::open_on(root, Arc::clone(&disk) as Arc<_>).unwrap();
    for name in ["free", "pinned"] {
        let payloads: Vec<_> = (1..=6).map(|byte| vec![byte; 400_000]).collect();
        let file = store.create_layer(layer_of(name, &payloads)).unwrap();
        for (id, bytes) in (0..).zip(payloads) {
            put_bytes(&file, id, bytes).unwrap();
        }
        file.flush().unwrap();
        if name == "pinned" {
            file.pin(0..6, SystemTime::now());
        }
    }
    (disk, store)
}

#[test]
fn an_eviction_that_fails_half_way_loses_nothing_of_the_policy() {
    // Room for half a layer: what is pinned is set aside, and then a part of it chosen.
    const LEFT: u64 = 1_200_000;
    let dir = tempfile::tempdir().unwrap();
    let (disk, store) = two_layers(dir.path(), None);
    let before = disk.ops();
    store.trim(LEFT).unwrap();
    let after = disk.ops();
    assert!(before < after);
    for fault in before..after {
        let dir = tempfile::tempdir().unwrap();
        let (_disk, store) = two_layers(dir.path(), Some(fault));
        // It may have gone on with others, or have been told nothing could be had.
        let failed = store.trim(LEFT);
        let trim = store.trim(0).unwrap();
        assert!(trim.kept.is_empty(), "{fault}: {trim:?}");
        assert_eq!(store.used().unwrap(), 0, "{fault}: {failed:?}, {trim:?}");
    }
}
