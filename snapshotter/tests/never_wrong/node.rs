//! A node: a store, a mount server, and the ways in which they show a layer.

use std::cell::RefCell;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use lazarette_fetcher::Error;
use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::layer::open::{LayerOpener, OpenedBy};
use lazarette_fetcher::layer::{Layer, Priority};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::trust::TrustedKeys;
use lazarette_snapshotter::fuse::{Backend, FuseOptions, LayerMount, LayerMounts};
use lazarette_snapshotter::mountd::{
    MountServer, Mounted, Place, Shown, Through, hide_whole, show_whole,
};
use lazarette_snapshotter::tree::Tree;

use crate::blobs::{Blob, fixture};
use crate::sys;

/// Tries of something that random faults may break: enough that a fault-free one comes.
pub(crate) const TRIES_MAX: usize = 200;
/// How long a kernel may take to let go of what was unmounted.
const LET_GO_MAX: Duration = Duration::from_secs(60);

/// What shows layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shows {
    Fuse,
    Erofs,
    ServerFuse,
    ServerFanotify,
    /// The kernel alone, once the layer is complete.
    Kernel,
}

/// See the module's documentation.
pub(crate) struct Node {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    server: Option<MountServer>,
    /// That of the process that opened a layer last.
    opened: RefCell<Option<Arc<Store>>>,
}

/// A layer that is shown.
pub(crate) enum Mount {
    Own(Arc<LayerMount>),
    Server(Mounted),
}

impl Mount {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Own(mount) => mount.path(),
            Self::Server(mounted) => &mounted.path,
        }
    }
}

/// What the network or the disk may do to reads is told as one of these.
#[track_caller]
pub(crate) fn assert_is_damage(error: &Error, what: &str) {
    let is_damage = matches!(
        error,
        Error::Corrupt { .. }
            | Error::Unavailable { .. }
            | Error::Malformed { .. }
            | Error::Limit { .. }
    );
    assert!(is_damage, "{what}: {error:?}");
}

/// The index that a node makes of a layer.
pub(crate) fn index_of(node: &Node, blob: &Blob) -> Vec<u8> {
    let source: Arc<dyn BlobSource> = Arc::new(blob.serve());
    let (layer, by) = node.open(blob, &source);
    assert_eq!(by, OpenedBy::Stream);
    let index = node.store().open_index(&blob.digest()).unwrap();
    let mut bytes = Vec::new();
    index.unwrap().read_to_end(&mut bytes).unwrap();
    node.close(&layer);
    bytes
}

