//! Unmodified gzip layers that a SOCI index makes lazy: one that the image names, or one that
//! refers to it, where that is allowed.

use std::cell::RefCell;
use std::io::Write as _;

use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::{Digest, MediaType};
use serde_json::{Value, json};

use crate::store::{data_file, ok, present};
use crate::support::{Changes, Layer, Laz, Pushed, is_root, push};

const LAYER: &[u8] = include_bytes!("../../../fetcher/tests/fixtures/soci/plain.tar.gz");
const ZTOC: &[u8] = include_bytes!("../../../fetcher/tests/fixtures/soci/plain.ztoc.gz");
const V1: &str = "application/vnd.amazon.soci.index.v1+json";
const V2: &str = "application/vnd.amazon.soci.index.v2+json";

fn unpacked(packed: &'static [u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut decoder = decoder(packed).unwrap();
    std::io::copy(&mut decoder, &mut bytes).unwrap();
    bytes
}

fn layer() -> Layer {
    Layer {
        blob: LAYER.to_vec(),
        diff_id: Digest::sha256(&unpacked(LAYER)),
        toc_digest: None,
    }
}

/// Pushes a SOCI index of `kind` with the layer's zTOC, as soci-snapshotter writes it.
fn push_index(registry: &FakeRegistry, kind: &str, subject: Option<Value>) -> Digest {
    push_index_with(registry, LAYER, (kind, subject), unpacked(ZTOC))
}

/// Pushes an index that an image may name, with what it says is a zTOC of `layer`.
pub(crate) fn push_index_of(registry: &FakeRegistry, layer: &[u8], ztoc: Vec<u8>) -> Digest {
    push_index_with(registry, layer, (V2, None), ztoc)
}

fn push_index_with(
    registry: &FakeRegistry,
    layer: &[u8],
    (kind, subject): (&str, Option<Value>),
    ztoc: Vec<u8>,
) -> Digest {
    let size = ztoc.len();
    let (ztoc, config) = (registry.add_blob(ztoc), registry.add_blob(&b"{}"[..]));
    let mut index = json!({
        "schemaVersion": 2,
        "mediaType": MediaType::OciManifest.as_str(),
        "config": {"mediaType": kind, "digest": config.to_string(), "size": 2},
        "layers": [
            {"mediaType": "application/vnd.amazon.soci.prefetch.v1+json",
             "digest": config.to_string(), "size": 2,
             "annotations": {"com.amazon.soci.image-layer-digest": Digest::sha256(layer)}},
            {"mediaType": "application/octet-stream", "digest": ztoc.to_string(), "size": size,
             "annotations": {"com.amazon.soci.image-layer-digest": Digest::sha256(layer),
                             "com.amazon.soci.image-layer-mediaType": MediaType::OciLayerGzip.as_str(),
                             "com.amazon.soci.span-size": "32768"}},
        ],
        "annotations": {"com.amazon.soci.build-tool-identifier": "a test"},
    });
    if let Some(subject) = subject {
        index["subject"] = subject;
    }
    let bytes = serde_json::to_vec(&index).unwrap();
    registry.add_manifest("test/image", "", MediaType::OciManifest, bytes)
}

/// Pushes the image, whose manifest names `index`; also its own descriptor.
fn push_image(registry: &FakeRegistry, index: Option<Digest>) -> (Pushed, Value) {
    let written = RefCell::new(Value::Null);
    let edit = |manifest: &mut Value| {
        if let Some(index) = index {
            manifest["annotations"] = json!({"com.amazon.soci.index-digest": index});
        }
        let bytes = serde_json::to_vec(manifest).unwrap();
        *written.borrow_mut() = json!({
            "mediaType": MediaType::OciManifest.as_str(),
            "digest": Digest::sha256(&bytes).to_string(), "size": bytes.len(),
        });
    };
    let changes = Changes {
        edit: &edit,
        ..Changes::default()
    };
    (push(registry, &layer(), &changes), written.into_inner())
}

/// Pushes an image that its SOCI index makes lazy.
pub(crate) fn push_lazy(registry: &FakeRegistry) -> Pushed {
    let index = push_index(registry, V2, None);
    push_image(registry, Some(index)).0
}

fn allow_referrers(laz: &Laz) {
    let config = std::fs::File::options()
        .append(true)
        .open(laz.path("config.toml"));
    config
        .unwrap()
        .write_all(b"[formats]\nsoci_referrers = true\n")
        .unwrap();
}

