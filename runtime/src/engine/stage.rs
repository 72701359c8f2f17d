//! Everything one container needs around it, and taking it all down.
//!
//! Invariant: a thing is on the stage before it can outlive an error, and [`Stage::strike`]
//! takes things down in the reverse order of their making, going on past failures; what is
//! still being made, for whoever wanted it was interrupted, it waits for first. What a
//! crash leaves is found by [`Stage::open`] of the next run through the run directory, which
//! goes last.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::join_all;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::cleanup::{RunDir, unmount_below};
use lazarette_snapshotter::data::LayerData;
use lazarette_snapshotter::fuse::{LayerMount, LayerMounts, ReadAhead};
use lazarette_snapshotter::metastore::Labels;
use lazarette_snapshotter::overlay::{self, Chain};
use lazarette_snapshotter::tree::Tree;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use super::Engine;
use super::companions::Companions;
use crate::executor::Embedded;
use crate::image::Image;
use crate::{Error, Result};

/// Hex digits of a container's id, as docker's short ids.
const ID_HEX: usize = 12;
/// The executor's state, in a run directory.
const EXECUTOR: &str = "executor";

/// What one container stands on.
pub(super) struct Stage {
    id: String,
    mounts: LayerMounts,
    held: Vec<Arc<LayerMount>>,
    layers: Vec<Arc<Layer>>,
    companions: Option<Companions>,
    snapshot: Option<String>,
    rootfs: Option<PathBuf>,
    /// Things being made.
    making: TaskTracker,
    /// How unmounting went so far.
    cleared: Result<()>,
    run: RunDir,
}

impl Stage {
    /// Sweeps what dead runs left and makes a run directory.
    pub(super) async fn open(engine: &Arc<Engine>) -> Result<Self> {
        let (engine, handle) = (Arc::clone(engine), Handle::current());
        blocking(move || {
            sweep(&engine, &handle)?;
            let id = format!("{:012x}", rand::random::<u64>() >> (64 - 4 * ID_HEX));
            let run = RunDir::create(&engine.state.join("runs"), &id)?;
            let mounts = LayerMounts::new(run.path().join("layers"), handle, engine.mounting);
            Ok(Self {
                id,
                mounts,
                held: Vec::new(),
                layers: Vec::new(),
                companions: None,
                snapshot: None,
                rootfs: None,
                making: TaskTracker::new(),
                cleared: Ok(()),
                run,
            })
        })
        .await
    }

    /// The container's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The run directory.
    pub(super) fn dir(&self) -> &Path {
        self.run.path()
    }

    /// Where the executor's bundle goes.
    pub(super) fn bundle(&self) -> PathBuf {
        self.dir().join("bundle")
    }

    /// Where the executor keeps its state.
    pub(super) fn executor(&self) -> PathBuf {
        self.dir().join(EXECUTOR)
    }

    /// What mounts layers for this stage; the mounts are held by [`Self::hold`].
    pub(super) fn mounter(&self) -> LayerMounts {
        self.mounts.clone()
    }

    /// Keeps mounted layers until the end, base first.
    pub(super) fn hold(&mut self, mounted: Vec<(Arc<Layer>, Arc<LayerMount>)>) {
        (self.layers, self.held) = mounted.into_iter().unzip();
    }

    /// The container is ready: nothing of it is guessed any more, and the kernel may read
    /// far ahead.
    pub(super) fn settle(&self) {
        if let Some(companions) = &self.companions {
            companions.close();
        }
        let wide = |mount: &Arc<LayerMount>| mount.read_ahead(ReadAhead::Wide);
        self.held.iter().for_each(wide);
    }

    /// Reads that had to wait for data so far.
    pub(super) fn misses(&self) -> u64 {
        self.held.iter().map(|mount| mount.stats().misses).sum()
    }

    /// Keeps what foresees reads of these layers until the container is ready.
    pub(super) fn keep(&mut self, companions: Option<Companions>) {
        self.companions = companions;
    }

    /// Makes a snapshot on the image's layers, which need not be here yet. Given to
    /// [`Self::set`] once they are mounted.
    pub(super) fn claim(
        &mut self,
        engine: &Arc<Engine>,
        image: &Image,
    ) -> impl Future<Output = Result<Chain>> + use<> {
        let (engine, image, key) = (Arc::clone(engine), image.clone(), self.id.clone());
        self.snapshot = Some(key.clone());
        make(&self.making, move || snapshot(&engine, &image, &key))
    }

    /// Mounts the snapshot on the layers that are held; the root file system's path.
    pub(super) async fn set(&mut self, engine: &Arc<Engine>, chain: Chain) -> Result<PathBuf> {
        let rootfs = self.dir().join("rootfs");
        let engine = Arc::clone(engine);
        let lowers: Vec<(Digest, PathBuf)> = self
            .held
            .iter()
            .map(|m| (m.blob_digest(), m.path().to_path_buf()))
            .collect();
        self.rootfs = Some(rootfs.clone());
        let target = rootfs.clone();
        make(&self.making, move || {
            let resolve = |digest: &Digest| mount_of(digest, &lowers);
            let mounts = engine.snapshots.mounts_of(&chain, &resolve)?;
            std::fs::create_dir_all(&target).map_err(|e| Error::io("create", &target, e))?;
            for mount in mounts {
                // What the container writes is removed with it, also after a crash.
                mount.passing().mount_at(&target)?;
            }
            Ok::<_, Error>(())
        })
        .await?;
        Ok(rootfs)
    }

