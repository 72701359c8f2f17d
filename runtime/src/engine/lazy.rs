//! Lazy layers for snapshots that containerd manages.
//!
//! Invariant: a layer that is wanted has a record that says how to open it again, written
//! before the store has anything of it; so after a restart it is mounted from what is on disk, and
//! a registry is asked only for what is not; or it is removed, if no snapshot names it. Its mount
//! is held until it is released, by the mount server unless the config or the machine wants none:
//! then it outlives this process. What the server refuses is refused, and containerd brings it:
//! a mount that ends with this process is no substitute.
//!
//! To bring a layer is two decisions, each one batch, with work between them that no batch can
//! hold: that it is wanted, before there is anything of it (all layers that are opened ahead in
//! the same batch), and that it is a snapshot, once it is mounted. To remove one is two as well:
//! that there is no such snapshot, and, once it is unmounted, that nothing of it is stored. So a
//! record of a layer without a snapshot is a layer that has yet to be brought or removed, in
//! this process, when nobody has come for it for a while ([`Keep`]), or by
//! [`NodeLayers::restore`] of the next; a snapshot without a record cannot be, but for one that is
//! removed while another asks for the same: the service gives a layer a
//! name only where it sees it mounted, and releases none meanwhile.
//!
//! Whether a layer is the one that is wanted is decided by the image's config, whose
//! digest leads back to the manifest's: labels are only hints.
//!
//! Work that was begun goes on when the one who asked goes away, and others who ask for the
//! same join it. Locks: the turn of a layer, while it is mounted or released; within it those
//! of `served`; the layers that are held, for a moment.

mod ahead;
mod choose;
mod held;
mod idle;
mod late;
mod record;
mod restore;
mod served;
mod session;
mod start;
mod turns;
mod unlisted;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use lazarette_fetcher::db::Batch;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::LayerRequest;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::metastore::Usage;
use lazarette_snapshotter::overlay::Snapshots;
use lazarette_snapshotter::remote::{LazyLayers, Wanted};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub use self::ahead::Keep;
use self::ahead::{Ahead, Resolved};
use self::held::{By, Held, HeldLayers, Here};
pub use self::record::{ServedLayer, ServedLayerTable};
use self::served::Served;
pub(super) use self::session::image_of;
use self::turns::Turns;
use super::Engine;
use crate::image::pull::PullMode;
use crate::image::{Image, ImageLayer};
use crate::trace::Trace;
use crate::{Error, Result};

/// The layers that this node serves to containerd.
pub struct NodeLayers {
    engine: Arc<Engine>,
    ahead: Arc<Ahead>,
    turns: Arc<Turns>,
    held: Arc<HeldLayers>,
    here: Here,
    /// `None` where this process mounts all layers itself.
    served: Option<Arc<Served>>,
    /// What removes layers that nobody came for, what mounts those that could not be mounted or
    /// answered for, and what ends mounts that could not be ended.
    beside: Mutex<JoinSet<()>>,
}

impl NodeLayers {
    /// Connects to the mount server, or starts `program` as one; what it has mounted stays.
    /// Removes what a crashed process left that mounted by itself.
    ///
    /// # Errors
    /// Also where the config asks for a backend that cannot be had here.
    pub async fn open(engine: &Arc<Engine>, program: &Path) -> Result<Arc<Self>> {
        Self::open_keeping(engine, program, Keep::default()).await
    }

