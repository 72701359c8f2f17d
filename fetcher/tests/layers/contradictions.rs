//! Registries that say one thing first and another later, each of it valid alone, and indexes
//! that are signed and wrong: what is read is the layer that was asked for, or an error, and
//! never a mixture.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::HashMap;
use std::io::{Cursor, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use bytes::Bytes;
use lazarette_fetcher::codec::Packer;
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::details::{SpanDetails, Spans};
use lazarette_fetcher::index::wire::{self, Header};
use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::index::{ChunkId, FileKind};
use lazarette_fetcher::layer::open::{
    LayerOpener, LayerRequest, OfferedIndex, OpenedBy, core_digest,
};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::{BlobRef, BlobSource, Body, Document};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::{noise, tar};
use lazarette_fetcher::trust::{SigningKey, Statement, TrustedKeys};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};
use parking_lot::Mutex;

/// A registry that serves some blobs in place of others.
#[derive(Default)]
struct Swapping {
    inner: MemorySource,
    swapped: Mutex<HashMap<Digest, Digest>>,
    /// Reads that are still answered with what was asked for.
    honest: Mutex<usize>,
}

impl Swapping {
    /// From the read after `honest` ones on, `digest` stands for the bytes of `other`.
    fn swap(&self, digest: Digest, other: &[u8], honest: usize) {
        let other = self.inner.add_blob(other.to_vec());
        self.swapped.lock().insert(digest, other);
        *self.honest.lock() = honest;
    }

    fn behave(&self) {
        self.swapped.lock().clear();
    }

    fn served(&self, blob: &BlobRef) -> BlobRef {
        let swapped = self.swapped.lock();
        let Some(other) = swapped.get(&blob.digest) else {
            return blob.clone();
        };
        let mut honest = self.honest.lock();
        if let Some(left) = honest.checked_sub(1) {
            *honest = left;
            return blob.clone();
        }
        BlobRef {
            digest: *other,
            ..blob.clone()
        }
    }
}

#[async_trait]
impl BlobSource for Swapping {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.inner.resolve(reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        self.inner.stat(repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        self.inner.read_range(&self.served(blob), range).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.inner.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        self.inner.read_parts(&self.served(blob), parts).await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        self.inner.read_all(&self.served(blob)).await
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

fn repository() -> Repository {
    let reference = Reference::parse("example.com/a:b").unwrap();
    reference.repository().clone()
}

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    fixtures.join(name)
}

/// Files of a layer.
const FEW: u32 = 8;
/// Files of a layer whose index is so long that it does not come whole.
const MANY: u32 = 60;

/// Names and contents.
type Files = Vec<(String, Vec<u8>)>;

/// Files of which every other one is another in another version; their names and lengths are
/// not. They compress by copying what was before, so decoding them takes windows.
fn files(version: u32, count: u32) -> Files {
    let file = |number: u32| {
        let of = if number.is_multiple_of(2) { 0 } else { version };
        (format!("file{number}"), copying(number * 10 + of))
    };
    (0..count).map(file).collect()
}

/// Bytes half of which copy what was shortly before.
fn copying(seed: u32) -> Vec<u8> {
    const LEN: usize = 250_001;
    let fresh = noise(seed, 0xff, LEN);
    let mut bytes: Vec<u8> = Vec::with_capacity(LEN + 64);
    for piece in fresh.chunks(16) {
        bytes.extend(piece);
        let back = bytes.len().min(16 + usize::from(piece[0]) * 100);
        let from = bytes.len() - back;
        bytes.extend_from_within(from..from + back.min(16));
    }
    bytes.truncate(LEN);
    bytes
}

fn tar_of(files: &Files) -> Vec<u8> {
    let files = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), &bytes[..]));
    tar(&files.collect::<Vec<_>>())
}

/// A blob, and what its manifest says of it.
struct Made {
    blob: Vec<u8>,
    request: LayerRequest,
}

fn made(version: u32, format: Option<Format>) -> Made {
    made_of(&files(version, FEW), format)
}

fn made_of(files: &Files, format: Option<Format>) -> Made {
    let tar = tar_of(files);
    let described = |blob: &[u8]| {
        let size = blob.len() as u64;
        Descriptor::new(MediaType::OciLayerGzip, Digest::sha256(blob), size)
    };
    let (blob, layer, diff_id) = match format {
        None => {
            let blob = MemberCompressor::new(6).compress(&tar);
            let layer = described(&blob);
            (blob, layer, Digest::sha256(&tar))
        }
        Some(format) => {
            let options = Options {
                chunk_bytes: 64 << 10,
                ..Options::new(format)
            };
            let mut blob = Vec::new();
            let written = write_layer("x", &mut Cursor::new(tar), &mut blob, &options).unwrap();
            let mut layer = described(&blob);
            let notes = written.annotations.into_iter();
            layer.annotations = notes.map(|(key, value)| (key.to_owned(), value)).collect();
            (blob, layer, written.diff_id)
        }
    };
    let request = LayerRequest::new(repository(), &layer, diff_id);
    Made { blob, request }
}

