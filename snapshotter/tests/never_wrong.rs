//! Nobody ever reads wrong bytes: everything of a layer is read through a real mount while
//! bits flip on the way from the registry, or after they flipped on the disk.
//!
//! A read may fail, and then the next may succeed; what it returns is what the image says.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use lazarette_fetcher::Error;
use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::{FaultySource, MemorySource};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use lazarette_snapshotter::fuse::{Backend, FuseOptions, LayerMount, LayerMounts};
use lazarette_snapshotter::tree::Tree;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Tries of something that random faults may break: enough that a fault-free one comes.
const TRIES_MAX: usize = 200;

/// What shows the layers, in turn.
const BACKENDS: [Backend; 2] = [Backend::Fuse, Backend::Erofs];

/// Content of every file by its path in the layer.
type Content = BTreeMap<String, Vec<u8>>;

/// Files of every size class: empty, smaller than a page, around a page and a chunk, and
/// some of many chunks; half of them compress well.
fn content() -> Content {
    let mut rng = StdRng::seed_from_u64(7);
    let sizes = [
        0, 1, 100, 4095, 4096, 4097, 65_535, 65_537, 200_000, 700_000,
    ];
    let file = |number: usize, size: usize, rng: &mut StdRng| {
        let mask = if number.is_multiple_of(2) { 0x07 } else { 0xff };
        let bytes = (0..size).map(|_| rng.random::<u8>() & mask).collect();
        (format!("d{}/f{number}", number % 3), bytes)
    };
    let all = sizes.iter().chain(&sizes).enumerate();
    all.map(|(number, size)| file(number, *size, &mut rng))
        .collect()
}

/// Runs a filter program.
fn pipe(program: &str, args: &[&str], input: Vec<u8>) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn tar(content: &Content) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in content {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let dir = dir.path().to_str().unwrap();
    pipe(
        "tar",
        &["-C", dir, "--sort=name", "-cf", "-", "."],
        Vec::new(),
    )
}

/// A layer as a registry serves it.
struct Blob {
    name: &'static str,
    bytes: Bytes,
    diff_id: Digest,
    annotations: BTreeMap<String, String>,
}

/// One layer in every format.
fn blobs(content: &Content) -> Vec<Blob> {
    let tar = tar(content);
    let plain = |name, bytes: Vec<u8>| Blob {
        name,
        bytes: bytes.into(),
        diff_id: Digest::sha256(&tar),
        annotations: BTreeMap::new(),
    };
    let written = |name, format| {
        let options = Options {
            chunk_bytes: 64 << 10,
            ..Options::new(format)
        };
        let (mut input, mut bytes) = (std::io::Cursor::new(&tar), Vec::new());
        let written = write_layer("layer", &mut input, &mut bytes, &options).unwrap();
        Blob {
            name,
            bytes: bytes.into(),
            diff_id: written.diff_id,
            annotations: (written.annotations.into_iter())
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
        }
    };
    // Frames that nobody says anything about.
    let frames = Blob {
        name: "zstd",
        annotations: BTreeMap::new(),
        ..written("", Format::ZstdChunked(Flavour::Stargz))
    };
    vec![
        frames,
        written("estargz", Format::Estargz),
        written(
            "podman's zstd:chunked",
            Format::ZstdChunked(Flavour::ContainersStorage),
        ),
        written(
            "stargz's zstd:chunked",
            Format::ZstdChunked(Flavour::Stargz),
        ),
        plain("gzip", pipe("gzip", &["-6"], tar.clone())),
        plain("tar", tar.clone()),
    ]
}

/// A store, and what it takes to mount layers of it.
struct Node {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Node {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Runtime::new().unwrap(),
        }
    }

    fn request(blob: &Blob) -> LayerRequest {
        let reference = Reference::parse("example.com/a:b").unwrap();
        let (digest, size) = (Digest::sha256(&blob.bytes), blob.bytes.len() as u64);
        let mut descriptor = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        descriptor.annotations.clone_from(&blob.annotations);
        LayerRequest::new(reference.repository().clone(), &descriptor, blob.diff_id).unwrap()
    }

    /// Opens the layer as often as it takes; every failure must be one that says so.
    fn open(&self, blob: &Blob, source: &Arc<dyn BlobSource>) -> Arc<Layer> {
        let request = Self::request(blob);
        let store = Store::open(self.dir.path().join("store")).unwrap();
        let opener = LayerOpener::new(Arc::clone(&store), Arc::clone(source));
        for _ in 0..TRIES_MAX {
            let opened = self
                .runtime
                .block_on(opener.open(&request, &AtomicU64::new(0)));
            match opened {
                Ok((layer, _)) => return layer,
                Err(Error::Corrupt { .. } | Error::Unavailable { .. }) => {}
                Err(error) => panic!("{}: {error}", blob.name),
            }
        }
        panic!("{} cannot be opened", blob.name);
    }

    fn mount(&self, layer: &Arc<Layer>, backend: Backend) -> Arc<LayerMount> {
        let handle = self.runtime.handle().clone();
        let dir = self.dir.path().join("mounts");
        let options = FuseOptions {
            backend,
            ..FuseOptions::default()
        };
        let mounts = LayerMounts::new(dir, handle, options);
        let tree = Arc::new(Tree::build(layer.index()).unwrap());
        let digest = layer.index().blob_digest;
        mounts.mount(digest, tree, Arc::clone(layer) as _).unwrap()
    }

    fn layer_file(&self, blob: &Blob, name: &str) -> PathBuf {
        let layers = self.dir.path().join("store/layers");
        layers
            .join(Digest::sha256(&blob.bytes).file_name())
            .join(name)
    }
}

