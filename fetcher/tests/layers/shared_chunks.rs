//! Two images that share files but no layer: what one has, the other does not fetch.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::fs::File;
use std::io::Cursor;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::FileKind;
use lazarette_fetcher::index::write::{Options, write_layer};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::source::{RegistrySource, SourceConfig};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::test_util::content::{self, tar};
use lazarette_fetcher::types::{ByteRange, Descriptor, Digest, MediaType, Reference};

/// Bytes that compress a little, the same for the same seed.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    content::noise(seed, 0x3f, len)
}

/// Where a store is.
enum Root {
    Dir(tempfile::TempDir),
    Xfs(Xfs),
}

impl Root {
    fn path(&self) -> &Path {
        match self {
            Self::Dir(dir) => dir.path(),
            Self::Xfs(xfs) => &xfs.mountpoint,
        }
    }
}

/// A new XFS, which can share blocks, in a file; unmounted when dropped.
struct Xfs {
    mountpoint: PathBuf,
    _dir: tempfile::TempDir,
}

impl Xfs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, mountpoint) = (dir.path().join("image"), dir.path().join("root"));
        std::fs::create_dir(&mountpoint).unwrap();
        // The least that mkfs.xfs makes; sparse.
        File::create(&image).unwrap().set_len(300 << 20).unwrap();
        run(Command::new("mkfs.xfs").arg("-q").arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &mountpoint]));
        Self {
            mountpoint,
            _dir: dir,
        }
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Lazily: a test that failed may hold files of it, and must leave no mount.
        run(Command::new("umount").arg("-l").arg(&self.mountpoint));
    }
}

/// What the command says; the test stops where it fails.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A node and the registry it pulls from.
struct World {
    registry: FakeRegistry,
    opener: LayerOpener,
    // Gone after the store.
    root: Root,
}

impl World {
    async fn new() -> Self {
        Self::below(Root::Dir(tempfile::tempdir().unwrap())).await
    }

    async fn below(root: Root) -> Self {
        let store = Store::open(root.path()).unwrap();
        let source = Arc::new(RegistrySource::new(SourceConfig::default()).unwrap());
        Self {
            registry: FakeRegistry::start().await,
            opener: LayerOpener::new(store, source),
            root,
        }
    }

    /// The extents of a layer's data file, as `filefrag` tells them.
    fn extents(&self, layer: &Layer) -> Vec<String> {
        let name = layer.index().blob_digest.to_string().replace(':', "-");
        let data = self.root.path().join("layers").join(name).join("data");
        let said = run(Command::new("filefrag").arg("-v").arg(&data));
        let extents = said.lines().filter(|line| line.contains(".."));
        extents.map(str::to_owned).collect()
    }

    async fn open(&self, layer: Descriptor, diff_id: Digest) -> (Arc<Layer>, OpenedBy) {
        let reference = format!("{}/a/b:t", self.registry.url_host());
        let reference = Reference::parse(&reference).unwrap();
        let request = LayerRequest::new(reference.repository().clone(), &layer, diff_id);
        let opened = self.opener.open(&request, &AtomicU64::new(0)).await;
        let (layer, by) = opened.unwrap();
        // Only what is asked for comes: requests and faults are counted.
        layer.set_foresight(false);
        (layer, by)
    }

    async fn open_estargz(&self, tar: Vec<u8>) -> Arc<Layer> {
        let mut blob = Vec::new();
        let options = Options {
            chunk_bytes: 64 << 10,
            ..Options::default()
        };
        let written = write_layer("x", &mut Cursor::new(tar), &mut blob, &options).unwrap();
        let size = blob.len() as u64;
        let digest = self.registry.add_blob(blob);
        let mut layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let notes = written.annotations.into_iter();
        layer.annotations = notes.map(|(key, value)| (key.to_owned(), value)).collect();
        let (layer, by) = self.open(layer, written.diff_id).await;
        assert_eq!(by, OpenedBy::Toc);
        layer
    }

    async fn open_gzip(&self, tar: &[u8]) -> Arc<Layer> {
        let blob = MemberCompressor::new(6).compress(tar);
        let size = blob.len() as u64;
        let digest = self.registry.add_blob(blob);
        let layer = Descriptor::new(MediaType::OciLayerGzip, digest, size);
        let (layer, by) = self.open(layer, Digest::sha256(tar)).await;
        assert_eq!(by, OpenedBy::Stream);
        layer
    }
}

/// Place of a file in the data file.
fn place(layer: &Layer, path: &str) -> ByteRange {
    let mut files = layer.index().files.iter();
    let file = files.find(|file| file.path == path.as_bytes()).unwrap();
    match file.kind {
        FileKind::Regular { size, data_offset } => ByteRange::at(data_offset, size).unwrap(),
        _ => panic!("{path} is no file"),
    }
}