    /// The same; what is opened ahead of who asks for it is kept for so long.
    ///
    /// # Errors
    /// As [`NodeLayers::open`].
    pub async fn open_keeping(
        engine: &Arc<Engine>,
        program: &Path,
        keep: Keep,
    ) -> Result<Arc<Self>> {
        let (opened, handle) = (Arc::clone(engine), Handle::current());
        let here = blocking(move || {
            let state = opened.state.join("lazd");
            Here::open(&opened, &state, handle)
        });
        let here = here.await?;
        let held = Arc::default();
        let served = Served::open(engine, program, &held).await?;
        let turns = Arc::default();
        if let Some(served) = &served {
            hide_by(engine, served, &turns);
        }
        let (told, unclaimed) = mpsc::unbounded_channel();
        let layers = Arc::new(Self {
            ahead: Ahead::new(Arc::clone(engine), keep, told),
            engine: Arc::clone(engine),
            turns,
            held,
            here,
            served,
            beside: Mutex::default(),
        });
        layers.remove_unclaimed(unclaimed);
        if let Some(served) = &layers.served {
            let ending = late::keep_ending(Arc::downgrade(&layers), Arc::clone(served));
            layers.beside.lock().spawn(ending);
        }
        Ok(layers)
    }

    /// The snapshots that are served.
    pub fn snapshots(&self) -> Arc<Snapshots> {
        Arc::clone(&self.engine.snapshots)
    }

    /// Leaves to the mount server what it shows. The rest is unmounted: what containers use
    /// of it is detached and fails when it is read.
    pub async fn close(&self) -> Result<()> {
        self.end_beside().await;
        if let Some(served) = &self.served {
            // First: reads wait for the next daemon then, and do not fail with the layers.
            served.close().await;
        }
        let held: Vec<Held> = self.held.lock().drain().map(|(_, held)| held).collect();
        let late = self.served.iter().flat_map(|s| s.take_unanswered());
        let held = held.into_iter().chain(late);
        let mut first = Ok(());
        for Held { layer, by } in held {
            if let By::Us(ours) = by {
                ours.put_down().await;
            }
            first = first.and(layer.close().await.map_err(Error::from));
        }
        first.and(self.here.close().await)
    }

