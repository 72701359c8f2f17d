//! The layers that are mounted for containerd, and the ones that this process mounts itself.
//!
//! Invariant: what this process mounts ends with it: readers of such a layer fail when it
//! dies, and the next one sweeps what is left. Everything else is the mount server's
//! ([`super::served`]).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::cleanup::{self, RunDir};
use lazarette_snapshotter::fuse::{LayerMount, LayerMounts};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::engine::Engine;
use crate::engine::stage::mount_layer;
use crate::{Error, Result};

/// All layers that are mounted, by blob digest.
pub(super) type HeldLayers = Mutex<HashMap<Digest, Held>>;

/// A layer that is mounted.
pub(super) struct Held {
    pub(super) layer: Arc<Layer>,
    pub(super) by: By,
}

/// Who mounted it.
pub(super) enum By {
    /// This process.
    Us(Ours),
    /// The mount server, there.
    Server(PathBuf),
}

impl Held {
    /// Where it is to be seen. Short: those of all layers of an image must fit into one page
    /// of mount options.
    pub(super) fn path(&self) -> &Path {
        match &self.by {
            By::Us(ours) => &ours.link,
            By::Server(path) => path,
        }
    }
}

/// What this process mounts.
pub(super) struct Here {
    mounts: LayerMounts,
    /// The next short name.
    next: AtomicU64,
    run: RunDir,
}

/// A layer that it mounted.
pub(super) struct Ours {
    mount: Arc<LayerMount>,
    /// A short name of the mountpoint.
    link: PathBuf,
}

impl Here {
    /// Removes what a crashed process left mounted below `state`, and begins with nothing.
    pub(super) fn open(engine: &Engine, state: &Path, handle: Handle) -> Result<Self> {
        cleanup::cleanup_stale(state)?;
        let run = RunDir::create(state, &std::process::id().to_string())?;
        Ok(Self {
            mounts: LayerMounts::new(run.path(), handle, engine.mounting),
            next: AtomicU64::new(0),
            run,
        })
    }

    /// Mounts a layer.
    pub(super) async fn mount(&self, layer: &Arc<Layer>) -> Result<Ours> {
        let data = Arc::clone(layer) as _;
        let mount = mount_layer(self.mounts.clone(), Arc::clone(layer), data).await?;
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let link = self.run.path().join(name);
        std::os::unix::fs::symlink(mount.path(), &link)
            .map_err(|e| Error::io("link the mountpoint to", &link, e))?;
        Ok(Ours { mount, link })
    }

    /// Takes everything down, also what could not be put down.
    pub(super) async fn close(&self) -> Result<()> {
        let dir = self.run.path().to_path_buf();
        blocking(move || Ok(cleanup::unmount_below(&dir)?)).await
    }
}

impl Ours {
    /// Unmounts it.
    pub(super) async fn put_down(self) {
        let Self { mount, link } = self;
        blocking(move || {
            if let Err(error) = std::fs::remove_file(&link) {
                tracing::warn!(path = %link.display(), %error, "name of a mountpoint stays");
            }
            drop(mount);
        })
        .await;
    }
}
