//! The service, spoken to in messages, with a fake source of lazy layers.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::StreamExt;
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, SnapshotsClient, SnapshotsServer,
    StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest, kind,
};
use lazarette_proto::{Status, types};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tonic::Code;

use super::Service;
use crate::metastore::{Kind, Labels, MemoryMetastore, Relabel, Usage};
use crate::overlay::Snapshots;
use crate::overlay::contract::{self, Refusal, Seen, SeenMount, Subject};
use crate::remote::{self, LazyLayers, Wanted};
use crate::{Error, Result};

/// Layers that are directories, of blobs that it was told of.
struct FakeLayers {
    root: tempfile::TempDir,
    available: Mutex<HashSet<Digest>>,
    mounted: Mutex<HashMap<Digest, PathBuf>>,
}

#[async_trait]
impl LazyLayers for FakeLayers {
    async fn claim(&self, wanted: &Wanted) -> Result<()> {
        // Lets others run, as a registry would.
        tokio::task::yield_now().await;
        if !self.available.lock().contains(&wanted.blob_digest) {
            return Err(missing(&wanted.blob_digest));
        }
        let place = self.root.path().join(wanted.blob_digest.hex());
        std::fs::create_dir_all(&place).unwrap();
        self.mounted.lock().insert(wanted.blob_digest, place);
        Ok(())
    }

    async fn mountpoint(&self, blob_digest: &Digest) -> Result<PathBuf> {
        let found = self.mounted.lock().get(blob_digest).cloned();
        found.ok_or_else(|| missing(blob_digest))
    }

    async fn usage(&self, blob_digest: &Digest) -> Result<Usage> {
        self.mountpoint(blob_digest).await?;
        Ok(Usage {
            bytes: 4096,
            inodes: 3,
        })
    }

    async fn release(&self, blob_digest: &Digest) -> Result<()> {
        self.mounted.lock().remove(blob_digest);
        Ok(())
    }
}

fn missing(blob_digest: &Digest) -> Error {
    let what = format!("blob {blob_digest}");
    let host = "registry".to_owned();
    lazarette_fetcher::Error::NotFound { what, host }.into()
}

type Client = SnapshotsClient<SnapshotsServer<Service>>;

/// The service, and a runtime to wait for it.
struct Remote {
    runtime: Runtime,
    client: Client,
    layers: Arc<FakeLayers>,
    _root: tempfile::TempDir,
}

impl Remote {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(MemoryMetastore::default());
        let snapshots = Arc::new(Snapshots::open(root.path(), store).unwrap());
        let layers = Arc::new(FakeLayers {
            root: tempfile::tempdir().unwrap(),
            available: Mutex::default(),
            mounted: Mutex::default(),
        });
        let service = Service::new(snapshots, Arc::clone(&layers) as _);
        Self {
            runtime: Runtime::new().unwrap(),
            client: SnapshotsClient::new(SnapshotsServer::new(Arc::new(service))),
            layers,
            _root: root,
        }
    }

    fn wait<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Refusal> {
        self.runtime
            .block_on(answer)
            .map_err(|status| refused(&status))
    }
}

fn refused(status: &Status) -> Refusal {
    match status.code() {
        Code::NotFound => Refusal::NotFound,
        Code::AlreadyExists => Refusal::AlreadyExists,
        Code::FailedPrecondition => Refusal::Precondition,
        Code::InvalidArgument => Refusal::Invalid,
        _ => Refusal::Other,
    }
}

fn seen(info: Info) -> Seen {
    assert!(info.created_at.is_some_and(|at| at.seconds > 0));
    Seen {
        name: info.name,
        parent: info.parent,
        kind: match info.kind {
            kind::VIEW => Kind::View,
            kind::ACTIVE => Kind::Active,
            kind::COMMITTED => Kind::Committed,
            other => panic!("kind {other}"),
        },
        labels: info.labels,
    }
}

fn mounts(mounts: Vec<types::Mount>) -> Vec<SeenMount> {
    let seen = |mount: types::Mount| SeenMount {
        fs_type: mount.r#type,
        source: mount.source.into(),
        options: mount.options,
    };
    mounts.into_iter().map(seen).collect()
}

fn own(text: &str) -> String {
    text.to_owned()
}

