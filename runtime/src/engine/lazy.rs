//! Lazy layers for snapshots that containerd manages.
//!
//! Invariant: a layer that was claimed has a record that says how to open it again, written
//! before any snapshot names it; so after a restart it is mounted from what is on disk, and
//! a registry is asked only for what is not. Its mount is held until it is released. Whether
//! a layer is the one that is wanted is decided by the image's config, whose digest leads
//! back to the manifest's: labels are only hints.
//!
//! Work that was begun goes on when the one who asked goes away, and others who ask for the
//! same join it. Locks are held for moments and never two at once.

mod ahead;
mod record;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use lazarette_fetcher::db::Batch;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::LayerRequest;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::cleanup::{self, RunDir};
use lazarette_snapshotter::fuse::{LayerMount, LayerMounts};
use lazarette_snapshotter::metastore::{Content, Kind, Usage};
use lazarette_snapshotter::overlay::Snapshots;
use lazarette_snapshotter::remote::{LazyLayers, Wanted};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use self::ahead::{Ahead, Resolved};
pub use self::record::{ServedLayer, ServedLayerTable};
use super::Engine;
use super::stage::mount_layer;
use crate::image::Image;
use crate::image::pull::{LAYERS_AT_ONCE, PullMode};
use crate::trace::Trace;
use crate::{Error, Result};

/// The layers that this process serves to containerd.
pub struct NodeLayers {
    engine: Arc<Engine>,
    mounts: LayerMounts,
    ahead: Arc<Ahead>,
    held: Mutex<HashMap<Digest, Held>>,
    /// The next short name.
    next: AtomicU64,
    run: RunDir,
}

/// A layer that is mounted.
struct Held {
    layer: Arc<Layer>,
    mount: Arc<LayerMount>,
    /// A short name of the mountpoint: those of all layers of an image must fit into one
    /// page of mount options.
    link: PathBuf,
}

impl NodeLayers {
    /// Removes what a crashed process left mounted, and begins with nothing mounted.
    pub async fn open(engine: &Arc<Engine>) -> Result<Arc<Self>> {
        let (engine, handle) = (Arc::clone(engine), Handle::current());
        blocking(move || {
            let state = engine.state.join("lazd");
            cleanup::cleanup_stale(&state)?;
            let run = RunDir::create(&state, &std::process::id().to_string())?;
            let mounts = LayerMounts::new(run.path(), handle, engine.mounting);
            Ok(Arc::new(Self {
                ahead: Ahead::new(Arc::clone(&engine)),
                engine,
                mounts,
                held: Mutex::default(),
                next: AtomicU64::new(0),
                run,
            }))
        })
        .await
    }

    /// The snapshots that are served.
    pub fn snapshots(&self) -> Arc<Snapshots> {
        Arc::clone(&self.engine.snapshots)
    }

