//! Layers with zTOCs that soci-snapshotter's own builder made: read lazily, span by span,
//! every span verified; streamed where the zTOC is of no use; sound on a disk that rots.

#![expect(
    clippy::unwrap_used,
    reason = "a fixture that cannot be read fails the test"
)]

use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::{FileKind, LayerFormat, LayerIndex, wire};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::source::{BlobRef, BlobSource};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::{FaultySource, MemorySource, ReadFault};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};

const PLAIN: &[u8] = include_bytes!("../fixtures/soci/plain.tar.gz");
const PLAIN_ZTOC: &[u8] = include_bytes!("../fixtures/soci/plain.ztoc.gz");
const PLAIN_V1_ZTOC: &[u8] = include_bytes!("../fixtures/soci/plain-v1.ztoc.gz");
const MEMBERS: &[u8] = include_bytes!("../fixtures/soci/members.tar.gz");
const MEMBERS_ZTOC: &[u8] = include_bytes!("../fixtures/soci/members.ztoc.gz");
const TAR_ZTOC: &[u8] = include_bytes!("../fixtures/soci/tar.ztoc.gz");
/// The largest file, which is in several spans.
const LARGE: &str = "usr/bin/large";

fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut decoder = decoder(std::io::Cursor::new(packed.to_vec())).unwrap();
    decoder.read_to_end(&mut bytes).unwrap();
    bytes
}

fn repository() -> Repository {
    let reference = Reference::parse("example.com/a/b:v1").unwrap();
    reference.repository().clone()
}

/// A node with an empty store and a registry that can fail.
struct Node {
    dir: tempfile::TempDir,
    source: Arc<FaultySource<MemorySource>>,
}

impl Node {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            source: Arc::new(FaultySource::scripted(MemorySource::new(), [])),
        }
    }

    /// Opens `blob` as a process that has just started would.
    async fn open(&self, blob: &[u8], ztoc: Option<BlobRef>) -> Result<(Arc<Layer>, OpenedBy)> {
        self.open_as(&self.request(blob, ztoc)).await
    }

    /// The same, of which all is wanted now.
    async fn open_whole(
        &self,
        blob: &[u8],
        ztoc: Option<BlobRef>,
    ) -> Result<(Arc<Layer>, OpenedBy)> {
        let mut request = self.request(blob, ztoc);
        request.is_wanted_whole = true;
        self.open_as(&request).await
    }

    fn request(&self, blob: &[u8], ztoc: Option<BlobRef>) -> LayerRequest {
        let digest = self.source.inner().add_blob(blob.to_vec());
        let layer = Descriptor::new(MediaType::OciLayerGzip, digest, blob.len() as u64);
        let diff_id = Digest::sha256(&unpacked(blob));
        let mut request = LayerRequest::new(repository(), &layer, diff_id);
        request.ztoc = ztoc;
        request
    }

    async fn open_as(&self, request: &LayerRequest) -> Result<(Arc<Layer>, OpenedBy)> {
        let store = Store::open(self.dir.path()).unwrap();
        let opener = LayerOpener::new(store, Arc::clone(&self.source) as Arc<dyn BlobSource>);
        opener.open(request, &AtomicU64::new(0)).await
    }

    /// Puts a zTOC into the registry.
    fn offer(&self, ztoc: Vec<u8>) -> Option<BlobRef> {
        let size = ztoc.len() as u64;
        Some(BlobRef {
            repository: repository(),
            digest: self.source.inner().add_blob(ztoc),
            size,
        })
    }

    async fn open_lazily(&self, blob: &[u8], ztoc: &[u8]) -> Arc<Layer> {
        let (layer, by) = self.open(blob, self.offer(unpacked(ztoc))).await.unwrap();
        assert_eq!((by, layer.present_bytes()), (OpenedBy::Toc, 0));
        // Only what is asked for comes: requests and faults are counted.
        layer.set_foresight(false);
        layer
    }

    fn file(&self, layer: &Layer, name: &str) -> PathBuf {
        let dir = self.dir.path().join("layers");
        dir.join(layer.index().blob_digest.file_name()).join(name)
    }
}

fn place(index: &LayerIndex, path: &str) -> ByteRange {
    let file = index.files.iter().find(|file| file.path == path.as_bytes());
    match file.unwrap().kind {
        FileKind::Regular { size, data_offset } => ByteRange::at(data_offset, size).unwrap(),
        ref other => panic!("{path} is {other:?}"),
    }
}

