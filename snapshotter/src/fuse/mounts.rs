//! The mounts of this process, one per layer.
//!
//! Invariant: a [`LayerMount`] is mounted from the moment it exists until its last user
//! drops it; then the mount and its directory are gone, whatever still has files open.
//! Never waits long for the kernel: what is busy is detached. One whose threads have ended is
//! handed to nobody any more.
//!
//! Locks, in this order: the map of slots, held for a moment; one slot, held while its
//! layer is being mounted, so that a second caller waits for that layer and no other.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use lazarette_fetcher::types::Digest;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::fs::LayerFs;
use super::miss::Misses;
use super::options::{Backend, FuseOptions};
use super::read_ahead::{Knob, ReadAhead};
use super::reader::{Counters, FuseStats, Reader};
use super::session::{self, Threads};
use super::stack::{self, ImageBytes, Stack};
use crate::data::LayerData;
use crate::tree::Tree;
use crate::{Error, Result, sys};

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
    /// Set once the kernel has refused EROFS: it would again.
    refused: AtomicBool,
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
                refused: AtomicBool::new(false),
            }),
        }
    }

    /// Mounts a layer, or returns the mount it has. Takes milliseconds and blocks for them.
    ///
    /// # Errors
    /// `Environment` when this process may not mount FUSE, or was told to use nothing but
    /// EROFS and the layer does not fit in it, saying what to do; `Mount` when the kernel
    /// refuses.
    pub fn mount(
        &self,
        blob_digest: Digest,
        tree: Arc<Tree>,
        data: Arc<dyn LayerData>,
    ) -> Result<Arc<LayerMount>> {
        let slot = self.slot(blob_digest);
        let mut slot = slot.lock();
        if let Some(mounted) = slot.upgrade().filter(|mount| mount.live()) {
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
        if let Some(image) = self.image(blob_digest, &tree)? {
            match self.mount_image(blob_digest, image, Arc::clone(&data)) {
                Err(error) if self.inner.options.backend == Backend::Auto => {
                    let refused = is_refusal(&error);
                    self.inner.refused.fetch_or(refused, Ordering::Relaxed);
                    tracing::info!(%error, for_good = refused, "served by fuse alone, without erofs");
                }
                mounted => return mounted,
            }
        }
        let (draft, reader) = self.draft(blob_digest, data)?;
        let fs = LayerFs::new(tree, reader);
        let threads = session::mount(fs, &draft.path, self.inner.options)?;
        let knob = Knob::of_fuse(&draft.path);
        tracing::debug!(digest = %blob_digest, path = %draft.path.display(), "layer mounted through fuse");
        Ok(draft.mounted(1, threads, knob))
    }

    fn mount_image(
        &self,
        blob_digest: Digest,
        image: ImageBytes,
        data: Arc<dyn LayerData>,
    ) -> Result<LayerMount> {
        let (draft, reader) = self.draft(blob_digest, data)?;
        let options = self.inner.options;
        let Stack { threads, knob } = stack::mount(image, reader, &draft.path, options)?;
        tracing::debug!(digest = %blob_digest, path = %draft.path.display(), "layer mounted through erofs");
        Ok(draft.mounted(stack::MOUNTS, threads, knob))
    }

    /// Makes the directory for a mount, and what answers its reads.
    fn draft(&self, blob_digest: Digest, data: Arc<dyn LayerData>) -> Result<(Draft, Reader)> {
        let sequence = self.inner.sequence.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{sequence}", blob_digest.file_name());
        let path = self.inner.root.join(name);
        fs::create_dir_all(&path).map_err(|source| Error::io("create", &path, source))?;
        let counters = Arc::new(Counters::default());
        let (close, closed) = watch::channel(false);
        let handle = self.inner.handle.clone();
        let what = Arc::from(blob_digest.to_string());
        let misses = Misses::new(handle, data, closed, what);
        let reader = Reader::new(misses, Arc::clone(&counters));
        let draft = Draft {
            blob_digest,
            path,
            counters,
            close,
        };
        Ok((draft, reader))
    }

    /// The image to mount, unless FUSE alone is to serve the layer.
    fn image(&self, blob_digest: Digest, tree: &Tree) -> Result<Option<ImageBytes>> {
        let refused = self.inner.refused.load(Ordering::Relaxed);
        match (self.inner.options.backend, refused) {
            (Backend::Fuse, _) | (Backend::Auto, true) => return Ok(None),
            (Backend::Erofs, _) | (Backend::Auto, false) => {}
            // Whoever asks before a read, and answers, must outlive this process.
            (Backend::Fanotify, _) => {
                return Err(Error::Environment {
                    op: "mount a layer through fanotify",
                    detail: "only the mount server does that; use the backend \"auto\", or lazd \
                             with a mount server"
                        .to_owned(),
                });
            }
        }
        match stack::image(tree) {
            Ok(image) => Ok(Some(image)),
            Err(unfit) if self.inner.options.backend == Backend::Auto => {
                tracing::info!(digest = %blob_digest, error = %unfit, "layer is served by fuse alone");
                Ok(None)
            }
            Err(unfit) => Err(Error::Environment {
                op: "mount a layer through erofs",
                detail: format!(
                    "layer {blob_digest}: {unfit}; use the backend \"fuse\" or \"auto\""
                ),
            }),
        }
    }
}