    /// Mounts the layers of all committed snapshots. What fails is logged, and tried again
    /// when somebody wants to mount it. Returns how many are mounted.
    pub async fn restore(self: &Arc<Self>) -> Result<usize> {
        let engine = Arc::clone(&self.engine);
        let served = blocking(move || {
            let entries = engine.db.scan::<ServedLayerTable>(b"");
            let digests = entries.map(|entry| entry.map(|(digest, _)| digest));
            digests.collect::<lazarette_fetcher::Result<Vec<_>>>()
        })
        .await?;
        let (named, unnamed) = self.sort_by_use(served).await?;
        for digest in unnamed {
            // Claimed, but the process ended before a snapshot was made of it.
            self.discard(&digest).await?;
        }
        let mount = async |digest: Digest| match self.mount(&digest).await {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%digest, %error, "layer cannot be mounted now");
                false
            }
        };
        let mounted = stream::iter(named)
            .map(mount)
            .buffer_unordered(LAYERS_AT_ONCE);
        Ok(mounted
            .filter(|done| std::future::ready(*done))
            .count()
            .await)
    }

    /// Unmounts everything. What containers still use is detached and fails when it is read.
    pub async fn close(&self) -> Result<()> {
        let held: Vec<Held> = self.held.lock().drain().map(|(_, held)| held).collect();
        let mut first = Ok(());
        for held in held {
            first = first.and(put_down(held).await);
        }
        let dir = self.run.path().to_path_buf();
        first.and(blocking(move || Ok(cleanup::unmount_below(&dir)?)).await)
    }

    /// Which of these layers a committed snapshot names, and which none does.
    async fn sort_by_use(&self, layers: Vec<Digest>) -> Result<(Vec<Digest>, Vec<Digest>)> {
        let snapshots = self.snapshots();
        blocking(move || {
            let named: Vec<Digest> = snapshots
                .list()?
                .iter()
                .filter(|record| record.kind == Kind::Committed)
                .filter_map(|record| match record.content {
                    Content::Layer(digest) => Some(digest),
                    Content::Directory(_) => None,
                })
                .collect();
            Ok(layers
                .into_iter()
                .partition(|digest| named.contains(digest)))
        })
        .await
    }

    async fn try_claim(&self, wanted: &Wanted) -> Result<()> {
        let (resolved, number) = self.find(wanted).await?;
        self.ahead.begin(&resolved, number, &wanted.ahead);
        let layer = self.ahead.open(&resolved, number).await?;
        self.record(&resolved, number).await?;
        self.hold(layer).await?;
        self.ahead.forget(&wanted.blob_digest);
        Ok(())
    }

    /// The image, and which of its layers is wanted. A tag may have moved since it was last
    /// resolved.
    async fn find(&self, wanted: &Wanted) -> Result<(Arc<Resolved>, usize)> {
        let resolved = self.ahead.resolve(wanted).await?;
        match position(&resolved.image, wanted) {
            Ok(number) => return Ok((resolved, number)),
            Err(error) if wanted.manifest_digest.is_some() => return Err(error),
            Err(_) => self.ahead.forget_image(wanted),
        }
        let resolved = self.ahead.resolve(wanted).await?;
        let number = position(&resolved.image, wanted)?;
        Ok((resolved, number))
    }

    async fn record(&self, resolved: &Resolved, number: usize) -> Result<()> {
        let Some(layer) = resolved.image.layers.get(number) else {
            return Ok(());
        };
        let (db, digest) = (Arc::clone(&self.engine.db), layer.descriptor.digest);
        let served = ServedLayer {
            reference: resolved.image.reference.clone(),
            descriptor: layer.descriptor.clone(),
            diff_id: layer.diff_id,
        };
        blocking(move || {
            let mut batch = Batch::new();
            batch.put::<ServedLayerTable>(&digest, &served)?;
            Ok(db.commit(batch)?)
        })
        .await
    }

    /// Mounts a layer and keeps it so.
    async fn hold(&self, layer: Arc<Layer>) -> Result<PathBuf> {
        let digest = layer.index().blob_digest;
        if let Some(path) = self.path(&digest) {
            return Ok(path);
        }
        let mount = mount_layer(
            self.mounts.clone(),
            Arc::clone(&layer),
            Arc::clone(&layer) as _,
        );
        let mount = mount.await?;
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let link = self.run.path().join(name);
        std::os::unix::fs::symlink(mount.path(), &link)
            .map_err(|e| Error::io("link the mountpoint to", &link, e))?;
        if self.engine.fills_layers {
            // At idle priority: readers go first, and what a profile names.
            layer.fetch_rest(false);
        }
        let mut held = self.held.lock();
        match held.entry(digest) {
            Entry::Vacant(place) => {
                place.insert(Held {
                    layer,
                    mount,
                    link: link.clone(),
                });
                Ok(link)
            }
            // Two mounted it at once: one mount, and one name is enough.
            Entry::Occupied(first) => {
                let _ = std::fs::remove_file(&link);
                Ok(first.get().link.clone())
            }
        }
    }

    fn path(&self, digest: &Digest) -> Option<PathBuf> {
        let held = self.held.lock();
        held.get(digest).map(|held| held.link.clone())
    }

    /// Mounts a layer that was claimed before, if it is not.
    async fn mount(&self, digest: &Digest) -> Result<PathBuf> {
        if let Some(path) = self.path(digest) {
            return Ok(path);
        }
        let (db, key) = (Arc::clone(&self.engine.db), *digest);
        let served = blocking(move || db.get::<ServedLayerTable>(&key)).await?;
        let served = served.ok_or_else(|| unknown(digest, &None))?;
        let repository = served.reference.repository().clone();
        let request = LayerRequest::new(repository, &served.descriptor, served.diff_id)?
            .of_image(&served.reference);
        let puller = self
            .engine
            .puller(PullMode::Lazy, Trace::new(std::time::Instant::now()));
        let (layer, _) = puller.opener().open(&request, &Default::default()).await?;
        self.hold(layer).await
    }

    /// Removes record and data of a layer, unless an image of `laz` has it.
    async fn discard(&self, digest: &Digest) -> Result<()> {
        // What was opened ahead would go on with files that are gone.
        self.ahead.forget(digest);
        let (engine, digest) = (Arc::clone(&self.engine), *digest);
        blocking(move || {
            let mut batch = Batch::new();
            batch.delete::<ServedLayerTable>(&digest);
            engine.db.commit(batch)?;
            let records = engine.records()?;
            let mut named = records.iter().flat_map(|record| &record.layers);
            if !named.any(|layer| layer.blob_digest == digest) {
                engine.store.remove_layer(&digest)?;
            }
            Ok(())
        })
        .await
    }
}