fn read(layer: &Layer, range: ByteRange) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(range.len()).unwrap()];
    let is_there = layer.try_read(range.start(), &mut bytes).unwrap();
    is_there.then_some(bytes)
}

/// Everything the data file holds.
async fn read_all(layer: &Layer) -> Vec<u8> {
    layer.fill_all().await.unwrap();
    read(layer, ByteRange::new(0, layer.index().data_len).unwrap()).unwrap()
}

/// The layer as streaming it gives it.
async fn streamed() -> (Arc<Layer>, Vec<u8>, Node) {
    let node = Node::new();
    let (layer, by) = node.open(PLAIN, None).await.unwrap();
    assert_eq!(by, OpenedBy::Stream);
    let bytes = read_all(&layer).await;
    (layer, bytes, node)
}

#[tokio::test]
async fn every_ztoc_shows_the_files_that_streaming_shows() {
    let (expected, bytes, _node) = streamed().await;
    let tar = unpacked(PLAIN);
    let table: [(&str, &[u8], &[u8], LayerFormat); 4] = [
        ("plain", PLAIN, PLAIN_ZTOC, LayerFormat::Gzip),
        ("first layout", PLAIN, PLAIN_V1_ZTOC, LayerFormat::Gzip),
        ("members", MEMBERS, MEMBERS_ZTOC, LayerFormat::Gzip),
        ("tar", &tar, TAR_ZTOC, LayerFormat::Tar),
    ];
    for (name, blob, ztoc, format) in table {
        let node = Node::new();
        let layer = node.open_lazily(blob, ztoc).await;
        assert_eq!(layer.index().format, format, "{name}");
        assert!(layer.index().has_whole_spans(), "{name}");
        assert_eq!(layer.index().files, expected.index().files, "{name}");
        assert!(layer.index().spans.len() >= 3, "{name}");
        assert!(read_all(&layer).await == bytes, "{name}");
    }
}

#[tokio::test]
async fn a_read_fetches_its_span_and_no_more() {
    let (expected, ..) = streamed().await;
    let node = Node::new();
    let layer = node.open_lazily(PLAIN, PLAIN_ZTOC).await;
    let range = place(layer.index(), "usr/bin/caps");
    layer.fill(range).await.unwrap();
    let counters = layer.counters();
    assert_eq!(counters.requests, 1);
    let span = layer
        .index()
        .chunks
        .last()
        .unwrap()
        .encoding
        .blob()
        .unwrap();
    assert_eq!(counters.bytes_fetched, span.len());
    assert!(span.len() < PLAIN.len() as u64 / 4);
    assert_eq!(read(&layer, range), read(&expected, range));
    assert_eq!(read(&layer, place(layer.index(), "etc/motd")), None);
}

#[tokio::test]
async fn a_ztoc_that_is_of_no_use_costs_nothing_but_laziness() {
    let (_, bytes, _node) = streamed().await;
    let good = unpacked(PLAIN_ZTOC);
    let flipped = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        bad
    };
    // What the digest binds: a window, a place, a name.
    for at in [good.len() / 2, good.len() - 100, 20] {
        let node = Node::new();
        let named = node.offer(good.clone()).map(|ztoc| BlobRef {
            digest: Digest::sha256(&flipped(at)),
            ..ztoc
        });
        let (layer, by) = node.open(PLAIN, named).await.unwrap();
        assert_eq!(by, OpenedBy::Stream, "the registry does not have it");
        assert!(read_all(&layer).await == bytes);
    }
    let table: [(&str, Vec<u8>); 5] = [
        ("of another blob", unpacked(MEMBERS_ZTOC)),
        ("of the tar", unpacked(TAR_ZTOC)),
        ("cut off", good[..good.len() / 2].to_vec()),
        ("empty", Vec::new()),
        ("no zTOC", b"{\"layers\":[]}".to_vec()),
    ];
    for (what, ztoc) in table {
        let node = Node::new();
        let (layer, by) = node.open(PLAIN, node.offer(ztoc)).await.unwrap();
        assert_eq!(by, OpenedBy::Stream, "{what}");
        assert!(read_all(&layer).await == bytes, "{what}");
    }
    let node = Node::new();
    let huge = node.offer(good).map(|ztoc| BlobRef {
        size: 1 << 40,
        ..ztoc
    });
    let (_, by) = node.open(PLAIN, huge).await.unwrap();
    assert_eq!(by, OpenedBy::Stream, "too long to be read");
}

