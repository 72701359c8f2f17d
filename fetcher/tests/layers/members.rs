//! eStargz whose chunks are long: members are verified whole, and what is learned of them
//! then brings later starts only what those read. Nothing that is wrong on the disk or comes
//! wrong is ever read.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::index::write::{Options, write_layer};
use lazarette_fetcher::index::{ChunkId, Encoding, FileKind};
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::{Shaped, Store};
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::test_util::{FaultySource, MemorySource, ReadFault};
use lazarette_fetcher::types::{ByteRange, Descriptor, MediaType, Reference};
use proptest::prelude::*;

const MIB: usize = 1 << 20;
/// Pieces of a member.
const PIECE: usize = 64 << 10;

struct World {
    source: Arc<FaultySource<MemorySource>>,
    dir: tempfile::TempDir,
}

/// A layer, and what its files are.
struct Image {
    request: LayerRequest,
    files: Vec<(String, Vec<u8>)>,
}

impl World {
    fn new() -> Self {
        Self {
            source: Arc::new(FaultySource::scripted(MemorySource::new(), [])),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// An eStargz of these files in chunks of 4 MiB.
    fn image(&self, files: Vec<(String, Vec<u8>)>) -> Image {
        let named = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), &bytes[..]));
        let tar = tar(&named.collect::<Vec<_>>());
        let options = Options {
            chunk_bytes: 4 << 20,
            level: 6,
            ..Options::default()
        };
        let mut blob = Vec::new();
        let written = write_layer("x", &mut Cursor::new(tar), &mut blob, &options).unwrap();
        let size = blob.len() as u64;
        let digest = self.source.inner().add_blob(blob);
        let mut layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let notes = written.annotations.into_iter();
        layer.annotations = notes.map(|(key, value)| (key.to_owned(), value)).collect();
        let reference = Reference::parse("example.com/a:b").unwrap();
        let repository = reference.repository().clone();
        let request = LayerRequest::new(repository, &layer, written.diff_id);
        Image { request, files }
    }

    /// A large file between small ones.
    fn usual(&self) -> Image {
        self.image(vec![
            ("a".to_owned(), noise(1, 0x7f, 3000)),
            ("b".to_owned(), noise(2, 0x7f, 5 * MIB + 77)),
            ("c".to_owned(), noise(3, 0x7f, 100_000)),
        ])
    }

    /// The layer as a process sees it that begins now.
    async fn open(&self, image: &Image) -> (Arc<Store>, Arc<Layer>) {
        let store = Store::open(self.dir.path()).unwrap();
        let source = Arc::clone(&self.source) as Arc<dyn BlobSource>;
        let opener = LayerOpener::new(Arc::clone(&store), source);
        let opened = opener.open(&image.request, &AtomicU64::new(0)).await;
        let (layer, by) = opened.unwrap();
        assert_ne!(by, OpenedBy::Stream);
        // Only what is asked for comes: its bytes are counted.
        layer.set_foresight(false);
        (store, layer)
    }

    fn path(&self, image: &Image, name: &str) -> PathBuf {
        let layers = self.dir.path().join("layers");
        layers
            .join(image.request.blob.digest.file_name())
            .join(name)
    }

    /// A start that reads `hot` is learnt, and all bytes are evicted.
    async fn learn(&self, image: &Image, hot: &[ChunkId]) -> Option<Shaped> {
        let (store, layer) = self.open(image).await;
        image.assert_reads(&layer, hot).await;
        layer.close().await.unwrap();
        let shaped = layer.file().shape(hot).unwrap();
        store.evict_layers(None).unwrap();
        shaped
    }
}

impl Image {
    /// Bytes that chunk `id` should have.
    fn bytes(&self, layer: &Layer, id: ChunkId) -> Vec<u8> {
        let chunk = &layer.index().chunks[id as usize];
        for file in &layer.index().files {
            if let FileKind::Regular { size, data_offset } = file.kind
                && (data_offset..data_offset + size).contains(&chunk.data_offset)
            {
                let name = String::from_utf8(file.path.clone()).unwrap();
                let bytes = &self.files.iter().find(|(path, _)| *path == name).unwrap().1;
                let at = usize::try_from(chunk.data_offset - data_offset).unwrap();
                return bytes[at..at + chunk.len as usize].to_vec();
            }
        }
        panic!("chunk {id} is in no file");
    }

    /// Reads chunks one after another, as one who prefetches would; nothing comes along.
    async fn assert_reads(&self, layer: &Layer, ids: &[ChunkId]) {
        for id in ids {
            let chunk = layer.index().chunks[*id as usize].clone();
            let mut bytes = vec![0; chunk.len as usize];
            while !layer.try_read(chunk.data_offset, &mut bytes).unwrap() {
                layer.fill_chunks(&[*id], Priority::Profile).await.unwrap();
            }
            assert!(bytes == self.bytes(layer, *id), "chunk {id}");
        }
    }
}

