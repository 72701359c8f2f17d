//! Chunks that take more memory than the node gives to fetching: the layer is streamed and
//! every file can be read, whatever kind of index it came with.

#![expect(
    clippy::unwrap_used,
    reason = "a fixture that cannot be read fails the test"
)]

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::estargz::LAYER_DIGEST_ANNOTATION;
use lazarette_fetcher::index::{FileKind, LayerIndex};
use lazarette_fetcher::layer::open::{
    LayerOpener, LayerRequest, OfferedIndex, OpenedBy, core_digest,
};
use lazarette_fetcher::layer::{EngineConfig, FetchEngine, Layer};
use lazarette_fetcher::source::{BlobRef, RegistrySource, SourceConfig};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::trust::{SigningKey, Statement, TrustedKeys};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};

const STORAGE: &[u8] = include_bytes!("../fixtures/zstdchunked/storage.zst");
const STORAGE_NOTES: &str = include_str!("../fixtures/zstdchunked/storage.zst.json");
const STARGZ: &[u8] = include_bytes!("../fixtures/zstdchunked/stargz.zst");
const STARGZ_NOTES: &str = include_str!("../fixtures/zstdchunked/stargz.zst.json");
const EXTERNAL: &[u8] = include_bytes!("../fixtures/zstdchunked/external.esgz");
const EXTERNAL_NOTES: &str = include_str!("../fixtures/zstdchunked/external.esgz.json");
const EXTERNAL_TOC: &[u8] = include_bytes!("../fixtures/zstdchunked/external-toc.tgz");
const PLAIN: &[u8] = include_bytes!("../fixtures/soci/plain.tar.gz");
const PLAIN_ZTOC: &[u8] = include_bytes!("../fixtures/soci/plain.ztoc.gz");

/// What a request holds besides a chunk and its encoded bytes.
const FIXED_BYTES: u64 = 192 << 10;

fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut decoder = decoder(std::io::Cursor::new(packed.to_vec())).unwrap();
    decoder.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Memory that the chunks of a layer take, each alone; ascending.
fn needs(index: &LayerIndex) -> Vec<u64> {
    let chunks = index.chunks.iter();
    let mut needs: Vec<u64> = chunks
        .map(|chunk| FIXED_BYTES + u64::from(chunk.len) + chunk.encoding.blob().unwrap().len())
        .collect();
    needs.sort_unstable();
    needs
}

/// Everything the files hold, by path.
async fn read_all(layer: &Arc<Layer>) -> Vec<(Vec<u8>, Vec<u8>)> {
    layer.fill_all().await.unwrap();
    let mut all = Vec::new();
    for file in &layer.index().files {
        if let FileKind::Regular { size, data_offset } = file.kind {
            let mut bytes = vec![0; usize::try_from(size).unwrap()];
            assert!(layer.try_read(data_offset, &mut bytes).unwrap());
            all.push((file.path.clone(), bytes));
        }
    }
    all.sort();
    all
}

struct World {
    registry: FakeRegistry,
    image: Reference,
}

