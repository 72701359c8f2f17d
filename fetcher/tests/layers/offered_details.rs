//! A signed index of which only the core is fetched when its layer is opened, and the
//! details of a span when one of its chunks is wanted.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::layer::open::{
    LayerOpener, LayerRequest, OfferedIndex, OpenedBy, core_bytes, core_digest,
};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::{BlobRef, BlobSource, Body, Document};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::{MemorySource, content};
use lazarette_fetcher::trust::{SigningKey, Statement, TrustedKeys};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};
use parking_lot::Mutex;

const FILE_LEN: usize = 12 << 20;

/// One file that compresses well by what it says again, as a tar: its windows are needed.
fn tar() -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        usize::try_from(state >> 8).unwrap()
    };
    let mut payload = Vec::with_capacity(FILE_LEN + 64);
    while payload.len() < FILE_LEN {
        payload.extend((0..16).map(|_| next().to_le_bytes()[2]));
        let back = payload.len() - next() % payload.len().min(32 << 10);
        let back = back.min(payload.len() - 16);
        payload.extend_from_within(back..back + 16);
    }
    payload.truncate(FILE_LEN);
    content::tar(&[("file", &payload)])
}

/// What is done to reads of one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Corrupt,
    Cut,
    Gone,
}

/// Content in memory, and a record of what was read of it.
#[derive(Default)]
struct Watched {
    inner: MemorySource,
    /// Of each read: which blob, and the parts that were asked for.
    reads: Mutex<Vec<(Digest, Vec<ByteRange>)>>,
    /// Blobs whose next reads do not go well, and how.
    acts: Mutex<HashMap<Digest, Vec<Act>>>,
}

impl Watched {
    /// Bytes of `blob` that were asked for since the last call, and in how many reads.
    fn take(&self, blob: Digest) -> (u64, usize) {
        let mut reads = self.reads.lock();
        let of_blob = reads.extract_if(.., |(digest, _)| *digest == blob);
        let lens: Vec<u64> = of_blob
            .map(|(_, parts)| parts.iter().map(ByteRange::len).sum())
            .collect();
        (lens.iter().sum(), lens.len())
    }

    fn next_act(&self, blob: Digest) -> Option<Act> {
        let mut acts = self.acts.lock();
        let left = acts.get_mut(&blob)?;
        match left.as_slice() {
            [Act::Gone] => Some(Act::Gone),
            _ => left.pop(),
        }
    }
}

#[async_trait]
impl BlobSource for Watched {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.inner.resolve(reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        self.inner.stat(repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        self.read_parts(blob, &[range]).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.inner.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        self.reads.lock().push((blob.digest, parts.to_vec()));
        let body = match self.next_act(blob.digest) {
            // At once, so that what is beside comes with it.
            None => {
                let mut body = self.inner.read_parts(blob, parts).await?;
                let mut all = Vec::new();
                while let Some(piece) = body.next().await {
                    all.extend_from_slice(&piece?);
                }
                return Ok(futures_util::stream::iter([Ok(all.into())]).boxed());
            }
            Some(Act::Gone) => {
                return Err(Error::NotFound {
                    what: "a blob".to_owned(),
                    host: "example.com".to_owned(),
                });
            }
            Some(Act::Corrupt) => self.inner.read_parts(blob, parts).await?,
            Some(Act::Cut) => {
                let body = self.inner.read_parts(blob, parts).await?;
                return Ok(body.take(0).boxed());
            }
        };
        let flip = |piece: Result<bytes::Bytes>| {
            piece.map(|piece| piece.iter().map(|byte| byte ^ 1).collect())
        };
        Ok(body.map(flip).boxed())
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        self.read_parts(blob, &[ByteRange::at(0, blob.size).unwrap()])
            .await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        self.inner
            .referrers(repository, digest, artifact_type)
            .await
    }
}

/// A layer, its index beside it, and nodes that trust the signer.
struct World {
    source: Arc<Watched>,
    layer: Descriptor,
    diff_id: Digest,
    tar: Vec<u8>,
    index: Vec<u8>,
    offered: OfferedIndex,
}

impl World {
    async fn new() -> Self {
        Self::shaped_for(&[]).await
    }

