//! One connection to the mount server, and what the server has mounted.
//!
//! ```text
//! <state>/mountd.sock               the server
//! <state>/layers/<n>                a layer; who has which number, the server knows
//! <root>/meta/<digest>.erofs        the image of a layer: on a disk, as the kernel wants it
//! ```
//!
//! Invariant: a mountpoint is the server's as long as it lists it, and is never used for
//! another layer meanwhile; what the server does not list is taken away when this is opened.
//! So a process may die at any instant: what it left half done is listed, and finished or
//! ended by the next, or it is not, and goes. Blocks: milliseconds at a time.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::mountd::{
    self, Choice, MountServer, Mounted, Place, Shown, Through, Unattached,
};
use lazarette_snapshotter::tree::Tree;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::{Error, Result};

/// Where images are, in the root.
const META: &str = "meta";

/// The image of a layer that the mount server shows.
pub(in crate::engine) fn image_of(root: &Path, blob_digest: &Digest) -> PathBuf {
    root.join(META).join(image_name(blob_digest))
}

fn image_name(blob_digest: &Digest) -> String {
    format!("{}.erofs", blob_digest.file_name())
}

/// Where everything lies.
pub(super) struct Places {
    /// Where the server listens.
    pub(super) socket: PathBuf,
    /// Its program.
    pub(super) program: PathBuf,
    layers: PathBuf,
    meta: PathBuf,
    /// Through what the kernel gets the data of layers that are mounted from now on.
    through: Through,
    /// Whether it gets what is complete by itself.
    shows_whole: bool,
    /// See [`Choice`].
    fails_short_reads: bool,
    /// The next number of a mountpoint.
    next: AtomicU64,
    /// Told of each mount that was to end and is in use.
    left: Notify,
}

impl Places {
    /// Makes the directories. Only root looks into that of mountpoints: what is mounted
    /// there holds set-uid programs of images.
    pub(super) fn make(root: &Path, state: &Path, program: &Path) -> Result<Self> {
        let meta = root.join(META);
        fs::create_dir_all(&meta).map_err(|e| Error::io("create", &meta, e))?;
        let layers = state.join("layers");
        let mut only_root = fs::DirBuilder::new();
        only_root.recursive(true).mode(0o700);
        let made = only_root.create(&layers);
        let layers = made.and_then(|()| layers.canonicalize());
        let layers = layers.map_err(|e| Error::io("create", state.join("layers"), e))?;
        Ok(Self {
            socket: state.join("mountd.sock"),
            program: program.to_path_buf(),
            layers,
            meta,
            through: Through::Fuse,
            shows_whole: false,
            fails_short_reads: true,
            next: AtomicU64::new(0),
            left: Notify::new(),
        })
    }

    /// The same, for a way that this kernel has; with `shows_whole` the kernel gets complete layers
    /// by itself, if it may have them.
    pub(super) fn through(self, way: &Choice, shows_whole: bool) -> Self {
        Self {
            through: way.through().unwrap_or(self.through),
            shows_whole: shows_whole && way.fails_short_reads,
            fails_short_reads: way.fails_short_reads,
            ..self
        }
    }

    /// Whether it matters that a layer is complete.
    pub(super) fn wants_complete(&self) -> bool {
        self.shows_whole || self.through == Through::Fanotify
    }

    /// Where images are.
    pub(super) fn meta(&self) -> &Path {
        &self.meta
    }

    /// The image of a layer.
    pub(super) fn metadata(&self, blob_digest: &Digest) -> PathBuf {
        self.meta.join(image_name(blob_digest))
    }

    /// Removes images of other layers than these, and what was never finished.
    pub(super) fn keep_metadata(&self, layers: &HashSet<Digest>) -> Result<()> {
        let fail = |e| Error::io("list", &self.meta, e);
        let kept: HashSet<PathBuf> = layers.iter().map(|digest| self.metadata(digest)).collect();
        for entry in fs::read_dir(&self.meta).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            // A directory is of one who was killed when it tried out what this kernel can.
            let remove = match path.is_dir() {
                true => fs::remove_dir_all,
                false => fs::remove_file,
            };
            if !kept.contains(&path)
                && let Err(error) = remove(&path)
            {
                tracing::warn!(path = %path.display(), %error, "image of no layer stays");
            }
        }
        Ok(())
    }

    /// Waits until some mount is to end that could not be ended.
    pub(super) async fn has_left(&self) {
        self.left.notified().await;
    }

    fn fresh(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.layers.join(number.to_string())
    }

    /// No number that one of these has is given again.
    fn skip<'a>(&self, paths: impl Iterator<Item = &'a PathBuf>) {
        let names = paths.filter_map(|path| path.file_name()?.to_str());
        let numbers = names.filter_map(|name| name.parse::<u64>().ok());
        let after = numbers.max().map_or(0, |number| number.saturating_add(1));
        self.next.fetch_max(after, Ordering::Relaxed);
    }
}

