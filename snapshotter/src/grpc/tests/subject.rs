//! The service as the contract's subject, and what stands behind it in tests.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt;
use hyper::{Request, Response};
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, SnapshotsClient, SnapshotsServer,
    StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest, kind,
};
use lazarette_proto::{Status, types};
use parking_lot::{Condvar, Mutex};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as TowerService, StdError};

use crate::grpc::channel::Channel;
use crate::grpc::{Service, serve};
use crate::metastore::{Decide, Kind, Labels, MemoryMetastore, Metastore, Records, Relabel, Usage};
use crate::overlay::Snapshots;
use crate::overlay::contract::{Refusal, Seen, SeenMount, Subject, entries};
use crate::remote::{LazyLayers, Wanted};
use crate::test_util::database;
use crate::{Error, Result};

/// Longest wait for what has to happen.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Where the work of a request can be held up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Before a layer is there.
    Claim,
    /// Before a decision about records.
    Update,
}

/// Holds work up while the test says so.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: Option<Stop>,
    waiting: usize,
}

impl Gate {
    pub(super) fn shut(&self, stop: Stop) {
        self.state.lock().shut = Some(stop);
    }

    pub(super) fn open(&self) {
        self.state.lock().shut = None;
        self.changed.notify_all();
    }

    /// Blocks until somebody is held up.
    pub(super) fn wait_for_one(&self) {
        let mut state = self.state.lock();
        let waited = self
            .changed
            .wait_while_for(&mut state, |state| state.waiting == 0, WAIT_MAX);
        assert!(!waited.timed_out(), "nobody comes");
    }

    /// Blocks while it is shut.
    fn pass(&self, stop: Stop) {
        let is_held = |state: &mut GateState| state.shut == Some(stop);
        let mut state = self.state.lock();
        if is_held(&mut state) {
            state.waiting += 1;
            self.changed.notify_all();
            self.changed.wait_while(&mut state, is_held);
            state.waiting -= 1;
        }
    }
}

/// Records behind a gate.
struct Gated {
    store: Arc<dyn Metastore>,
    gate: Arc<Gate>,
}

impl Metastore for Gated {
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()> {
        self.store.read(look)
    }

    fn update(&self, decide: Decide<'_>) -> Result<()> {
        self.gate.pass(Stop::Update);
        self.store.update(decide)
    }
}

/// Layers that are directories, of blobs that it was told of.
pub(super) struct FakeLayers {
    pub(super) root: tempfile::TempDir,
    pub(super) available: Mutex<HashSet<Digest>>,
    pub(super) mounted: Mutex<HashMap<Digest, PathBuf>>,
    gate: Arc<Gate>,
}

#[async_trait]
impl LazyLayers for FakeLayers {
    async fn claim(&self, wanted: &Wanted) -> Result<()> {
        // Lets others run, as a registry would.
        let gate = Arc::clone(&self.gate);
        let passed = tokio::task::spawn_blocking(move || gate.pass(Stop::Claim));
        passed.await.unwrap();
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

/// The service: spoken to in this process, or through a socket.
#[derive(Clone)]
pub(super) enum Line {
    Direct(SnapshotsServer<Service>),
    Socket(Channel),
}

impl TowerService<Request<Body>> for Line {
    type Response = Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<Response<Body>, StdError>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self {
            Self::Direct(server) => {
                let answer = server.call(request);
                Box::pin(async move { Ok(answer.await?) })
            }
            Self::Socket(channel) => channel.call(request),
        }
    }
}

pub(super) type Client = SnapshotsClient<Line>;

/// The service, and a runtime to wait for it.
pub(super) struct Remote {
    pub(super) runtime: Runtime,
    pub(super) client: Client,
    pub(super) layers: Arc<FakeLayers>,
    pub(super) gate: Arc<Gate>,
    dir: tempfile::TempDir,
    root: PathBuf,
}

impl Remote {
    /// In this process, with records in memory.
    pub(super) fn new() -> Self {
        Self::start(false)
    }

    /// Behind a socket, with records in a database.
    pub(super) fn over_socket() -> Self {
        Self::start(true)
    }

    fn start(is_real: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let gate = Arc::<Gate>::default();
        let store: Arc<dyn Metastore> = match is_real {
            true => database(dir.path()),
            false => Arc::<MemoryMetastore>::default(),
        };
        let gate_of_store = Arc::clone(&gate);
        let store = Arc::new(Gated {
            store,
            gate: gate_of_store,
        });
        let root = dir.path().join("root");
        let snapshots = Arc::new(Snapshots::open(&root, store).unwrap());
        let layers = Arc::new(FakeLayers {
            root: tempfile::tempdir().unwrap(),
            available: Mutex::default(),
            mounted: Mutex::default(),
            gate: Arc::clone(&gate),
        });
        let service = Service::new(snapshots, Arc::clone(&layers) as _);
        let line = match is_real {
            true => {
                let _inside = runtime.enter();
                let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
                runtime.spawn(serve(listener, service, std::future::pending()));
                runtime.block_on(connect(dir.path()))
            }
            false => Line::Direct(SnapshotsServer::new(Arc::new(service))),
        };
        Self {
            runtime,
            client: SnapshotsClient::new(line),
            layers,
            gate,
            dir,
            root,
        }
    }

    /// Another client with a connection of its own.
    pub(super) fn connect(&self) -> Client {
        SnapshotsClient::new(self.runtime.block_on(connect(self.dir.path())))
    }

    /// How many directories of snapshots there are, orphans and trash counted.
    pub(super) fn directories(&self) -> usize {
        let count = |name| entries(&self.root.join(name)).len();
        count("snapshots") + count("trash")
    }

    /// Waits until this is so.
    pub(super) fn becomes(&self, is_so: impl Fn() -> bool) {
        let since = Instant::now();
        while !is_so() {
            assert!(since.elapsed() < WAIT_MAX, "it never becomes so");
            std::thread::yield_now();
        }
    }

    pub(super) fn wait<T>(
        &self,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Refusal> {
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

pub(super) fn own(text: &str) -> String {
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

    fn root(&self) -> &Path {
        &self.root
    }
}

async fn connect(dir: &Path) -> Line {
    let channel = Channel::connect(&dir.join("socket")).await;
    Line::Socket(channel.unwrap())
}