    /// Unmounts what the container stood on, which has ended. What fails is told by
    /// [`Self::strike`], which does the same for those that never came so far.
    pub(super) async fn clear(&mut self) {
        let rootfs = self.rootfs.take().filter(|path| path.exists());
        let unmounted = blocking(move || match rootfs {
            Some(rootfs) => overlay::unmount(&rootfs).map_err(Error::from),
            None => Ok(()),
        })
        .await;
        // Nobody reads any more. Each of these mostly waits for the kernel.
        let held = std::mem::take(&mut self.held).into_iter();
        join_all(held.map(|mount| blocking(move || drop(mount)))).await;
        self.cleared = std::mem::replace(&mut self.cleared, Ok(())).and(unmounted);
    }

    /// Takes everything down. The first failure is returned after all was tried.
    pub(super) async fn strike(mut self, engine: &Arc<Engine>) -> Result<()> {
        self.making.close();
        self.making.wait().await;
        self.clear().await;
        let (cleared, key, layers) = (self.cleared, self.snapshot.take(), self.layers);
        let (engine, run) = (Arc::clone(engine), self.run);
        // Each of these mostly waits for the disk.
        let released = blocking(move || release(&engine, run, key.as_deref()));
        let closed = async {
            let mut first = Ok(());
            for layer in layers {
                first = first.and(layer.close().await.map_err(Error::from));
            }
            first
        };
        let (released, closed) = tokio::join!(released, closed);
        cleared.and(released).and(closed)
    }
}

/// [`blocking`] work that `making` knows of, also when nobody waits for it any more.
fn make<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
    making: &TaskTracker,
    work: W,
) -> impl Future<Output = T> + use<T, W> {
    let made = making.spawn_blocking(work);
    async {
        match made.await {
            Ok(made) => made,
            Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
        }
    }
}

/// Commits the image's layers as snapshots where they are not yet, and prepares one on top.
fn snapshot(engine: &Engine, image: &Image, key: &str) -> Result<Chain> {
    let snapshots = &engine.snapshots;
    let mut parent: Option<String> = None;
    for layer in &image.layers {
        let name = layer.stack_id.to_string();
        match snapshots.commit_layer(
            &name,
            parent.as_deref(),
            layer.descriptor.digest,
            &Labels::new(),
        ) {
            Ok(()) | Err(lazarette_snapshotter::Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        parent = Some(name);
    }
    snapshots.prepare(key, parent.as_deref(), &Labels::new())?;
    Ok(snapshots.chain(key)?)
}

/// Where a layer is mounted.
fn mount_of(
    digest: &Digest,
    lowers: &[(Digest, PathBuf)],
) -> Result<PathBuf, lazarette_snapshotter::Error> {
    let mounted = lowers.iter().find(|(blob_digest, _)| blob_digest == digest);
    let not_found = || lazarette_snapshotter::Error::NotFound {
        key: digest.to_string(),
    };
    Ok(mounted.ok_or_else(not_found)?.1.clone())
}

/// Removes the snapshot and then the run directory, by which the next run would find it. What
/// is mounted there goes meanwhile.
fn release(engine: &Engine, run: RunDir, key: Option<&str>) -> Result<()> {
    let forgotten = std::thread::scope(|scope| {
        // Tried again below, where failures are told.
        scope.spawn(|| drop(unmount_below(run.path())));
        key.map_or(Ok(()), |key| forget(engine, key))
    });
    if let Err(error) = forgotten {
        if let Err(error) = run.leave() {
            tracing::warn!(%error, "what is left of a run cannot be unmounted");
        }
        return Err(error.into());
    }
    Ok(run.close()?)
}

/// Removes a container's snapshot if it got as far as having one.
fn forget(engine: &Engine, key: &str) -> Result<(), lazarette_snapshotter::Error> {
    match engine.snapshots.remove(key) {
        Ok(_) | Err(lazarette_snapshotter::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes down what processes that died left mounted, ends containers whose executor host died with them,
/// and forgets their snapshots.
fn sweep(engine: &Engine, handle: &Handle) -> Result<()> {
    let runs = engine.state.join("runs");
    let release = |key: &str| {
        let state = runs.join(key).join(EXECUTOR);
        let ended = handle.block_on(Embedded::new().sweep(&state));
        ended.map_err(|error| {
            let source = io::Error::other(error);
            lazarette_fetcher::Error::io("end the container of", &state, source)
        })?;
        forget(engine, key)
    };
    let swept = RunDir::sweep_after(&runs, &release)?;
    for (path, error) in &swept.failed {
        tracing::warn!(path = %path.display(), %error, "what a dead run left cannot be removed");
    }
    Ok(())
}

/// Builds a layer's tree and mounts it, to be read through `data`.
pub(super) async fn mount_layer(
    mounts: LayerMounts,
    layer: Arc<Layer>,
    data: Arc<dyn LayerData>,
) -> Result<Arc<LayerMount>> {
    let tree = tree_of(&layer).await?;
    mount_tree(mounts, &layer, tree, data).await
}

/// Builds a layer's tree.
pub(super) async fn tree_of(layer: &Arc<Layer>) -> Result<Arc<Tree>> {
    let layer = Arc::clone(layer);
    blocking(move || Ok(Arc::new(Tree::build(layer.index())?))).await
}

/// Mounts a layer whose tree is built, to be read through `data`.
pub(super) async fn mount_tree(
    mounts: LayerMounts,
    layer: &Layer,
    tree: Arc<Tree>,
    data: Arc<dyn LayerData>,
) -> Result<Arc<LayerMount>> {
    let digest = layer.index().blob_digest;
    blocking(move || Ok(mounts.mount(digest, tree, data)?)).await
}