fn all(layer: &Layer) -> Vec<ChunkId> {
    (0..u32::try_from(layer.index().chunks.len()).unwrap()).collect()
}

/// Chunks that are pieces of members which are verified whole.
fn whole(layer: &Layer) -> usize {
    let chunks = layer.index().chunks.iter();
    let whole = |chunk: &&_| {
        let chunk: &lazarette_fetcher::index::Chunk = chunk;
        matches!(chunk.encoding, Encoding::WholeMember { .. })
    };
    chunks.filter(whole).count()
}

/// Three pieces in the middle of the large file, of two members.
const HOT: [ChunkId; 3] = [30, 31, 75];

#[tokio::test]
async fn later_starts_fetch_what_they_read() {
    let world = World::new();
    let image = world.usual();
    let (_store, layer) = world.open(&image).await;
    assert_eq!(whole(&layer), (5 * MIB + 77).div_ceil(PIECE));
    image.assert_reads(&layer, &HOT).await;
    // Who waits for a piece goes on while others of its member are still being written.
    layer.close().await.unwrap();
    let first = layer.counters().bytes_fetched;
    assert!(first > 4 * MIB as u64, "{first}");
    // Two requests brought all of two members.
    let present = all(&layer)
        .into_iter()
        .filter(|id| layer.file().is_present(*id));
    assert_eq!(present.count(), whole(&layer));
    drop((_store, layer));

    let shaped = world.learn(&image, &HOT).await.unwrap();
    assert!(shaped.before_bytes > 4 * MIB as u64, "{shaped:?}");
    assert_eq!(
        world.learn(&image, &HOT).await,
        None,
        "it is shaped already"
    );
    let (_store, layer) = world.open(&image).await;
    assert_eq!(whole(&layer), 0);
    layer.fill_chunks(&HOT, Priority::Profile).await.unwrap();
    image.assert_reads(&layer, &HOT).await;
    let again = layer.counters().bytes_fetched;
    assert_eq!(again, shaped.after_bytes);
    assert!(again < 8 * PIECE as u64, "{again}");
    let len = std::fs::metadata(world.path(&image, "index"))
        .unwrap()
        .len();
    assert_eq!(len, shaped.index_bytes);
    assert!(len <= image.request.blob.size / 50);

    let others: Vec<ChunkId> = all(&layer).into_iter().rev().collect();
    image.assert_reads(&layer, &others).await;
    let check = layer.file().check_all().unwrap();
    assert_eq!((check.dropped.len(), layer.file().is_complete()), (0, true));
}

#[tokio::test]
async fn a_check_takes_out_entries_that_are_wrong_and_leaves_the_rest() {
    let world = World::new();
    let image = world.usual();
    let (_store, layer) = world.open(&image).await;
    image.assert_reads(&layer, &HOT).await;
    layer.close().await.unwrap();
    drop((_store, layer));
    let path = world.path(&image, "entries");
    let right = std::fs::read(&path).unwrap();
    let record = |id: ChunkId| 16 * id as usize..16 * (id as usize + 1);
    let mut damaged = right.clone();
    damaged[record(HOT[0])][3] ^= 0x40;
    // Of one that was never decoded.
    damaged[record(0)][0] = 1;
    std::fs::write(&path, &damaged).unwrap();
    let (store, layer) = world.open(&image).await;
    let check = || store.check().unwrap().layers.remove(0).1.unwrap();
    let found = check();
    assert_eq!(
        (&found.damaged_files[..], found.dropped.len()),
        (&["entries"][..], 0)
    );
    let mut expected = right;
    expected[record(HOT[0])].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_eq!(check().damaged_files, Vec::<&str>::new());
    // One of another length is no such file.
    std::fs::write(&path, &expected[1..]).unwrap();
    assert_eq!(check().damaged_files, ["entries"]);
    assert!(!path.exists());
    image.assert_reads(&layer, &all(&layer)).await;
}

#[tokio::test]
async fn a_member_comes_once_however_many_want_pieces_of_it() {
    let world = World::new();
    let image = world.usual();
    let (_store, layer) = world.open(&image).await;
    let profile = [[10, 20], [30, 40], [50, 60]];
    let profile = profile
        .iter()
        .map(|ids| layer.fill_chunks(ids, Priority::Profile));
    let place = |id: usize| {
        let chunk = &layer.index().chunks[id];
        ByteRange::at(chunk.data_offset, u64::from(chunk.len)).unwrap()
    };
    let readers = [11, 21, 31].map(|id| layer.fill(place(id)));
    let all = futures_util::future::join(
        futures_util::future::join_all(profile),
        futures_util::future::join_all(readers),
    );
    let (profile, readers) = all.await;
    assert!(profile.iter().chain(&readers).all(Result::is_ok));
    let fetched = layer.counters().bytes_fetched;
    assert!(fetched <= image.request.blob.size, "{fetched}");
}

