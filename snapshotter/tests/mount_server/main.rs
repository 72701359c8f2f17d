//! A layer of a real store, mounted by a real mount server and an EROFS over it, while the
//! processes that fetch and evict are killed.
//!
//! Promise: no read fails, and none returns anything but the layer's bytes. The test runs
//! this binary again as the daemons that it kills.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod sys;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazarette_fetcher::Error;
use lazarette_fetcher::index::write::{Format, Options, write_layer};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use lazarette_snapshotter::mountd::{MountServer, Mounted, Place};
use lazarette_snapshotter::tree::Tree;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tokio::runtime::Runtime;

const READY: &str = "the daemon is ready";
/// Names the directory of the test to a daemon's process.
const DIR: &str = "LAZ_MOUNT_SERVER_TEST_DIR";
const KILLS: u32 = 40;
const READERS: u64 = 3;
/// How long the server may take to read what a daemon told it.
const PATIENCE: Duration = Duration::from_secs(10);
const FILES: usize = 24;

/// What the layer holds, by path.
type Content = BTreeMap<String, Vec<u8>>;

fn content() -> Content {
    let mut rng = StdRng::seed_from_u64(3);
    let file = |number: usize| {
        let mut bytes = vec![0; [1, 100, 4096, 5000, 70_000, 300_000][number % 6]];
        rng.fill_bytes(&mut bytes);
        // Never a zero, so that a hole is not mistaken for it.
        bytes.iter_mut().for_each(|byte| *byte |= 1);
        (format!("d{}/f{number}", number % 3), bytes)
    };
    (0..FILES).map(file).collect()
}

/// Writes the layer's blob and what its descriptor says of it below `dir`.
fn write_blob(dir: &Path, content: &Content) {
    let tree = dir.join("tree");
    for (path, bytes) in content {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let tar = Command::new("tar")
        .args(["--sort=name", "-cf", "-", "-C"])
        .arg(&tree)
        .arg(".")
        .output()
        .unwrap();
    assert!(tar.status.success());
    let options = Options {
        chunk_bytes: 32 << 10,
        ..Options::new(Format::Estargz)
    };
    let (mut input, mut blob) = (std::io::Cursor::new(&tar.stdout), Vec::new());
    let written = write_layer("layer", &mut input, &mut blob, &options).unwrap();
    fs::write(dir.join("blob"), blob).unwrap();
    let mut facts = format!("{}\n", written.diff_id);
    for (key, value) in written.annotations {
        facts.push_str(&format!("{key}={value}\n"));
    }
    fs::write(dir.join("facts"), facts).unwrap();
}

/// The layer in the store below `dir`, which is fetched from the blob there.
fn open_layer(dir: &Path, runtime: &Runtime) -> Arc<Layer> {
    let blob = Bytes::from(fs::read(dir.join("blob")).unwrap());
    let facts = fs::read_to_string(dir.join("facts")).unwrap();
    let mut facts = facts.lines();
    let diff_id = Digest::parse(facts.next().unwrap()).unwrap();
    let digest = Digest::sha256(&blob);
    let mut descriptor = Descriptor::new(MediaType::OciLayerGzip, digest, blob.len() as u64);
    for fact in facts {
        let (key, value) = fact.split_once('=').unwrap();
        descriptor
            .annotations
            .insert(key.to_owned(), value.to_owned());
    }
    let reference = Reference::parse("example.com/a:b").unwrap();
    let repository = reference.repository().clone();
    let request = LayerRequest::new(repository, &descriptor, diff_id);
    let memory = MemorySource::new();
    memory.add_blob(blob);
    let source: Arc<dyn BlobSource> = Arc::new(memory);
    let opener = LayerOpener::new(Store::open(dir.join("store")).unwrap(), source);
    let opened = runtime.block_on(opener.open(&request, &AtomicU64::new(0)));
    opened.unwrap().0
}

/// The server's program, which cargo builds beside this one.
fn program() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let program = me.parent().unwrap().parent().unwrap().join("laz-mountd");
    assert!(
        program.exists(),
        "build it first: cargo build --workspace --bins"
    );
    program
}