/// Reads every file in pieces of odd sizes; returns how many reads failed. Panics at the
/// first wrong byte.
fn read_everything(root: &Path, content: &Content, what: &str) -> usize {
    let mut failed = 0;
    for (path, expected) in content {
        let file = fs::File::open(root.join(path)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), expected.len() as u64);
        let mut piece = vec![0; 50_001];
        let mut at = 0;
        while at < expected.len() {
            let wanted = piece.len().min(expected.len() - at);
            match file.read_exact_at(&mut piece[..wanted], at as u64) {
                Ok(()) => assert!(
                    piece[..wanted] == expected[at..at + wanted],
                    "{what}: wrong bytes in {path} at {at}"
                ),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(5), "{what}: {error}");
                    failed += 1;
                }
            }
            at += wanted;
        }
    }
    failed
}

fn must_be_root(test: &str) -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
    }
    root
}

#[test]
fn privileged_bits_that_flip_on_the_way_are_never_read() {
    if !must_be_root("privileged_bits_that_flip_on_the_way_are_never_read") {
        return;
    }
    let content = content();
    let mut dropped = 0;
    for blob in blobs(&content) {
        for (seed, backend) in BACKENDS.into_iter().cycle().take(4).enumerate() {
            let memory = MemorySource::new();
            memory.add_blob(blob.bytes.clone());
            let faulty: Arc<dyn BlobSource> =
                Arc::new(FaultySource::seeded(memory, seed as u64, 3));
            let node = Node::new();
            let layer = node.open(&blob, &faulty);
            let mount = node.mount(&layer, backend);
            let what = format!("{} with seed {seed}, {backend:?}", blob.name);
            let clean = (0..TRIES_MAX).any(|_| {
                let failed = std::thread::scope(|scope| {
                    let reader = || read_everything(mount.path(), &content, &what);
                    let readers: Vec<_> = (0..3).map(|_| scope.spawn(reader)).collect();
                    readers
                        .into_iter()
                        .map(|reader| reader.join().unwrap())
                        .sum::<usize>()
                });
                failed == 0
            });
            assert!(clean, "{what}: some reads never succeed");
            dropped += layer.counters().chunks_corrupt;
            drop(mount);
            node.runtime.block_on(layer.close()).unwrap();
        }
    }
    assert!(dropped > 0, "no bit ever flipped");
}

#[test]
fn privileged_bits_that_flipped_on_the_disk_are_never_read() {
    if !must_be_root("privileged_bits_that_flipped_on_the_disk_are_never_read") {
        return;
    }
    let content = content();
    for blob in blobs(&content) {
        let memory = MemorySource::new();
        memory.add_blob(blob.bytes.clone());
        let source: Arc<dyn BlobSource> = Arc::new(memory);
        let node = Node::new();
        let mut rng = StdRng::seed_from_u64(11);
        for round in 0..8 {
            let backend = BACKENDS[round / 4];
            let layer = node.open(&blob, &source);
            node.runtime.block_on(layer.fill_all()).unwrap();
            node.runtime.block_on(layer.close()).unwrap();
            drop(layer);
            let victim = node.layer_file(&blob, ["data", "data", "index", "bitmap"][round % 4]);
            let file = fs::File::options()
                .read(true)
                .write(true)
                .open(victim)
                .unwrap();
            for _ in 0..3 {
                let at = rng.random_range(0..file.metadata().unwrap().len());
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0] ^= 1_u8 << rng.random_range(0..8);
                file.write_all_at(&byte, at).unwrap();
            }
            let what = format!("{} in round {round}, {backend:?}", blob.name);
            // Where an index was damaged, reads may fail until the layer is opened anew.
            let clean = (0..2).any(|_| {
                let layer = node.open(&blob, &source);
                let mount = node.mount(&layer, backend);
                let clean = (0..3).any(|_| read_everything(mount.path(), &content, &what) == 0);
                drop(mount);
                node.runtime.block_on(layer.close()).unwrap();
                clean
            });
            assert!(clean, "{what}: some reads never succeed");
        }
    }
}