fn read(layer: &Layer, path: &str) -> Option<Vec<u8>> {
    let place = place(layer, path);
    let mut bytes = vec![0; usize::try_from(place.len()).unwrap()];
    let read = layer.try_read(place.start(), &mut bytes).unwrap();
    read.then_some(bytes)
}

#[tokio::test]
async fn files_of_another_image_are_read_without_the_registry() {
    let world = World::new().await;
    let (large, small, own) = (noise(1, 300_000), noise(2, 900), noise(3, 100_000));
    let first = [
        ("large", &large[..]),
        ("old", &own[..50]),
        ("small", &small),
    ];
    let first = world.open_estargz(tar(&first)).await;
    first.fill_all().await.unwrap();
    // In another place, and another order.
    let second = [("small", &small[..]), ("dir", &own), ("zlarge", &large)];
    let second = world.open_estargz(tar(&second)).await;
    let before = world.registry.requests().blobs;
    for (path, bytes) in [("small", &small), ("zlarge", &large)] {
        assert_eq!(read(&second, path), None);
        second.fill(place(&second, path)).await.unwrap();
        assert_eq!(read(&second, path).as_ref(), Some(bytes));
    }
    let counters = second.counters();
    assert_eq!((counters.requests, counters.bytes_fetched), (0, 0));
    assert_eq!(counters.bytes_copied, 300_900);
    assert_eq!(world.registry.requests().blobs, before);
    second.fill_all().await.unwrap();
    assert_eq!(read(&second, "dir"), Some(own));
    let counters = second.counters();
    assert!(counters.bytes_fetched < 120_000, "only the file of its own");
    // Its source may go; the copy is its own.
    first.file().evict_all().unwrap();
    assert_eq!(read(&second, "zlarge"), Some(large));
}

#[tokio::test]
async fn plain_gzip_layers_refill_from_each_other() {
    let world = World::new().await;
    let (shared, a, b) = (noise(1, 1_500_000), noise(2, 700_000), noise(3, 600_000));
    let tar_a = tar(&[("a", &a), ("shared", &shared)]);
    let tar_b = tar(&[("shared", &shared), ("b", &b)]);
    let first = world.open_gzip(&tar_a).await;
    let second = world.open_gzip(&tar_b).await;
    second.file().evict_all().unwrap();
    assert_eq!(read(&second, "shared"), None, "it can be fetched again");
    second.fill(place(&second, "shared")).await.unwrap();
    assert_eq!(read(&second, "shared"), Some(shared.clone()));
    let counters = second.counters();
    assert_eq!((counters.requests, counters.bytes_copied), (0, 1_500_000));
    // And the other way round.
    first.file().evict_all().unwrap();
    first.fill_all().await.unwrap();
    assert_eq!(read(&first, "shared"), Some(shared));
    assert_eq!(read(&first, "a"), Some(a));
    assert_eq!(first.counters().bytes_copied, 1_500_000);
}

/// Where the file system can, the blocks are the same ones.
#[tokio::test]
async fn privileged_copies_share_blocks_on_xfs() {
    if !std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0) {
        eprintln!("SKIPPED (needs root): privileged_copies_share_blocks_on_xfs");
        return;
    }
    let world = World::below(Root::Xfs(Xfs::new())).await;
    let (large, own) = (noise(1, 1 << 20), noise(3, 100_000));
    let first = world.open_estargz(tar(&[("large", &large)])).await;
    first.fill_all().await.unwrap();
    let of_first = world.extents(&first);
    assert!(!of_first.iter().any(|line| line.contains("shared")));
    let second = world
        .open_estargz(tar(&[("dir", &own), ("zlarge", &large)]))
        .await;
    second.fill(place(&second, "zlarge")).await.unwrap();
    assert_eq!(second.counters().requests, 0);
    assert_eq!(read(&second, "zlarge").as_ref(), Some(&large));
    let of_second = world.extents(&second);
    let shared = of_second.iter().filter(|line| line.contains("shared"));
    assert!(shared.count() > 0, "{of_second:#?}");
    // Each has its own view of them: what one drops, the other keeps.
    first.file().evict_all().unwrap();
    assert_eq!(read(&first, "large"), None);
    assert_eq!(read(&second, "zlarge").as_ref(), Some(&large));
    second.fill_all().await.unwrap();
    assert_eq!(read(&second, "dir"), Some(own));
    first.fill_all().await.unwrap();
    assert_eq!(read(&first, "large"), Some(large));
}
