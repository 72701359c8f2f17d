//! A mount of the layer by one backend, with a store and processes of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazarette_fetcher::layer::Layer;
use lazarette_snapshotter::fuse::{Backend, FuseOptions, LayerMount, LayerMounts};
use lazarette_snapshotter::mountd::{
    MountServer, Mounted, Place, Shown, Through, clear, show_whole,
};
use lazarette_snapshotter::tree::Tree;
use tokio::runtime::Runtime;

use crate::{layer, sys};

/// How long others may have a descriptor of a mount that only we opened.
const INHERITED_MAX: Duration = Duration::from_secs(60);

/// Unmounts something. A test beside this one that is just starting a process has, until that has
/// begun, a copy of every descriptor here, and with it the mount.
#[track_caller]
pub(crate) fn soon<T, E: std::fmt::Display>(mut unmount: impl FnMut() -> Result<T, E>) -> T {
    let until = Instant::now() + INHERITED_MAX;
    loop {
        match unmount() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What shows the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shows {
    Fuse,
    Erofs,
    ServerFuse,
    /// The same, small files like large ones, as kernels that make up short reads have it.
    ServerDataAlone,
    ServerFanotify,
    /// The kernel alone: the layer is complete, and every process of ours has been killed.
    Kernel,
}

impl Shows {
    /// Whether an EROFS does.
    pub(crate) fn is_erofs(self) -> bool {
        self != Self::Fuse
    }
}

/// How many files the EROFS of an image has its data in.
fn devices(image: &Path) -> u16 {
    /// Where the superblock has their number.
    const AT: usize = 1024 + 86;
    let image = fs::read(image).unwrap();
    u16::from_le_bytes(image[AT..AT + 2].try_into().unwrap())
}

enum Mount {
    Own(Arc<LayerMount>),
    Server(MountServer, Mounted),
    /// What was mounted by servers that are gone.
    Left(PathBuf),
}

/// The overlay's directory.
const OVER: &str = "over";

/// Where a layer is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Where it is mounted.
    Bare,
    /// As a container has it: below an overlay, which is read-only.
    Overlay,
}

/// Nothing of the layer has been read.
pub(crate) struct Bed {
    pub(crate) shows: Shows,
    seen: Seen,
    /// Has the tree that the layer was made of.
    pub(crate) origin: PathBuf,
    dir: tempfile::TempDir,
    pub(crate) layer: Arc<Layer>,
    mount: Option<Mount>,
    runtime: Runtime,
}

impl Bed {
    pub(crate) fn new(origin: &tempfile::TempDir, shows: Shows, seen: Seen) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let layer = layer::open(origin.path(), &dir.path().join("store"), &runtime);
        let mut bed = Self {
            shows,
            seen: Seen::Bare,
            origin: origin.path().to_path_buf(),
            dir,
            layer,
            mount: None,
            runtime,
        };
        bed.mount = Some(match shows {
            Shows::Fuse => bed.mount_own(Backend::Fuse),
            Shows::Erofs => bed.mount_own(Backend::Erofs),
            Shows::ServerFuse => bed.mount_by_server(Through::Fuse, false),
            Shows::ServerDataAlone => bed.mount_by_server(Through::Fuse, true),
            Shows::ServerFanotify => bed.mount_by_server(Through::Fanotify, false),
            Shows::Kernel => bed.mount_by_kernel(),
        });
        if seen == Seen::Overlay {
            let (at, none) = (bed.path(), bed.scratch("none"));
            let lowers = format!("lowerdir={}:{}", at.display(), none.display());
            sys::mount_overlay(&bed.scratch(OVER), &lowers);
            bed.seen = seen;
        }
        bed
    }

    fn mount_own(&self, backend: Backend) -> Mount {
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        let handle = self.runtime.handle().clone();
        let mounts = LayerMounts::new(self.dir.path().join("mounts"), handle, options);
        let tree = Arc::new(Tree::build(self.layer.index()).unwrap());
        let digest = self.layer.index().blob_digest;
        let data = Arc::clone(&self.layer) as _;
        Mount::Own(mounts.mount(digest, tree, data).unwrap())
    }

    fn mount_by_server(&self, through: Through, data_alone: bool) -> Mount {
        let (socket, handle) = (self.dir.path().join("socket"), self.runtime.handle());
        let program = layer::program();
        let (server, _) = MountServer::connect_or_start(&socket, &program, handle.clone()).unwrap();
        let server = server.with_data_alone(data_alone);
        let tree = Tree::build(self.layer.index()).unwrap();
        let shown = Shown {
            blob_digest: self.layer.index().blob_digest,
            tree: &tree,
            data: Arc::clone(&self.layer) as _,
            through,
        };
        let place = Place {
            path: &self.dir.path().join("mnt"),
            metadata: &self.dir.path().join("metadata"),
        };
        let mounted = server.mount_shown(&shown, place).unwrap();
        let expected = if through == Through::Fuse && !data_alone {
            2
        } else {
            1
        };
        assert_eq!(devices(&self.dir.path().join("metadata")), expected);
        Mount::Server(server, mounted)
    }

    fn mount_by_kernel(&self) -> Mount {
        let Mount::Server(server, mounted) = self.mount_by_server(Through::Fuse, false) else {
            unreachable!("it is by a server");
        };
        self.runtime.block_on(self.layer.fill_all()).unwrap();
        assert!(show_whole(&mounted, self.layer.file()).unwrap());
        drop(server);
        for (pid, _) in servers(self.dir.path()) {
            sys::kill_by_id(pid);
        }
        while !servers(self.dir.path()).is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Mount::Left(mounted.path)
    }

    /// Where the layer is to be looked at.
    pub(crate) fn path(&self) -> PathBuf {
        match self.seen {
            Seen::Bare => self.place().to_path_buf(),
            Seen::Overlay => self.dir.path().join(OVER),
        }
    }

    /// Where it is mounted.
    fn place(&self) -> &Path {
        match self.mount.as_ref().unwrap() {
            Mount::Own(mount) => mount.path(),
            Mount::Server(_, mounted) => &mounted.path,
            Mount::Left(path) => path,
        }
    }

    /// A directory for the test.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Unmounts in order; nothing is left.
    pub(crate) fn end(mut self) {
        if self.seen == Seen::Overlay {
            sys::unmount(&self.path());
        }
        match self.mount.take().unwrap() {
            Mount::Own(mount) => drop(mount),
            Mount::Server(server, mounted) => soon(|| server.unmount_layer(&mounted)),
            Mount::Left(path) => {
                assert!(self.layer.file().evict_all().is_err(), "it is mounted");
                let others = |other: &Path| other != path;
                assert_eq!(clear(self.dir.path(), &others).unwrap(), 1);
                layer::evict_soon(&self.layer);
            }
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(self.dir.path().to_str().unwrap()));
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        sys::detach(&self.dir.path().join(OVER));
        drop(self.mount.take());
        end_servers(self.dir.path());
    }
}

/// Whoever serves at the socket in `dir`, and its guard.
pub(crate) fn servers(dir: &Path) -> Vec<(i32, bool)> {
    let socket = dir.join("socket");
    let all = fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let ours = |pid: i32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut args = args.split(|byte| *byte == 0);
        let is_guard = args.nth(1)? == b"guard";
        let args = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let is_ours = args
            .split(|byte| *byte == 0)
            .any(|arg| arg == socket.as_os_str().as_encoded_bytes());
        is_ours.then_some((pid, is_guard))
    };
    pids.filter_map(ours).collect()
}

/// Ends the servers of a test and takes down what they showed, also where it failed.
pub(crate) fn end_servers(dir: &Path) {
    for (pid, _) in servers(dir) {
        sys::kill_by_id(pid);
    }
    for name in ["merged", OVER, "mnt2", "mnt2", "mnt", "mnt", "mnt", "mnt"] {
        sys::detach(&dir.join(name));
    }
}
