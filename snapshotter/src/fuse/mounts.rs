//! The mounts of this process, one per layer.
//!
//! Invariant: a [`LayerMount`] is mounted from the moment it exists until its last user
//! drops it; then the mount and its directory are gone, whatever still has files open.
//! Never waits long for the kernel: what is busy is detached.
//!
//! Locks, in this order: the map of slots, held for a moment; one slot, held while its
//! layer is being mounted, so that a second caller waits for that layer and no other.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread;
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};
use lazarette_fetcher::types::Digest;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::fs::{Counters, FuseStats, LayerFs};
use super::miss::Misses;
use crate::data::LayerData;
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// The name that `mount` and `df` show.
const NAME: &str = "lazarette";

/// How long dropping a mount waits for its threads after the kernel let go of it. They
/// end at once unless another Linux namespace or an overlay still holds the file system.
const JOIN_WAIT: Duration = Duration::from_millis(500);

/// How layers are mounted.
#[derive(Debug, Clone, Copy)]
pub struct FuseOptions {
    /// Threads that answer requests of one mount. They share nothing but the tree.
    pub threads: usize,
}

/// The kernel's read-ahead window of a mount. It is also what one page fault of a mapped
/// file reads around it, bytes that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAhead {
    /// Hardly more than is asked for: where what is read is recorded, or was, a page too
    /// many is a chunk too many.
    Narrow,
    /// Few round trips to this process, and fewer to the registry.
    Wide,
}

impl ReadAhead {
    fn kib(self) -> u32 {
        match self {
            Self::Narrow => 32,
            // Twice the kernel's usual.
            Self::Wide => 256,
        }
    }
}

impl Default for FuseOptions {
    /// Two to four threads by the machine.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            threads: cores.clamp(2, 4),
        }
    }
}

/// All layers that this process has mounted. Clones share them.
#[derive(Clone)]
pub struct LayerMounts {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    handle: Handle,
    options: FuseOptions,
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
    /// Tells the directories of a layer's successive mounts apart.
    sequence: AtomicU64,
}

type Slot = Mutex<Weak<LayerMount>>;

impl LayerMounts {
    /// Mounts will lie below `root`, a directory that only this process uses; misses are
    /// answered on `handle`.
    pub fn new(root: impl Into<PathBuf>, handle: Handle, options: FuseOptions) -> Self {
        Self {
            inner: Arc::new(Inner {
                root: root.into(),
                handle,
                options,
                slots: Mutex::default(),
                sequence: AtomicU64::new(0),
            }),
        }
    }

    /// Mounts a layer, or returns the mount it has. Takes milliseconds and blocks for them.
    ///
    /// # Errors
    /// `Environment` when this process may not mount FUSE, saying what to do; `Mount` when
    /// the kernel refuses.
    pub fn mount(
        &self,
        blob_digest: Digest,
        tree: Arc<Tree>,
        data: Arc<dyn LayerData>,
    ) -> Result<Arc<LayerMount>> {
        let slot = self.slot(blob_digest);
        let mut slot = slot.lock();
        if let Some(mounted) = slot.upgrade() {
            return Ok(mounted);
        }
        let mounted = Arc::new(self.mount_new(blob_digest, tree, data)?);
        *slot = Arc::downgrade(&mounted);
        Ok(mounted)
    }

    fn slot(&self, blob_digest: Digest) -> Arc<Slot> {
        let mut slots = self.inner.slots.lock();
        // A slot that someone else holds is being mounted; try_lock tells.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot.try_lock().is_none_or(|weak| weak.strong_count() > 0)
        });
        Arc::clone(slots.entry(blob_digest).or_default())
    }

    fn mount_new(
        &self,
        blob_digest: Digest,
        tree: Arc<Tree>,
        data: Arc<dyn LayerData>,
    ) -> Result<LayerMount> {
        check_environment()?;
        let sequence = self.inner.sequence.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{sequence}", blob_digest.file_name());
        let path = self.inner.root.join(name);
        fs::create_dir_all(&path).map_err(|source| Error::io("create", &path, source))?;

        let counters = Arc::new(Counters::default());
        let (close, closed) = watch::channel(false);
        let handle = self.inner.handle.clone();
        let what = Arc::from(blob_digest.to_string());
        let misses = Misses::new(handle, data, closed, what);
        let fs = LayerFs::new(tree, misses, Arc::clone(&counters));
        let session = Session::new(fs, &path, &config(self.inner.options))
            .map_err(|source| abandon(&path, "mount fuse at", source))?;
        let threads = spawn(session).map_err(|source| abandon(&path, "serve fuse at", source))?;
        set_read_ahead(&path, ReadAhead::Wide);
        tracing::debug!(digest = %blob_digest, path = %path.display(), "layer mounted");
        Ok(LayerMount {
            blob_digest,
            path,
            counters,
            close,
            threads: Mutex::new(Some(threads)),
        })
    }
}

