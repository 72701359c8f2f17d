//! Images that are pulled beside one another, of which one cannot be had.
//!
//! Promise: what becomes of one image is no matter of its neighbour's registry, neither in what it
//! waits for nor in what it is told.

use std::time::Duration;

use super::*;

/// More than are opened at once.
const LAYERS: usize = 12;
/// Longest wait for what has to happen, on a machine that does much else.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// Longer than that.
const NEVER: &str = "60m";
/// Enough for a config, and for no table of contents.
const CONFIG_BYTES: usize = 4096;

/// Pushes an image of many layers with tables; their blobs, and the lowest layer.
fn push_many(registry: &FakeRegistry) -> (Pushed, Vec<Digest>, Layer) {
    let layers: Vec<_> = (0..LAYERS)
        .map(|number| estargz(layer(&format!("file-{number}"), b"text")))
        .collect();
    let diff_ids: Vec<_> = layers.iter().map(|l| l.diff_id.to_string()).collect();
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = serde_json::to_vec(&config).unwrap();
    assert!(config.len() < CONFIG_BYTES);
    let digest = registry.add_blob(config.clone()).to_string();
    let blobs = layers.iter().map(|l| registry.add_blob(l.blob.clone()));
    let blobs: Vec<Digest> = blobs.collect();
    let edit = |manifest: &mut Value| {
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(config.len());
        let first = manifest["layers"][0].clone();
        let all = layers.iter().zip(&blobs).map(|(layer, blob)| {
            let mut one = first.clone();
            let toc = layer.toc_digest.unwrap().to_string();
            one["digest"] = json!(blob.to_string());
            one["size"] = json!(layer.blob.len());
            one["annotations"] = json!({"containerd.io/snapshot/stargz/toc.digest": toc});
            one
        });
        manifest["layers"] = all.collect();
    };
    let changes = Changes {
        edit: &edit,
        ..Changes::default()
    };
    let image = push(registry, &layers[0], &changes);
    let lowest = layers.into_iter().next().unwrap();
    (image, blobs, lowest)
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_an_image_whose_registry_is_silent_keeps_no_other_waiting() {
    if !is_root("privileged_an_image_whose_registry_is_silent_keeps_no_other_waiting") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [silent, fast] = [FakeRegistry::start().await, FakeRegistry::start().await];
    let (stuck, all, lowest) = push_many(&silent);
    silent.always(Endpoint::Blob, Fault::HangAfter(CONFIG_BYTES));
    let other = gzipped(layer("other", b"of another image"));
    let image = push(&fast, &other, &Changes::default());
    let (node, _) = Node::open_as(Path::new("/none"), config(dir.path(), NEVER, "")).await;
    let stuck = Wanted {
        image: &stuck,
        chain_id: lowest.diff_id,
        blob: all[0],
        all: &all,
    };
    let wanted = Wanted {
        image: &image,
        chain_id: other.diff_id,
        blob: Digest::sha256(&other.blob),
        all: &[],
    };
    let waits = node.prepare("stuck", "", Some(&stuck));
    let brought = async {
        // The line of what is opened is full, as far as it ever is.
        while silent.requests().blobs < 9 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        node.bring("", &wanted).await
    };
    let brought = tokio::time::timeout(WAIT_MAX, brought);
    tokio::select! {
        answer = waits => panic!("nobody answered it: {answer:?}"),
        brought = brought => drop(brought.unwrap()),
    }
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_an_image_does_not_fail_by_the_registry_of_another() {
    if !is_root("privileged_an_image_does_not_fail_by_the_registry_of_another") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [refusing, other] = [FakeRegistry::start().await, FakeRegistry::start().await];
    let base = estargz(layer("base", b"from the base"));
    let shared = gzipped(layer("shared", b"in both"));
    let refused = push_two(&refusing, [&base, &shared]);
    let image = push(&other, &shared, &Changes::default());
    let (node, _) = Node::open(dir.path()).await;
    let lower = Wanted {
        image: &refused,
        chain_id: base.diff_id,
        blob: Digest::sha256(&base.blob),
        all: &[],
    };
    let first = node.bring("", &lower).await;
    refusing.always(Endpoint::Blob, Fault::Status(404, None));
    let upper = Wanted {
        chain_id: chain(&base, &shared),
        blob: Digest::sha256(&shared.blob),
        ..lower
    };
    let mounts = node.prepare("upper", &first, Some(&upper)).await.unwrap();
    assert_eq!(lowers(&mounts).len(), 1, "it was brought: {mounts:?}");
    let wanted = Wanted {
        image: &image,
        chain_id: shared.diff_id,
        ..upper
    };
    let name = node.bring("", &wanted).await;
    let mounts = node.prepare("container", &name, None).await.unwrap();
    let file = lowers(&mounts)[0].join("shared");
    assert_eq!(read(file).await, b"in both");
    node.close().await;
}