    /// The index is one for starts that read these chunks, if there are any.
    async fn shaped_for(hot: &[u32]) -> Self {
        let tar = tar();
        let blob = MemberCompressor::new(6).compress(&tar);
        let size = blob.len() as u64;
        let source = Arc::new(Watched::default());
        let digest = source.inner.add_blob(blob);
        let layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let diff_id = Digest::sha256(&tar);
        let repository = Reference::parse("example.com/a:b").unwrap();
        let repository = repository.repository().clone();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let opener = LayerOpener::new(Arc::clone(&store), Arc::clone(&source) as Arc<_>);
        let request = LayerRequest::new(repository.clone(), &layer, diff_id);
        let opened = opener.open(&request, &AtomicU64::new(0)).await.unwrap();
        let shaped = opened.0.file().shape(hot).unwrap();
        assert_eq!(shaped.is_none(), hot.is_empty());
        let mut index = Vec::new();
        let mut file = store.open_index(&digest).unwrap().unwrap();
        file.read_to_end(&mut index).unwrap();
        let statement = Statement {
            blob_digest: digest,
            core_digest: core_digest(&index).unwrap(),
        };
        let key = SigningKey::read(&fixture("index-key.pem")).unwrap();
        let offered = OfferedIndex {
            blob: BlobRef {
                repository,
                digest: source.inner.add_blob(index.clone()),
                size: index.len() as u64,
            },
            signature: key.sign(&statement),
            core_bytes: None,
        };
        source.reads.lock().clear();
        Self {
            source,
            layer,
            diff_id,
            tar,
            index,
            offered,
        }
    }

    /// Opens the layer on the node whose store is in `dir`.
    async fn open(&self, dir: &Path) -> (Arc<Layer>, OpenedBy) {
        self.open_with(dir, self.offered.clone()).await
    }

    async fn open_with(&self, dir: &Path, offered: OfferedIndex) -> (Arc<Layer>, OpenedBy) {
        self.open_in(&Store::open(dir).unwrap(), offered).await
    }

    async fn open_in(&self, store: &Arc<Store>, offered: OfferedIndex) -> (Arc<Layer>, OpenedBy) {
        let opener = LayerOpener::new(Arc::clone(store), Arc::clone(&self.source) as Arc<_>);
        let keys = TrustedKeys::load(&[fixture("index-key.pub")]).unwrap();
        let opener = opener.trusting(keys);
        let repository = offered.blob.repository.clone();
        let mut request = LayerRequest::new(repository, &self.layer, self.diff_id);
        request.index = Some(offered);
        let (layer, by) = opener.open(&request, &AtomicU64::new(0)).await.unwrap();
        // Only what is asked for comes: requests and faults are counted.
        layer.set_foresight(false);
        (layer, by)
    }

    /// What is done to reads of the index.
    fn act(&self, acts: &[Act]) {
        self.act_on(self.offered.blob.digest, acts);
    }

    fn act_on(&self, blob: Digest, acts: &[Act]) {
        self.source.acts.lock().insert(blob, acts.to_vec());
    }

    fn index_reads(&self) -> (u64, usize) {
        self.source.take(self.offered.blob.digest)
    }

    /// How often all of the layer was asked for since the last call.
    fn streams(&self) -> usize {
        let mut reads = self.source.reads.lock();
        let of_layer = reads.extract_if(.., |(digest, _)| *digest == self.layer.digest);
        let is_all = |parts: &[ByteRange]| parts.iter().any(|part| part.len() == self.layer.size);
        of_layer.filter(|(_, parts)| is_all(parts)).count()
    }

    fn assert_page(&self, layer: &Layer, at: u64) {
        let mut page = vec![0; 4096];
        assert!(layer.try_read(at, &mut page).unwrap(), "page at {at}");
        let at = 512 + usize::try_from(at).unwrap();
        assert!(page == self.tar[at..at + 4096]);
    }
}

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    fixtures.join(name)
}

fn page(at: u64) -> ByteRange {
    ByteRange::at(at, 4096).unwrap()
}

#[tokio::test]
async fn a_start_fetches_the_core_and_the_details_of_what_it_reads() {
    let world = World::new().await;
    let core = core_bytes(&world.index).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let hinted = OfferedIndex {
        core_bytes: Some(core),
        ..world.offered.clone()
    };
    let (layer, by) = world.open_with(dir.path(), hinted).await;
    assert_eq!((by, layer.present_bytes()), (OpenedBy::Toc, 0));
    assert_eq!(world.index_reads(), (core, 1));
    layer.fill(page(6 << 20)).await.unwrap();
    world.assert_page(&layer, 6 << 20);
    let (bytes, reads) = world.index_reads();
    let largest = layer.index().spans.iter().map(|span| span.details.len());
    let largest = largest.max().unwrap();
    assert!(bytes > 0 && bytes <= 2 * largest, "{bytes} of {largest}");
    assert_eq!(reads, 1);
    assert_eq!(layer.counters().details_fetched, bytes);
    // The same span again needs nothing more.
    let span = layer.index().spans.len() / 2;
    layer.file().evict_all().unwrap();
    layer.fill(page(6 << 20)).await.unwrap();
    assert_eq!(world.index_reads(), (0, 0), "of {span} spans");
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
    let all = world.index.len() as u64 - core;
    assert_eq!(layer.counters().details_fetched, all, "each comes once");
}