impl Subject for Remote {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<SeenMount>, Refusal> {
        let request = PrepareSnapshotRequest {
            snapshotter: own("lazarette"),
            key: own(key),
            parent: own(parent),
            labels: labels.clone(),
        };
        Ok(mounts(self.wait(self.client.prepare(request))?.mounts))
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<SeenMount>, Refusal> {
        let request = ViewSnapshotRequest {
            snapshotter: own("lazarette"),
            key: own(key),
            parent: own(parent),
            labels: labels.clone(),
        };
        Ok(mounts(self.wait(self.client.view(request))?.mounts))
    }

    fn mounts(&self, key: &str) -> Result<Vec<SeenMount>, Refusal> {
        let request = MountsRequest {
            key: own(key),
            ..Default::default()
        };
        Ok(mounts(self.wait(self.client.mounts(request))?.mounts))
    }

    fn commit(&self, name: &str, key: &str, parent: &str, labels: &Labels) -> Result<(), Refusal> {
        let request = CommitSnapshotRequest {
            snapshotter: own("lazarette"),
            name: own(name),
            key: own(key),
            labels: labels.clone(),
            parent: own(parent),
        };
        self.wait(self.client.commit(request)).map(drop)
    }

    fn remove(&self, key: &str) -> Result<(), Refusal> {
        let request = RemoveSnapshotRequest {
            key: own(key),
            ..Default::default()
        };
        self.wait(self.client.remove(request)).map(drop)
    }

    fn stat(&self, key: &str) -> Result<Seen, Refusal> {
        let request = StatSnapshotRequest {
            key: own(key),
            ..Default::default()
        };
        let answer = self.wait(self.client.stat(request))?;
        Ok(seen(answer.info.unwrap()))
    }

    fn relabel(&self, key: &str, change: &Relabel) -> Result<Seen, Refusal> {
        let (labels, paths) = match change {
            Relabel::All(labels) => (labels, Vec::new()),
            Relabel::Some(some) => {
                let paths = some.keys().map(|key| format!("labels.{key}"));
                (some, paths.collect())
            }
        };
        let request = UpdateSnapshotRequest {
            snapshotter: own("lazarette"),
            info: Some(Info {
                name: own(key),
                labels: labels.clone(),
                ..Default::default()
            }),
            update_mask: Some(types::FieldMask { paths }),
        };
        let answer = self.wait(self.client.update(request))?;
        Ok(seen(answer.info.unwrap()))
    }

    fn list(&self, filters: &[&str]) -> Result<Vec<Seen>, Refusal> {
        let request = ListSnapshotsRequest {
            snapshotter: own("lazarette"),
            filters: filters.iter().map(|&filter| own(filter)).collect(),
        };
        let mut answers = self.wait(self.client.list(request))?;
        let mut all = Vec::new();
        while let Some(answer) = self.runtime.block_on(answers.next()) {
            let some = answer.map_err(|status| refused(&status))?.info;
            assert!(!some.is_empty() && some.len() <= 100, "{}", some.len());
            all.extend(some.into_iter().map(seen));
        }
        Ok(all)
    }

    fn usage(&self, key: &str) -> Result<Usage, Refusal> {
        let request = UsageRequest {
            key: own(key),
            ..Default::default()
        };
        let answer = self.wait(self.client.usage(request))?;
        Ok(Usage {
            bytes: answer.size.try_into().unwrap(),
            inodes: answer.inodes.try_into().unwrap(),
        })
    }