#[tokio::test]
async fn wrong_bytes_of_the_registry_are_asked_for_again_and_never_served() {
    let (expected, bytes, _node) = streamed().await;
    let tar = unpacked(PLAIN);
    let table: [(&[u8], &[u8]); 3] = [
        (PLAIN, PLAIN_ZTOC),
        (MEMBERS, MEMBERS_ZTOC),
        (&tar, TAR_ZTOC),
    ];
    for (blob, ztoc) in table {
        let node = Node::new();
        let layer = node.open_lazily(blob, ztoc).await;
        let range = place(layer.index(), "etc/motd");
        // A bit behind all that the file needs is enough: the span is verified whole.
        for fault in [ReadFault::WrongBytes, ReadFault::FlippedBit(40_000)] {
            node.source.script(Some(fault));
            node.source.script(Some(fault));
            let error = layer.fill(range).await.unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert_eq!(read(&layer, range), None);
        }
        node.source.script(Some(ReadFault::WrongBytes));
        layer.fill(range).await.unwrap();
        assert_eq!(read(&layer, range), read(&expected, range));
        assert!(layer.counters().chunks_corrupt >= 5);
        assert!(read_all(&layer).await == bytes);
    }
}

#[tokio::test]
async fn a_disk_that_rots_is_noticed_though_chunks_have_no_promised_digest() {
    let (_, bytes, _node) = streamed().await;
    let tar = unpacked(PLAIN);
    for (blob, ztoc) in [(PLAIN, PLAIN_ZTOC), (&tar[..], TAR_ZTOC)] {
        let node = Node::new();
        let range = {
            let layer = node.open_lazily(blob, ztoc).await;
            assert!(read_all(&layer).await == bytes);
            layer.close().await.unwrap();
            place(layer.index(), LARGE)
        };
        for (file, at) in [("data", range.start() + 7), ("learned", 32 + 5)] {
            let (layer, by) = node.open(blob, None).await.unwrap();
            assert_eq!(by, OpenedBy::Store);
            assert!(layer.file().is_complete());
            let path = node.file(&layer, file);
            let disk = std::fs::File::options().read(true).write(true).open(path);
            let (disk, mut byte) = (disk.unwrap(), [0]);
            disk.read_exact_at(&mut byte, at).unwrap();
            disk.write_all_at(&[!byte[0]], at).unwrap();
            let whole = ByteRange::new(0, layer.index().data_len).unwrap();
            assert_eq!(read(&layer, whole), None, "{file}");
            assert!(!layer.file().is_complete(), "{file}");
            assert!(read_all(&layer).await == bytes, "{file}");
            assert!(layer.counters().bytes_fetched < blob.len() as u64, "{file}");
            layer.close().await.unwrap();
        }
        let (layer, _) = node.open(blob, None).await.unwrap();
        let check = layer.file().check_all().unwrap();
        assert_eq!((check.dropped, check.bitmap_lost), (Vec::new(), false));
        std::fs::remove_file(node.file(&layer, "learned")).unwrap();
        drop(layer);
        let (layer, by) = node.open(blob, None).await.unwrap();
        assert_eq!(by, OpenedBy::Stream, "without it the layer is damaged");
        assert!(read_all(&layer).await == bytes);
    }
}

#[tokio::test]
async fn a_window_that_rots_in_the_stored_index_is_an_error_and_not_wrong_bytes() {
    let node = Node::new();
    let layer = node.open_lazily(PLAIN, PLAIN_ZTOC).await;
    let path = node.file(&layer, "index");
    let last = std::fs::metadata(&path).unwrap().len() - 1;
    let file = std::fs::File::options().read(true).write(true).open(&path);
    let (file, mut byte) = (file.unwrap(), [0]);
    file.read_exact_at(&mut byte, last).unwrap();
    file.write_all_at(&[!byte[0]], last).unwrap();
    let error = layer.fill(place(layer.index(), "usr/bin/caps")).await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(layer.present_bytes(), 0);
}

#[tokio::test]
async fn what_is_evicted_comes_back() {
    let (_, bytes, _node) = streamed().await;
    let node = Node::new();
    let layer = node.open_lazily(MEMBERS, MEMBERS_ZTOC).await;
    assert!(read_all(&layer).await == bytes);
    layer.file().evict_all().unwrap();
    assert_eq!(layer.present_bytes(), 0);
    assert!(read_all(&layer).await == bytes);
}