/// A mount that is being made.
struct Draft {
    blob_digest: Digest,
    path: PathBuf,
    counters: Arc<Counters>,
    close: watch::Sender<bool>,
}

impl Draft {
    fn mounted(self, mounts: usize, threads: Threads, knob: Option<Knob>) -> LayerMount {
        let mount = LayerMount {
            blob_digest: self.blob_digest,
            path: self.path,
            mounts,
            knob,
            counters: self.counters,
            close: self.close,
            threads: Mutex::new(Some(threads)),
        };
        mount.read_ahead(ReadAhead::Wide);
        mount
    }
}

/// A mounted layer. Dropping the last reference unmounts it.
pub struct LayerMount {
    blob_digest: Digest,
    path: PathBuf,
    /// How many file systems lie on that path, one over the other.
    mounts: usize,
    knob: Option<Knob>,
    counters: Arc<Counters>,
    close: watch::Sender<bool>,
    /// Taken by the drop. Locked, as what it holds may be sent but not shared.
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

    /// Whether it is answered for. It is not where somebody else unmounted it.
    fn live(&self) -> bool {
        self.threads.lock().as_ref().is_some_and(Threads::live)
    }

    /// Changes the window of files that are opened from now on.
    pub fn read_ahead(&self, window: ReadAhead) {
        if let Some(knob) = &self.knob {
            knob.set(window);
        }
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
        let mut unmounted = true;
        for _ in 0..self.mounts {
            if sys::unmount(&self.path).is_ok() {
                continue;
            }
            unmounted = false;
            if let Err(error) = sys::detach(&self.path) {
                tracing::warn!(path = %self.path.display(), %error, "layer cannot be unmounted");
            }
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
            detail: format!("cannot open /dev/fuse: {error}{}", advice(&error)),
        }),
    }
}

/// What to do where `/dev/fuse` cannot be opened.
fn advice(error: &io::Error) -> &'static str {
    if sys::has_no_descriptors(error) {
        return "; raise the limit of open files (ulimit -n, LimitNOFILE= of a unit)";
    }
    if error.kind() == io::ErrorKind::PermissionDenied {
        return "; inside a container pass the device (--device /dev/fuse)";
    }
    "; load the kernel module (modprobe fuse), or inside a container pass the device (--device \
     /dev/fuse)"
}

/// Whether the kernel would say the same again: it had all it needs of what may run short.
fn is_refusal(error: &Error) -> bool {
    const PASSING: [io::ErrorKind; 4] = [
        io::ErrorKind::WouldBlock,
        io::ErrorKind::OutOfMemory,
        io::ErrorKind::StorageFull,
        io::ErrorKind::Interrupted,
    ];
    let Error::Mount { source, .. } = error else {
        return false;
    };
    !sys::has_no_descriptors(source) && !PASSING.contains(&source.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_now_is_told_from_what_is_missing() {
        for (errno, refusal, advised) in [
            (2, true, "modprobe"),
            (19, true, "modprobe"),
            (22, true, "modprobe"),
            (1, true, "pass the device"),
            (13, true, "pass the device"),
            (23, false, "LimitNOFILE="),
            (24, false, "ulimit -n"),
            (11, false, ""),
            (12, false, ""),
            (28, false, ""),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            let advice = advice(&error);
            assert!(advice.contains(advised), "{errno}: {advice}");
            let short = sys::has_no_descriptors(&error);
            assert!(!short || !advice.contains("modprobe"), "{errno}: {advice}");
            let mount = Error::mount("mount at", Path::new("/x"), error);
            assert_eq!(is_refusal(&mount), refusal, "{errno}");
        }
        let io = Error::io("create", "/x", io::Error::from_raw_os_error(13));
        assert!(!is_refusal(&io));
    }
}
