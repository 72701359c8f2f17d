//! Containers that read more than the store may hold, while `lazd` is killed.
//!
//! Promise: whatever is read is right, no read fails or hangs, and once `lazd` lives the store
//! takes no more than its budget, whatever those that were killed left in it.

use std::fs;
use std::io::Write as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lazarette_fetcher::store::{Bounds, LayerFile, Store};
use lazarette_fetcher::test_util::content::noise;
use lazarette_fetcher::test_util::layers::{layer_of, put_bytes};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use super::bed::{Bed, Readers, program};
use crate::support::is_root;
use crate::sys;

/// Longer than anything here takes: what fails by it is a failure.
const PATIENT: &str = "2m";
/// Longest wait for what has to happen, on a machine that does much else.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// When `lazd` records what it fetched, and some more.
const RECORDED_WITHIN: Duration = Duration::from_secs(8);
/// Through FUSE, where mounted layers are evicted from.
const CROWDED: &str =
    "[snapshotter]\nfill = false\n[store]\nbudget = \"12m\"\nfree_floor = \"0\"\n";
const BUDGET: u64 = 12 << 20;
/// Large files are so much larger: all have some 45 MB.
const TIMES: usize = 20;
/// Times that `lazd` is killed, and how many of them pass until it is killed while it evicts.
const KILLS: u32 = 40;
const EVICTS_EACH: u32 = 4;
/// Through fanotify, where they are not, so that only what lies beside them gives way. It is
/// less than both have.
const CROWDED_ASKED: &str = "[mounts]\nbackend = \"fanotify\"\n[snapshotter]\nfill = false\n\
                             [store]\nbudget = \"20m\"\nfree_floor = \"0\"\n";
const BUDGET_ASKED: u64 = 20 << 20;
/// Large files are so much larger there: mounted layers have some 14 MB.
const TIMES_ASKED: usize = 6;
/// What lies beside them, of a layer, and how many there are.
const BESIDE_BYTES: usize = 5 << 20;
const BESIDE: u8 = 3;
/// After each of them. A disk that is written to all the time has none for others, and is slowed
/// down for it where it is rented.
const BESIDE_PAUSE: Duration = Duration::from_millis(50);
/// Nodes with layers of which nothing is there, and how often `lazd` is killed on each at most.
const BATCHES: u32 = 3;
const KILLS_MAX: u32 = 15;

/// The number of evictions in a store, whoever made them.
fn evictions(bed: &Bed) -> u64 {
    let bytes = fs::read(bed.path().join("root/evictions")).unwrap_or_default();
    bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n))
}

/// Waits until something is evicted that is there now, while readers read.
fn wait_for_eviction(bed: &Bed) {
    let (before, since) = (evictions(bed), Instant::now());
    while evictions(bed) == before {
        std::thread::sleep(Duration::from_millis(1));
        assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
    }
}

/// Bytes of the device that data files take.
fn on_disk(bed: &Bed) -> u64 {
    let layers = fs::read_dir(bed.path().join("root/layers")).unwrap();
    let data = layers.map(|layer| layer.unwrap().path().join("data"));
    data.map(|path| sys::blocks_of(&path) * 512).sum()
}

/// Waits until the store is within its budget. That is seen to when what was fetched last is
/// recorded, by one at a time: whoever comes meanwhile leaves it to the next, which `prompt`
/// brings about.
fn wait_for_budget(bed: &Bed, budget: u64, prompt: impl Fn()) {
    let (since, mut prompted) = (Instant::now(), Instant::now());
    while on_disk(bed) > budget {
        let late = since.elapsed() > WAIT_MAX;
        assert!(!late, "{} bytes: {}", on_disk(bed), bed.files.log());
        std::thread::sleep(Duration::from_millis(20));
        if prompted.elapsed() > RECORDED_WITHIN {
            prompt();
            prompted = Instant::now();
        }
    }
}

/// What `laz store` says, which must be that all is well.
fn laz_store(bed: &Bed, args: &[&str]) -> Value {
    let mut laz = Command::new(program("laz"));
    laz.arg("--config").arg(bed.path().join("config.toml"));
    let said = laz.args(["--output", "json", "store"]).args(args).output();
    let said = said.unwrap();
    assert!(said.status.success(), "{args:?}: {said:?}");
    serde_json::from_slice(&said.stdout).unwrap()
}

