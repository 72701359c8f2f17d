//! Layers without a table through an opener and a registry: how many requests they take, and
//! what is left of them after trouble.

#![expect(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use lazarette_fetcher::Error;
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::write::{Options, write_layer};
use lazarette_fetcher::layer::open::{Asker, LayerOpener, LayerRequest, Lines, OpenedBy, Said};
use lazarette_fetcher::layer::{EngineConfig, FetchEngine, Layer};
use lazarette_fetcher::plan::whole::{Share, Why, decide};
use lazarette_fetcher::source::{RegistrySource, SourceConfig};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::content::{self, tar};
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};

/// Bytes that hardly compress.
fn noise(len: usize) -> Vec<u8> {
    content::noise(1, 0xff, len)
}

/// A node of little memory, so that parts are of 64 KiB, and the registry it pulls from.
struct World {
    registry: FakeRegistry,
    store: Arc<Store>,
    engine: Arc<FetchEngine>,
    opener: LayerOpener,
    read_soon: bool,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let source = Arc::new(RegistrySource::new(SourceConfig::default()).unwrap());
        let engine = FetchEngine::new(EngineConfig {
            memory_bytes_max: 512 << 10,
            ..EngineConfig::default()
        });
        let opener = LayerOpener::new(Arc::clone(&store), source);
        Self {
            registry: FakeRegistry::start().await,
            opener: opener.fetching_with(Arc::clone(&engine)),
            store,
            engine,
            read_soon: true,
            _dir: dir,
        }
    }

    async fn open(
        &self,
        layer: &Descriptor,
        diff_id: Digest,
    ) -> lazarette_fetcher::Result<(Arc<Layer>, OpenedBy)> {
        let mut request = self.request(layer, diff_id);
        request.read_soon = self.read_soon;
        self.opener.open(&request, &AtomicU64::new(0)).await
    }

    fn request(&self, layer: &Descriptor, diff_id: Digest) -> LayerRequest {
        let reference = format!("{}/a/b:t", self.registry.url_host());
        let repository = Reference::parse(&reference).unwrap().repository().clone();
        LayerRequest::new(repository, layer, diff_id)
    }

    fn add_gzip(&self, tar: &[u8]) -> Descriptor {
        let blob = MemberCompressor::new(1).compress(tar);
        let size = blob.len() as u64;
        let digest = self.registry.add_blob(blob);
        Descriptor::new(MediaType::OciLayerGzip, digest, size)
    }
}

fn read_file(layer: &Layer, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert!(layer.file().read_at(0, &mut bytes).unwrap());
    bytes
}

