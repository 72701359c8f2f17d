//! Crashes and failures of the store at every single operation.
//!
//! Each scenario runs once to count its operations, then once per operation and fault.
//! After a crash, several states that the device may be left in are opened and checked:
//! what is present hashes right, what was reported as recorded is there, nothing that
//! was being made is visible. The table of chunks is none of what the recorded operations
//! change: what is left of it is of any age, whole or torn; see `table`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod check;
mod layers;
mod learned;
mod scenarios;
mod table;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use lazarette_fetcher::store::{Bounds, Store};
use lazarette_fetcher::test_util::disk::{CrashDisk, Fault, scratch};
use lazarette_fetcher::test_util::layers::put_chunk;
use lazarette_fetcher::{Error, Result};

use crate::check::{check, check_layer};
use crate::layers::{CHUNKS, index};
use crate::scenarios::{Acked, SCENARIOS, Scenario, copy, fill_and_flush, ingest};
use crate::table::Left;

const SEEDS: u64 = 6;

/// Opens a store on `disk` and runs the scenario.
fn run(root: &Path, disk: &Arc<CrashDisk>, scenario: Scenario, acked: &mut Acked) -> Result<()> {
    let disk: Arc<CrashDisk> = Arc::clone(disk);
    table::make_small(root);
    scenario(&Store::open_on(root, disk)?, acked)
}

fn operations_of(scenario: Scenario) -> u64 {
    let dir = scratch();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    run(dir.path(), &disk, scenario, &mut Acked::default()).unwrap();
    disk.ops()
}

#[test]
fn a_crash_at_any_operation_leaves_nothing_wrong() {
    let (mut stale, mut right) = (0, 0);
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        assert!(ops > 5, "{name} does something");
        for at in 0..=ops {
            let dir = scratch();
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, Fault::Crash))));
            let mut acked = Acked::default();
            let result = run(dir.path(), &disk, scenario, &mut acked);
            // A crash while cleaning up after success or abort is not an error.
            assert!(
                disk.crashed() || at == ops && result.is_ok(),
                "{name} at {at}"
            );
            let mut taken = BTreeSet::new();
            for seed in 0..SEEDS {
                let after = scratch();
                disk.materialise(after.path(), seed).unwrap();
                let left = table::carry(dir.path(), after.path(), seed);
                let when = format!("{name}, op {at}/{ops}, {left:?}, seed {seed}");
                let chunks = check(after.path(), &acked, &when);
                if left == Left::AsItWas {
                    taken.insert(chunks);
                }
            }
            stale += usize::from(taken.len() > 1);
            right += usize::from(taken.iter().any(|chunks| *chunks > 0));
        }
    }
    // One table beside different states: true of one of them, and not of another.
    assert!(stale > 10 && right > 10, "{stale} {right}");
}

#[test]
fn a_failure_at_any_operation_loses_nothing() {
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        for at in 0..ops {
            for fault in [Fault::NoSpace, Fault::Io] {
                let when = format!("{name}, {fault:?} at {at}/{ops}");
                let dir = scratch();
                let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, fault))));
                let mut acked = Acked::default();
                let result = run(dir.path(), &disk, scenario, &mut acked);
                if let Err(error) = result {
                    let full = matches!(error, Error::NoSpace { .. });
                    assert_eq!(full, fault == Fault::NoSpace, "{when}: {error}");
                }
                // The same process goes on with the same disk, and crashes after that.
                let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
                let mut later = acked.clone();
                later.removed.clear();
                fill_and_flush(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
                drop(store);
                for seed in 0..3 {
                    let after = scratch();
                    disk.materialise(after.path(), seed).unwrap();
                    check(after.path(), &later, &format!("{when}, seed {seed}"));
                }
                check(dir.path(), &acked, &when);
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_from_any_operation_on_loses_nothing() {
    for (name, scenario) in SCENARIOS {
        let ops = operations_of(scenario);
        for at in 0..ops {
            let when = format!("{name}, full from {at}/{ops} on");
            let dir = scratch();
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, Fault::Full))));
            let mut acked = Acked::default();
            let result = run(dir.path(), &disk, scenario, &mut acked);
            if let Err(error) = &result {
                assert!(matches!(error, Error::NoSpace { .. }), "{when}: {error}");
            }
            // Nothing that was kept went, nothing half made came.
            for seed in 0..3 {
                let after = scratch();
                disk.materialise(after.path(), seed).unwrap();
                check(after.path(), &acked, &format!("{when}, seed {}", seed + 1));
            }
            // Then there is room again, for the same process.
            disk.relieve();
            let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
            let mut later = Acked::default();
            fill_and_flush(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
            ingest(&store, &mut later).unwrap_or_else(|e| panic!("{when}: {e}"));
            drop(store);
            check(dir.path(), &later, &when);
        }
    }
}

#[test]
fn a_copy_shares_blocks_and_survives_its_source() {
    let dir = scratch();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let mut acked = Acked::default();
    run(dir.path(), &disk, copy, &mut acked).unwrap();
    // The last one ends within its last block: it was written.
    assert_eq!((disk.shared(), acked.copied), (1, [2].into()));
}

#[test]
fn a_fill_on_a_full_disk_evicts_if_it_may() {
    let full_at = |ops, bounds: Option<Bounds>| {
        let dir = scratch();
        let disk = Arc::new(CrashDisk::new(dir.path(), Some((ops, Fault::NoSpace))));
        let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
        if let Some(bounds) = bounds {
            store.keep_within_bounds(bounds);
        }
        fill_and_flush(&store, &mut Acked::default()).unwrap();
        let file = store.create_layer(index("other")).unwrap();
        let before = disk.ops();
        let outcome = put_chunk(&file, 2);
        let lazy = store
            .open_layer(&index("lazy").blob_digest)
            .unwrap()
            .unwrap();
        (before, outcome, check_layer(&file), check_layer(&lazy))
    };
    let unbounded = Bounds {
        budget: None,
        free_floor: Some(0),
    };
    let (at, outcome, ..) = full_at(u64::MAX, None);
    outcome.unwrap();
    let (_, outcome, there, lazy) = full_at(at, None);
    assert!(matches!(outcome, Err(Error::NoSpace { .. })), "{outcome:?}");
    assert_eq!((there.len(), lazy.len()), (0, CHUNKS as usize));
    let (_, outcome, there, lazy) = full_at(at, Some(unbounded));
    outcome.unwrap();
    assert_eq!((there, lazy.len()), ([2].into(), 0));
}