struct Node {
    dir: tempfile::TempDir,
    source: Arc<Swapping>,
}

impl Node {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            source: Arc::default(),
        }
    }

    fn opener(&self) -> LayerOpener {
        let store = Store::open(self.dir.path()).unwrap();
        let keys = TrustedKeys::load(&[fixture("index-key.pub")]).unwrap();
        LayerOpener::new(store, Arc::clone(&self.source) as Arc<_>).trusting(keys)
    }

    async fn open(&self, request: &LayerRequest) -> Result<(Arc<Layer>, OpenedBy)> {
        let opened = self.opener().open(request, &AtomicU64::new(0)).await?;
        // Only what is asked for comes.
        opened.0.set_foresight(false);
        Ok(opened)
    }
}

/// Reads every chunk alone: each is that of the first version, or an error. How many were.
async fn read_all(layer: &Layer) -> (usize, usize) {
    read_each(layer, 1).await
}

/// The same of one chunk in so many.
async fn read_each(layer: &Layer, stride: ChunkId) -> (usize, usize) {
    let right = files(1, MANY);
    let (mut read, mut refused) = (0, 0);
    for file in &layer.index().files {
        let FileKind::Regular { size, data_offset } = file.kind else {
            continue;
        };
        let name = String::from_utf8(file.path.clone()).unwrap();
        let right = &right.iter().find(|(path, _)| *path == name).unwrap().1;
        let its = data_offset..data_offset + size;
        for (id, chunk) in (0..).zip(&layer.index().chunks) {
            if !its.contains(&chunk.data_offset) {
                continue;
            }
            let id: ChunkId = id;
            if !id.is_multiple_of(stride) {
                continue;
            }
            if let Err(error) = layer.fill_chunks(&[id], Priority::Profile).await {
                assert!(is_damage(&error), "{error}");
                refused += 1;
                continue;
            }
            let mut bytes = vec![0; chunk.len as usize];
            assert!(layer.try_read(chunk.data_offset, &mut bytes).unwrap());
            let at = usize::try_from(chunk.data_offset - data_offset).unwrap();
            assert!(bytes == right[at..at + bytes.len()], "{name} at {at}");
            read += 1;
        }
    }
    (read, refused)
}

fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. } | Error::Malformed { .. })
}

/// All formats; `None` is gzip, of which the node made an index before.
const FORMATS: [Option<Format>; 4] = [
    None,
    Some(Format::Estargz),
    Some(Format::ZstdChunked(Flavour::ContainersStorage)),
    Some(Format::ZstdChunked(Flavour::Stargz)),
];

#[tokio::test]
async fn a_blob_that_becomes_another_behind_its_table_is_never_mixed_with_it() {
    for format in FORMATS {
        let (first, mut second) = (made(1, format), made(2, format));
        // Every range of the one is there of the other.
        let len = second.blob.len().max(first.blob.len());
        second.blob.resize(len, 0);
        let node = Node::new();
        node.source.inner.add_blob(first.blob.clone());
        let (layer, _) = node.open(&first.request).await.unwrap();
        layer.file().evict_all().unwrap();
        node.source.swap(first.request.blob.digest, &second.blob, 0);
        let (read, refused) = read_all(&layer).await;
        assert!(refused > read / 2, "{format:?}: {read} read, {refused} not");
        assert!(layer.counters().chunks_corrupt > 0, "{format:?}");
        node.source.behave();
        let (_, refused) = read_all(&layer).await;
        assert_eq!(refused, 0, "{format:?}");
    }
}

#[tokio::test]
async fn a_blob_that_becomes_another_while_it_is_opened_is_refused_and_not_kept() {
    for format in FORMATS {
        let (first, mut second) = (made(1, format), made(2, format));
        let len = second.blob.len().max(first.blob.len());
        second.blob.resize(len, 0);
        for honest in 0..2 {
            let node = Node::new();
            node.source.inner.add_blob(first.blob.clone());
            let digest = first.request.blob.digest;
            node.source.swap(digest, &second.blob, honest);
            match node.open(&first.request).await {
                // Its table was read before.
                Ok((layer, by)) => {
                    assert!(honest > 0, "{format:?}");
                    let (_, refused) = read_all(&layer).await;
                    assert!(refused > 0 || by == OpenedBy::Stream, "{format:?}");
                }
                Err(error) => assert!(is_damage(&error), "{format:?}: {error}"),
            }
            node.source.behave();
            let (layer, _) = node.open(&first.request).await.unwrap();
            assert_eq!(read_all(&layer).await.1, 0, "{format:?}");
        }
    }
}