/// Connects as soon as no other daemon is connected.
fn connect(dir: &Path, runtime: &Runtime) -> (MountServer, Vec<Mounted>) {
    loop {
        let handle = runtime.handle().clone();
        match MountServer::connect_or_start(&dir.join("socket"), &program(), handle) {
            Ok(connected) => return connected,
            Err(error) => assert!(error.to_string().contains("another daemon"), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
#[ignore = "another test runs it, as a process that it kills"]
fn daemon() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("a test runs this"));
    let runtime = Runtime::new().unwrap();
    let layer = open_layer(&dir, &runtime);
    let (server, mounts) = connect(&dir, &runtime);
    let tree = Tree::build(layer.index()).unwrap();
    let (path, metadata) = (dir.join("mnt"), dir.join("metadata"));
    let data = || Arc::clone(&layer) as _;
    match mounts.first() {
        None => {
            let place = Place {
                path: &path,
                metadata: &metadata,
            };
            let digest = layer.index().blob_digest;
            server.mount_layer(digest, &tree, data(), place).unwrap();
        }
        Some(mounted) => {
            assert_eq!(mounted.blob_digest, Some(layer.index().blob_digest));
            server
                .attach_layer(mounted, || Ok(tree), data(), &metadata)
                .unwrap();
        }
    }
    let _ = writeln!(std::io::stdout(), "{READY}");
    // Evicts while others read, until it is killed.
    let mut rng = StdRng::seed_from_u64(u64::from(std::process::id()));
    let chunks = u32::try_from(layer.index().chunks.len()).unwrap();
    let began = Instant::now();
    loop {
        let ids: Vec<u32> = (0..4).map(|_| rng.random_range(0..chunks)).collect();
        match layer.file().evict(&ids) {
            // The server may not have read yet that there is a daemon again.
            Err(Error::Unsupported { .. }) if began.elapsed() < PATIENCE => {}
            evicted => drop(evicted.unwrap()),
        }
        if rng.random_bool(0.2) {
            layer.file().flush().unwrap();
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
    }
}

fn start_daemon(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["daemon", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap().contains(READY)),
        "the daemon failed"
    );
    std::thread::spawn(move || lines.for_each(drop));
    child
}

/// Reads a file from the layer's data, not from what the kernel remembers.
fn read_anew(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    sys::forget(&file);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Whoever serves at the socket below `dir`, and its guard.
fn servers(dir: &Path) -> Vec<i32> {
    let socket = dir.join("socket");
    let is_ours = |pid: &i32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        args.split(|byte| *byte == 0)
            .any(|arg| arg == socket.as_os_str().as_encoded_bytes())
    };
    let all = fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(is_ours).collect()
}

/// Ends the servers of a test also where it fails; what is mounted goes with them.
struct EndServers<'a>(&'a Path);

impl Drop for EndServers<'_> {
    fn drop(&mut self) {
        servers(self.0).into_iter().for_each(sys::kill_by_id);
        for _ in 0..2 {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.0.join("mnt"))
                .output();
        }
    }
}

/// Tells the readers to end, also where the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn privileged_daemons_that_are_killed_break_no_read_of_a_layer() {
    if !sys::is_root() {
        let test = "privileged_daemons_that_are_killed_break_no_read_of_a_layer";
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let content = content();
    write_blob(dir.path(), &content);
    let _end = EndServers(dir.path());
    let mut daemon = start_daemon(dir.path());
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|threads| {
        let _stop = StopOnDrop(&stop);
        let reader = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stop.load(Ordering::Relaxed) {
                let (path, bytes) = content.iter().nth(rng.random_range(0..FILES)).unwrap();
                let read = read_anew(&dir.path().join("mnt").join(path));
                assert!(read == *bytes, "wrong bytes in {path}");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        };
        let readers: Vec<_> = (0..READERS)
            .map(|seed| threads.spawn(move || reader(seed)))
            .collect();
        let mut rng = StdRng::seed_from_u64(9);
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            daemon = start_daemon(dir.path());
        }
        let goal = reads.load(Ordering::Relaxed) + 100;
        while reads.load(Ordering::Relaxed) < goal && readers.iter().all(|it| !it.is_finished()) {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    daemon.kill().unwrap();
    daemon.wait().unwrap();

    let runtime = Runtime::new().unwrap();
    let (server, mounts) = connect(dir.path(), &runtime);
    let held = File::open(dir.path().join("mnt/d0/f0")).unwrap();
    assert!(server.unmount_layer(&mounts[0]).is_err(), "it is in use");
    drop(held);
    // A process that the other test is starting has what was open here, until it has begun.
    let since = Instant::now();
    while let Err(error) = server.unmount_layer(&mounts[0]) {
        assert!(since.elapsed() < Duration::from_secs(60), "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!dir.path().join("mnt").exists());
}

#[test]
fn privileged_a_server_that_hangs_is_waited_for_and_given_up() {
    if !sys::is_root() {
        let test = "privileged_a_server_that_hangs_is_waited_for_and_given_up";
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    write_blob(dir.path(), &content());
    let _end = EndServers(dir.path());
    let runtime = Runtime::new().unwrap();
    let layer = open_layer(dir.path(), &runtime);
    let digest = layer.index().blob_digest;
    let path = dir.path().join("mnt");
    fs::create_dir(&path).unwrap();
    let (server, _) = connect(dir.path(), &runtime);
    let pids = servers(dir.path());
    pids.iter().for_each(|pid| sys::stop(*pid, true));
    std::thread::scope(|threads| {
        let another = threads.spawn(|| {
            let handle = runtime.handle().clone();
            MountServer::connect(&dir.path().join("socket"), handle).map(drop)
        });
        let mounted = server.mount(digest, Arc::clone(&layer) as _, &path);
        assert!(mounted.unwrap_err().to_string().contains("does not answer"));
        assert!(
            server.is_closed(),
            "what comes later would be taken for another answer"
        );
        let connected = another.join().unwrap();
        assert!(connected.unwrap_err().to_string().contains("says nothing"));
    });
    pids.iter().for_each(|pid| sys::stop(*pid, false));

    // What it did in the end is in its list.
    let (server, mounts) = loop {
        let (server, mounts) = connect(dir.path(), &runtime);
        match mounts.is_empty() {
            true => std::thread::sleep(Duration::from_millis(10)),
            false => break (server, mounts),
        }
    };
    server.unmount(&mounts[0]).unwrap();
}
