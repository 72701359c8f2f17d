//! Layers brought to containerd, asked for as containerd does, from a registry on loopback.
//!
//! The service runs in this process, over the real engine and real mounts. Here the mounts
//! are its own; [`restarts`] and its neighbours have those of the mount server.

mod asked;
mod bed;
mod beside;
mod crash;
mod crowded;
mod early;
mod group;
mod hung;
mod lacks;
mod left;
mod many;
mod owners;
mod power;
mod pressure;
mod restarts;
mod scarce;
mod served;
mod shared;
mod start;
mod unlisted;
mod whole;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use lazarette_fetcher::source::install_tls_provider;
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{
    Info, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, SnapshotsClient,
    SnapshotsServer, UsageRequest,
};
use lazarette_proto::types::Mount;
use lazarette_runtime::config::Config;
use lazarette_runtime::engine::Engine;
use lazarette_runtime::engine::lazy::{Keep, NodeLayers};
use lazarette_snapshotter::grpc::Service;
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Changes, File, Layer, PATIENT, Pushed, estargz, gzipped, incompressible, is_root, push, source,
    tar,
};

const REF: &str = "containerd.io/snapshot.ref";
const CRI: &str = "containerd.io/snapshot/cri";

/// A daemon without its socket.
struct Node {
    /// How many layers it mounted to begin with.
    restored: usize,
    engine: Arc<Engine>,
    layers: Arc<NodeLayers>,
    client: SnapshotsClient<SnapshotsServer<Service>>,
}

impl Node {
    /// One that mounts layers itself.
    async fn open(dir: &Path) -> (Self, usize) {
        Self::open_with(dir, "").await
    }

    /// The same with more lines of config.
    async fn open_with(dir: &Path, more: &str) -> (Self, usize) {
        Self::open_as(Path::new("/none"), config(dir, PATIENT, more)).await
    }

    /// One whose layers the mount server `program` shows.
    async fn open_served(dir: &Path, program: &Path) -> (Self, usize) {
        Self::open_as(program, config(dir, PATIENT, "")).await
    }

    async fn open_as(program: &Path, file: PathBuf) -> (Self, usize) {
        Self::open_keeping(program, file, Keep::default()).await
    }

    async fn open_keeping(program: &Path, file: PathBuf, keep: Keep) -> (Self, usize) {
        // Another test may have done it.
        install_tls_provider();
        let engine = Engine::open(Config::load(Some(&file)).unwrap()).unwrap();
        let layers = NodeLayers::open_keeping(&engine, program, keep);
        let layers = layers.await.unwrap();
        let restored = layers.restore().await.unwrap();
        let service = Service::new(layers.snapshots(), Arc::clone(&layers) as _);
        let client = SnapshotsClient::new(SnapshotsServer::new(Arc::new(service)));
        let node = Self {
            restored,
            engine,
            layers,
            client,
        };
        (node, restored)
    }

    async fn close(self) {
        self.layers.close().await.unwrap();
    }

    async fn prepare(
        &self,
        key: &str,
        parent: &str,
        image: Option<&Wanted<'_>>,
    ) -> Result<Vec<Mount>, Code> {
        let request = PrepareSnapshotRequest {
            snapshotter: "lazarette".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: image.map(Wanted::labels).unwrap_or_default(),
        };
        let answer = self.client.prepare(request).await;
        answer
            .map(|answer| answer.mounts)
            .map_err(|status| status.code())
    }

    async fn list(&self, filter: &str) -> Vec<Info> {
        let request = ListSnapshotsRequest {
            snapshotter: String::new(),
            filters: vec![filter.to_owned()],
        };
        let answers = self.client.list(request).await.unwrap();
        let all: Vec<_> = answers.collect().await;
        all.into_iter()
            .flat_map(|answer| answer.unwrap().info)
            .collect()
    }

    /// Prepares a layer that must be brought; the name of its snapshot.
    async fn bring(&self, parent: &str, wanted: &Wanted<'_>) -> String {
        let answer = self.prepare("extract", parent, Some(wanted)).await;
        assert_eq!(answer, Err(Code::AlreadyExists));
        let filter = format!("labels.{REF:?}=={},parent=={parent:?}", wanted.chain_id);
        let found = self.list(&filter).await;
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].name.clone()
    }

    async fn remove(&self, key: &str) {
        let key = key.to_owned();
        let request = RemoveSnapshotRequest {
            key,
            ..Default::default()
        };
        self.client.remove(request).await.unwrap();
    }
}

/// Writes a config with everything below `dir`; what a registry has not answered by
/// `deadline` fails.
fn config(dir: &Path, deadline: &str, more: &str) -> PathBuf {
    let text = format!(
        "root = {:?}\nstate = {:?}\n{}{more}",
        dir.join("root"),
        dir.join("state"),
        source(deadline)
    );
    let file = dir.join("config.toml");
    std::fs::write(&file, text).unwrap();
    file
}

