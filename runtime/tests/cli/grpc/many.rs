//! Many layers at once: what the mount server and its guard take for them, and that all of them
//! outlive `lazd` and the server.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::test_util::content::noise;
use lazarette_fetcher::types::Digest;

use super::bed::{EIO, EVICTABLE, clean, mounts, program, servers};
use super::{Node, Wanted, config, lowers, read};
use crate::support::{self, Changes, PATIENT, estargz, is_root, push, tar};
use crate::sys;

/// As many as a node may have mounted, by what is promised.
const LAYERS: usize = 500;
/// Where memory is looked at.
const HUNDRED: usize = 100;
/// The promise for that many, of each process, KiB.
const PEAK_KIB_MAX: u64 = 15 << 10;
/// Bytes of each of those layers: to be read in many pieces.
const LARGE: usize = 200 << 10;
/// Who reads all of them at once.
const READERS: usize = 6;
/// Longest wait for what has to happen.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// The most memory that the mount server and its guard ever had, KiB.
fn peaks(dir: &Path) -> Vec<u64> {
    let peak = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse().unwrap()
    };
    servers(dir).iter().map(peak).collect()
}

fn must_be_small(dir: &Path, when: &str) {
    let peaks = peaks(dir);
    let sum: u64 = peaks.iter().sum();
    let _ = writeln!(
        io::stderr(),
        "{when}: server and guard {peaks:?} KiB, {sum}"
    );
    assert_eq!(peaks.len(), 2);
    assert!(
        peaks.iter().all(|kib| *kib <= PEAK_KIB_MAX),
        "{when}: {peaks:?}"
    );
}

/// Brings one more layer, which has this file; the name of its snapshot.
async fn bring(node: &Node, registry: &FakeRegistry, bytes: &[u8]) -> String {
    let layer = estargz(tar(&[support::File {
        path: "file",
        mode: 0o644,
        bytes,
    }]));
    // Under the tag that the one before had.
    let image = push(registry, &layer, &Changes::default());
    let wanted = Wanted {
        image: &image,
        chain_id: layer.diff_id,
        blob: Digest::sha256(&layer.blob),
        all: &[],
    };
    node.bring("", &wanted).await
}