#[tokio::test]
async fn another_layer_has_the_same_member() {
    let world = World::new();
    let large = || ("b".to_owned(), noise(2, 0x7f, 3 * MIB));
    let first = world.image(vec![large()]);
    let second = world.image(vec![("z".to_owned(), noise(5, 0x7f, 9000)), large()]);
    let (store, layer) = world.open(&first).await;
    image_complete(&first, &layer).await;
    drop((store, layer));
    let (_store, layer) = world.open(&second).await;
    let ids = all(&layer);
    second.assert_reads(&layer, &ids).await;
    layer.close().await.unwrap();
    let counted = layer.counters();
    assert!(counted.bytes_fetched < 20_000, "{counted:?}");
    assert!(counted.bytes_copied > 2 * MIB as u64, "{counted:?}");
    assert_eq!(layer.file().check_all().unwrap().dropped.len(), 0);
}

async fn image_complete(image: &Image, layer: &Layer) {
    image.assert_reads(layer, &all(layer)).await;
    layer.close().await.unwrap();
}

#[tokio::test]
async fn wrong_bytes_are_never_read() {
    let world = World::new();
    let image = world.usual();
    let (_store, layer) = world.open(&image).await;
    // Once is asked again, twice is an error.
    world.source.script(Some(ReadFault::WrongBytes));
    image.assert_reads(&layer, &HOT[..1]).await;
    assert_eq!(layer.counters().chunks_corrupt, 1);
    world.source.script(Some(ReadFault::WrongBytes));
    world.source.script(Some(ReadFault::WrongBytes));
    let refused = layer.fill_chunks(&HOT[2..], Priority::Profile).await;
    assert!(refused.is_err());
    assert!(!layer.file().is_present(HOT[2]));
    image.assert_reads(&layer, &HOT).await;
}

/// A member, and later the pieces of it, over connections that break or end early, wherever they do.
#[tokio::test]
async fn connections_that_break_cost_nobody_right_bytes() {
    for at in [0, 40_000] {
        for fault in [ReadFault::Short(at), ReadFault::Truncated(at)] {
            let world = World::new();
            let image = world.usual();
            for is_first in [true, false] {
                let (_store, layer) = world.open(&image).await;
                assert_eq!(whole(&layer) > 0, is_first);
                world.source.script(Some(fault));
                // Whether it is tried again or is an error, nothing wrong is there.
                let filled = layer.fill_chunks(&HOT, Priority::Profile).await;
                let is_present = |id: &ChunkId| layer.file().is_present(*id);
                let is_whole = HOT.iter().all(is_present);
                assert!(filled.is_err() || is_whole, "{fault:?}");
                let there: Vec<_> = all(&layer).into_iter().filter(is_present).collect();
                image.assert_reads(&layer, &there).await;
                image.assert_reads(&layer, &HOT).await;
                layer.close().await.unwrap();
                drop((_store, layer));
                world.learn(&image, &HOT).await;
            }
        }
    }
}

/// What rots while the bytes that it speaks of are there: they are fetched again, and it is
/// learned anew.
#[tokio::test]
async fn what_rots_beside_bytes_that_are_there_is_learned_again() {
    let world = World::new();
    let image = world.usual();
    let (_store, layer) = world.open(&image).await;
    image.assert_reads(&layer, &HOT).await;
    layer.close().await.unwrap();
    drop((_store, layer));
    let path = world.path(&image, "learned");
    let right = std::fs::read(&path).unwrap();
    for id in [HOT[0], HOT[2]] {
        for bit in [0, 255] {
            let mut bad = right.clone();
            bad[32 * id as usize + bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bad).unwrap();
            let (_store, layer) = world.open(&image).await;
            let mut bytes = vec![0; PIECE];
            let at = layer.index().chunks[id as usize].data_offset;
            let is_believed = layer.try_read(at, &mut bytes).unwrap();
            assert!(!is_believed, "the digest of chunk {id} is another's");
            image.assert_reads(&layer, &HOT).await;
            let fetched = layer.counters().bytes_fetched;
            assert!(fetched > 8 * PIECE as u64, "{fetched}: the member");
            layer.close().await.unwrap();
            assert!(std::fs::read(&path).unwrap() == right, "chunk {id}");
        }
    }
    // And what was learned again is good enough to go by.
    assert!(world.learn(&image, &HOT).await.is_some());
    let (_store, layer) = world.open(&image).await;
    assert_eq!(whole(&layer), 0);
    image.assert_reads(&layer, &HOT).await;
}

