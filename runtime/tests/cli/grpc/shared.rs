//! Layers that images of several repositories have.

use lazarette_fetcher::source::Credential;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::types::Reference;

use super::*;
use crate::support::push_layers;

const LAZY: &str = "[snapshotter]\nfill = false\n";

/// What a container reads of a layer's large file, whatever is in the store.
async fn read_anew(dir: &Path, digest: &Digest, at: &Path) -> Vec<u8> {
    let store = Store::open(dir.join("root")).unwrap();
    let layer = store.open_layer(digest).unwrap().unwrap();
    layer.evict_all().unwrap();
    read(at.to_owned()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_is_read_by_the_image_that_may_still_be_read() {
    if !is_root("privileged_a_layer_is_read_by_the_image_that_may_still_be_read") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::builder().basic("u", "p").private("test/");
    let registry = registry.start().await.unwrap();
    let layers = [
        estargz(layer("base", b"below")),
        estargz(layer("top", b"above")),
    ];
    let all = [0, 1].map(|number: usize| Digest::sha256(&layers[number].blob));
    let first = push(&registry, &layers[0], &Changes::default());
    let changes = Changes {
        repository: "open/image",
        ..Changes::default()
    };
    let second = push_layers(&registry, &layers, &changes);
    let (node, _) = Node::open_with(dir.path(), LAZY).await;
    let reference = Reference::parse(&first.reference).unwrap();
    let credential = Credential::Basic {
        user: "u".to_owned(),
        password: "p".to_owned(),
    };
    let keyring = node.engine.registry().keyring();
    keyring.give(reference.repository(), credential).succeeded();
    let base = Wanted {
        image: &first,
        chain_id: layers[0].diff_id,
        blob: all[0],
        all: &all[..1],
    };
    let base = node.bring("", &base).await;
    let top = Wanted {
        image: &second,
        chain_id: chain(&layers[0], &layers[1]),
        blob: all[1],
        all: &all,
    };
    let top = node.bring(&base, &top).await;
    node.close().await;

    // Its credentials were in memory only.
    let (node, restored) = Node::open_with(dir.path(), LAZY).await;
    assert_eq!(restored, 2);
    let mounts = node.prepare("container", &top, None).await.unwrap();
    let file = lowers(&mounts)[1].join("base-big");
    let bytes = read_anew(dir.path(), &all[0], &file).await;
    assert!(bytes == incompressible(300 << 10));
    node.close().await;
}
