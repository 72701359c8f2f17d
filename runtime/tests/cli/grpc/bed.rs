//! A node with a container on two lazy layers: the real `lazd`, the mount server that it
//! starts, and an overlay as containerd would mount it, whose files are known byte for byte.
//!
//! Whatever becomes of a test, no process and no mount of it is left.

pub(super) mod files;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::MountsRequest;
use lazarette_proto::types::Mount;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

pub(super) use self::files::{EIO, Files, Readers};
use super::{Node, Wanted, chain, config, push_two};
use crate::support::{self, PATIENT, Pushed, estargz, tar};
use crate::sys;

/// Longest wait for what has to happen, on a machine that does much else.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);
/// In the config where layers are to be evicted from while they are mounted: without a budget
/// those that are complete are the kernel's alone.
pub(super) const EVICTABLE: &str = "[store]\nbudget = \"1t\"\n";

/// A node.
pub(super) struct Bed {
    pub(super) registry: FakeRegistry,
    pub(super) files: Arc<Files>,
    layers: [Digest; 2],
    chains: [Digest; 2],
    image: Pushed,
    dir: tempfile::TempDir,
    config: PathBuf,
    /// What is in it beside the usual.
    more: &'static str,
    lazd: Option<Child>,
    /// Servers that the test itself started.
    started: Vec<Child>,
}

impl Bed {
    /// Has layers and a container, mounted, and no daemon yet. Registries have `deadline`, and
    /// the config is [`EVICTABLE`].
    pub(super) async fn new(deadline: &str) -> Self {
        Self::configured(deadline, EVICTABLE).await
    }

    /// The same, with this in the config instead.
    pub(super) async fn configured(deadline: &str, more: &'static str) -> Self {
        Self::sized(deadline, more, 1).await
    }