/// Whatever rots of what was learned, every reader gets right bytes at once: the member that it
/// was learned of stays whole.
#[tokio::test]
async fn what_rots_is_not_believed() {
    for name in ["learned", "entries"] {
        let world = World::new();
        let image = world.usual();
        let (_store, layer) = world.open(&image).await;
        image.assert_reads(&layer, &HOT).await;
        layer.close().await.unwrap();
        drop((_store, layer));
        let path = world.path(&image, name);
        let right = std::fs::read(&path).unwrap();
        let index = std::fs::read(world.path(&image, "index")).unwrap();
        let mut lost = 0;
        for at in (0..right.len()).step_by(right.len() / 29) {
            let mut bad = right.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            let (store, layer) = world.open(&image).await;
            let shaped = layer.file().shape(&HOT).unwrap();
            store.evict_layers(None).unwrap();
            drop((store, layer));
            let (_store, layer) = world.open(&image).await;
            let left = whole(&layer);
            assert!([0, 17, 64, 81].contains(&left), "{name} at {at}: {left}");
            image.assert_reads(&layer, &all(&layer)).await;
            lost += usize::from(left > 0 || shaped.is_none());
            layer.close().await.unwrap();
            drop((_store, layer));
            // As it was, for the next.
            std::fs::write(&path, &right).unwrap();
            std::fs::write(world.path(&image, "index"), &index).unwrap();
            let _ = std::fs::remove_file(world.path(&image, "index.plain"));
        }
        assert!(lost > 20, "{name}: {lost}");
    }
}

#[tokio::test]
async fn what_was_not_decoded_stays_whole() {
    let world = World::new();
    let image = world.usual();
    // Only pieces of the second member of the large file were read.
    let shaped = world.learn(&image, &[75]).await.unwrap();
    assert!(shaped.after_bytes < shaped.before_bytes);
    let (_store, layer) = world.open(&image).await;
    assert_eq!(whole(&layer), 64);
    image.assert_reads(&layer, &[75, 30]).await;
    drop((_store, layer));
    // And becomes like it once it was.
    assert!(world.learn(&image, &HOT).await.is_some());
    let (_store, layer) = world.open(&image).await;
    assert_eq!(whole(&layer), 0);
    let ids = all(&layer);
    image.assert_reads(&layer, &ids).await;
}

#[derive(Debug, Clone)]
struct Case {
    files: Vec<(usize, u32, u8)>,
    hot: Vec<prop::sample::Index>,
    later: Vec<prop::sample::Index>,
}

fn case() -> impl Strategy<Value = Case> {
    let size = prop_oneof![2 => 1..9000_usize, 3 => 9000..400_000_usize, 1 => MIB..(6 * MIB)];
    let mask = prop_oneof![Just(0xff_u8), Just(0x7f), Just(3), Just(0)];
    let files = prop::collection::vec((size, any::<u32>(), mask), 1..8);
    let ids = || prop::collection::vec(any::<prop::sample::Index>(), 1..9);
    (files, ids(), ids()).prop_map(|(files, hot, later)| Case { files, hot, later })
}

async fn any_layer(case: Case) -> Result<(), TestCaseError> {
    let world = World::new();
    let file = |(number, (len, seed, mask)): (usize, &(usize, u32, u8))| {
        (format!("file{number}"), noise(*seed, *mask, *len))
    };
    let image = world.image(case.files.iter().enumerate().map(file).collect());
    let (_store, layer) = world.open(&image).await;
    let count = layer.index().chunks.len();
    let places: Vec<_> = layer
        .index()
        .chunks
        .iter()
        .map(|c| (c.data_offset, c.len))
        .collect();
    drop((_store, layer));
    for hot in [&case.hot, &case.later] {
        let hot = hot
            .iter()
            .map(|at| ChunkId::try_from(at.index(count)).unwrap());
        let hot: Vec<ChunkId> = hot.collect();
        let shaped = world.learn(&image, &hot).await;
        let (store, layer) = world.open(&image).await;
        let now: Vec<_> = layer
            .index()
            .chunks
            .iter()
            .map(|c| (c.data_offset, c.len))
            .collect();
        prop_assert_eq!(&places, &now);
        image.assert_reads(&layer, &hot).await;
        if let Some(shaped) = shaped {
            prop_assert!(shaped.after_bytes < shaped.before_bytes);
        }
        let mut rest = all(&layer);
        rest.reverse();
        image.assert_reads(&layer, &rest).await;
        prop_assert_eq!(layer.file().check_all().unwrap().dropped.len(), 0);
        store.evict_layers(None).unwrap();
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn every_chunk_of_any_layer_is_right(case in case()) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(any_layer(case))?;
    }
}
