//! A prefetch over real layers and a source in memory.

use super::*;
use crate::index::{Chunk, Encoding, LayerBlob, LayerFormat, LayerIndex};
use crate::prefetch::BLOCK_BYTES;
use crate::source::{BlobRef, BlobSource};
use crate::store::Store;
use crate::test_util::MemorySource;
use crate::test_util::layers::regular_file;
use crate::types::{ByteRange, Digest, Reference};

const CHUNK: u32 = 64 << 10;

struct Fixture {
    source: Arc<MemorySource>,
    store: Arc<Store>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            source: Arc::new(MemorySource::new()),
            store: Store::open(dir.path()).unwrap(),
            _dir: dir,
        }
    }

    /// A layer of one file of `chunks` blocks; the source has it only if `is_there`.
    fn layer(&self, fill: u8, chunks: u32, is_there: bool) -> Arc<Layer> {
        let data = vec![fill; usize::try_from(chunks * CHUNK).unwrap()];
        let digest = Digest::sha256(&data);
        if is_there {
            self.source.add_blob(data.clone());
        }
        let len = u64::from(CHUNK);
        let chunk = |n: u32| Chunk {
            encoding: Encoding::Stored {
                blob: ByteRange::at(u64::from(n) * len, len).unwrap(),
            },
            data_offset: u64::from(n) * len,
            len: CHUNK,
            chunk_digest: Digest::sha256(&vec![fill; usize::try_from(CHUNK).unwrap()])
                .as_bytes()
                .try_into()
                .ok(),
        };
        let file = regular_file("file", data.len() as u64, 0);
        let blob = LayerBlob {
            digest,
            size: data.len() as u64,
            format: LayerFormat::Tar,
        };
        let index = LayerIndex::new(blob, vec![file], (0..chunks).map(chunk).collect()).unwrap();
        let blob = BlobRef {
            repository: Reference::parse("localhost/x")
                .unwrap()
                .repository()
                .clone(),
            digest,
            size: data.len() as u64,
        };
        let file = self.store.create_layer(index).unwrap();
        Layer::new(file, Arc::clone(&self.source) as Arc<dyn BlobSource>, blob)
    }
}

fn block(rank: u32, block: u32) -> (u32, Place) {
    (
        rank,
        Place {
            block,
            pages: u16::MAX,
        },
    )
}

fn has(layer: &Layer, wanted: &[u32]) -> bool {
    let chunks = 0..u32::try_from(layer.index().chunks.len()).unwrap();
    chunks
        .into_iter()
        .all(|id| layer.file().is_present(id) == wanted.contains(&id))
}

fn start(places: BTreeMap<usize, Vec<(u32, Place)>>, options: PrefetchOptions) -> Prefetch {
    Prefetch::start(std::future::ready(Some((places, options))), None)
}

/// Waits for the task's own end, then for what it did.
async fn done(mut prefetch: Prefetch) -> PrefetchUse {
    (&mut prefetch.task).await.unwrap();
    *prefetch.used.lock()
}

#[tokio::test]
async fn exactly_what_was_named_is_there_in_the_end() {
    let fixture = Fixture::new();
    let layers = [fixture.layer(1, 40, true), fixture.layer(2, 3, true)];
    let places = BTreeMap::from([
        (
            0,
            vec![block(0, 7), block(2, 3), block(3, 39), block(4, 40)],
        ),
        (1, vec![block(1, 2)]),
    ]);
    for first in [true, false] {
        let prefetch = start(places.clone(), PrefetchOptions::default());
        // The later layer may be open first, and one that nobody asked for as well.
        prefetch.opened(1, &layers[1]);
        prefetch.opened(5, &layers[1]);
        prefetch.opened(0, &layers[0]);
        let used = done(prefetch).await;
        assert!(has(&layers[0], &[3, 7, 39]) && has(&layers[1], &[2]));
        assert_eq!((used.unknown, used.failed), (1, 0));
        // The second time all of it is there already.
        assert_eq!(used.chunks, if first { 4 } else { 0 });
        assert_eq!(used.bytes, used.chunks * BLOCK_BYTES);
    }
}