/// A gzip layer, and the index that another node makes of it.
async fn indexed(count: u32) -> (Made, Vec<u8>) {
    let made = made_of(&files(1, count), None);
    let node = Node::new();
    node.source.inner.add_blob(made.blob.clone());
    let (_, by) = node.open(&made.request).await.unwrap();
    assert_eq!(by, OpenedBy::Stream);
    let store = Store::open(node.dir.path()).unwrap();
    let index = store.open_index(&made.request.blob.digest).unwrap();
    let mut bytes = Vec::new();
    index.unwrap().read_to_end(&mut bytes).unwrap();
    (made, bytes)
}

/// Says that `index` is right, with the key that nodes trust.
fn signed(made: &Made, index: &[u8]) -> LayerRequest {
    let statement = Statement {
        blob_digest: made.request.blob.digest,
        core_digest: core_digest(index).unwrap(),
    };
    let key = SigningKey::read(&fixture("index-key.pem")).unwrap();
    let offered = OfferedIndex {
        blob: BlobRef {
            repository: repository(),
            digest: Digest::sha256(index),
            size: index.len() as u64,
        },
        signature: key.sign(&statement),
        core_bytes: None,
    };
    LayerRequest {
        index: Some(offered),
        ..made.request.clone()
    }
}

/// The index with other windows, every digest of it made right again.
fn with_wrong_windows(index: &[u8]) -> Vec<u8> {
    let core_end = usize::try_from(Header::parse(index).unwrap().core_end()).unwrap();
    let old = Bytes::copy_from_slice(&index[core_end..]);
    let mut tables = wire::decode(index).unwrap();
    let (mut packer, mut spans) = (Packer::new().unwrap(), Spans::default());
    let mut windows = 0;
    for span in &tables.spans {
        let at = usize::try_from(span.details.start()).unwrap();
        let end = usize::try_from(span.details.end()).unwrap();
        let parsed = SpanDetails::parse(span, span.chunk_count, old.slice(at..end)).unwrap();
        let digests = (0..span.chunk_count as usize).map(|n| parsed.digest(n).unwrap());
        let digests: Vec<_> = digests.collect();
        let mut window = Vec::new();
        if !parsed.window.is_empty() {
            let wrong: Vec<u8> = parsed.window.iter().map(|byte| byte ^ 1).collect();
            window = packer.pack(&wrong).unwrap();
            windows += 1;
        }
        spans
            .push((span.start, span.bits), &digests, &window)
            .unwrap();
    }
    let (made, all) = spans.finish();
    for (span, made) in tables.spans.iter_mut().zip(made) {
        (span.details, span.details_digest) = (made.details, made.details_digest);
    }
    assert!(windows > 2);
    wire::encode(&tables, &all).unwrap()
}

#[tokio::test]
async fn a_signed_index_with_wrong_windows_is_an_error_and_never_wrong_bytes() {
    let (made, index) = indexed(FEW).await;
    let wrong = with_wrong_windows(&index);
    let node = Node::new();
    node.source.inner.add_blob(made.blob.clone());
    node.source.inner.add_blob(wrong.clone());
    let request = signed(&made, &wrong);
    let (layer, by) = node.open(&request).await.unwrap();
    assert_eq!(
        by,
        OpenedBy::Toc,
        "nothing is wrong that can be told without decoding"
    );
    let (read, refused) = read_all(&layer).await;
    assert!(read > 0 && refused > 0, "{read} read, {refused} not");
    let error = layer.fill_all().await.unwrap_err();
    assert!(is_damage(&error), "{error}");
    layer.close().await.unwrap();
    drop(layer);
    // The way out, which a full pull takes.
    let streamed = node.opener();
    let streamed = streamed.open_by_stream(&request, &AtomicU64::new(0)).await;
    let layer = streamed.unwrap();
    layer.close().await.unwrap();
    drop(layer);
    let (layer, by) = node.open(&request).await.unwrap();
    assert_eq!(by, OpenedBy::Store);
    layer.file().evict_all().unwrap();
    assert_eq!(read_all(&layer).await.1, 0);
}

#[tokio::test]
async fn details_of_another_index_than_the_core_is_of_are_refused() {
    let (made, index) = indexed(MANY).await;
    assert!(index.len() > 128 << 10, "{} bytes come whole", index.len());
    let mut other = with_wrong_windows(&index);
    other.resize(index.len().max(other.len()), 0);
    let node = Node::new();
    node.source.inner.add_blob(made.blob.clone());
    let digest = node.source.inner.add_blob(index.clone());
    let request = signed(&made, &index);
    let (layer, by) = node.open(&request).await.unwrap();
    assert_eq!(by, OpenedBy::Toc);
    assert!(layer.file().details_origin().is_some());
    node.source.swap(digest, &other, 0);
    let (_, refused) = read_each(&layer, 11).await;
    assert!(refused > 0);
    node.source.behave();
    assert_eq!(read_each(&layer, 11).await.1, 0);
}
