//! An eStargz of long members in the hands of processes that die: the first learns of the members
//! that it fetched, the next fetches inside them by what was learned.
//!
//! Promise: wherever one of them dies, finds the disk full or the device failing, what is present
//! then is right, what was recorded is there, and the next process reads every byte.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};

use lazarette_fetcher::index::write::{Options, write_layer};
use lazarette_fetcher::index::{ChunkId, FileKind};
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::store::disk::Disk;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::test_util::disk::{CrashDisk, Fault, scratch};
use lazarette_fetcher::types::{Descriptor, MediaType, Reference};
use lazarette_fetcher::{Error, Result};
use tokio::runtime::Runtime;

use crate::check::open_unsynced;

/// What starts read: a piece in the middle of each of two members.
const HOT: [ChunkId; 2] = [2, 6];
/// States that a device may be left in by a crash.
const SEEDS: u64 = 4;

/// Two files that are a member each, of five pieces.
struct Image {
    source: Arc<MemorySource>,
    request: LayerRequest,
    /// The data file, padding included.
    payload: Vec<u8>,
}

static IMAGE: LazyLock<Image> = LazyLock::new(|| {
    let files = [1, 2].map(|seed| noise(seed, 0x7f, 300 << 10));
    let tar = tar(&[("a", &files[0]), ("b", &files[1])]);
    let options = Options {
        chunk_bytes: 4 << 20,
        level: 6,
        ..Options::default()
    };
    let (mut blob, source) = (Vec::new(), MemorySource::new());
    let written = write_layer("x", &mut Cursor::new(tar), &mut blob, &options).unwrap();
    let size = blob.len() as u64;
    let digest = source.add_blob(blob);
    let mut layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
    let notes = written.annotations.into_iter();
    layer.annotations = notes.map(|(key, value)| (key.to_owned(), value)).collect();
    let reference = Reference::parse("example.com/a:b").unwrap();
    let repository = reference.repository().clone();
    Image {
        source: Arc::new(source),
        request: LayerRequest::new(repository, &layer, written.diff_id),
        payload: files.concat(),
    }
});

/// What must survive.
#[derive(Default)]
struct Acked {
    chunks: BTreeSet<ChunkId>,
    is_shaped: bool,
}

async fn open(store: &Arc<Store>) -> Result<Arc<Layer>> {
    let source = Arc::clone(&IMAGE.source) as Arc<dyn BlobSource>;
    let opener = LayerOpener::new(Arc::clone(store), source);
    let (layer, by) = opener.open(&IMAGE.request, &AtomicU64::new(0)).await?;
    assert_ne!(by, OpenedBy::Stream, "it is read in pieces");
    layer.set_foresight(false);
    Ok(layer)
}

fn all(layer: &Layer) -> Vec<ChunkId> {
    (0..).take(layer.index().chunks.len()).collect()
}

/// A process that starts on `disk`.
async fn lives<T>(
    (root, disk): (&Path, &Arc<CrashDisk>),
    life: impl AsyncFnOnce(&Arc<Store>) -> Result<T>,
) -> Result<T> {
    life(&Store::open_on(root, Arc::clone(disk) as Arc<dyn Disk>)?).await
}

/// Two starts, and what is learned between them; up to the first error.
async fn start_twice(on: (&Path, &Arc<CrashDisk>), acked: &mut Acked) -> Result<u64> {
    lives(on, async |store| {
        let layer = open(store).await?;
        layer.fill_chunks(&HOT, Priority::Profile).await?;
        layer.close().await?;
        acked.chunks.extend(all(&layer));
        // An entry that could not be noted is no error.
        acked.is_shaped = layer.file().shape(&HOT)?.is_some();
        Ok(())
    })
    .await?;
    lives(on, async |store| {
        acked.chunks.clear();
        store.evict_layers(None)?;
        let layer = open(store).await?;
        layer.fill_chunks(&HOT, Priority::Profile).await?;
        layer.close().await?;
        acked.chunks.extend(HOT);
        Ok(layer.counters().bytes_fetched)
    })
    .await
}