#[async_trait]
impl LazyLayers for NodeLayers {
    async fn claim(&self, wanted: &Wanted) -> lazarette_snapshotter::Result<()> {
        let outcome = self.try_claim(wanted).await;
        outcome.map_err(|error| plain(error, &wanted.blob_digest))
    }

    async fn mountpoint(&self, blob_digest: &Digest) -> lazarette_snapshotter::Result<PathBuf> {
        let outcome = self.mount(blob_digest).await;
        outcome.map_err(|error| plain(error, blob_digest))
    }

    async fn usage(&self, blob_digest: &Digest) -> lazarette_snapshotter::Result<Usage> {
        let (store, digest) = (Arc::clone(&self.engine.store), *blob_digest);
        let taken = blocking(move || store.taken(&digest)).await?;
        Ok(Usage {
            bytes: taken.bytes,
            inodes: taken.inodes,
        })
    }

    async fn release(&self, blob_digest: &Digest) -> lazarette_snapshotter::Result<()> {
        let held = self.held.lock().remove(blob_digest);
        let put_down = match held {
            Some(held) => put_down(held).await,
            None => Ok(()),
        };
        let outcome = put_down.and(self.discard(blob_digest).await);
        outcome.map_err(|error| plain(error, blob_digest))
    }
}

/// Which layer of the image is wanted: the one of this blob at the end of this chain. An
/// image may hold a blob twice.
fn position(image: &Image, wanted: &Wanted) -> Result<usize> {
    let mut chain: Option<Digest> = None;
    for (number, layer) in image.layers.iter().enumerate() {
        let id = match chain {
            None => layer.diff_id,
            Some(below) => Digest::sha256(format!("{below} {}", layer.diff_id).as_bytes()),
        };
        if id == wanted.chain_id && layer.descriptor.digest == wanted.blob_digest {
            return Ok(number);
        }
        chain = Some(id);
    }
    Err(unknown(&wanted.blob_digest, &Some(image.reference.clone())))
}

fn unknown(digest: &Digest, image: &Option<Reference>) -> Error {
    let what = match image {
        Some(image) => format!("layer {digest} in image {image}, at the place that its label says"),
        None => format!("record of layer {digest}"),
    };
    lazarette_fetcher::Error::NotFound {
        what,
        host: String::new(),
    }
    .into()
}

async fn put_down(held: Held) -> Result<()> {
    let Held { layer, mount, link } = held;
    blocking(move || {
        if let Err(error) = std::fs::remove_file(&link) {
            tracing::warn!(path = %link.display(), %error, "name of a mountpoint stays");
        }
        drop(mount);
        Ok::<_, Error>(())
    })
    .await?;
    Ok(layer.close().await?)
}

/// The errors below the engine are the snapshotter's own or the fetcher's.
fn plain(error: Error, digest: &Digest) -> lazarette_snapshotter::Error {
    match error {
        Error::Snapshot(error) => error,
        Error::Fetch(error) => error.into(),
        other => lazarette_fetcher::Error::Unavailable {
            what: format!("layer {digest}"),
            host: "this node".to_owned(),
            detail: other.report(),
        }
        .into(),
    }
}

#[cfg(test)]
mod tests;