/// Whether pulling left the data in the registry; then gets it, and checks all of it.
async fn is_lazy(laz: &Laz, image: &Pushed) -> bool {
    ok(laz, &["pull", &image.reference]).await;
    let (there, all) = present(laz).await;
    assert!(there == 0 || there == all);
    ok(laz, &["pull", "--full", &image.reference]).await;
    assert_eq!(present(laz).await, (all, all));
    ok(laz, &["store", "check"]).await;
    let streamed = Laz::new();
    let registry = FakeRegistry::start().await;
    let (plain, _) = push_image(&registry, None);
    ok(&streamed, &["pull", &plain.reference]).await;
    let bytes = |laz: &Laz| std::fs::read(data_file(laz)).unwrap();
    assert!(bytes(laz) == bytes(&streamed), "both show the same files");
    there == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_the_image_names_makes_it_lazy() {
    let registry = FakeRegistry::start().await;
    let index = push_index(&registry, V2, None);
    let (image, _) = push_image(&registry, Some(index));
    assert!(is_lazy(&Laz::new(), &image).await);
    assert_eq!(registry.requests().referrers, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_refers_to_the_image_is_used_only_where_that_is_allowed() {
    for builder in [
        FakeRegistry::builder(),
        FakeRegistry::builder().without_referrers(),
    ] {
        let registry = builder.start().await.unwrap();
        let (image, subject) = push_image(&registry, None);
        let digest = subject["digest"].as_str().unwrap().to_owned();
        let index = push_index(&registry, V1, Some(subject));
        let listed = json!({
            "schemaVersion": 2, "mediaType": MediaType::OciIndex.as_str(),
            "manifests": [{"mediaType": MediaType::OciManifest.as_str(), "artifactType": V1,
                           "digest": index.to_string(), "size": 1000}],
        });
        let tag = digest.replace(':', "-");
        let listed = serde_json::to_vec(&listed).unwrap();
        registry.add_manifest("test/image", &tag, MediaType::OciIndex, listed);
        assert!(!is_lazy(&Laz::new(), &image).await);
        assert_eq!(registry.requests().referrers, 0, "not even asked for");
        let laz = Laz::new();
        allow_referrers(&laz);
        assert!(is_lazy(&laz, &image).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_of_no_use_costs_laziness_and_a_line() {
    let registry = FakeRegistry::start().await;
    let foreign = push_index(&registry, V1, None);
    let table = [
        (Digest::sha256(b"nowhere"), "not found"),
        (foreign, "it is of kind"),
    ];
    for (index, says) in table {
        let (image, _) = push_image(&registry, Some(index));
        let laz = Laz::new();
        let said = laz.run(&["pull", &image.reference]).await;
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.err.contains(says), "{said:?}");
        assert!(said.err.contains("SOCI index"), "{said:?}");
        assert!(!is_lazy(&laz, &image).await);
    }
}

/// Whether a check says of the only layer that nothing but its zTOC's word is behind it: to
/// programs, and to people.
async fn by_ztoc_alone(laz: &Laz) -> (bool, bool) {
    let check = ok(laz, &["store", "check"]).await;
    let said = laz.run(&["store", "check"]).await.out;
    let to_programs = check["layers"][0]["by_ztoc_alone"].as_bool();
    (to_programs.unwrap(), said.contains("as its zTOC says"))
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_check_tells_what_rests_on_a_ztocs_word() {
    if !is_root("privileged_a_check_tells_what_rests_on_a_ztocs_word") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push_lazy(&registry);
    let laz = Laz::new();
    // It has no such program; what is looked for comes by the zTOC, and is right by its word.
    laz.run(&["run", &image.reference, "/usr/bin/caps"]).await;
    assert!(present(&laz).await.0 > 0);
    assert_eq!(by_ztoc_alone(&laz).await, (true, true));
    ok(&laz, &["pull", "--full", &image.reference]).await;
    assert_eq!(by_ztoc_alone(&laz).await, (false, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pull_takes_nobodys_word_and_tells_of_lies() {
    let registry = FakeRegistry::start().await;
    let mut lying = unpacked(ZTOC);
    let name = b"usr/bin/caps";
    // The tables are behind the windows.
    let at = lying.windows(name.len()).rposition(|bytes| bytes == name);
    lying[at.unwrap()] = b'U';
    let index = push_index_of(&registry, LAYER, lying);
    let (image, _) = push_image(&registry, Some(index));
    let laz = Laz::new();
    let lazily = laz.run(&["pull", &image.reference]).await;
    assert_eq!((lazily.code, present(&laz).await.0), (0, 0), "{lazily:?}");
    assert_eq!(by_ztoc_alone(&laz).await, (false, false), "nothing is here");
    let full = ["pull", "--full", &image.reference];
    let said = laz.run(&full).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(by_ztoc_alone(&laz).await, (false, false), "it was proven");
    assert!(said.err.contains("zTOC was wrong"), "{said:?}");
    assert!(said.err.contains("Usr/bin/caps"), "{said:?}");
    let again = laz.run(&full).await;
    assert!(again.code == 0 && !again.err.contains("zTOC"), "{again:?}");
    // One that never came lazily is not even asked for its zTOC.
    let fresh = Laz::new();
    let asked = registry.requests();
    let said = fresh.run(&full).await;
    assert!(said.code == 0 && !said.err.contains("zTOC"), "{said:?}");
    let now = registry.requests();
    assert_eq!(
        (now.manifests, now.blobs),
        (asked.manifests + 1, asked.blobs + 2)
    );
}