/// Bytes of the file that begins at `data_offset`, at `at` of the data file.
fn right(layer: &Layer, at: u64, len: usize) -> &'static [u8] {
    let mut before = 0;
    for file in &layer.index().files {
        if let FileKind::Regular { size, data_offset } = file.kind
            && size > 100_000
        {
            if (data_offset..data_offset + size).contains(&at) {
                let start = before + usize::try_from(at - data_offset).unwrap();
                return &IMAGE.payload[start..start + len];
            }
            before += usize::try_from(size).unwrap();
        }
    }
    panic!("nothing is at {at}");
}

/// Chunks of the two files that can be read, each compared.
fn present(layer: &Layer, when: &str) -> BTreeSet<ChunkId> {
    let mut present = BTreeSet::new();
    for (id, chunk) in (0..).zip(&layer.index().chunks) {
        let mut bytes = vec![0xee; chunk.len as usize];
        if layer.try_read(chunk.data_offset, &mut bytes).unwrap() {
            let is_right = bytes == right(layer, chunk.data_offset, bytes.len());
            assert!(is_right, "{when}: chunk {id}");
            present.insert(id);
        }
    }
    present
}

/// What the next process finds, and that it reads everything.
async fn check(store: Arc<Store>, acked: &Acked, when: &str) {
    let layer = open(&store).await;
    let layer = layer.unwrap_or_else(|error| panic!("{when}: {error}"));
    let found = present(&layer, when);
    assert!(acked.chunks.is_subset(&found), "{when}: {found:?}");
    let is_shaped = !layer.index().has_whole_members();
    assert!(is_shaped || !acked.is_shaped, "{when}: it was shaped");
    let all = all(&layer);
    let filled = layer.fill_chunks(&all, Priority::Profile).await;
    filled.unwrap_or_else(|error| panic!("{when}: {error}"));
    assert_eq!(present(&layer, when).len(), all.len(), "{when}");
    let dropped = layer.file().check_all().unwrap().dropped;
    assert_eq!(dropped, [0; 0], "{when}");
    layer.close().await.unwrap();
}

fn operations(runtime: &Runtime) -> u64 {
    let dir = scratch();
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let mut acked = Acked::default();
    let fetched = runtime.block_on(start_twice((dir.path(), &disk), &mut acked));
    assert!(acked.is_shaped);
    // Pieces came again, and not the members that they are of.
    let (fetched, all) = (fetched.unwrap(), IMAGE.request.blob.size);
    assert!(fetched < all * 3 / 4, "{fetched} of {all}");
    disk.ops()
}

#[test]
fn a_crash_at_any_operation_of_a_start_that_learns_leaves_nothing_wrong() {
    let runtime = Runtime::new().unwrap();
    for at in 0..=operations(&runtime) {
        let dir = scratch();
        let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, Fault::Crash))));
        let mut acked = Acked::default();
        // What is not needed for going on may fail without a word.
        let _ = runtime.block_on(start_twice((dir.path(), &disk), &mut acked));
        for seed in 0..SEEDS {
            let after = scratch();
            disk.materialise(after.path(), seed).unwrap();
            let store = open_unsynced(after.path()).unwrap();
            let when = format!("crash at {at}, seed {seed}");
            runtime.block_on(check(store, &acked, &when));
        }
    }
}

#[test]
fn a_failure_at_any_operation_of_a_start_that_learns_loses_nothing() {
    let runtime = Runtime::new().unwrap();
    for at in 0..operations(&runtime) {
        for fault in [Fault::NoSpace, Fault::Io, Fault::Full] {
            let when = format!("{fault:?} at {at}");
            let dir = scratch();
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, fault))));
            let mut acked = Acked::default();
            let result = runtime.block_on(start_twice((dir.path(), &disk), &mut acked));
            if let Err(error) = result {
                let is_full = matches!(error, Error::NoSpace { .. });
                assert_eq!(is_full, fault != Fault::Io, "{when}: {error}");
            }
            // It is a help, and what fails behind it may cost it.
            acked.is_shaped = false;
            let after = scratch();
            disk.materialise(after.path(), 1).unwrap();
            let store = open_unsynced(after.path()).unwrap();
            runtime.block_on(check(store, &acked, &format!("{when}, then a crash")));
            // The next process, on the same disk, which has room again.
            disk.relieve();
            let store = Store::open_on(dir.path(), Arc::clone(&disk) as Arc<_>).unwrap();
            runtime.block_on(check(store, &acked, &when));
        }
    }
}