/// A layer as containerd names it.
struct Wanted<'a> {
    image: &'a Pushed,
    chain_id: Digest,
    blob: Digest,
    all: &'a [Digest],
}

impl Wanted<'_> {
    fn labels(&self) -> std::collections::BTreeMap<String, String> {
        let all: Vec<String> = self.all.iter().map(ToString::to_string).collect();
        [
            (REF.to_owned(), self.chain_id.to_string()),
            (format!("{CRI}.image-ref"), self.image.reference.clone()),
            (format!("{CRI}.layer-digest"), self.blob.to_string()),
            (format!("{CRI}.image-layers"), all.join(",")),
        ]
        .into()
    }
}

fn layer(name: &str, text: &[u8]) -> Vec<u8> {
    let big = incompressible(300 << 10);
    tar(&[
        File {
            path: name,
            mode: 0o644,
            bytes: text,
        },
        File {
            path: &format!("{name}-big"),
            mode: 0o644,
            bytes: &big,
        },
    ])
}

/// Pushes an image of two layers.
fn push_two(registry: &FakeRegistry, layers: [&Layer; 2]) -> Pushed {
    push_two_with(registry, layers, Changes::default().tag, &json!({}))
}

/// The same with a tag, and with what is run.
fn push_two_with(
    registry: &FakeRegistry,
    [base, top]: [&Layer; 2],
    tag: &str,
    command: &Value,
) -> Pushed {
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": command,
        "rootfs": {"type": "layers", "diff_ids": [base.diff_id.to_string(), top.diff_id.to_string()]},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let digest = registry.add_blob(config.clone()).to_string();
    let blob = registry.add_blob(top.blob.clone()).to_string();
    let edit = |manifest: &mut Value| {
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(config.len());
        let mut layer = manifest["layers"][0].clone();
        layer["digest"] = json!(blob);
        layer["size"] = json!(top.blob.len());
        layer["annotations"] = match top.toc_digest {
            Some(toc) => json!({"containerd.io/snapshot/stargz/toc.digest": toc.to_string()}),
            None => json!({}),
        };
        manifest["layers"].as_array_mut().unwrap().push(layer);
    };
    push(
        registry,
        base,
        &Changes {
            edit: &edit,
            tag,
            ..Changes::default()
        },
    )
}

fn chain(base: &Layer, top: &Layer) -> Digest {
    Digest::sha256(format!("{} {}", base.diff_id, top.diff_id).as_bytes())
}

fn lowers(mounts: &[Mount]) -> Vec<PathBuf> {
    let option = mounts[0]
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="));
    option.unwrap().split(':').map(PathBuf::from).collect()
}

/// Off the async workers, which answer what the read waits for.
async fn read(path: PathBuf) -> Vec<u8> {
    let read = tokio::task::spawn_blocking(move || std::fs::read(path));
    read.await.unwrap().unwrap()
}