/// Whether a mount is to end that could not be ended yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Stays,
    Ends,
}

/// A connection.
pub(super) struct Session {
    server: MountServer,
    places: Arc<Places>,
    mounts: Mutex<BTreeMap<PathBuf, (Mounted, Fate)>>,
}

impl Session {
    /// Connects to the server; with `starts`, starts one where there is none. Wants are
    /// answered on `handle`.
    pub(super) fn open(places: &Arc<Places>, starts: bool, handle: Handle) -> Result<Self> {
        let (server, listed) = if starts {
            MountServer::connect_or_start(&places.socket, &places.program, handle)?
        } else {
            MountServer::connect(&places.socket, handle)?
        };
        let mounts: BTreeMap<_, _> = listed
            .into_iter()
            .map(|mounted| (mounted.path.clone(), (mounted, Fate::Stays)))
            .collect();
        places.skip(mounts.keys());
        let cleared = mountd::clear(&places.layers, &|path| mounts.contains_key(path))?;
        if cleared > 0 {
            tracing::info!(count = cleared, "removed mountpoints that no server has");
        }
        Ok(Self {
            server: server.with_data_alone(!places.fails_short_reads),
            places: Arc::clone(places),
            mounts: Mutex::new(mounts),
        })
    }

    /// Whether the server is gone; what fails then may work with the next one.
    pub(super) fn is_closed(&self) -> bool {
        self.server.is_closed()
    }

    /// Waits until it is.
    pub(super) async fn closed(&self) {
        self.server.closed().await;
    }

    /// Answers for a layer from now on, where it is mounted already or else where it will
    /// be then. Nobody else does the same for this layer meanwhile. Where it fails, what is mounted
    /// stays, as containers may have it; it may work later.
    pub(super) fn hold(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let path = self.hold_lazily(layer)?;
        if layer.file().is_known_whole() {
            self.complete(layer);
        }
        Ok(path)
    }

    fn hold_lazily(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let digest = layer.index().blob_digest;
        let metadata = self.places.metadata(&digest);
        let tree = || Tree::build(layer.index());
        let mut first = None;
        // All of them: each may be what some container has.
        for mounted in self.mounts_of(&digest) {
            let data = Arc::clone(layer) as _;
            match self.server.attach_layer(&mounted, tree, data, &metadata) {
                Ok(()) => {
                    self.know(mounted.clone(), Fate::Stays);
                    first = first.or(Some(mounted.path));
                }
                // Of a data file that was removed meanwhile, or mounted no more.
                Err(Unattached::Useless(error)) if !self.is_closed() => {
                    tracing::info!(%digest, %error, "a mount of a layer is of no use any more");
                    self.end(&mounted);
                }
                Err(Unattached::Useless(error) | Unattached::NotNow(error)) => {
                    return Err(error.into());
                }
            }
        }
        first.map_or_else(|| self.mount_anew(layer), Ok)
    }

    fn mount_anew(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let digest = layer.index().blob_digest;
        let metadata = self.places.metadata(&digest);
        let path = self.places.fresh();
        let place = Place {
            path: &path,
            metadata: &metadata,
        };
        let shown = Shown {
            blob_digest: digest,
            tree: &Tree::build(layer.index())?,
            data: Arc::clone(layer) as _,
            through: self.places.through,
        };
        match self.server.mount_shown(&shown, place) {
            Ok(mounted) => {
                self.know(mounted, Fate::Stays);
                Ok(path)
            }
            Err(error) => {
                // Not there, or mounted still and in the server's list.
                let _ = fs::remove_dir(&path);
                Err(error.into())
            }
        }
    }

    /// Has the kernel ask no more about a layer of which all is known to be present, and show
    /// it by itself to those who come from now on, if it may. Nobody else has its turn.
    pub(super) fn complete(&self, layer: &Arc<Layer>) {
        for mounted in self.mounts_of(&layer.index().blob_digest) {
            if mounted.through == Through::Fanotify {
                self.tell_complete(&mounted, layer);
            }
            if self.places.shows_whole {
                show_whole(&mounted, layer);
            }
        }
    }