#[tokio::test]
async fn a_core_of_unknown_length_takes_at_most_two_reads() {
    let world = World::new().await;
    let core = core_bytes(&world.index).unwrap();
    for hint in [None, Some(0), Some(41), Some(core + 1), Some(u64::MAX)] {
        let dir = tempfile::tempdir().unwrap();
        let offered = OfferedIndex {
            core_bytes: hint,
            ..world.offered.clone()
        };
        let (layer, by) = world.open_with(dir.path(), offered).await;
        assert_eq!(by, OpenedBy::Toc, "{hint:?}");
        assert!(world.index_reads().1 <= 2, "{hint:?}");
        layer.fill(page(0)).await.unwrap();
        world.assert_page(&layer, 0);
        world.index_reads();
    }
}

#[tokio::test]
async fn what_is_expected_comes_in_one_request() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    world.index_reads();
    let every_other: Vec<u32> = (0..).take(layer.index().chunks.len()).step_by(16).collect();
    layer.expect(every_other.clone());
    layer
        .fill_chunks(&every_other, Priority::Profile)
        .await
        .unwrap();
    let (bytes, reads) = world.index_reads();
    assert_eq!(reads, 1, "{bytes} bytes");
    assert_eq!(layer.counters().details_fetched, bytes);
}

#[tokio::test]
async fn readers_of_one_span_fetch_its_details_once() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    world.index_reads();
    let fills = (0..12).map(|n| layer.fill(page((5 << 20) + n * 4096 * 16)));
    for outcome in futures_util::future::join_all(fills).await {
        outcome.unwrap();
    }
    let (bytes, _) = world.index_reads();
    let spans = layer.index().spans.iter();
    let needed: u64 = spans
        .enumerate()
        .filter(|(number, _)| layer.file().has_details(u32::try_from(*number).unwrap()))
        .map(|(_, span)| span.details.len())
        .sum();
    assert!(bytes > 0 && bytes == needed, "{bytes} of {needed}");
}

#[tokio::test]
async fn corrupt_details_are_asked_for_once_more_and_never_kept() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    world.act(&[Act::Corrupt]);
    layer.fill(page(0)).await.unwrap();
    world.assert_page(&layer, 0);
    assert_eq!(layer.counters().chunks_corrupt, 1);
    let far = 9 << 20;
    world.act(&[Act::Corrupt; 8]);
    let error = layer.fill(page(far)).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert!(!layer.try_read(far, &mut [0; 16]).unwrap());
    world.act(&[Act::Cut; 8]);
    let error = layer.fill(page(far)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    world.act(&[]);
    layer.fill(page(far)).await.unwrap();
    world.assert_page(&layer, far);
}

#[tokio::test]
async fn details_outlive_the_process_and_are_shared_with_others() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = world.open(dir.path()).await;
    let (second, by) = world.open(dir.path()).await;
    assert_eq!(by, OpenedBy::Store);
    world.index_reads();
    first.fill(page(0)).await.unwrap();
    assert_eq!(world.index_reads().1, 1);
    // Another process on the store has the details, though not the chunk's bit.
    second.fill(page(0)).await.unwrap();
    assert_eq!(world.index_reads(), (0, 0));
    first.close().await.unwrap();
    drop((first, second));
    // Again, and offline.
    let store = Store::open(dir.path()).unwrap();
    let checked = store.check().unwrap();
    let (_, found) = &checked.layers[0];
    let found = found.as_ref().unwrap();
    assert!(found.chunks > 0 && found.dropped.is_empty(), "{found:?}");
    drop(store);
    world.act(&[Act::Gone]);
    let (layer, _) = world.open(dir.path()).await;
    world.assert_page(&layer, 0);
    assert_eq!(world.index_reads(), (0, 0));
}

