//! Layers of the snapshots that were there before this process.
//!
//! Invariant: what has a record and no snapshot is removed, before anything is served; later only what
//! was opened ahead and nobody came for. A layer that could not be mounted is tried again
//! ([`late`]). A store that the process before left beyond its bounds is brought back within
//! them.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::metastore::{Content, Kind};
use lazarette_snapshotter::overlay::Snapshots;
use tokio::sync::mpsc;

use super::{NodeLayers, ServedLayerTable, late};
use crate::Result;
use crate::image::pull::LAYERS_AT_ONCE;

impl NodeLayers {
    /// Mounts the layers of all committed snapshots, or answers for them where they are
    /// mounted; others are unmounted. What fails is logged, and tried again when somebody
    /// wants to mount it, and now and then (`late.rs`). Returns how many are mounted.
    pub async fn restore(self: &Arc<Self>) -> Result<usize> {
        let engine = Arc::clone(&self.engine);
        let recorded = blocking(move || {
            let entries = engine.db.scan::<ServedLayerTable>(b"");
            let digests = entries.map(|entry| entry.map(|(digest, _)| digest));
            digests.collect::<lazarette_fetcher::Result<Vec<_>>>()
        })
        .await?;
        let snapshots = self.snapshots();
        let named = blocking(move || named(&snapshots)).await?;
        // Before anything is tried: whoever comes after that is another one.
        let renewed = self.served.as_ref().map(|served| served.renewals());
        if let Some(served) = &self.served {
            served.keep(named.clone()).await?;
        }
        let (named, unnamed): (Vec<_>, Vec<_>) = recorded
            .into_iter()
            .partition(|digest| named.contains(digest));
        for digest in unnamed {
            // The process ended before a snapshot was made of it. Nobody is to wait for what
            // nobody has; the next start tries again.
            if let Err(error) = self.discard(&digest).await {
                tracing::warn!(%digest, %error, "cannot remove a layer that nobody has");
            }
        }
        let tried = stream::iter(named)
            .map(async |digest| (digest, self.try_mount(&digest).await))
            .buffer_unordered(LAYERS_AT_ONCE);
        let (mut mounted, mut failed) = (0, Vec::new());
        for (digest, is_mounted) in tried.collect::<Vec<_>>().await {
            match is_mounted {
                true => mounted += 1,
                false => failed.push(digest),
            }
        }
        if let Some(renewed) = renewed {
            let this = Arc::downgrade(self);
            self.beside
                .lock()
                .spawn(late::keep_trying(this, renewed, failed));
        }
        let store = Arc::clone(&self.engine.store);
        // Nobody waits for it. Layers that are in use are known by now.
        drop(tokio::task::spawn_blocking(move || store.keep_within()));
        Ok(mounted)
    }

    /// Has what is opened ahead and `unclaimed` removed.
    pub(super) fn remove_unclaimed(
        self: &Arc<Self>,
        mut unclaimed: mpsc::UnboundedReceiver<Digest>,
    ) {
        let this = Arc::downgrade(self);
        self.beside.lock().spawn(async move {
            while let Some(digest) = unclaimed.recv().await
                && let Some(this) = this.upgrade()
            {
                this.discard_unclaimed(&digest).await;
            }
        });
    }

    /// Who claims the layer meanwhile finds it removed, and containerd brings it.
    async fn discard_unclaimed(&self, digest: &Digest) {
        let _turn = self.turns.of(digest).await;
        let is_held = self.held.lock().contains_key(digest);
        if is_held || self.ahead.has(digest) || self.is_named(digest).await {
            return;
        }
        match self.discard(digest).await {
            Ok(()) => tracing::debug!(%digest, "nobody came for a layer that was opened ahead"),
            Err(error) => {
                let error = error.report();
                tracing::warn!(%digest, error, "cannot remove a layer that nobody came for");
            }
        }
    }

    /// Mounts and removes nothing any more but what is asked for.
    pub(super) async fn end_beside(&self) {
        let mut beside = std::mem::take(&mut *self.beside.lock());
        beside.shutdown().await;
    }

    /// Where that cannot be told, it is.
    pub(super) async fn is_named(&self, digest: &Digest) -> bool {
        let (snapshots, digest) = (self.snapshots(), *digest);
        let named = blocking(move || snapshots.is_named(&digest)).await;
        named.unwrap_or(true)
    }
}

/// The layers that committed snapshots name.
pub(super) fn named(snapshots: &Snapshots) -> Result<HashSet<Digest>> {
    let records = snapshots.list()?;
    let committed = records.iter().filter(|r| r.kind == Kind::Committed);
    let layers = committed.filter_map(|record| match record.content {
        Content::Layer(digest) => Some(digest),
        Content::Directory(_) => None,
    });
    Ok(layers.collect())
}