/// Nobody writes any more: what the store says of itself is so.
fn assert_sound(bed: &Bed, budget: u64) {
    let checked = laz_store(bed, &["check"]);
    for layer in checked["layers"].as_array().unwrap() {
        assert_eq!(layer["dropped_chunks"], 0, "{checked}");
    }
    let on_disk = on_disk(bed);
    let df = laz_store(bed, &["df", "--summary"]);
    let used = df["used_bytes"].as_u64().unwrap();
    assert_eq!(used, on_disk, "{df}");
    assert!(used <= budget, "{df}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_lazd_is_killed_while_it_evicts_what_a_container_reads() {
    if !is_root("privileged_lazd_is_killed_while_it_evicts_what_a_container_reads") {
        return;
    }
    let mut bed = Bed::sized(PATIENT, CROWDED, TIMES).await;
    let mounted = bed.mounts();
    let seed = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    let _ = writeln!(std::io::stderr(), "seed {seed}");
    bed.start_lazd(&program("lazd"));
    let readers = Readers::start(&bed.files, 3);
    for kill in 0..KILLS {
        let mut soon = Duration::from_millis(rng.random_range(0..200));
        if kill % EVICTS_EACH == 0 {
            // The number goes up before holes are made.
            wait_for_eviction(&bed);
            soon /= 20;
        }
        std::thread::sleep(soon);
        bed.kill_lazd();
        bed.start_lazd(&program("lazd"));
    }
    readers.wait_for(100);
    let said = format!("{} evictions, {} reads", evictions(&bed), readers.right());
    let _ = writeln!(std::io::stderr(), "{KILLS} kills, {said}");
    assert_eq!(readers.failed(), 0, "{}", bed.files.log());
    readers.end();
    bed.files.read_all();
    assert_eq!(bed.mounts(), mounted);
    wait_for_budget(&bed, BUDGET, || bed.files.read_all());
    bed.stop_lazd();
    assert_sound(&bed, BUDGET);
}

/// Somebody else who fills the store with layers that nobody has mounted: of the very bytes of
/// the mounted ones, so that they are copied from where they go.
struct Crowding {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Arc<LayerFile>>>,
}

impl Crowding {
    fn start(bed: &Bed) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let (stopped, files) = (Arc::clone(&stop), Arc::clone(&bed.files));
        let store = Store::open(bed.path().join("root")).unwrap();
        store.keep_within_bounds(Bounds {
            budget: Some(BUDGET_ASKED),
            free_floor: Some(0),
        });
        let shared = files.pieces(BESIDE_BYTES / 4);
        let layers = (0..BESIDE).map(|number: u8| {
            let mut pieces = noise(number.into(), 0xff, BESIDE_BYTES * 3 / 4);
            pieces.iter_mut().for_each(|byte| *byte |= 1);
            let own = pieces.chunks(64 << 10).map(<[u8]>::to_vec);
            own.chain(shared.clone()).collect::<Vec<_>>()
        });
        let layers: Vec<_> = layers.collect();
        let crowd = move || {
            let mut layers = (0..).zip(&layers).cycle();
            loop {
                let (number, payloads) = layers.next().unwrap();
                let name = format!("beside {number}");
                let file = store.create_layer(layer_of(&name, payloads)).unwrap();
                for (id, payload) in (0..).zip(payloads) {
                    put_bytes(&file, id, payload.clone()).unwrap();
                }
                file.flush().unwrap();
                for (chunk, right) in file.index().chunks.iter().zip(payloads) {
                    let mut read = vec![0; right.len()];
                    let is_there = file.read_at(chunk.data_offset, &mut read).unwrap();
                    assert!(!is_there || read == *right, "wrong bytes in {name}");
                }
                if stopped.load(Ordering::Relaxed) {
                    return file;
                }
                std::thread::sleep(BESIDE_PAUSE);
            }
        };
        let thread = Some(std::thread::spawn(crowd));
        Self { stop, thread }
    }

    /// Ends it; one of its layers.
    fn end(mut self) -> Arc<LayerFile> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Crowding {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_lazd_is_killed_while_what_lies_beside_an_asking_layer_is_evicted() {
    if !is_root("privileged_lazd_is_killed_while_what_lies_beside_an_asking_layer_is_evicted") {
        return;
    }
    let seed = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    let _ = writeln!(std::io::stderr(), "seed {seed}");
    let (mut kills, mut missing) = (0, 0);
    for _ in 0..BATCHES {
        let mut bed = Bed::sized(PATIENT, CROWDED_ASKED, TIMES_ASKED).await;
        let mounted = bed.mounts();
        let crowding = Crowding::start(&bed);
        let readers = Readers::start(&bed.files, 3);
        for _ in 0..KILLS_MAX {
            bed.start_lazd(&program("lazd"));
            std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
            bed.kill_lazd();
            kills += 1;
            missing += u32::from(!bed.store().is_complete());
        }
        bed.start_lazd(&program("lazd"));
        bed.files.read_all();
        wait_for_eviction(&bed);
        readers.wait_for(20);
        assert_eq!(readers.failed(), 0, "{}", bed.files.log());
        let beside = crowding.end();
        readers.end();
        assert!(!bed.store().evict(), "the kernel may read it at any time");
        assert_eq!(bed.mounts(), mounted);
        bed.files.read_all();
        wait_for_budget(&bed, BUDGET_ASKED, || beside.flush().unwrap());
        bed.stop_lazd();
        assert_sound(&bed, BUDGET_ASKED);
    }
    let said = format!("{kills} kills, {missing} with something missing");
    let _ = writeln!(std::io::stderr(), "{said}");
}