fn mounts_below(dir: &Path) -> usize {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = format!(" {}/", dir.display());
    // A layer may be two file systems on one mountpoint.
    let mountpoints = text.lines().filter(|line| line.contains(&dir));
    let mountpoints: BTreeSet<_> = mountpoints.filter_map(|l| l.split(' ').nth(4)).collect();
    mountpoints.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_layers_are_brought_and_outlast_a_restart_without_a_registry() {
    if !is_root("privileged_layers_are_brought_and_outlast_a_restart_without_a_registry") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let base = estargz(layer("base", b"from the base"));
    // Streamed in full, as nothing says where its files are.
    let top = gzipped(layer("top", b"from the top"));
    let image = push_two(&registry, [&base, &top]);
    let all = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
    let wanted = |chain_id, number: usize| Wanted {
        image: &image,
        chain_id,
        blob: all[number],
        all: &all[number..],
    };
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!(restored, 0);
    let mine = format!("state/lazd/{}", std::process::id());
    let mode = std::fs::metadata(dir.path().join(mine)).unwrap();
    assert_eq!(
        mode.permissions().mode() & 0o777,
        0o700,
        "others could run what is set-uid"
    );
    let first = node.bring("", &wanted(base.diff_id, 0)).await;
    let second = node.bring(&first, &wanted(chain(&base, &top), 1)).await;
    // Both were resolved by the first question.
    assert_eq!(registry.requests().manifests, 1);
    let mounts = node.prepare("container", &second, None).await.unwrap();
    let places = lowers(&mounts);
    assert_eq!(places.len(), 2, "{mounts:?}");
    assert_eq!(read(places[0].join("top")).await, b"from the top");
    assert_eq!(read(places[1].join("base")).await, b"from the base");
    let usage = |key: &str| UsageRequest {
        key: key.to_owned(),
        ..Default::default()
    };
    assert!(node.client.usage(usage(&second)).await.unwrap().size > 300 << 10);
    node.close().await;
    assert_eq!(mounts_below(dir.path()), 0);

    drop(registry);
    let (node, restored) = Node::open(dir.path()).await;
    assert_eq!(restored, 2);
    let again = node
        .client
        .mounts(lazarette_proto::snapshots::MountsRequest {
            key: "container".to_owned(),
            ..Default::default()
        });
    let places = lowers(&again.await.unwrap().mounts);
    assert_eq!(read(places[0].join("top")).await, b"from the top");
    assert_eq!(read(places[1].join("base")).await, b"from the base");
    for key in ["container", &second, &first] {
        node.remove(key).await;
    }
    assert_eq!(mounts_below(dir.path()), 0);
    let left = std::fs::read_dir(dir.path().join("root/layers")).unwrap();
    assert_eq!(left.count(), 0, "the store keeps what nobody names");
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_cannot_be_brought_is_left_to_containerd() {
    if !is_root("privileged_what_cannot_be_brought_is_left_to_containerd") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let base = estargz(layer("base", b"from the base"));
    let top = gzipped(layer("top", b"from the top"));
    let image = push_two(&registry, [&base, &top]);
    let all = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
    let (node, _) = Node::open(dir.path()).await;
    let at = |image, chain_id, number: usize| Wanted {
        image,
        chain_id,
        blob: all[number],
        all: &[],
    };
    let elsewhere = Pushed {
        reference: image.reference.replace("test/image", "test/none"),
    };
    let wrong = [
        at(&elsewhere, base.diff_id, 0),
        // A layer under a chain that is not its own must not be served as that.
        at(&image, top.diff_id, 0),
        at(&image, base.diff_id, 1),
        // It would be there, and lie on nothing.
        at(&image, chain(&base, &top), 1),
    ];
    for (number, wanted) in wrong.iter().enumerate() {
        let key = format!("wrong-{number}");
        let mounts = node.prepare(&key, "", Some(wanted)).await.unwrap();
        assert_eq!(mounts[0].r#type, "overlay");
        node.remove(&key).await;
    }
    // The base can be had, the top cannot: an image of both kinds.
    let first = node.bring("", &at(&image, base.diff_id, 0)).await;
    registry.always(Endpoint::Blob, Fault::Status(404, None));
    let mounts = node
        .prepare("top", &first, Some(&at(&image, chain(&base, &top), 1)))
        .await
        .unwrap();
    assert_eq!(
        (mounts[0].r#type.as_str(), lowers(&mounts).len()),
        ("overlay", 1)
    );
    assert_eq!(node.list("kind==committed").await.len(), 1);
    for key in ["top", &first] {
        node.remove(key).await;
    }
    assert!(node.list("").await.is_empty());
    assert_eq!(mounts_below(dir.path()), 0);
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_tag_that_has_moved_is_resolved_again() {
    if !is_root("privileged_a_tag_that_has_moved_is_resolved_again") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let (node, _) = Node::open(dir.path()).await;
    for (number, text) in ["the first", "the second"].into_iter().enumerate() {
        let layer = gzipped(layer("file", text.as_bytes()));
        // Under the tag that the one before had.
        let image = push(&registry, &layer, &Changes::default());
        let wanted = Wanted {
            image: &image,
            chain_id: layer.diff_id,
            blob: Digest::sha256(&layer.blob),
            all: &[],
        };
        let name = node.bring("", &wanted).await;
        let key = format!("container-{number}");
        let mounts = node.prepare(&key, &name, None).await.unwrap();
        assert_eq!(read(lowers(&mounts)[0].join("file")).await, text.as_bytes());
    }
    node.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_many_who_want_one_layer_share_the_work() {
    if !is_root("privileged_many_who_want_one_layer_share_the_work") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = FakeRegistry::start().await;
    let layer = gzipped(layer("file", b"text"));
    let image = push(&registry, &layer, &Changes::default());
    let all = [Digest::sha256(&layer.blob)];
    let wanted = Wanted {
        image: &image,
        chain_id: layer.diff_id,
        blob: all[0],
        all: &all,
    };
    let (node, _) = Node::open(dir.path()).await;
    let asked = (0..16).map(|number| {
        let (node, wanted) = (&node, &wanted);
        async move {
            // Half of them under keys that others have.
            node.prepare(&format!("extract-{}", number / 2), "", Some(wanted))
                .await
        }
    });
    for answer in futures_util::future::join_all(asked).await {
        assert_eq!(answer, Err(Code::AlreadyExists));
    }
    assert_eq!(registry.requests().manifests, 1);
    assert_eq!(node.list("").await.len(), 1);
    assert_eq!(mounts_below(dir.path()), 1);
    let name = node.list("").await.remove(0).name;
    let asked = (0..32).map(|_| node.prepare("container", &name, None));
    let answers = futures_util::future::join_all(asked).await;
    let made = answers.iter().filter(|answer| answer.is_ok()).count();
    let refused = |answer: &&Result<_, Code>| **answer == Err(Code::AlreadyExists);
    assert_eq!((made, answers.iter().filter(refused).count()), (1, 31));
    assert_eq!(node.list("").await.len(), 2);
    let directories = std::fs::read_dir(dir.path().join("root/snapshots"));
    assert_eq!(directories.unwrap().count(), 1);
    node.close().await;
}
