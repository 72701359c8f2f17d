//! containerd's snapshots service over [`Snapshots`].
//!
//! Invariant: what a request began is done to its end, whether or not the client still
//! waits, and what fails half way is taken back: no answer leaves a snapshot that nobody
//! knows of. The rules are the library's; here are only messages, statuses, and the
//! protocol by which layers are brought lazily (see [`remote`]).
//!
//! A layer is released only while `naming` is held exclusively, and given a name only while
//! it is held shared and the layer is seen to be mounted: so none is released that has just
//! been named. Nothing else is locked inside.

#[cfg(test)]
mod channel;
mod convert;
pub mod images;
mod relay;
mod serve;
mod status;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use futures_util::stream;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
    RemoveSnapshotRequest, Snapshots as Api, StatSnapshotRequest, StatSnapshotResponse,
    UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use lazarette_proto::types::Empty;
use lazarette_proto::{Status, Streamed};
use tokio::sync::{OnceCell, RwLock};

pub use serve::{serve, serve_images};

use crate::metastore::filter::Filters;
use crate::metastore::{Content, Kind, Labels, Record, Relabel, Usage};
use crate::overlay::{Mount, Snapshots};
use crate::remote::{self, Ask, LazyLayers, Wanted};
use crate::{Error, Result};

/// Snapshots in one message of a list; containerd's own number.
const LIST_CHUNK: usize = 100;

/// The service. Clones are one.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    snapshots: Arc<Snapshots>,
    lazy: Arc<dyn LazyLayers>,
    naming: RwLock<()>,
    /// Writable snapshots can be mounted.
    is_writable: OnceCell<()>,
}

/// A snapshot that is to be made.
struct New {
    key: String,
    parent: Option<String>,
    labels: Labels,
    kind: Kind,
}

impl Service {
    /// Serves `snapshots`, with layers from `lazy`.
    pub fn new(snapshots: Arc<Snapshots>, lazy: Arc<dyn LazyLayers>) -> Self {
        let naming = RwLock::new(());
        Self(Arc::new(Inner {
            snapshots,
            lazy,
            naming,
            is_writable: OnceCell::new(),
        }))
    }

    /// Does it to its end, even if the client goes away.
    async fn finish<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let done = tokio::spawn(work(Arc::clone(&self.0))).await;
        let outcome = done.map_err(|error| Status::internal(error.to_string()))?;
        outcome.map_err(|error| status::of(&error))
    }
}

