//! The engine: wiring of store, database, source and snapshots, and what users ask of it.
//!
//! Invariant: opening an engine touches nothing but its own directories, and several
//! engines may be open on one root at once (the database is held only while facts are
//! read or written). Never prints; never reads the environment.

mod check;
mod companions;
mod follow;
mod hot;
mod index;
mod inventory;
mod keep;
pub mod lazy;
mod profiles;
mod run;
mod stage;
#[cfg(test)]
mod tests;
mod warming;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, TryStreamExt, stream};
use lazarette_fetcher::Error as FetchError;
use lazarette_fetcher::db::{Batch, Db, Table as _};
use lazarette_fetcher::index::write::{Format, HotFiles, Options};
use lazarette_fetcher::layer::open::LayerOpener;
use lazarette_fetcher::layer::{EngineConfig, FetchEngine, Layer};
use lazarette_fetcher::source::{Mirrors, Pusher, stack};
use lazarette_fetcher::store::{Bounds, Store};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::trust::TrustedKeys;
use lazarette_fetcher::types::{Digest, Platform, Reference, Repository};
use lazarette_snapshotter::fuse::FuseOptions;
use lazarette_snapshotter::metastore::{DbMetastore, SnapshotTable};
use lazarette_snapshotter::overlay::Snapshots;
use parking_lot::Mutex;

pub use check::{CheckReport, CheckedLayer, LostBlob};
pub use index::IndexSummary;
pub use inventory::{ImageSummary, LayerSummary, Removed};
pub use keep::{EvictReport, EvictWhat, Kept, Pruned, StoreSummary};
pub use run::RunRequest;

use self::lazy::ServedLayerTable;

use crate::Result;
use crate::config::{Config, FormatsConfig};
use crate::image::convert::{ConvertEvent, ConvertOptions, ConvertReport, Converter};
use crate::image::pull::{LAYERS_AT_ONCE, Landmarks, PullMode, Puller};
use crate::image::resolve::Resolver;
use crate::image::{AccountsTable, Image, ImageRecord, ImageTable};
use crate::profile::ProfileTable;
use crate::spec::bundle::AccountFiles;
use crate::trace::Trace;

/// Accounts of an image that are remembered, bytes. Debian's are 1.5 KiB.
const ACCOUNT_BYTES_KEPT_MAX: usize = 64 << 10;

/// An engine over one root directory.
pub struct Engine {
    root: PathBuf,
    state: PathBuf,
    store: Arc<Store>,
    db: Arc<Db>,
    registry: Mirrors,
    resolver: Resolver,
    metastore: Arc<DbMetastore>,
    snapshots: Arc<Snapshots>,
    pusher: Pusher,
    keys: TrustedKeys,
    /// Bounds what all layers fetch at once.
    fetching: Arc<FetchEngine>,
    formats: FormatsConfig,
    mounting: FuseOptions,
    /// Whether what is served to containerd comes whole, in the background.
    fills_layers: bool,
    /// Whether what came whole is the kernel's alone then. Nothing is evicted from it while it
    /// is mounted: a store that is to stay within a budget needs that it is.
    shows_whole: bool,
    /// Held while what is known of starts is read, added to and written.
    learning: Arc<Mutex<()>>,
}

impl Engine {
    /// Opens the store and the database under the configured root, creating them first
    /// where they are missing.
    pub fn open(config: Config) -> Result<Arc<Self>> {
        Self::open_with(config, None, &|path, tables| Db::open(path, tables))
    }

    /// [`Engine::open`] for who asks for something in `repository` next: connections to its
    /// registry begin meanwhile. In an async runtime only.
    pub fn open_to_ask(config: Config, repository: &Repository) -> Result<Arc<Self>> {
        Self::open_with(config, Some(repository), &|path, tables| {
            Db::open(path, tables)
        })
    }