#[tokio::test]
async fn a_stream_that_will_take_too_long_is_given_up() {
    let tar = tar(&[("big", &noise(700_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let hangs = Fault::HangAfter(10_000);
    world.registry.always(Endpoint::Blob, hangs);
    let mut request = world.request(&layer, Digest::sha256(&tar));
    // What it waits for otherwise is a minute.
    let asker = asker(Duration::from_millis(60), 1);
    asker.asked.say();
    request.asker = Some(asker);
    let opened = world.opener.open(&request, &AtomicU64::new(0)).await;
    let error = opened.map(drop).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(world.store.open_layer(&layer.digest).unwrap().is_none());
}

/// Somebody who has not asked yet, where so many may stream.
fn asker(within: Duration, streaming: usize) -> Asker {
    Asker {
        within,
        asked: Said::default(),
        too_long: Said::default(),
        lines: Lines::new(1, streaming),
    }
}

#[tokio::test]
async fn who_is_asked_for_is_streamed_past_those_whom_nobody_wants_yet() {
    let tar = tar(&[("big", &noise(100_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let mut request = world.request(&layer, Digest::sha256(&tar));
    let asker = asker(Duration::from_secs(600), 0);
    request.asker = Some(asker.clone());
    let received = AtomicU64::new(0);
    let asked = async {
        tokio::task::yield_now().await;
        assert_eq!(world.registry.requests().blobs, 0);
        asker.asked.say();
    };
    let (opened, ()) = tokio::join!(world.opener.open(&request, &received), asked);
    assert_eq!(opened.unwrap().1, OpenedBy::Stream);
}

#[tokio::test]
async fn no_layer_is_streamed_once_one_of_its_image_took_too_long() {
    let tar = tar(&[("big", &noise(100_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let mut request = world.request(&layer, Digest::sha256(&tar));
    let asker = asker(Duration::from_secs(600), 1);
    asker.asked.say();
    asker.too_long.say();
    request.asker = Some(asker);
    let opened = world.opener.open(&request, &AtomicU64::new(0)).await;
    let error = opened.map(drop).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert_eq!(world.registry.requests().blobs, 0);
}

#[tokio::test]
async fn a_layer_is_whole_whatever_happens_to_its_parts() {
    let content = noise(700_000);
    let tar = tar(&[("big", &content)]);
    let table: [(&str, &[Fault], bool, usize); 5] = [
        ("nothing", &[], false, 2),
        (
            "its first part breaks",
            &[Fault::CloseAfter(10_000)],
            false,
            3,
        ),
        ("no ranges", &[], true, 2),
        ("a refusal", &[Fault::Status(503, None)], false, 3),
        (
            "it breaks twice",
            &[Fault::CloseAfter(1), Fault::CloseAfter(40_000)],
            false,
            4,
        ),
    ];
    for (case, faults, no_ranges, requests) in table {
        let world = World::new().await;
        let layer = world.add_gzip(&tar);
        for fault in faults {
            world.registry.script_on(Endpoint::Blob, fault.clone());
        }
        if no_ranges {
            world.registry.always(Endpoint::Blob, Fault::IgnoreRange);
        }
        let (layer, by) = world.open(&layer, Digest::sha256(&tar)).await.unwrap();
        assert_eq!(by, OpenedBy::Stream, "{case}");
        assert!(layer.file().is_complete(), "{case}");
        assert!(read_file(&layer, content.len()) == content, "{case}");
        assert_eq!(
            world.registry.ranges().len(),
            requests,
            "{case}: {:?}",
            world.registry.ranges()
        );
        assert_eq!(world.engine.memory_bytes(), 0, "{case}");
        layer.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_layer_that_nobody_reads_soon_is_the_same() {
    // More than one write past the page cache, on whatever file system tests run.
    let (first, second) = (noise(1_500_000), content::noise(2, 0xff, 700_001));
    let tar = tar(&[("first", &first), ("second", &second)]);
    let mut world = World::new().await;
    world.read_soon = false;
    let (layer, _) = world
        .open(&world.add_gzip(&tar), Digest::sha256(&tar))
        .await
        .unwrap();
    let data_len = usize::try_from(layer.file().index().data_len).unwrap();
    let bytes = read_file(&layer, data_len);
    let second_at = data_len - second.len();
    assert!(bytes.starts_with(&first) && bytes.ends_with(&second));
    assert!(bytes[first.len()..second_at].iter().all(|byte| *byte == 0));
    assert_eq!(layer.file().check_all().unwrap().dropped, Vec::<u32>::new());
    layer.close().await.unwrap();
}

#[tokio::test]
async fn a_layer_with_wrong_bytes_never_shows() {
    let tar = tar(&[("big", &noise(700_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let registry = &world.registry;
    registry.always(Endpoint::Blob, Fault::CorruptBytes);
    let error = world.open(&layer, Digest::sha256(&tar)).await.map(drop);
    assert!(matches!(error, Err(Error::Corrupt { .. })), "{error:?}");
    assert!(world.store.open_layer(&layer.digest).unwrap().is_none());
}

#[tokio::test]
async fn a_layer_with_wrong_bytes_is_streamed_once_more() {
    let tar = tar(&[("big", &noise(700_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let registry = &world.registry;
    registry.script_on(Endpoint::Blob, Fault::CorruptBytes);
    let request = world.request(&layer, Digest::sha256(&tar));
    let received = AtomicU64::new(0);
    let (opened, _) = world.opener.open(&request, &received).await.unwrap();
    assert!(opened.file().is_complete());
    assert_eq!(
        received.into_inner(),
        layer.size,
        "the first counts nothing"
    );
    opened.close().await.unwrap();
}

#[tokio::test]
async fn a_small_layer_without_a_table_is_one_request() {
    let tar = tar(&[("small", &noise(50_000))]);
    let world = World::new().await;
    let layer = world.add_gzip(&tar);
    let (layer, _) = world.open(&layer, Digest::sha256(&tar)).await.unwrap();
    assert_eq!(world.registry.ranges(), [""]);
    layer.close().await.unwrap();
    drop((layer, world.opener));
}

#[tokio::test]
async fn a_small_layer_with_a_table_is_one_request_for_data() {
    let files: Vec<(String, Vec<u8>)> = (0..40)
        .map(|i| (format!("f{i:02}"), noise(100 + i * 97)))
        .collect();
    let borrowed: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (&**n, &**b)).collect();
    let tar = tar(&borrowed);
    let mut blob = Vec::new();
    let options = Options::default();
    let written = write_layer("x", &mut Cursor::new(&tar), &mut blob, &options).unwrap();
    let world = World::new().await;
    let size = blob.len() as u64;
    let digest = world.registry.add_blob(blob);
    let mut layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
    let notes = written.annotations.into_iter();
    layer.annotations = notes.map(|(key, value)| (key.to_owned(), value)).collect();
    let (layer, by) = world.open(&layer, written.diff_id).await.unwrap();
    assert_eq!(by, OpenedBy::Toc);
    let before = world.registry.ranges().len();
    let facts = layer.facts(None);
    assert_eq!(decide(&facts), (Share::Full, Why::Small), "{facts:?}");
    layer.fetch_rest(true);
    // Waits for what is on its way.
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
    assert_eq!(decide(&layer.facts(None)), (Share::Full, Why::Complete));
    let asked = world.registry.ranges().split_off(before);
    assert_eq!(asked.len(), 1, "{asked:?}");
}