impl Inner {
    /// Calls the library where it may block.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&Snapshots) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let snapshots = Arc::clone(&self.snapshots);
        blocking(move || call(&snapshots)).await
    }

    /// Makes a snapshot; its mounts. None of it stays if they cannot be had.
    async fn create(self: Arc<Self>, new: New) -> Result<Vec<Mount>> {
        if new.kind == Kind::Active {
            self.refuse_if_brought(&new).await?;
            let try_writable = || self.with(Snapshots::try_writable);
            self.is_writable.get_or_try_init(try_writable).await?;
        }
        let key = new.key.clone();
        self.with(move |snapshots| {
            let parent = new.parent.as_deref();
            match new.kind {
                Kind::View => snapshots.view(&new.key, parent, &new.labels),
                Kind::Active | Kind::Committed => snapshots.prepare(&new.key, parent, &new.labels),
            }
        })
        .await?;
        match self.mounts(key.clone()).await {
            Ok(mounts) => Ok(mounts),
            Err(error) => {
                if let Err(error) = self.with(move |snapshots| snapshots.remove(&key)).await {
                    tracing::warn!(%error, "a snapshot that cannot be mounted stays");
                }
                Err(error)
            }
        }
    }

    /// `AlreadyExists` if the snapshot that is wanted in the end is there, or could be made
    /// of a lazy layer.
    async fn refuse_if_brought(self: &Arc<Self>, new: &New) -> Result<()> {
        let Some(target) = new.labels.get(remote::REF) else {
            return Ok(());
        };
        let name = remote::name(new.parent.as_deref(), target);
        let there = || Error::AlreadyExists {
            key: target.clone(),
        };
        let wanted = name.clone();
        match self.with(move |snapshots| snapshots.stat(&wanted)).await {
            Ok(record) => {
                self.show(record, target).await?;
                return Err(there());
            }
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let brought = match remote::ask(&new.labels, new.parent.is_some()) {
            Ask::Plain => return Ok(()),
            Ask::Unusable(why) => {
                tracing::debug!(snapshot = target, why, "containerd brings this layer");
                return Ok(());
            }
            Ask::Layer(wanted) => {
                let layer = wanted.blob_digest;
                let brought = self.bring(new, name, *wanted).await;
                if brought.is_err() {
                    self.let_go(layer).await;
                }
                brought
            }
        };
        match brought {
            Ok(()) => Err(there()),
            Err(error) => {
                tracing::info!(snapshot = target, %error, "containerd brings this layer");
                Ok(())
            }
        }
    }

    /// Has containerd find `record`, which it looks for by the label of what it wanted; another of its
    /// namespaces may have taken that off.
    async fn show(self: &Arc<Self>, record: Record, target: &str) -> Result<()> {
        if record.labels.get(remote::REF).map(String::as_str) == Some(target) {
            return Ok(());
        }
        let label = Labels::from([(remote::REF.to_owned(), target.to_owned())]);
        self.with(move |snapshots| snapshots.relabel(&record.key, &Relabel::Some(label)))
            .await?;
        Ok(())
    }

    /// Mounts a layer and commits it under `name`.
    async fn bring(self: &Arc<Self>, new: &New, name: String, wanted: Wanted) -> Result<()> {
        self.lazy.claim(&wanted).await?;
        let _naming = self.naming.read().await;
        self.lazy.mountpoint(&wanted.blob_digest).await?;
        let (parent, mut labels) = (new.parent.clone(), new.labels.clone());
        labels.insert(remote::REMOTE.to_owned(), "remote snapshot".to_owned());
        let made = self
            .with(move |snapshots| {
                snapshots.commit_layer(&name, parent.as_deref(), wanted.blob_digest, &labels)
            })
            .await;
        match made {
            // Two asked at once.
            Err(Error::AlreadyExists { .. }) => Ok(()),
            made => made,
        }
    }

    /// Releases a layer that containerd brings after all, unless a snapshot names it. Nobody
    /// would before the next start: no snapshot of it is ever removed.
    async fn let_go(self: &Arc<Self>, layer: Digest) {
        let _naming = self.naming.write().await;
        let let_go = match self.with(move |snapshots| snapshots.is_named(&layer)).await {
            Ok(true) => Ok(()),
            Ok(false) => self.lazy.release(&layer).await,
            Err(error) => Err(error),
        };
        if let Err(error) = let_go {
            tracing::warn!(digest = %layer, %error, "layer could not be released");
        }
    }

    async fn mounts(self: &Arc<Self>, key: String) -> Result<Vec<Mount>> {
        let chain = self.with(move |snapshots| snapshots.chain(&key)).await?;
        let mut places = HashMap::new();
        for layer in chain.layers() {
            let place = self.lazy.mountpoint(&layer).await?;
            places.insert(layer, place);
        }
        self.with(move |snapshots| {
            let resolve = |layer: &_| {
                let place = places.get(layer).cloned();
                place.ok_or_else(|| Error::NotFound {
                    key: layer.to_string(),
                })
            };
            snapshots.mounts_of(&chain, &resolve)
        })
        .await
    }

    async fn remove(self: Arc<Self>, key: String) -> Result<()> {
        let asked = key.clone();
        let record = self.with(move |snapshots| snapshots.stat(&asked)).await?;
        match record.content {
            // May take long, and no layer is concerned.
            Content::Directory(_) => {
                self.with(move |snapshots| snapshots.remove(&key)).await?;
            }
            Content::Layer(_) => {
                let _naming = self.naming.write().await;
                let unnamed = self.with(move |snapshots| snapshots.remove(&key)).await?;
                if let Some(layer) = unnamed
                    && let Err(error) = self.lazy.release(&layer).await
                {
                    // The snapshot is gone; what stays is found again by its own record.
                    tracing::warn!(digest = %layer, %error, "layer could not be released");
                }
            }
        }
        Ok(())
    }

    async fn usage(self: Arc<Self>, key: String) -> Result<Usage> {
        let asked = key.clone();
        let record = self.with(move |snapshots| snapshots.stat(&asked)).await?;
        match record.content {
            Content::Layer(layer) => self.lazy.usage(&layer).await,
            Content::Directory(_) => self.with(move |snapshots| snapshots.usage(&key)).await,
        }
    }
}