    async fn try_claim(&self, wanted: &Wanted) -> Result<()> {
        let began = Instant::now();
        let (resolved, number) = self.find(wanted).await?;
        must_know_parent(wanted, number)?;
        let resolved_ms = began.elapsed().as_millis();
        let above = Ahead::above(&resolved, number, &wanted.ahead);
        // Before any of them is opened: restore() finds what is in the store by its record.
        let numbers: Vec<_> = above.iter().copied().chain([number]).collect();
        self.record(&resolved, &numbers).await?;
        // Those above only stand in line until they are asked for, too: who is asked for is first.
        self.ahead.begin(&resolved, &[number]);
        self.ahead.begin(&resolved, &above);
        self.share_held(&resolved, number);
        let layer = self.ahead.open(&resolved, number).await?;
        let opened_ms = began.elapsed().as_millis();
        // Somebody may have released the same layer meanwhile.
        self.record(&resolved, &[number]).await?;
        let path = self.hold(Arc::clone(&layer)).await?;
        self.must_list((&resolved.image, number), &layer, wanted)
            .await?;
        resolved.mounted(number, &layer, &path);
        let held_ms = began.elapsed().as_millis();
        tracing::debug!(digest = %wanted.blob_digest, resolved_ms, opened_ms, held_ms, "layer is brought");
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

    /// Says which layers below `number` other images brought here.
    fn share_held(&self, resolved: &Resolved, number: usize) {
        for digest in resolved.below(number) {
            if let Some(layer) = self.held_layer(&digest) {
                resolved.opened(&layer);
            }
        }
    }

    /// Records those layers of the image that have no record, and of those that have one by
    /// another image that this one has them, too.
    async fn record(&self, resolved: &Resolved, numbers: &[usize]) -> Result<()> {
        let layers = &resolved.image.layers;
        let wanted = numbers.iter().filter_map(|&number| layers.get(number));
        let served = |layer: &ImageLayer| ServedLayer {
            reference: resolved.image.reference.clone(),
            descriptor: layer.descriptor.clone(),
            diff_id: layer.diff_id,
            others: Vec::new(),
        };
        let wanted: Vec<_> = wanted.map(served).collect();
        let digests: Vec<Digest> = layers.iter().map(|layer| layer.descriptor.digest).collect();
        let image = resolved.image.reference.clone();
        let (db, registry) = (Arc::clone(&self.engine.db), self.engine.registry.clone());
        blocking(move || {
            let mut batch = Batch::new();
            for digest in digests {
                if let Some(mut served) = db.get::<ServedLayerTable>(&digest)?
                    && served.also(&image)
                {
                    batch.put::<ServedLayerTable>(&digest, &served)?;
                    registry.homes().note(&digest, image.repository());
                }
            }
            for served in wanted {
                let digest = served.descriptor.digest;
                if db.get::<ServedLayerTable>(&digest)?.is_none() {
                    batch.put::<ServedLayerTable>(&digest, &served)?;
                }
            }
            Ok(db.commit(batch)?)
        })
        .await
    }

    /// Mounts a layer and keeps it so.
    async fn hold(&self, layer: Arc<Layer>) -> Result<PathBuf> {
        let digest = layer.index().blob_digest;
        let _turn = self.turns.of(&digest).await;
        if let Some(path) = self.path(&digest) {
            return Ok(path);
        }
        let path = self.show(&layer).await?;
        self.fill(layer);
        Ok(path)
    }

    /// Has a layer shown. The caller has its turn.
    async fn show(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        // Whoever could not use it released it since it was opened.
        if layer.file().is_removed() {
            return Err(unknown(&layer.index().blob_digest, &None));
        }
        match &self.served {
            Some(served) => served.hold(layer).await,
            None => self.hold_here(layer).await,
        }
    }

    /// Fetches the rest of a layer in the background, if the config says so: when nobody has
    /// waited for anything for a while, as a start is not the only one on its cores.
    fn fill(&self, layer: Arc<Layer>) {
        if !self.engine.fills_layers {
            return;
        }
        let served = self.served.as_ref();
        let served = served
            .filter(|served| served.wants_complete())
            .map(Arc::clone);
        let (turns, held) = (Arc::clone(&self.turns), Arc::clone(&self.held));
        // Ends with the layer, which is closed when it is released.
        tokio::spawn(async move {
            let filled = layer.fill_when_quiet().await;
            if let Some(served) = &served
                && matches!(filled, Ok(true))
                && served.is_shown_whole(&layer).await
            {
                return tracing::debug!(digest = %layer.index().blob_digest, "layer is the kernel's alone already");
            }
            let whole = match (filled, &served) {
                (Ok(true), Some(served)) => served.is_whole(&layer).await,
                (Ok(filled), _) => Ok(filled),
                (Err(error), _) => Err(error.into()),
            };
            let Some(served) = served.filter(|_| matches!(whole, Ok(true))) else {
                return tracing::debug!(?whole, "a layer is not complete yet");
            };
            let digest = layer.index().blob_digest;
            let _turn = turns.of(&digest).await;
            let is_it = |held: &Held| Arc::ptr_eq(&held.layer, &layer);
            // It may have been released meanwhile.
            let is_held = held.lock().get(&digest).is_some_and(is_it);
            if is_held {
                served.complete(&layer).await;
            }
        });
    }

    /// The same, in this process.
    async fn hold_here(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let held = Held {
            by: By::Us(self.here.mount(layer).await?),
            layer: Arc::clone(layer),
        };
        let path = held.path().to_path_buf();
        self.held.lock().insert(layer.index().blob_digest, held);
        Ok(path)
    }

    fn path(&self, digest: &Digest) -> Option<PathBuf> {
        let held = self.held.lock();
        held.get(digest).map(|held| held.path().to_path_buf())
    }

    fn held_layer(&self, digest: &Digest) -> Option<Arc<Layer>> {
        let held = self.held.lock();
        held.get(digest).map(|held| Arc::clone(&held.layer))
    }

    /// Mounts a layer that was claimed before, if it is not.
    async fn mount(&self, digest: &Digest) -> Result<PathBuf> {
        if let Some(path) = self.path(digest) {
            return Ok(path);
        }
        let (db, key) = (Arc::clone(&self.engine.db), *digest);
        let served = blocking(move || db.get::<ServedLayerTable>(&key)).await?;
        let served = served.ok_or_else(|| unknown(digest, &None))?;
        for other in served.others.iter().rev() {
            self.engine
                .registry
                .homes()
                .note(digest, other.repository());
        }
        let repository = served.reference.repository().clone();
        let request = LayerRequest::new(repository, &served.descriptor, served.diff_id)
            .of_image(&served.reference);
        let puller = self
            .engine
            .puller(PullMode::Lazy, Trace::new(Instant::now()));
        let (layer, _) = puller.opener().open(&request, &Default::default()).await?;
        self.hold(layer).await
    }

    async fn put_down(&self, Held { layer, by }: Held) -> Result<()> {
        match (by, &self.served) {
            (By::Us(ours), _) => ours.put_down().await,
            (By::Server(path), Some(served)) => served.unmount(path).await,
            (By::Server(_), None) => {}
        }
        Ok(layer.close().await?)
    }

    /// Removes a layer's data, unless an image of `laz` has it, and its record. Of one that is still
    /// being opened there is more to come: it stays until that is done and nobody came for it.
    async fn discard(&self, digest: &Digest) -> Result<()> {
        if self.ahead.is_opening(digest) {
            return Ok(());
        }
        // What was opened ahead would go on with files that are gone.
        self.ahead.forget(digest);
        self.engine.registry.homes().forget(digest);
        if let Some(served) = &self.served {
            served.forget(digest).await;
        }
        let (engine, digest) = (Arc::clone(&self.engine), *digest);
        blocking(move || {
            let records = engine.records()?;
            let mut named = records.iter().flat_map(|record| &record.layers);
            if !named.any(|layer| layer.blob_digest == digest) {
                engine.store.remove_layer(&digest)?;
            }
            // Last: by it the next process finds what this one could not remove.
            let mut batch = Batch::new();
            batch.delete::<ServedLayerTable>(&digest);
            Ok(engine.db.commit(batch)?)
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
        let _turn = self.turns.of(blob_digest).await;
        let held = self.held.lock().remove(blob_digest);
        let put_down = match held {
            Some(held) => self.put_down(held).await,
            None => Ok(()),
        };
        let outcome = put_down.and(self.discard(blob_digest).await);
        outcome.map_err(|error| plain(error, blob_digest))
    }
}

/// Has the store evict from complete layers that no container has, before it has no room.
fn hide_by(engine: &Arc<Engine>, served: &Arc<Served>, turns: &Arc<Turns>) {
    let (snapshots, turns) = (Arc::clone(&engine.snapshots), Arc::clone(turns));
    let served = Arc::downgrade(served);
    engine.store.hide_by(Arc::new(move |digest| {
        let (Some(served), Some(_turn)) = (served.upgrade(), turns.try_of(digest)) else {
            return;
        };
        match snapshots.list() {
            Ok(records) if !idle::used(&records).contains(digest) => served.hide_whole(digest),
            Ok(_) => {}
            Err(error) => tracing::warn!(%digest, %error, "cannot tell who has a layer"),
        }
    }));
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

/// Refuses a layer that others are below when nobody says which: see [`Wanted::has_parent`].
fn must_know_parent(wanted: &Wanted, number: usize) -> Result<()> {
    if number == 0 || wanted.has_parent {
        return Ok(());
    }
    Err(lazarette_fetcher::Error::Unsupported {
        what: format!("layer {} of {}", wanted.blob_digest, wanted.reference),
        detail: "layers that are unpacked at the same time (the capability \"rebase\") cannot be \
                 brought lazily, but for the lowest"
            .to_owned(),
    }
    .into())
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