    /// The same, with large files so many times as large.
    pub(super) async fn sized(deadline: &str, more: &'static str, times: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = FakeRegistry::start().await;
        let (mut content, mut layers) = (BTreeMap::new(), Vec::new());
        for name in ["base", "top"] {
            let files = files::of_layer(name, times);
            let list: Vec<_> = files
                .iter()
                .map(|(path, bytes)| support::File {
                    path,
                    mode: 0o644,
                    bytes,
                })
                .collect();
            layers.push(estargz(tar(&list)));
            content.extend(files);
        }
        let [base, top] = [&layers[0], &layers[1]];
        let image = push_two(&registry, [base, top]);
        let chains = [base.diff_id, chain(base, top)];
        let layers = [base, top].map(|layer| Digest::sha256(&layer.blob));
        let bed = Self {
            registry,
            files: Arc::new(Files::new(dir.path().join("rootfs"), content, dir.path())),
            layers,
            chains,
            image,
            config: dir.path().join("config.toml"),
            more,
            dir,
            lazd: None,
            started: Vec::new(),
        };
        let node = bed.node().await;
        let mounts = bed.bring(&node).await;
        bed.mount(&mounts);
        node.close().await;
        config(bed.path(), deadline, more);
        bed
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon without its socket, in this process.
    pub(super) async fn node(&self) -> Node {
        let file = config(self.path(), PATIENT, self.more);
        Node::open_as(&program("laz-mountd"), file).await.0
    }

    /// Has `node` bring both layers and make the container; its mounts.
    pub(super) async fn bring(&self, node: &Node) -> Vec<Mount> {
        let mut parent = String::new();
        for (number, chain_id) in self.chains.into_iter().enumerate() {
            let wanted = Wanted {
                image: &self.image,
                chain_id,
                blob: self.layers[number],
                all: &self.layers[number..],
            };
            parent = node.bring(&parent, &wanted).await;
        }
        node.prepare("container", &parent, None).await.unwrap()
    }

    /// Has `node` remove the container and both layers.
    pub(super) async fn remove(&self, node: &Node) {
        node.remove("container").await;
        let mut committed = node.list("kind==committed").await;
        committed.sort_by_key(|info| info.parent.is_empty());
        for info in committed {
            node.remove(&info.name).await;
        }
    }

    /// The container's mounts as they are now.
    pub(super) async fn ask_mounts(&self, node: &Node) -> Vec<Mount> {
        let request = MountsRequest {
            key: "container".to_owned(),
            ..Default::default()
        };
        node.client.mounts(request).await.unwrap().mounts
    }

    /// Mounts the container as containerd does.
    pub(super) fn mount(&self, mounts: &[Mount]) {
        mount(mounts, &self.files.rootfs);
    }

    /// Starts a daemon and does not wait for it.
    pub(super) fn spawn_lazd(&mut self, program: &Path) -> UnixDatagram {
        assert!(self.lazd.is_none());
        let notify = self.path().join("notify");
        let _ = fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path().join("lazd.log"));
        let lazd = Command::new(program)
            .arg("--config")
            .arg(&self.config)
            .env("NOTIFY_SOCKET", &notify)
            .env("HOME", self.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn();
        self.lazd = Some(lazd.unwrap());
        ready
    }

    /// Starts a daemon; returns when it serves.
    pub(super) fn start_lazd(&mut self, program: &Path) {
        let ready = self.spawn_lazd(program);
        ready.set_read_timeout(Some(WAIT_MAX)).unwrap();
        let said = loop {
            match ready.recv(&mut [0; 64]) {
                // With a time limit the kernel restarts nothing that a signal interrupts, and each child
                // that ends sends one.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                said => break said,
            }
        };
        if let Err(error) = said {
            panic!("lazd does not start: {error}: {}", self.files.log());
        }
    }

    /// Ends it without giving it a say.
    pub(super) fn kill_lazd(&mut self) {
        if let Some(mut lazd) = self.lazd.take() {
            lazd.kill().unwrap();
            lazd.wait().unwrap();
        }
    }

    /// Does `what` while the daemon, which is there, takes part in nothing.
    pub(super) fn while_lazd_sleeps<T>(&self, what: impl FnOnce() -> T) -> T {
        let pid = self.lazd.as_ref().unwrap().id();
        sys::pause(pid, true);
        let done = what();
        sys::pause(pid, false);
        done
    }

    /// Ends it as systemd does.
    pub(super) fn stop_lazd(&mut self) {
        let mut lazd = self.lazd.take().unwrap();
        sys::terminate(lazd.id());
        assert!(lazd.wait().unwrap().success(), "{}", self.files.log());
    }

    /// The mount server and its guard, the guard last.
    pub(super) fn servers(&self) -> Vec<i32> {
        servers(self.path())
    }

    /// Everything mounted below the node's directory, latest first.
    pub(super) fn mounts(&self) -> Vec<PathBuf> {
        mounts(self.path())
    }

    /// Takes the container's root file system down.
    pub(super) fn unmount(&self) {
        sys::detach(&self.files.rootfs);
    }

    /// Waits until so many of [`Self::servers`] are there.
    pub(super) fn wait_for_servers(&self, count: usize) {
        let since = Instant::now();
        while self.servers().len() != count {
            assert!(since.elapsed() < WAIT_MAX, "{}", self.files.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a server is none any more.
    pub(super) fn wait_for_end_of(&self, pid: i32) {
        let since = Instant::now();
        while self.servers().contains(&pid) {
            assert!(since.elapsed() < WAIT_MAX, "{}", self.files.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a server that a test started, once this ends it.
    pub(super) fn reap_later(&mut self, server: Child) {
        self.started.push(server);
    }

    /// As a node is after the power went: no process, no mount, nothing in the state directory.
    pub(super) fn reset(&mut self) {
        self.kill_lazd();
        // The server first: nothing may notice and start another.
        clean(self.path());
        let since = Instant::now();
        while !self.servers().is_empty() || !self.mounts().is_empty() {
            assert!(since.elapsed() < WAIT_MAX, "{:?}", self.mounts());
            std::thread::sleep(Duration::from_millis(10));
        }
        fs::remove_dir_all(self.path().join("state")).unwrap();
    }

    /// Reads everything off the async workers, which answer what the reads wait for.
    pub(super) async fn read_all_here(&self) {
        self.read_all_at(&self.files.rootfs).await;
    }

    /// The same of another mount of the container.
    pub(super) async fn read_all_at(&self, rootfs: &Path) {
        let files = self.files.at(rootfs);
        tokio::task::spawn_blocking(move || files.read_all())
            .await
            .unwrap();
    }

    /// The node's store, as another process sees it.
    pub(super) fn store(&self) -> Evictor {
        Evictor {
            store: Store::open(self.path().join("root")).unwrap(),
            layers: self.layers,
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.kill_lazd();
        clean(self.path());
        for server in &mut self.started {
            let _ = server.wait();
        }
    }
}

/// Makes holes in layers that are mounted.
pub(super) struct Evictor {
    store: Arc<Store>,
    layers: [Digest; 2],
}

impl Evictor {
    /// Makes a hole of all that can be fetched again; `false` where that is not allowed now.
    pub(super) fn evict(&self) -> bool {
        let evict = |digest| {
            let file = self.store.open_layer(digest).unwrap().unwrap();
            file.evict_all().is_ok()
        };
        self.layers.iter().all(evict)
    }

    /// Whether nothing is missing.
    pub(super) fn is_complete(&self) -> bool {
        let open = |digest| self.store.open_layer(digest).unwrap().unwrap();
        self.layers.iter().all(|digest| open(digest).is_complete())
    }
}

/// A thread that makes holes again and again, until it is dropped.
pub(super) struct Evicting {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl Evicting {
    pub(super) fn start(evictor: Evictor) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let stopped = Arc::clone(&stop);
        let evict = move || {
            let (mut rng, mut evictions) = (StdRng::seed_from_u64(5), 0);
            let began = Instant::now();
            // It is refused at times, and a test may be short.
            let goes_on = |evictions| {
                !stopped.load(Ordering::Relaxed) || (evictions == 0 && began.elapsed() < WAIT_MAX)
            };
            while goes_on(evictions) {
                evictions += u32::from(evictor.evict());
                std::thread::sleep(Duration::from_millis(rng.random_range(0..100)));
            }
            evictions
        };
        let thread = Some(std::thread::spawn(evict));
        Self { stop, thread }
    }

    /// Ends it, once everything was evicted or long was tried; how often it was.
    pub(super) fn end(mut self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Evicting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Starts a mount server; returns when it listens.
pub(super) fn start_server(command: &mut Command) -> Child {
    let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let out = server.stdout.as_mut().unwrap();
    BufReader::new(out).read_line(&mut said).unwrap();
    assert_eq!(said, "ready\n", "it does not start");
    server
}

/// Ends the servers of a test and takes its mounts down.
pub(super) fn clean(dir: &Path) {
    servers(dir).into_iter().for_each(sys::kill_by_id);
    mounts(dir).iter().for_each(|path| sys::detach(path));
}

/// The mount server of a test and its guard, the guard last.
pub(super) fn servers(dir: &Path) -> Vec<i32> {
    let socket = dir.join("state/mountd.sock");
    let args = |pid: i32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args = args.split(|byte| *byte == 0).map(<[u8]>::to_vec);
        args.collect::<Vec<_>>()
    };
    let all = fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_ours = |pid: &i32| {
        args(*pid)
            .iter()
            .any(|arg| arg == socket.as_os_str().as_encoded_bytes())
    };
    let mut pids: Vec<i32> = pids.filter(is_ours).collect();
    pids.sort_by_key(|pid| args(*pid).iter().any(|arg| arg == b"guard"));
    pids
}

/// Everything mounted below `dir`, latest first.
pub(super) fn mounts(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mountpoints = text.lines().filter_map(|line| line.split(' ').nth(4));
    let below = mountpoints
        .map(PathBuf::from)
        .filter(|path| path.starts_with(dir));
    below.collect::<Vec<_>>().into_iter().rev().collect()
}

/// Mounts what a snapshot's mounts say.
pub(super) fn mount(mounts: &[Mount], at: &Path) {
    fs::create_dir_all(at).unwrap();
    let options = mounts[0].options.join(",");
    let mounted = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(at)
        .output()
        .unwrap();
    assert!(mounted.status.success(), "{mounted:?}");
}

/// A program that cargo builds beside `laz`.
pub(super) fn program(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_laz")).with_file_name(name);
    assert!(
        program.exists(),
        "build it first: cargo build --workspace --bins"
    );
    program
}