    fn cleanup(&self) -> Result<(), Refusal> {
        self.wait(self.client.cleanup(CleanupRequest::default()))
            .map(drop)
    }
}

#[test]
fn the_service_keeps_the_contract() {
    contract::all(|check| check(&Remote::new()));
}

/// Labels of a layer as containerd's CRI plugin gives them.
fn of_layer(target: &Digest, blob_digest: &Digest) -> Labels {
    let pairs = [
        (remote::REF, target.to_string()),
        (
            "containerd.io/snapshot/cri.image-ref",
            own("reg.example/app:1"),
        ),
        (
            "containerd.io/snapshot/cri.layer-digest",
            blob_digest.to_string(),
        ),
    ];
    pairs
        .into_iter()
        .map(|(key, value)| (own(key), value))
        .collect()
}

/// What containerd's metadata asks for after `AlreadyExists`.
fn brought(remote: &Remote, target: &Digest, parent: &str) -> Vec<Seen> {
    let filter = format!("labels.{:?}=={target},parent=={parent:?}", remote::REF);
    remote.list(&[&filter]).unwrap()
}

#[test]
fn a_layer_that_can_be_brought_exists_already() {
    let remote = Remote::new();
    let [base, top, blob] = [b"base", b"tops", b"blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    let labels = of_layer(&base, &blob);
    let prepare = |key: &str, parent: &str, labels: &Labels| remote.prepare(key, parent, labels);
    assert_eq!(
        prepare("extract-1", "", &labels),
        Err(Refusal::AlreadyExists)
    );
    let [lower] = &brought(&remote, &base, "")[..] else {
        panic!("one is expected")
    };
    assert_eq!(lower.kind, Kind::Committed);
    assert_eq!(
        lower.labels.get(remote::REMOTE).map(String::as_str),
        Some("remote snapshot")
    );
    assert_eq!(remote.usage(&lower.name).unwrap().bytes, 4096);
    // Again, and by somebody who does not name the image.
    assert_eq!(
        prepare("extract-2", "", &labels),
        Err(Refusal::AlreadyExists)
    );
    let bare = Labels::from([(own(remote::REF), base.to_string())]);
    assert_eq!(prepare("extract-3", "", &bare), Err(Refusal::AlreadyExists));
    // The next layer's blob is nowhere to be had: containerd unpacks it.
    let labels = of_layer(&top, &Digest::sha256(b"elsewhere"));
    let mounts = prepare("extract-4", &lower.name, &labels).unwrap();
    let place = remote.layers.root.path().join(blob.hex());
    let place = format!("lowerdir={}", place.display());
    assert!(mounts[0].options.contains(&place), "{mounts:?}");
    remote.commit("ns/4/top", "extract-4", "", &bare).unwrap();
    assert!(brought(&remote, &top, &lower.name).is_empty());
    // It goes with the last snapshot that names it.
    remote.remove("ns/4/top").unwrap();
    assert_eq!(remote.layers.mounted.lock().len(), 1);
    remote.remove(&lower.name).unwrap();
    assert!(remote.layers.mounted.lock().is_empty());
    assert!(remote.list(&[]).unwrap().is_empty());
}

#[test]
fn many_who_ask_at_once_get_one_snapshot() {
    let remote = Remote::new();
    let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    let ask = |number: usize| PrepareSnapshotRequest {
        snapshotter: String::new(),
        key: format!("extract-{number}"),
        parent: String::new(),
        labels: of_layer(&target, &blob),
    };
    let (client, runtime) = (&remote.client, &remote.runtime);
    let all = (0..32).map(|number| client.prepare(ask(number)));
    let answers = runtime.block_on(futures_util::future::join_all(all));
    for answer in answers {
        assert_eq!(answer.unwrap_err().code(), Code::AlreadyExists);
    }
    assert_eq!(remote.list(&[]).unwrap().len(), 1);
}

#[test]
fn a_snapshot_that_cannot_be_mounted_is_taken_back() {
    let remote = Remote::new();
    let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    remote
        .prepare("extract", "", &of_layer(&target, &blob))
        .unwrap_err();
    let base = brought(&remote, &target, "").remove(0).name;
    // As after a restart without a registry.
    remote.layers.mounted.lock().clear();
    let request = PrepareSnapshotRequest {
        key: own("container"),
        parent: base,
        ..Default::default()
    };
    let status = remote
        .runtime
        .block_on(remote.client.prepare(request))
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(remote.stat("container"), Err(Refusal::NotFound));
}

#[test]
fn a_client_that_goes_away_leaves_the_work_whole() {
    let remote = Remote::new();
    let request = PrepareSnapshotRequest {
        key: own("key"),
        ..Default::default()
    };
    remote.runtime.block_on(async {
        let answer = remote.client.prepare(request);
        tokio::select! {
            biased;
            _ = answer => {}
            () = std::future::ready(()) => {}
        }
    });
    // Either whole or not at all: what is listed can be mounted.
    for snapshot in remote.list(&[]).unwrap() {
        remote.mounts(&snapshot.name).unwrap();
    }
}