/// Tables of some layers take long to read. One that would wait for all of them is late.
#[tokio::test]
async fn what_is_open_is_fetched_while_tables_of_other_layers_are_still_being_read() {
    let fixture = Fixture::new();
    let layers = [1, 2, 3].map(|fill| fixture.layer(fill, 4, true));
    // Those that are open first are wanted last.
    let places = [0, 1, 2].map(|n| (n, vec![block(u32::try_from(n).unwrap(), 3)]));
    let prefetch = start(BTreeMap::from(places), PrefetchOptions::default());
    for number in [2, 0, 1] {
        let later = layers.iter().filter(|layer| has(layer, &[])).count();
        prefetch.opened(number, &layers[number]);
        let came = async {
            while !has(&layers[number], &[3]) {
                tokio::task::yield_now().await;
            }
        };
        let came = tokio::time::timeout(std::time::Duration::from_secs(60), came).await;
        came.expect("it waits for layers that are not open");
        let still = layers.iter().filter(|layer| has(layer, &[])).count();
        assert_eq!(still + 1, later);
    }
    assert_eq!(done(prefetch).await.chunks, 3);
}

#[tokio::test]
async fn a_layer_that_fails_leaves_the_others_alone() {
    let fixture = Fixture::new();
    let (gone, here) = (fixture.layer(1, 4, false), fixture.layer(2, 4, true));
    let all = |rank| (0..4).map(|n| block(rank + n, n)).collect::<Vec<_>>();
    let options = PrefetchOptions {
        batches_max: 1,
        first_bytes: 1,
        batch_bytes_max: 1,
    };
    let prefetch = start(BTreeMap::from([(0, all(0)), (1, all(4))]), options);
    prefetch.opened(0, &gone);
    prefetch.opened(1, &here);
    let used = done(prefetch).await;
    assert_eq!(
        (used.failed, used.chunks),
        (1, 4),
        "one batch, then no more of it"
    );
    assert!(has(&gone, &[]) && has(&here, &[0, 1, 2, 3]));
}

#[tokio::test]
async fn it_ends_when_it_is_told_to() {
    let wanted = BTreeMap::from([(0, vec![block(0, 0)])]);
    let prefetch = start(wanted, PrefetchOptions::default());
    assert_eq!(prefetch.finish().await, PrefetchUse::default());
    let empty = start(BTreeMap::new(), PrefetchOptions::default());
    assert_eq!(done(empty).await, PrefetchUse::default());
    let never = Prefetch::start(std::future::pending(), None);
    assert_eq!(never.finish().await, PrefetchUse::default());
    assert_eq!(
        done(Prefetch::start(std::future::ready(None), None)).await,
        PrefetchUse::default()
    );
}

#[tokio::test]
async fn what_is_wanted_may_be_known_after_layers_are_open() {
    let fixture = Fixture::new();
    let layer = fixture.layer(1, 4, true);
    let (tell, told) = tokio::sync::oneshot::channel();
    let prefetch = Prefetch::start(async { told.await.ok() }, None);
    prefetch.opened(0, &layer);
    assert!(has(&layer, &[]));
    let wanted = BTreeMap::from([(0, vec![block(0, 2)])]);
    assert!(tell.send((wanted, PrefetchOptions::default())).is_ok());
    assert_eq!(done(prefetch).await.chunks, 1);
    assert!(has(&layer, &[2]));
}

#[tokio::test]
async fn what_was_there_and_what_comes_is_told_once() {
    let fixture = Fixture::new();
    let layer = fixture.layer(1, 6, true);
    layer
        .fill_chunks(&[1, 2], Priority::OnDemand)
        .await
        .unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let tells = Arc::clone(&told);
    let on_present: OnPresent = Box::new(move |number, ranges| tells.lock().push((number, ranges)));
    let wanted = [1, 2, 4].map(|n| block(n, n)).to_vec();
    let wanted = Some((BTreeMap::from([(3, wanted)]), PrefetchOptions::default()));
    let prefetch = Prefetch::start(std::future::ready(wanted), Some(on_present));
    prefetch.opened(3, &layer);
    assert_eq!(done(prefetch).await.chunks, 1);
    let blocks = |from: u64, to: u64| ByteRange::new(from * BLOCK_BYTES, to * BLOCK_BYTES).unwrap();
    let expected = vec![(3, vec![blocks(1, 3)]), (3, vec![blocks(4, 5)])];
    assert_eq!(*told.lock(), expected);
}