#[tokio::test]
async fn the_index_survives_being_stored() {
    let node = Node::new();
    let layer = node.open_lazily(PLAIN, PLAIN_ZTOC).await;
    let bytes = std::fs::read(node.file(&layer, "index")).unwrap();
    assert_eq!(wire::decode(&bytes).unwrap(), **layer.index());
}

/// The zTOC with other windows: right in all that can be told before anything is decoded.
fn with_wrong_windows(mut ztoc: Vec<u8>) -> Vec<u8> {
    const SPAN: i64 = 32_768;
    const CHECKPOINT: usize = 17 + (32 << 10);
    let count = |at: usize| {
        let bytes = ztoc.get(at.checked_sub(4)?..at)?.try_into().ok()?;
        usize::try_from(i32::from_le_bytes(bytes)).ok()
    };
    let len = |at: usize| {
        let bytes = ztoc.get(at.checked_sub(8)?..at - 4)?.try_into().ok()?;
        usize::try_from(i32::from_le_bytes(bytes)).ok()
    };
    let is_it = |at: &usize| {
        let is_size = ztoc[*at..].starts_with(&SPAN.to_le_bytes());
        is_size && len(*at) == count(*at).map(|count| 12 + count * CHECKPOINT)
    };
    let at = (0..ztoc.len()).find(is_it).unwrap();
    let count = count(at).unwrap();
    assert!(count >= 3);
    for number in 1..count {
        let window = at + 8 + number * CHECKPOINT + 17;
        ztoc[window..window + (32 << 10)]
            .iter_mut()
            .for_each(|byte| *byte ^= 1);
    }
    ztoc
}

#[tokio::test]
async fn who_wants_all_of_a_layer_gets_what_is_in_it_and_not_what_a_ztoc_says() {
    let (expected, bytes, _node) = streamed().await;
    let lying = with_wrong_windows(unpacked(PLAIN_ZTOC));
    // Nothing is here; nothing was read; all was.
    for (is_here, is_read) in [(false, false), (true, false), (true, true)] {
        let node = Node::new();
        let ztoc = || node.offer(lying.clone());
        let mut old = None;
        if is_here {
            let (layer, by) = node.open(PLAIN, ztoc()).await.unwrap();
            assert_eq!(by, OpenedBy::Toc, "nobody can tell yet");
            if is_read {
                // Its maker's word, as docs/soci.md says.
                assert!(read_all(&layer).await != bytes);
            }
            layer.flush().await.unwrap();
            old = Some(layer);
        }
        let (layer, by) = node.open_whole(PLAIN, ztoc()).await.unwrap();
        assert_eq!(by, OpenedBy::Stream);
        assert!(!layer.index().is_by_ztoc());
        assert_eq!(layer.index().files, expected.index().files);
        assert!(read_all(&layer).await == bytes);
        layer.close().await.unwrap();
        if let Some(old) = old {
            // Who has the old one goes on with it.
            read_all(&old).await;
        }
        let (layer, by) = node.open_whole(PLAIN, ztoc()).await.unwrap();
        assert_eq!(by, OpenedBy::Store, "once is enough");
        assert!(layer.file().is_complete());
        layer.file().evict_all().unwrap();
        assert!(read_all(&layer).await == bytes);
    }
}

#[tokio::test]
async fn what_a_ztoc_says_stays_until_the_layer_was_streamed() {
    let node = Node::new();
    let layer = node.open_lazily(PLAIN, PLAIN_ZTOC).await;
    layer.fill(place(layer.index(), "etc/motd")).await.unwrap();
    layer.close().await.unwrap();
    drop(layer);
    // Wrong bytes are streamed once more.
    for (fault, times) in [(ReadFault::Unavailable, 1), (ReadFault::WrongBytes, 2)] {
        (0..times).for_each(|_| node.source.script(Some(fault)));
        node.open_whole(PLAIN, None).await.unwrap_err();
        let (layer, by) = node.open(PLAIN, None).await.unwrap();
        assert_eq!((by, layer.index().is_by_ztoc()), (OpenedBy::Store, true));
        assert_ne!(layer.present_bytes(), 0, "{fault:?}");
    }
    // The blob is right, and the tar in it is not the image's.
    let mut request = node.request(PLAIN, None);
    (request.is_wanted_whole, request.diff_id) = (true, Digest::sha256(b"another"));
    let error = node.open_as(&request).await.unwrap_err();
    assert!(error.to_string().contains("diff_id"), "{error}");
    let (_, by) = node.open(PLAIN, None).await.unwrap();
    assert_eq!(by, OpenedBy::Stream, "nothing of it is left");
}