impl World {
    async fn new() -> Self {
        let registry = FakeRegistry::start().await;
        let toc = registry.add_blob(EXTERNAL_TOC);
        let manifest = serde_json::json!({ "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": toc, "size": EXTERNAL_TOC.len(),
            "annotations": { LAYER_DIGEST_ANNOTATION: Digest::sha256(EXTERNAL) },
        }] });
        let kind = MediaType::OciManifest;
        registry.add_manifest("a/b", "v1-esgztoc", kind, manifest.to_string());
        let image = format!("{}/a/b:v1", registry.url_host());
        Self {
            image: Reference::parse(&image).unwrap(),
            registry,
        }
    }

    fn add(&self, bytes: &[u8]) -> BlobRef {
        BlobRef {
            repository: self.image.repository().clone(),
            digest: self.registry.add_blob(bytes.to_vec()),
            size: bytes.len() as u64,
        }
    }

    fn request(&self, blob: &[u8], notes: &str) -> LayerRequest {
        let added = self.add(blob);
        let mut layer = Descriptor::new(MediaType::OciLayerGzip, added.digest, added.size);
        layer.annotations = serde_json::from_str(notes).unwrap();
        let diff_id = Digest::sha256(&unpacked(blob));
        let request = LayerRequest::new(added.repository, &layer, diff_id);
        request.of_image(&self.image)
    }

    async fn open(
        &self,
        store: &Path,
        request: &LayerRequest,
        memory_bytes_max: u64,
    ) -> (Arc<Layer>, OpenedBy) {
        let store = Store::open(store).unwrap();
        let source = RegistrySource::new(SourceConfig::default()).unwrap();
        let engine = FetchEngine::new(EngineConfig {
            memory_bytes_max,
            ..EngineConfig::default()
        });
        let opener = LayerOpener::new(store, Arc::new(source)).fetching_with(engine);
        let opener = opener.trusting(TrustedKeys::load(&[fixture("index-key.pub")]).unwrap());
        opener.open(request, &AtomicU64::new(0)).await.unwrap()
    }

    /// A request for a plain layer beside which there is a signed index of it.
    async fn signed(&self) -> LayerRequest {
        let dir = tempfile::tempdir().unwrap();
        let mut request = self.request(PLAIN, "{}");
        let (layer, by) = self.open(dir.path(), &request, 64 << 20).await;
        assert_eq!(by, OpenedBy::Stream);
        let store = Store::open(dir.path()).unwrap();
        let mut file = store.open_index(layer.file().digest()).unwrap().unwrap();
        let mut index = Vec::new();
        file.read_to_end(&mut index).unwrap();
        let statement = Statement {
            blob_digest: request.blob.digest,
            core_digest: core_digest(&index).unwrap(),
        };
        let key = SigningKey::read(&fixture("index-key.pem")).unwrap();
        request.index = Some(OfferedIndex {
            blob: self.add(&index),
            signature: key.sign(&statement),
            core_bytes: None,
        });
        request
    }
}

fn fixture(name: &str) -> std::path::PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    fixtures.join(name)
}

#[tokio::test]
async fn a_layer_is_lazy_only_if_each_chunk_fits_into_the_memory_for_fetching() {
    let world = World::new().await;
    let mut soci = world.request(PLAIN, "{}");
    soci.ztoc = Some(world.add(&unpacked(PLAIN_ZTOC)));
    let table = [
        ("podman's", world.request(STORAGE, STORAGE_NOTES)),
        ("stargz's", world.request(STARGZ, STARGZ_NOTES)),
        ("external TOC", world.request(EXTERNAL, EXTERNAL_NOTES)),
        ("zTOC", soci),
        ("signed", world.signed().await),
    ];
    for (case, request) in table {
        let dir = || tempfile::tempdir().unwrap();
        let (lazy, fits, large) = (dir(), dir(), dir());
        let (layer, by) = world.open(lazy.path(), &request, 64 << 20).await;
        assert_eq!(by, OpenedBy::Toc, "{case}");
        let largest = needs(layer.index()).last().copied().unwrap();
        let expected = read_all(&layer).await;

        let (layer, by) = world.open(fits.path(), &request, largest).await;
        assert_eq!(by, OpenedBy::Toc, "{case}");
        assert!(read_all(&layer).await == expected, "{case}");

        let (layer, by) = world.open(large.path(), &request, largest - 1).await;
        assert_eq!(by, OpenedBy::Stream, "{case}");
        assert!(read_all(&layer).await == expected, "{case}");
    }
}

#[tokio::test]
async fn a_layer_that_is_here_stays_lazy_when_the_memory_shrinks() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let request = world.request(STORAGE, STORAGE_NOTES);
    let (layer, _) = world.open(dir.path(), &request, 64 << 20).await;
    let needs = needs(layer.index());
    let (smallest, largest) = (needs[0], needs[needs.len() - 1]);
    assert!(smallest < largest);
    drop(layer);
    let (layer, by) = world.open(dir.path(), &request, largest - 1).await;
    assert_eq!((by, layer.present_bytes()), (OpenedBy::Store, 0));
    for chunk in &layer.index().chunks {
        let place = ByteRange::at(chunk.data_offset, chunk.len.into()).unwrap();
        let need = FIXED_BYTES + place.len() + chunk.encoding.blob().unwrap().len();
        let filled = layer.fill(place).await;
        assert_eq!(filled.is_ok(), need < largest, "{filled:?}");
    }
}