impl Node {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Runtime::new().unwrap(),
            server: None,
            opened: RefCell::default(),
        }
    }

    fn store(&self) -> Arc<Store> {
        Store::open(self.dir.path().join("store")).unwrap()
    }

    /// A file of the layer in the store.
    pub(crate) fn file(&self, blob: &Blob, name: &str) -> PathBuf {
        let layers = self.dir.path().join("store/layers");
        layers.join(blob.digest().file_name()).join(name)
    }

    /// Opens the layer, as a process would that begins now, as often as it takes.
    pub(crate) fn open(&self, blob: &Blob, source: &Arc<dyn BlobSource>) -> (Arc<Layer>, OpenedBy) {
        let request = blob.request();
        let keys = TrustedKeys::load(&[fixture("index-key.pub")]).unwrap();
        let store = self.store();
        let opener = LayerOpener::new(Arc::clone(&store), Arc::clone(source)).trusting(keys);
        self.opened.replace(Some(store));
        for _ in 0..TRIES_MAX {
            let received = AtomicU64::new(0);
            match self.runtime.block_on(opener.open(&request, &received)) {
                Ok(opened) => return opened,
                Err(error) => assert_is_damage(&error, blob.name),
            }
        }
        panic!("{} cannot be opened", blob.name);
    }

    /// The same, of which then nothing is here: what is read of it comes in pieces, by its
    /// table, which was shaped where it should be.
    pub(crate) fn open_lazily(&self, blob: &Blob, source: &Arc<dyn BlobSource>) -> Arc<Layer> {
        let mut layer = self.open_by_table(blob, source);
        if !blob.hot.is_empty() {
            assert!(self.fill(&layer, Some(blob.hot)), "{}", blob.name);
            assert!(
                layer.file().shape(blob.hot).unwrap().is_some(),
                "{}",
                blob.name
            );
            self.close(&layer);
            drop(layer);
            layer = self.open(blob, source).0;
        }
        let mut encodings = layer.index().chunks.iter().map(|chunk| &chunk.encoding);
        assert!(
            encodings.any(blob.is_encoded),
            "{} is of another kind",
            blob.name
        );
        let is_partial = layer.file().details_origin().is_some();
        assert_eq!(is_partial, blob.is_offered(), "{}", blob.name);
        evict(&layer);
        layer
    }

    /// Where the way to its table was spoilt so often that it was streamed, that is undone.
    fn open_by_table(&self, blob: &Blob, source: &Arc<dyn BlobSource>) -> Arc<Layer> {
        for _ in 0..TRIES_MAX {
            let (layer, by) = self.open(blob, source);
            if (by == OpenedBy::Toc) == blob.has_table() {
                return layer;
            }
            self.close(&layer);
            drop(layer);
            self.forget(blob);
        }
        panic!("{}: its table is never read", blob.name);
    }

    /// Gets these chunks, or all, as often as it takes; `false` where some never come.
    pub(crate) fn fill(&self, layer: &Layer, ids: Option<&[ChunkId]>) -> bool {
        (0..TRIES_MAX).any(|_| self.try_fill(layer, ids))
    }

    fn try_fill(&self, layer: &Layer, ids: Option<&[ChunkId]>) -> bool {
        let filled = self.runtime.block_on(async {
            match ids {
                Some(ids) => layer.fill_chunks(ids, Priority::Profile).await,
                None => layer.fill_all().await,
            }
        });
        if let Err(error) = &filled {
            assert_is_damage(error, "a fill");
        }
        filled.is_ok()
    }

    /// Gets all of it, and compares what is on the disk; what is not right comes again.
    fn make_whole(&self, layer: &Layer) -> bool {
        (0..TRIES_MAX)
            .any(|_| self.try_fill(layer, None) && matches!(layer.file().is_whole(), Ok(true)))
    }

    /// Removes the layer, if it is here.
    pub(crate) fn forget(&self, blob: &Blob) {
        self.store().remove_layer(&blob.digest()).unwrap();
    }

    pub(crate) fn close(&self, layer: &Layer) {
        self.runtime.block_on(layer.close()).unwrap();
    }

    /// Shows the layer; `None` where that takes all of it, and some never comes.
    pub(crate) fn show(&mut self, layer: &Arc<Layer>, shows: Shows) -> Option<Mount> {
        Some(match shows {
            Shows::Fuse => self.mount_own(layer, Backend::Fuse),
            Shows::Erofs => self.mount_own(layer, Backend::Erofs),
            Shows::ServerFuse => Mount::Server(self.mount_by_server(layer, Through::Fuse)),
            Shows::ServerFanotify => Mount::Server(self.mount_by_server(layer, Through::Fanotify)),
            Shows::Kernel => {
                if !self.make_whole(layer) {
                    return None;
                }
                let mounted = self.mount_by_server(layer, Through::Fuse);
                assert!(show_whole(&mounted, layer.file()).unwrap());
                Mount::Server(mounted)
            }
        })
    }

    fn mount_own(&self, layer: &Arc<Layer>, backend: Backend) -> Mount {
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        let handle = self.runtime.handle().clone();
        let mounts = LayerMounts::new(self.dir.path().join("mounts"), handle, options);
        let tree = Arc::new(Tree::build(layer.index()).unwrap());
        let digest = layer.index().blob_digest;
        Mount::Own(mounts.mount(digest, tree, Arc::clone(layer) as _).unwrap())
    }

    fn mount_by_server(&mut self, layer: &Arc<Layer>, through: Through) -> Mounted {
        let (path, metadata) = (
            self.dir.path().join("mnt"),
            self.dir.path().join("metadata"),
        );
        let place = Place {
            path: &path,
            metadata: &metadata,
        };
        let shown = Shown {
            blob_digest: layer.index().blob_digest,
            tree: &Tree::build(layer.index()).unwrap(),
            data: Arc::clone(layer) as _,
            through,
        };
        self.server().mount_shown(&shown, place).unwrap()
    }

    fn server(&mut self) -> &MountServer {
        let (socket, handle) = (
            self.dir.path().join("socket"),
            self.runtime.handle().clone(),
        );
        self.server.get_or_insert_with(|| {
            let connected = MountServer::connect_or_start(&socket, &program(), handle);
            connected.unwrap().0
        })
    }

    pub(crate) fn hide(&mut self, mount: Mount) {
        let Mount::Server(mounted) = mount else {
            return;
        };
        soon(|| hide_whole(&mounted));
        soon(|| self.server().unmount_layer(&mounted));
    }
}

impl Drop for Node {
    /// Ends the server also where the test fails; what is mounted goes with it.
    fn drop(&mut self) {
        if self.server.take().is_none() {
            return;
        }
        let socket = self.dir.path().join("socket");
        servers(&socket).into_iter().for_each(sys::kill_by_id);
        (0..4).for_each(|_| sys::detach(&self.dir.path().join("mnt")));
    }
}

/// Evicts all of a layer, as soon as nobody reads it by the kernel alone any more.
pub(crate) fn evict(layer: &Layer) {
    soon(|| layer.file().evict_all());
}

/// Does what cannot be done while files are open: a process that another test is starting has
/// those of this one open for a moment, too.
fn soon<T, E: std::fmt::Display>(mut attempt: impl FnMut() -> Result<T, E>) {
    let since = Instant::now();
    while let Err(error) = attempt() {
        assert!(since.elapsed() < LET_GO_MAX, "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The server's program, which cargo builds beside this one.
fn program() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let program = me.parent().unwrap().parent().unwrap().join("laz-mountd");
    let how = "build it first: cargo build --workspace --bins";
    assert!(program.exists(), "{how}");
    program
}

/// Whoever serves at the socket, and its guard.
fn servers(socket: &Path) -> Vec<i32> {
    let is_ours = |pid: &i32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut args = args.split(|byte| *byte == 0);
        args.any(|arg| arg == socket.as_os_str().as_encoded_bytes())
    };
    let all = fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(is_ours).collect()
}