    /// [`Engine::open`] with another way to open the database.
    fn open_with(
        config: Config,
        asked: Option<&Repository>,
        open_db: OpenDb<'_>,
    ) -> Result<Arc<Self>> {
        let (root, state) = (config.root(), config.state());
        let bounds = Bounds {
            budget: config.store.budget,
            free_floor: config.store.free_floor,
        };
        let keys = TrustedKeys::load(&config.trust.index_keys)?;
        let pusher = Pusher::new(config.source.clone());
        // Beside the database, which waits for the disk; this reads the trust anchors.
        let (opened, built) = std::thread::scope(|scope| {
            let opening = scope.spawn(|| open_both(&root, bounds, open_db));
            let built = stack::build(config.source);
            if let (Some(repository), Ok((_, registry))) = (asked, &built) {
                registry.connect_ahead(repository);
            }
            let opened = opening.join();
            (opened.unwrap_or_else(|panic| resume_unwind(panic)), built)
        });
        let ((store, db), (source, registry)) = (opened?, built?);
        let resolver = Resolver {
            source,
            store: Arc::clone(&store),
            platform: Platform::host(),
        };
        let metastore = Arc::new(DbMetastore::new(Arc::clone(&db)));
        let snapshots = Arc::new(Snapshots::open(&root, Arc::clone(&metastore) as _)?);
        Ok(Arc::new(Self {
            root,
            state,
            store,
            db,
            registry,
            resolver,
            metastore,
            snapshots,
            pusher,
            keys,
            fetching: FetchEngine::new(EngineConfig::default()),
            formats: config.formats,
            fills_layers: config.snapshotter.fill,
            shows_whole: config.snapshotter.fill && config.store.budget.is_none(),
            learning: Arc::default(),
            mounting: FuseOptions {
                backend: config.mounts.backend,
                ..FuseOptions::default()
            },
        }))
    }

    /// Where bytes came from and how many, so far.
    pub fn registry(&self) -> &Mirrors {
        &self.registry
    }

    /// Asks the registry what `reference` is now and remembers the answer.
    pub async fn resolve(&self, reference: &Reference, trace: &Trace) -> Result<Image> {
        self.resolve_for(reference, trace, None).await
    }

    /// [`Self::resolve`] for who opens the layers next: their tables come meanwhile.
    pub async fn resolve_to_open(&self, reference: &Reference, puller: &Puller) -> Result<Image> {
        self.resolve_for(reference, &puller.trace, Some(puller))
            .await
    }

    async fn resolve_for(
        &self,
        reference: &Reference,
        trace: &Trace,
        opens: Option<&Puller>,
    ) -> Result<Image> {
        let span = trace.start("resolve", None);
        let manifest = self.resolver.manifest(reference).await?;
        span.end();
        if let Some(puller) = opens {
            puller.look_ahead(reference, &manifest).await;
        }
        let span = trace.start("config", None);
        let image = self.resolver.image(reference, manifest).await?;
        span.end();
        self.remember(&image).await?;
        Ok(image)
    }