#[tonic::async_trait]
impl Api for Service {
    async fn prepare(
        &self,
        request: PrepareSnapshotRequest,
    ) -> Result<PrepareSnapshotResponse, Status> {
        let new = New {
            key: request.key,
            parent: convert::named(request.parent),
            labels: request.labels,
            kind: Kind::Active,
        };
        let mounts = self.finish(|inner| inner.create(new)).await?;
        let mounts = convert::mounts(&mounts);
        Ok(PrepareSnapshotResponse { mounts })
    }

    async fn view(&self, request: ViewSnapshotRequest) -> Result<ViewSnapshotResponse, Status> {
        let new = New {
            key: request.key,
            parent: convert::named(request.parent),
            labels: request.labels,
            kind: Kind::View,
        };
        let mounts = self.finish(|inner| inner.create(new)).await?;
        let mounts = convert::mounts(&mounts);
        Ok(ViewSnapshotResponse { mounts })
    }

    async fn mounts(&self, request: MountsRequest) -> Result<MountsResponse, Status> {
        let mounts = self
            .finish(|inner| async move { inner.mounts(request.key).await })
            .await?;
        let mounts = convert::mounts(&mounts);
        Ok(MountsResponse { mounts })
    }

    async fn commit(&self, request: CommitSnapshotRequest) -> Result<Empty, Status> {
        let commit = move |snapshots: &Snapshots| {
            let (name, key) = (&request.name, &request.key);
            let parent = convert::named(request.parent);
            snapshots.commit_on(name, key, parent.as_deref(), &request.labels)
        };
        self.finish(|inner| async move { inner.with(commit).await })
            .await?;
        Ok(Empty {})
    }

    async fn remove(&self, request: RemoveSnapshotRequest) -> Result<Empty, Status> {
        self.finish(|inner| inner.remove(request.key)).await?;
        Ok(Empty {})
    }

    async fn stat(&self, request: StatSnapshotRequest) -> Result<StatSnapshotResponse, Status> {
        let stat = move |snapshots: &Snapshots| snapshots.stat(&request.key);
        let record = self
            .finish(|inner| async move { inner.with(stat).await })
            .await?;
        let info = Some(convert::info(record));
        Ok(StatSnapshotResponse { info })
    }

    async fn update(
        &self,
        request: UpdateSnapshotRequest,
    ) -> Result<UpdateSnapshotResponse, Status> {
        let (key, change) = convert::relabel(request).map_err(|error| status::of(&error))?;
        let update = move |snapshots: &Snapshots| snapshots.relabel(&key, &change);
        let record = self
            .finish(|inner| async move { inner.with(update).await })
            .await?;
        let info = Some(convert::info(record));
        Ok(UpdateSnapshotResponse { info })
    }

    async fn list(
        &self,
        request: ListSnapshotsRequest,
    ) -> Result<Streamed<ListSnapshotsResponse>, Status> {
        let filters = Filters::parse(&request.filters).map_err(|error| status::of(&error))?;
        let records = self
            .finish(|inner| async move { inner.with(Snapshots::list).await })
            .await?;
        let mut found = records
            .into_iter()
            .filter(move |record| filters.matches(record))
            .map(convert::info);
        let answers = std::iter::from_fn(move || {
            let info: Vec<_> = found.by_ref().take(LIST_CHUNK).collect();
            (!info.is_empty()).then_some(Ok(ListSnapshotsResponse { info }))
        });
        Ok(Box::pin(stream::iter(answers)))
    }

    async fn usage(&self, request: UsageRequest) -> Result<UsageResponse, Status> {
        let usage = self.finish(|inner| inner.usage(request.key)).await?;
        Ok(convert::usage(usage))
    }

    async fn cleanup(&self, _: CleanupRequest) -> Result<Empty, Status> {
        self.finish(|inner| async move { inner.with(Snapshots::cleanup).await })
            .await?;
        Ok(Empty {})
    }
}
