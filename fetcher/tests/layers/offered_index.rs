//! An index that was made on one node, signed and carried to another: used there only with
//! a trusted signature over exactly it and its layer, else the layer is streamed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{
    LayerOpener, LayerRequest, OfferedIndex, OpenedBy, core_digest,
};
use lazarette_fetcher::source::{BlobRef, BlobSource};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::{self, noise};
use lazarette_fetcher::trust::{SigningKey, Statement, TrustedKeys};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};

struct World {
    source: Arc<MemorySource>,
    layer: Descriptor,
    diff_id: Digest,
    tar: Vec<u8>,
}

impl World {
    fn new() -> Self {
        // Compresses a little.
        let tar = content::tar(&[("file", &noise(1, 0x3f, 3 << 20))]);
        let blob = MemberCompressor::new(6).compress(&tar);
        let size = blob.len() as u64;
        let source = Arc::new(MemorySource::new());
        let digest = source.add_blob(blob);
        Self {
            source,
            layer: Descriptor::new(MediaType::OciLayerGzip, digest, size),
            diff_id: Digest::sha256(&tar),
            tar,
        }
    }

    /// Opens the layer on a new node that trusts `keys`.
    async fn open(
        &self,
        offered: Option<OfferedIndex>,
        keys: &[PathBuf],
    ) -> (Arc<Store>, Arc<Layer>, OpenedBy, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let source = Arc::clone(&self.source) as Arc<dyn BlobSource>;
        let opener = LayerOpener::new(Arc::clone(&store), source);
        let opener = opener.trusting(TrustedKeys::load(keys).unwrap());
        let repository = repository();
        let mut request = LayerRequest::new(repository, &self.layer, self.diff_id);
        request.index = offered;
        let (layer, by) = opener.open(&request, &AtomicU64::new(0)).await.unwrap();
        // Only what is asked for comes: requests and faults are counted.
        layer.set_foresight(false);
        (store, layer, by, dir)
    }

    /// The index file that a node makes by streaming the layer.
    async fn index(&self) -> Vec<u8> {
        let (store, _, by, _dir) = self.open(None, &[]).await;
        assert_eq!(by, OpenedBy::Stream);
        let mut bytes = Vec::new();
        let mut file = store.open_index(&self.layer.digest).unwrap().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn offer(&self, bytes: Vec<u8>, signature: String) -> Option<OfferedIndex> {
        let size = bytes.len() as u64;
        let blob = BlobRef {
            repository: repository(),
            digest: self.source.add_blob(bytes),
            size,
        };
        Some(OfferedIndex {
            blob,
            signature,
            core_bytes: None,
        })
    }

    fn signed(&self, bytes: &[u8]) -> String {
        key().sign(&Statement {
            blob_digest: self.layer.digest,
            core_digest: core_digest(bytes).unwrap(),
        })
    }
}

fn repository() -> lazarette_fetcher::types::Repository {
    let reference = Reference::parse("example.com/a:b").unwrap();
    reference.repository().clone()
}

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    fixtures.join(name)
}

fn key() -> SigningKey {
    SigningKey::read(&fixture("index-key.pem")).unwrap()
}

#[tokio::test]
async fn a_signed_index_makes_a_gzip_layer_lazy_on_another_node() {
    let world = World::new();
    let index = world.index().await;
    let offered = world.offer(index.clone(), world.signed(&index));
    let (_, layer, by, _dir) = world.open(offered, &[fixture("index-key.pub")]).await;
    assert_eq!((by, layer.present_bytes()), (OpenedBy::Toc, 0));
    // One page in the middle of the file, far from both ends.
    let place = ByteRange::at(1_600_000, 4096).unwrap();
    layer.fill(place).await.unwrap();
    let mut page = vec![0; 4096];
    assert!(layer.try_read(place.start(), &mut page).unwrap());
    assert_eq!(page, world.tar[512 + 1_600_000..][..4096]);
    let fetched = layer.counters().bytes_fetched;
    assert!(fetched < world.layer.size / 2, "{fetched}");
    layer.fill_all().await.unwrap();
    assert!(layer.file().is_complete());
}

#[tokio::test]
async fn anything_else_than_a_trusted_signature_streams_the_layer() {
    let world = World::new();
    let index = world.index().await;
    let good = world.signed(&index);
    let trusted = [fixture("index-key.pub")];
    let other_layer = key().sign(&Statement {
        blob_digest: Digest::sha256(b"another layer"),
        core_digest: core_digest(&index).unwrap(),
    });
    let mut damaged = index.clone();
    damaged[60] ^= 1;
    let table: [(&str, Vec<u8>, String, &[PathBuf]); 6] = [
        ("no key is trusted", index.clone(), good.clone(), &[]),
        ("no signature", index.clone(), String::new(), &trusted),
        (
            "signed for another layer",
            index.clone(),
            other_layer,
            &trusted,
        ),
        (
            "damaged after it was signed",
            damaged,
            good.clone(),
            &trusted,
        ),
        (
            "cut off",
            index[..index.len() - 1].to_vec(),
            good.clone(),
            &trusted,
        ),
        ("no index at all", b"hello".to_vec(), good, &trusted),
    ];
    for (what, bytes, signature, keys) in table {
        let offered = world.offer(bytes, signature);
        let (_, layer, by, _dir) = world.open(offered, keys).await;
        assert_eq!(by, OpenedBy::Stream, "{what}");
        assert!(layer.file().is_complete(), "{what}");
    }
}