    /// The image `reference` named when it was last pulled, without asking a registry.
    pub async fn local(&self, reference: &Reference) -> Result<Option<Image>> {
        let (db, key) = (Arc::clone(&self.db), reference.to_string());
        let Some(record) = blocking(move || db.get::<ImageTable>(&key)).await? else {
            return Ok(None);
        };
        match self.resolver.stored_manifest(&record.manifest).await {
            Ok(manifest) => Ok(Some(self.resolver.image(reference, manifest).await?)),
            // Damaged and dropped by the store: as if it had never been pulled.
            Err(FetchError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A puller for this engine's store.
    pub fn puller(&self, mode: PullMode, trace: Trace) -> Puller {
        let (store, source) = (Arc::clone(&self.store), Arc::clone(&self.resolver.source));
        let opener = LayerOpener::new(store, source)
            .trusting(self.keys.clone())
            .fetching_with(Arc::clone(&self.fetching));
        Puller::new(opener, trace, mode)
    }

    /// Makes every layer of `image` readable and, in full mode, complete.
    pub async fn pull(&self, image: &Image, puller: &Puller) -> Result<Vec<Arc<Layer>>> {
        // Layers may take minutes to stream; other processes need not wait for that.
        self.release_db();
        self.look_for_indexes(image, puller).await;
        stream::iter(image.layers.iter().enumerate())
            .map(|(number, layer)| async move {
                let layer = puller
                    .layer(image, number, layer, Landmarks::Honour)
                    .await?;
                layer.flush().await?;
                Ok(layer)
            })
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await
    }

    /// Pushes a copy of `src` in another format as `dst`, what is hot first.
    pub async fn convert(
        &self,
        src: &Reference,
        dst: &Reference,
        (format, hot): (Format, Option<HotFiles>),
        progress: &(dyn Fn(ConvertEvent<'_>) + Send + Sync),
    ) -> Result<ConvertReport> {
        self.release_db();
        let spool = self.root.join("ingest");
        let mut options = ConvertOptions::new(spool);
        options.write = Options::new(format);
        options.hot = hot;
        let converter = Converter {
            source: self.resolver.source.as_ref(),
            sink: &self.pusher,
            options,
            progress,
        };
        Ok(converter.convert(src, dst).await?)
    }

    /// The accounts of an image that was started here before.
    async fn accounts(&self, manifest: Digest) -> Option<AccountFiles> {
        let db = Arc::clone(&self.db);
        let found = blocking(move || db.get::<AccountsTable>(&manifest)).await;
        found.unwrap_or_else(|error| {
            tracing::warn!(%manifest, %error, "accounts are read from the image");
            None
        })
    }

    /// Remembers an image's accounts, unless they are uncommonly long. A failure costs the
    /// next start some time.
    async fn remember_accounts(&self, manifest: Digest, accounts: AccountFiles) {
        if accounts.passwd.len() + accounts.group.len() > ACCOUNT_BYTES_KEPT_MAX {
            return;
        }
        let db = Arc::clone(&self.db);
        let kept = blocking(move || {
            let mut batch = Batch::new();
            batch.put::<AccountsTable>(&manifest, &accounts)?;
            db.commit(batch)
        });
        if let Err(error) = kept.await {
            tracing::warn!(%manifest, %error, "accounts could not be remembered");
        }
    }

    /// Opens the database for facts that are written next; a failure shows there.
    async fn expect_commit(&self) {
        let db = Arc::clone(&self.db);
        if let Err(error) = blocking(move || db.prepare_commit()).await {
            tracing::debug!(%error, "database cannot be written yet");
        }
    }

    /// Lets other processes use the database until the next fact is read or written.
    fn release_db(&self) {
        self.metastore.release();
    }

    async fn remember(&self, image: &Image) -> Result<()> {
        let (db, record) = (Arc::clone(&self.db), ImageRecord::new(image, now_s()));
        blocking(move || {
            let mut batch = Batch::new();
            batch.put::<ImageTable>(&record.reference.to_string(), &record)?;
            db.commit(batch)
        })
        .await?;
        Ok(())
    }
}

/// Opens the database in a directory, with these tables.
type OpenDb<'a> = &'a (dyn Fn(&Path, &[&str]) -> Result<Db, FetchError> + Sync);

/// Opens store and database side by side: each waits for the disk most of its time.
fn open_both(root: &Path, bounds: Bounds, open_db: OpenDb<'_>) -> Result<(Arc<Store>, Arc<Db>)> {
    const TABLES: [&str; 5] = [
        ImageTable::NAME,
        SnapshotTable::NAME,
        ProfileTable::NAME,
        AccountsTable::NAME,
        ServedLayerTable::NAME,
    ];
    let (store, db) = std::thread::scope(|scope| {
        let db = scope.spawn(|| open_db(&root.join("db"), &TABLES));
        let store = Store::open(root);
        let db = db.join();
        (store, db.unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let (store, db) = (store?, Arc::new(db?));
    store.keep_within_bounds(bounds);
    // Not earlier: all that was read so far would have waited for it.
    store.expect_lookups();
    Ok((store, db))
}

/// Seconds since 1970.
fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// What a finished pull tells.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PullReport {
    /// The reference.
    pub reference: Reference,
    /// The platform's manifest.
    pub manifest_digest: Digest,
    /// Number of layers.
    pub layers: usize,
    /// Size of all layers in the registry, bytes.
    pub image_bytes: u64,
    /// Received in this pull, bytes.
    pub fetched_bytes: u64,
    /// Taken from other layers of this node instead, bytes of files.
    pub copied_bytes: u64,
}