    /// Whether a layer is the kernel's alone already, and there is nothing to tell the server.
    pub(super) fn is_shown_whole(&self, digest: &Digest) -> bool {
        let is_shown = |mounted: &Mounted| {
            mounted.through == Through::Fuse && mountd::is_shown_whole(mounted).unwrap_or(false)
        };
        let mounts = self.mounts_of(digest);
        !mounts.is_empty() && mounts.iter().all(is_shown)
    }

    /// Has those who come from now on see a layer through the server again. Nobody else has its
    /// turn.
    pub(super) fn hide_whole(&self, digest: &Digest) {
        for mounted in self.mounts_of(digest) {
            match mountd::hide_whole(&mounted) {
                Ok(true) => tracing::debug!(%digest, "layer can be evicted from"),
                Ok(false) => {}
                Err(error) => tracing::debug!(%digest, %error, "layer stays the kernel's alone"),
            }
        }
    }

    fn tell_complete(&self, mounted: &Mounted, layer: &Layer) {
        let (digest, len) = (layer.index().blob_digest, layer.index().data_len);
        if let Err(error) = self.server.tell_complete(mounted, layer, len) {
            tracing::debug!(%digest, %error, "the kernel goes on asking about a layer");
        }
    }

    /// Unmounts what is at `path`. What is in use stays, and is to end.
    pub(super) fn unmount(&self, path: &Path) {
        let mounted = self.mounts.lock().get(path).map(|(it, _)| it.clone());
        if let Some(mounted) = mounted {
            self.end(&mounted);
        }
    }

    /// Unmounts what is at `path` if it is to end. Nobody else has its layer's turn.
    pub(super) fn end_left(&self, path: &Path) {
        let is_left = |(_, fate): &(Mounted, Fate)| *fate == Fate::Ends;
        let is_left = self.mounts.lock().get(path).is_some_and(is_left);
        if is_left {
            self.unmount(path);
        }
    }

    /// Unmounts layers that are none of these.
    pub(super) fn keep(&self, layers: &HashSet<Digest>) {
        // What has no digest nobody here mounted.
        let is_other =
            |mounted: &&Mounted| mounted.blob_digest.is_some_and(|d| !layers.contains(&d));
        let mounts = self.mounts.lock();
        let all = mounts.values().map(|(mounted, _)| mounted);
        let others: Vec<Mounted> = all.filter(is_other).cloned().collect();
        drop(mounts);
        others.iter().for_each(|mounted| self.end(mounted));
    }

    /// What is to end and could not be ended, and of which layer it is.
    pub(super) fn ending(&self) -> Vec<(PathBuf, Option<Digest>)> {
        let mounts = self.mounts.lock();
        let ending = mounts.values().filter(|(_, fate)| *fate == Fate::Ends);
        let named = ending.map(|(mounted, _)| (mounted.path.clone(), mounted.blob_digest));
        named.collect()
    }

    fn end(&self, mounted: &Mounted) {
        match self.server.unmount_layer(mounted) {
            Ok(()) => drop(self.mounts.lock().remove(&mounted.path)),
            Err(error) => {
                tracing::info!(%error, "a layer that nothing names stays mounted for now");
                self.know(mounted.clone(), Fate::Ends);
                self.places.left.notify_one();
            }
        }
    }

    fn mounts_of(&self, digest: &Digest) -> Vec<Mounted> {
        let mounts = self.mounts.lock();
        let all = mounts.values().map(|(mounted, _)| mounted);
        let its = all.filter(|mounted| mounted.blob_digest.as_ref() == Some(digest));
        its.cloned().collect()
    }

    fn know(&self, mounted: Mounted, fate: Fate) {
        let path = mounted.path.clone();
        self.mounts.lock().insert(path, (mounted, fate));
    }
}

fn show_whole(mounted: &Mounted, layer: &Layer) {
    let digest = layer.index().blob_digest;
    match mountd::show_whole(mounted, layer.file()) {
        Ok(true) => tracing::debug!(%digest, "layer is the kernel's alone"),
        Ok(false) => tracing::debug!(%digest, "a layer is not whole after all"),
        Err(error) => {
            tracing::info!(%digest, %error, "layer is complete, and served all the same");
        }
    }
}