#[tokio::test]
async fn lost_details_take_their_chunks_with_them_until_they_are_back() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    layer.fill(page(0)).await.unwrap();
    layer.close().await.unwrap();
    drop(layer);
    // What a disk may do that loses writes it was told to keep.
    let path = dir.path().join("layers");
    let path = path.join(world.layer.digest.file_name()).join("index");
    let core = core_bytes(&world.index).unwrap();
    let index = std::fs::File::options().write(true).open(path).unwrap();
    index.set_len(core).unwrap();
    index.set_len(world.index.len() as u64).unwrap();
    let (layer, by) = world.open(dir.path()).await;
    assert_eq!(by, OpenedBy::Store);
    assert!(!layer.try_read(0, &mut [0; 16]).unwrap());
    layer.fill(page(0)).await.unwrap();
    world.assert_page(&layer, 0);
}

#[tokio::test]
async fn an_index_that_is_gone_is_made_again_of_the_layer() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    world.act(&[Act::Gone]);
    world.streams();
    let fills = (3..12).map(|n| layer.fill(page(n << 20)));
    for outcome in futures_util::future::join_all(fills).await {
        outcome.unwrap();
    }
    for n in 3..12 {
        world.assert_page(&layer, n << 20);
    }
    assert_eq!(world.streams(), 1, "for all of them");
    let counters = layer.counters();
    assert!(counters.bytes_fetched > world.layer.size, "{counters:?}");
    assert_eq!(counters.details_fetched, 0, "nobody had any");
    // All of it: nobody asks for the index any more, nor does whoever opens the layer next.
    world.index_reads();
    layer.fill(page(2 << 20)).await.unwrap();
    layer.close().await.unwrap();
    drop(layer);
    let (layer, by) = world.open(dir.path()).await;
    assert_eq!(by, OpenedBy::Store);
    world.assert_page(&layer, 9 << 20);
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
    assert_eq!(world.index_reads(), (0, 0));
}

#[tokio::test]
async fn a_layer_that_does_not_come_costs_no_index() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (layer, _) = world.open(dir.path()).await;
    let blob = world.layer.digest;
    for act in [Act::Gone, Act::Corrupt] {
        world.act(&[Act::Gone]);
        world.act_on(blob, &[act; 8]);
        let error = layer.fill(page(0)).await.unwrap_err();
        assert!(!error.to_string().contains("index"), "{act:?}: {error}");
    }
    // The index is where it was.
    world.act_on(blob, &[]);
    let (_, by) = world.open(dir.path()).await;
    assert_eq!(by, OpenedBy::Store);
    layer.fill(page(0)).await.unwrap();
    world.assert_page(&layer, 0);
}

#[tokio::test]
async fn an_index_that_is_gone_leads_to_the_whole_layer() {
    // In the middle of a span: what it has for this start is not in the layer.
    let hot = 100;
    let world = World::shaped_for(&[hot]).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (layer, _) = world.open_in(&store, world.offered.clone()).await;
    let hot_chunk = hot;
    let hot = layer.index().chunks[hot as usize].data_offset;
    layer.fill(page(0)).await.unwrap();
    world.act(&[Act::Gone]);
    world.streams();
    for _ in 0..2 {
        let error = layer.fill(page(hot)).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
        assert!(
            error.to_string().contains("pull the image again"),
            "{error}"
        );
    }
    assert_eq!(world.streams(), 1, "a second one would bring no more");
    // The span was cut in three; what lies before them does not fail with what comes with it.
    let index = layer.index();
    let at = |chunk: u32| index.chunks[chunk as usize].data_offset;
    let middle = index
        .spans
        .iter()
        .position(|span| span.first_chunk == hot_chunk);
    let cut = index.spans[middle.unwrap() - 1].first_chunk;
    let both = ByteRange::new(at(cut - 1), at(cut) + 1).unwrap();
    layer.fill(both).await.unwrap_err();
    world.assert_page(&layer, at(cut - 1));
    // What is here stays readable for who has it open, and what came of the layer does too.
    world.assert_page(&layer, 0);
    layer.fill(page(11 << 20)).await.unwrap();
    world.assert_page(&layer, 11 << 20);
    let (again, by) = world.open_in(&store, world.offered.clone()).await;
    assert_eq!(by, OpenedBy::Stream);
    assert!(again.file().is_complete());
    world.assert_page(&again, 9 << 20);
    // Who still has the old one open does no harm to the new one.
    layer.fill(page(hot)).await.unwrap_err();
    let (_, by) = world.open(dir.path()).await;
    assert_eq!(by, OpenedBy::Store);
}