/// A mounted layer. Dropping the last reference unmounts it.
pub struct LayerMount {
    blob_digest: Digest,
    path: PathBuf,
    counters: Arc<Counters>,
    close: watch::Sender<bool>,
    /// Locked by nobody but the drop: what it holds may be sent but not shared.
    threads: Mutex<Option<Threads>>,
}

impl LayerMount {
    /// The directory that shows the layer's files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which layer this is.
    pub fn blob_digest(&self) -> Digest {
        self.blob_digest
    }

    /// Changes the window of files that are opened from now on.
    pub fn read_ahead(&self, window: ReadAhead) {
        set_read_ahead(&self.path, window);
    }

    /// What it has answered so far.
    pub fn stats(&self) -> FuseStats {
        self.counters.stats()
    }
}

impl Drop for LayerMount {
    /// Reads that wait for data fail now: unmounting would wait for them. Files that are
    /// still open keep what is present until they are closed.
    fn drop(&mut self) {
        self.close.send_replace(true);
        let unmounted = sys::unmount(&self.path).is_ok();
        if !unmounted && let Err(error) = sys::detach(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "layer cannot be unmounted");
        }
        if let Some(threads) = self.threads.get_mut().take()
            && unmounted
        {
            threads.join();
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "mountpoint cannot be removed");
        }
    }
}

/// The threads that serve one mount.
struct Threads {
    ended: mpsc::Receiver<()>,
    supervisor: thread::JoinHandle<()>,
}

impl Threads {
    /// Waits a moment for the end; threads that the kernel still needs end by themselves.
    fn join(self) {
        if self.ended.recv_timeout(JOIN_WAIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::debug!("layer is still in use elsewhere");
        } else if self.supervisor.join().is_err() {
            tracing::warn!("fuse thread panicked");
        }
    }
}

fn spawn(session: Session<LayerFs>) -> io::Result<Threads> {
    let (end, ended) = mpsc::channel();
    let supervisor = thread::Builder::new()
        .name("laz-fuse".to_owned())
        .spawn(move || {
            if let Err(error) = session.run() {
                tracing::warn!(%error, "fuse session failed");
            }
            // Nobody listens when the mount was detached.
            let _ = end.send(());
        })?;
    Ok(Threads { ended, supervisor })
}

fn config(options: FuseOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(NAME.to_owned()),
        MountOption::Subtype(NAME.to_owned()),
        MountOption::RO,
        MountOption::DefaultPermissions,
        // Images hold device nodes and set-uid programs; containers decide about them.
        MountOption::Dev,
        MountOption::Suid,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

/// Takes back what a failed mount left.
fn abandon(path: &Path, op: &'static str, source: io::Error) -> Error {
    // Not mounted is what is hoped for; the error that matters is the first one.
    let _ = sys::detach(path);
    let _ = fs::remove_dir(path);
    Error::mount(op, path, source)
}

fn check_environment() -> Result<()> {
    const OP: &str = "mount layers through fuse";
    if !sys::is_root() {
        return Err(Error::Environment {
            op: OP,
            detail: "this needs root; run it with sudo".to_owned(),
        });
    }
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    match opened {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Environment {
            op: OP,
            detail: format!(
                "cannot open /dev/fuse: {error}; load the kernel module (modprobe fuse), or inside \
                 a container pass the device (--device /dev/fuse)"
            ),
        }),
    }
}

/// Without it all works the same.
fn set_read_ahead(path: &Path, window: ReadAhead) {
    let set = || {
        let (major, minor) = sys::split_dev(fs::metadata(path)?.dev());
        let knob = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        fs::write(knob, window.kib().to_string())
    };
    if let Err(error) = set() {
        tracing::debug!(path = %path.display(), %error, "read-ahead stays as it is");
    }
}
