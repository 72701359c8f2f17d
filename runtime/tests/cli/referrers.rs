//! Things beside an image that refer to one another in circles: each is looked at once, told of,
//! and passed over.

use std::cell::RefCell;

use lazarette_fetcher::source::{BlobSource as _, RegistrySource, SourceConfig};
use lazarette_fetcher::test_util::{FakeRegistry, Paging};
use lazarette_fetcher::types::{Digest, MediaType, Reference};
use serde_json::{Value, json};

use crate::store::present;
use crate::support::{Changes, File, Laz, Pushed, gzipped, incompressible, push, tar};

const INDEX_TYPE: &str = "application/vnd.lazarette.index.v3";
const KEY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../fetcher/tests/fixtures/index-key.pub"
);
/// Artifacts of one kind that are looked at.
const FOUND_MAX: u32 = 8;

/// A `laz` that looks for indexes beside images.
pub(crate) fn trusting() -> Laz {
    let laz = Laz::new();
    let config = std::fs::read_to_string(laz.path("config.toml")).unwrap();
    let config = format!("{config}[trust]\nindex_keys = [\"{KEY}\"]\n");
    std::fs::write(laz.path("config.toml"), config).unwrap();
    laz
}

/// Pushes an image of one gzip layer; also the descriptor of its manifest.
fn push_image(registry: &FakeRegistry) -> (Pushed, Value) {
    let bytes = incompressible(100_000);
    let files = [File {
        path: "data/noise",
        mode: 0o644,
        bytes: &bytes,
    }];
    let written = RefCell::new(Value::Null);
    let edit = |manifest: &mut Value| *written.borrow_mut() = described(manifest);
    let changes = Changes {
        edit: &edit,
        ..Changes::default()
    };
    let image = push(registry, &gzipped(tar(&files)), &changes);
    (image, written.into_inner())
}

pub(crate) fn described(document: &Value) -> Value {
    let bytes = serde_json::to_vec(document).unwrap();
    json!({
        "mediaType": document["mediaType"], "artifactType": INDEX_TYPE,
        "digest": Digest::sha256(&bytes).to_string(), "size": bytes.len(),
        "platform": {"os": "linux", "architecture": "amd64"},
    })
}

/// Pushes a document under its digest, and under `tag` unless that is empty.
pub(crate) fn push_document(registry: &FakeRegistry, tag: &str, document: &Value) -> Value {
    let kind = MediaType::from(document["mediaType"].as_str().unwrap().to_owned());
    let bytes = serde_json::to_vec(document).unwrap();
    registry.add_manifest("test/image", tag, kind, bytes);
    described(document)
}

fn index_of(manifests: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": MediaType::OciIndex.as_str(), "manifests": manifests})
}

/// An artifact of our kind that refers to `subject`, with nothing in it.
pub(crate) fn artifact(subject: &Value) -> Value {
    json!({
        "schemaVersion": 2, "mediaType": MediaType::OciManifest.as_str(),
        "artifactType": INDEX_TYPE, "subject": subject, "layers": [],
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2,
                   "digest": Digest::sha256(b"{}").to_string()},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_referrers_is_added_to_as_the_registry_has_it() {
    let bare = || FakeRegistry::builder().without_referrers();
    let registry = bare().start().await.unwrap();
    let mirror = bare().start().await.unwrap();
    let (image, own) = push_image(&registry);
    push_image(&mirror);
    let tag = own["digest"].as_str().unwrap().replace(':', "-");
    let theirs = push_document(&registry, "", &artifact(&own));
    push_document(&registry, &tag, &index_of(std::slice::from_ref(&theirs)));
    // The mirror has the list as it was before.
    push_document(&mirror, &tag, &index_of(&[]));
    let laz = Laz::new();
    laz.set_mirror(&registry, &mirror);
    let key = KEY.replace(".pub", ".pem");
    let push = ["image", "index", "--push", "--key", &key, &image.reference];
    let said = laz.run(&push).await;
    assert_eq!(said.code, 0, "{said:?}");
    assert!(mirror.requests().blobs > 0, "the mirror is not asked");
    let list = format!("{}/test/image:{tag}", registry.url_host());
    let source = RegistrySource::new(SourceConfig::default()).unwrap();
    let list = source.resolve(&Reference::parse(&list).unwrap()).await;
    let list: Value = serde_json::from_slice(&list.unwrap().bytes).unwrap();
    let listed = list["manifests"].as_array().unwrap();
    assert_eq!(listed.len(), 2, "{list}");
    assert_eq!(listed[0]["digest"], theirs["digest"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_in_circles_cost_a_request_each_and_no_more() {
    let builder = FakeRegistry::builder().without_referrers();
    let registry = builder.start().await.unwrap();
    let (image, own) = push_image(&registry);
    // The subject of one is another, whose subject is the image; an index has an index in it,
    // which has the image and that artifact; and the image refers to itself.
    let right = push_document(&registry, "", &artifact(&own));
    let of_other = push_document(&registry, "", &artifact(&right));
    let inner = push_document(&registry, "", &index_of(&[own.clone(), of_other.clone()]));
    let outer = push_document(&registry, "", &index_of(std::slice::from_ref(&inner)));
    let tag = own["digest"].as_str().unwrap().replace(':', "-");
    let all = [own, of_other, inner, outer, right];
    let many: Vec<Value> = all.iter().cycle().take(50).cloned().collect();
    push_document(&registry, &tag, &index_of(&many));
    let laz = trusting();
    let said = laz.run(&["pull", &image.reference]).await;
    assert_eq!(said.code, 0, "{said:?}");
    let passed_over = said.err.matches("passing over an artifact").count();
    assert!(passed_over >= 4, "{said:?}");
    let (here, all) = present(&laz).await;
    assert!(here == all && all > 0, "streamed");
    // The image, the list, and what is in it.
    let manifests = registry.requests().manifests;
    assert!(manifests <= 2 + FOUND_MAX, "{manifests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_referrers_without_end_costs_laziness_and_a_line() {
    for (paging, requests) in [(Paging::Loop, 1), (Paging::Endless, 8)] {
        let registry = FakeRegistry::start().await;
        let (image, _) = push_image(&registry);
        registry.page_referrers(paging);
        let said = trusting().run(&["pull", &image.reference]).await;
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.err.contains("cannot look for indexes"), "{said:?}");
        assert!(said.err.contains("page"), "{said:?}");
        assert_eq!(registry.requests().referrers, requests, "{paging:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_in_an_index_is_no_image() {
    let registry = FakeRegistry::start().await;
    let (_, own) = push_image(&registry);
    let inner = push_document(&registry, "", &index_of(&[own]));
    let inner = push_document(&registry, "", &index_of(&[inner]));
    push_document(&registry, "nested", &index_of(&[inner]));
    let reference = format!("{}/test/image:nested", registry.url_host());
    let said = Laz::new().run(&["pull", &reference]).await;
    assert_eq!(said.code, 125, "{said:?}");
    assert!(said.err.contains("lists no image manifest"), "{said:?}");
    assert_eq!(registry.requests().manifests, 1, "no deeper");
}
