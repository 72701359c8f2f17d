//! The layer that all work on, and what is done to it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lazarette_fetcher::Result;
use lazarette_fetcher::index::ingest::LayerSink as _;
use lazarette_fetcher::index::{ChunkId, LayerIndex};
use lazarette_fetcher::store::{LayerFile, Store};
use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, layer_of, put_chunk};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// Enough that the bitmap has several words, the last one not full.
pub(crate) const CHUNKS: u32 = 300;
pub(crate) const BLOCK: u64 = 4096;
pub(crate) const KILLS: u64 = 20;

/// A layer of one file per chunk, with padding between them.
pub(crate) fn index(name: &str) -> LayerIndex {
    let payloads: Vec<Vec<u8>> = (0..CHUNKS).map(chunk_bytes).collect();
    layer_of(name, &payloads)
}

/// Longest wait for what a process has that is just being started.
const INHERITED_MAX: Duration = Duration::from_secs(60);

/// Evicts where an image was open until now. A process that another test is starting has all that
/// was open here until it has begun, so nobody may evict before.
#[track_caller]
pub(crate) fn soon<T>(mut evict: impl FnMut() -> Result<T>) -> T {
    let since = Instant::now();
    loop {
        match evict() {
            Ok(evicted) => return evicted,
            Err(error) => assert!(since.elapsed() < INHERITED_MAX, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whatever is present reads as it should; returns what is.
pub(crate) fn check(file: &LayerFile) -> BTreeSet<ChunkId> {
    let mut present = BTreeSet::new();
    for id in 0..CHUNKS {
        if read(file, id) {
            present.insert(id);
        }
    }
    present
}

/// Whether the chunk can be read; then it reads as it should.
pub(crate) fn read(file: &LayerFile, id: ChunkId) -> bool {
    let mut buf = vec![0xee; CHUNK_LEN as usize];
    let read = file.read_at(u64::from(id) * BLOCK, &mut buf).unwrap();
    assert!(
        !read || buf == chunk_bytes(id),
        "chunk {id} is present but wrong"
    );
    read
}

/// What a store opened now finds of a layer.
pub(crate) fn found(root: &Path, name: &str) -> BTreeSet<ChunkId> {
    let store = Store::open(root).unwrap();
    let file = store.open_layer(&index(name).blob_digest).unwrap();
    file.map(|file| check(&file)).unwrap_or_default()
}

pub(crate) fn all() -> BTreeSet<ChunkId> {
    (0..CHUNKS).collect()
}

pub(crate) fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// Fills the layer in an order of its own; reports each flush.
pub(crate) fn fill(store: &Arc<Store>, name: &str, seed: u64, mut flushed: impl FnMut(&[ChunkId])) {
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

pub(crate) fn ingest(store: &Arc<Store>, name: &str, halfway: impl FnOnce()) {
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

/// Reads, fills and evicts at random until told to stop; every read asserts its bytes.
pub(crate) fn disturb(file: &LayerFile, seed: u64, stop: &AtomicBool) {
    let mut rng = StdRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let id = rng.random_range(0..CHUNKS);
        if !read(file, id) {
            put_chunk(file, id).unwrap();
        }
    }
}

/// Tells the threads of a test to end when it goes, so a failed test ends too.
pub(crate) struct StopOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Evicts random chunks, many times, with flushes in between.
pub(crate) fn evict_at_random(file: &LayerFile, seed: u64, times: u32) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..times {
        let ids: Vec<ChunkId> = (0..150).map(|_| rng.random_range(0..CHUNKS)).collect();
        file.evict(&ids).unwrap();
        if rng.random_bool(0.3) {
            file.flush().unwrap();
        }
    }
}
