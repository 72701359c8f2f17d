//! The service on a unix socket, and one client of it.

#[path = "../../src/grpc/channel.rs"]
mod channel;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use futures_util::StreamExt as _;
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{ListSnapshotsRequest, PrepareSnapshotRequest, SnapshotsClient};
use lazarette_snapshotter::grpc::{Service, serve};
use lazarette_snapshotter::metastore::Usage;
use lazarette_snapshotter::overlay::Snapshots;
use lazarette_snapshotter::remote::{LazyLayers, Wanted};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;

use self::channel::Channel;

/// A connection, and the threads that serve it.
pub(crate) struct Client {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
}

/// Layers that are all mounted, in one place.
struct Mounted(PathBuf);

#[async_trait::async_trait]
impl LazyLayers for Mounted {
    async fn claim(&self, _: &Wanted) -> lazarette_snapshotter::Result<()> {
        Ok(())
    }

    async fn mountpoint(&self, _: &Digest) -> lazarette_snapshotter::Result<PathBuf> {
        Ok(self.0.clone())
    }

    async fn usage(&self, _: &Digest) -> lazarette_snapshotter::Result<Usage> {
        Ok(Usage::default())
    }

    async fn release(&self, _: &Digest) -> lazarette_snapshotter::Result<()> {
        Ok(())
    }
}

impl Client {
    /// Serves `snapshots` on `socket`, and connects to it.
    pub(crate) fn start(snapshots: &Arc<Snapshots>, socket: &Path, layer: &Path) -> Result<Self> {
        let runtime = Runtime::new()?;
        let layers = Arc::new(Mounted(layer.to_path_buf()));
        let service = Service::new(Arc::clone(snapshots), layers);
        let channel = runtime.block_on(async {
            let listener = UnixListener::bind(socket)?;
            tokio::spawn(serve(listener, service, std::future::pending()));
            Channel::connect(socket).await
        });
        let channel = channel.map_err(|error| anyhow!(error))?;
        let client = SnapshotsClient::new(channel);
        Ok(Self { runtime, client })
    }

    /// How many snapshots are listed.
    pub(crate) fn list(&mut self) -> Result<usize> {
        self.runtime.block_on(async {
            let mut answers = self.client.list(ListSnapshotsRequest::default()).await?;
            let mut count = 0;
            while let Some(answer) = answers.next().await {
                count += answer?.info.len();
            }
            Ok(count)
        })
    }

    /// How many mounts a new snapshot has.
    pub(crate) fn prepare(&mut self, key: &str, parent: &str) -> Result<usize> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client.prepare(request))?;
        Ok(answer.mounts.len())
    }
}