/// Where the file of a layer is.
async fn place(node: &Node, name: &str) -> PathBuf {
    let mounts = node.prepare("place", name, None).await.unwrap();
    node.remove("place").await;
    lowers(&mounts)[0].join("file")
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_hundred_layers_that_are_read_take_little_memory() {
    if !is_root("privileged_a_hundred_layers_that_are_read_take_little_memory") {
        return;
    }
    for (name, through) in [
        ("fuse", ""),
        ("fanotify", "[mounts]\nbackend = \"fanotify\"\n"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let _clean = Clean(dir.path());
        let registry = FakeRegistry::start().await;
        let more = format!("{through}[snapshotter]\nfill = false\n{EVICTABLE}");
        let file = config(dir.path(), PATIENT, &more);
        let (node, _) = Node::open_as(&program("laz-mountd"), file).await;
        let mut all = Vec::new();
        for number in 0..HUNDRED {
            let bytes = noise(u32::try_from(number).unwrap(), 0xff, LARGE);
            let layer = bring(&node, &registry, &bytes).await;
            all.push((place(&node, &layer).await, bytes));
        }
        must_be_small(dir.path(), &format!("{name}, {HUNDRED} layers mounted"));
        let all = Arc::new(all);
        // Each begins elsewhere; the second pass is of what is on the disk.
        let reader = |first: usize| {
            let all = Arc::clone(&all);
            tokio::task::spawn_blocking(move || {
                for (path, bytes) in all.iter().cycle().skip(first).take(2 * HUNDRED) {
                    assert!(read_anew(path).unwrap() == *bytes, "{path:?}");
                }
            })
        };
        let readers: Vec<_> = (0..READERS)
            .map(|n| reader(n * HUNDRED / READERS))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        must_be_small(dir.path(), &format!("{name}, all read by {READERS}"));
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_five_hundred_layers_are_mounted_at_once() {
    if !is_root("privileged_five_hundred_layers_are_mounted_at_once") {
        return;
    }
    sys::raise_open_files();
    let dir = tempfile::tempdir().unwrap();
    let _clean = Clean(dir.path());
    let registry = FakeRegistry::start().await;
    let (node, _) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    let (mut names, mut places) = (Vec::new(), Vec::new());
    for number in 0..LAYERS {
        let name = bring(&node, &registry, text(number).as_bytes()).await;
        places.push(place(&node, &name).await);
        assert_eq!(read(places[number].clone()).await, text(number).as_bytes());
        names.push(name);
    }
    let _ = writeln!(io::stderr(), "{LAYERS} layers: {:?} KiB", peaks(dir.path()));
    must_be_mounted(dir.path());

    // Containers that had a layer before it was complete read through the server for ever.
    let readers = Readers::start(places);
    readers.wait_for(LAYERS);
    node.close().await;
    drop(registry);
    begin_and_kill_lazd(dir.path(), || readers.wait_for(LAYERS));
    readers.wait_for(LAYERS);
    assert_eq!(readers.failed(), 0);
    let (node, restored) = Node::open_served(dir.path(), &program("laz-mountd")).await;
    assert_eq!(restored, LAYERS);
    readers.wait_for(LAYERS);
    assert_eq!(readers.failed(), 0);

    let before = servers(dir.path());
    sys::kill_by_id(before[0]);
    let since = Instant::now();
    while servers(dir.path()).len() != 2 || servers(dir.path()) == before {
        assert!(since.elapsed() < WAIT_MAX, "there is no other server");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    readers.wait_for(2 * LAYERS);
    readers.end();
    must_be_mounted(dir.path());
    for (number, name) in names.iter().enumerate() {
        let file = place(&node, name).await;
        assert_eq!(read(file).await, text(number).as_bytes());
        node.remove(name).await;
    }
    node.close().await;
    assert_eq!(mounts(dir.path()).len(), 0);
    for left in ["state/layers", "root/meta", "root/layers"] {
        assert_eq!(fs::read_dir(dir.path().join(left)).unwrap().count(), 0);
    }
}

/// Kills the real daemon when it serves, after `meanwhile`.
fn begin_and_kill_lazd(dir: &Path, meanwhile: impl FnOnce()) {
    let mut lazd = Command::new(program("lazd"));
    let lazd = lazd.arg("--config").arg(dir.join("config.toml"));
    let log = File::create(dir.join("lazd.log")).unwrap();
    let mut lazd = lazd.stdin(Stdio::null()).stderr(log).spawn().unwrap();
    let since = Instant::now();
    while UnixStream::connect(dir.join("state/snapshotter.sock")).is_err() {
        let log = || fs::read_to_string(dir.join("lazd.log")).unwrap();
        assert!(since.elapsed() < WAIT_MAX, "{}", log());
        std::thread::sleep(Duration::from_millis(10));
    }
    meanwhile();
    lazd.kill().unwrap();
    lazd.wait().unwrap();
}

/// What the file of a small layer says.
fn text(number: usize) -> String {
    format!("layer {number}")
}

/// Each is an EROFS over a FUSE; over those that are complete is one of the kernel alone.
fn must_be_mounted(dir: &Path) {
    let mounted = mounts(dir).len();
    assert!((2 * LAYERS..=3 * LAYERS).contains(&mounted), "{mounted}");
}

/// Reads from the layer's data, not from what the kernel remembers of the file.
fn read_anew(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    sys::forget(&file);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Threads that read the files of small layers, each of them right or with `EIO`.
struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    right: AtomicU64,
    failed: AtomicU64,
}

impl Readers {
    fn start(places: Vec<PathBuf>) -> Self {
        // As containers do, who opened their layers before whatever comes.
        let files: Arc<Vec<File>> =
            Arc::new(places.iter().map(|at| File::open(at).unwrap()).collect());
        let shared: Arc<Shared> = Arc::default();
        let start = |first: usize| {
            let (files, shared) = (Arc::clone(&files), Arc::clone(&shared));
            let files = move || {
                let numbers = (0..LAYERS).cycle().skip(first * LAYERS / READERS);
                for number in numbers.take_while(|_| !shared.stop.load(Ordering::Relaxed)) {
                    shared.read(&files[number], number);
                }
            };
            std::thread::spawn(files)
        };
        let threads = (0..READERS).map(start).collect();
        Self { shared, threads }
    }

    fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits until so many more reads were right.
    fn wait_for(&self, more: usize) {
        let right = || self.shared.right.load(Ordering::Relaxed);
        let (goal, since) = (right() + more as u64, Instant::now());
        while right() < goal {
            let failed = self.threads.iter().any(JoinHandle::is_finished);
            assert!(!failed, "a reader failed");
            assert!(since.elapsed() < WAIT_MAX, "readers hang");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends them; whatever one of them met is met here.
    fn end(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn read(&self, file: &File, number: usize) {
        sys::forget(file);
        let mut bytes = [0; 64];
        let counter = match std::os::unix::fs::FileExt::read_at(file, &mut bytes, 0) {
            Ok(len) => {
                assert_eq!(&bytes[..len], text(number).as_bytes());
                &self.right
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(EIO), "{error}");
                &self.failed
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Leaves no process and no mount, also where the test fails.
struct Clean<'a>(&'a Path);

impl Drop for Clean<'_> {
    fn drop(&mut self) {
        clean(self.0);
    }
}
