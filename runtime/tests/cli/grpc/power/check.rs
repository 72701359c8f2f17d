//! What is looked at after a power cut, by a node that has no registry.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lazarette_fetcher::index::FileKind;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::types::ByteRange;
use lazarette_proto::snapshots::MountsRequest;

use super::container_of;
use super::work::{Data, Synced, content_of};
use crate::disk::{Cut, Kind};
use crate::grpc::bed::{self, EIO, EVICTABLE, clean, program};
use crate::grpc::crash::Image;
use crate::grpc::crash::log::Log;
use crate::grpc::crash::work::check;
use crate::grpc::{Node, config};
use crate::support::wait_until_empty;
use crate::sys;

/// What was promised.
pub(super) struct Check {
    pub(super) kind: Kind,
    pub(super) images: Vec<Image>,
    pub(super) data: Data,
    /// What was answered, with the time of the disk.
    pub(super) log: PathBuf,
    /// What containers wrote and synced, with the same.
    pub(super) synced: Vec<Synced>,
}

/// What cuts left, counted.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Sectors that they took.
    pub(super) lost: usize,
    /// Snapshots that were there.
    snapshots: usize,
    /// Chunks that were present, and right.
    chunks: u64,
    /// Files of layers that were read right.
    read: usize,
    /// Files of layers that could not be read, as they had to be fetched.
    missing: usize,
    /// Files that containers had synced.
    synced: usize,
    /// Cuts where something was in the store already, and part of it was not.
    partial: usize,
}

impl Seen {
    pub(super) fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.snapshots += other.snapshots;
        self.chunks += other.chunks;
        self.read += other.read;
        self.missing += other.missing;
        self.partial += other.partial;
        self.synced += other.synced;
    }

    /// A check that looks at nothing would pass.
    pub(super) fn must_be_of_everything(&self) {
        let counts = [
            self.lost,
            self.snapshots,
            self.read,
            self.missing,
            self.partial,
            self.synced,
        ];
        assert!(!counts.contains(&0) && self.chunks > 0, "{self:?}");
    }
}

impl Check {
    /// Looks at the disk in `dir/image`.
    pub(super) async fn after(&self, cut: &Cut, dir: &Path, number: usize) -> Seen {
        let told = format!("cut {number}, {cut:?}");
        let _say = Say(&told);
        let mounted = self.kind.mount(&dir.join("image"), &dir.join("root"));
        let mut log = Log::as_it_was(&self.log, cut.at, &dir.join("log"));
        let mut seen = Seen::default();
        // Before anything reads it: what is read and not right is dropped.
        let present = self.present(dir, &mut seen).await;
        // With a budget layers are served, else those that are whole are the kernel's.
        let more = [EVICTABLE, ""][number % 2];
        let file = config(dir, "100ms", more);
        let (node, _) = Node::open_as(&program("laz-mountd"), file).await;
        check(&node, dir, &self.images, &mut log).await;
        seen.snapshots += log.there().len();
        for left in ["root/ingest", "root/trash"] {
            wait_until_empty(&dir.join(left));
        }
        self.synced(&node, cut, &mut seen).await;
        let image = &self.images[self.images.len() - 1];
        let top = &image.names()[1];
        if log.there().contains_key(top) {
            let mounts = node.prepare("probe", top, None).await.unwrap();
            bed::mount(&mounts, &container_of(dir));
            self.read(dir, &present, &mut seen).await;
            sys::detach(&container_of(dir));
            node.remove("probe").await;
        }
        let report = node.engine.check(false).await.unwrap();
        let is_damaged = report.layers.iter().any(|layer| layer.is_damaged());
        assert!(report.is_sound() && !is_damaged, "{report:?}");
        node.close().await;
        clean(dir);
        drop(mounted);
        fs::remove_file(dir.join("image")).unwrap();
        seen
    }

    /// Which files are all there, as the store says; that it is right in all that it says.
    async fn present(&self, dir: &Path, seen: &mut Seen) -> BTreeMap<String, bool> {
        let (root, layers) = (dir.join("root"), self.data.layers);
        let look = move || {
            let store = Store::open(root).unwrap();
            let mut present = BTreeMap::new();
            for digest in layers {
                let Some(layer) = store.open_layer(&digest).unwrap() else {
                    continue;
                };
                for entry in &layer.index().files {
                    if let FileKind::Regular { size, data_offset } = entry.kind {
                        let range = ByteRange::at(data_offset, size).unwrap();
                        let path = String::from_utf8(entry.path.clone()).unwrap();
                        present.insert(path, layer.missing(range).is_empty());
                    }
                }
            }
            (present, store.check().unwrap())
        };
        let (present, found) = tokio::task::spawn_blocking(look).await.unwrap();
        assert!(found.blobs.dropped.is_empty(), "{found:?}");
        for (digest, layer) in found.layers {
            let layer = layer.unwrap();
            assert!(!layer.bitmap_lost, "{digest}");
            assert!(layer.dropped.is_empty(), "{digest}: {layer:?}");
            assert!(layer.damaged_files.is_empty(), "{digest}: {layer:?}");
            seen.chunks += layer.chunks;
        }
        present
    }

    /// What containers synced is there.
    async fn synced(&self, node: &Node, cut: &Cut, seen: &mut Seen) {
        for Synced { key, name, at } in &self.synced {
            if *at > cut.at {
                continue;
            }
            let request = MountsRequest {
                key: key.clone(),
                ..Default::default()
            };
            let mounts = node.client.mounts(request).await.unwrap().mounts;
            let upper = mounts[0].options.iter();
            let mut upper = upper.filter_map(|option| option.strip_prefix("upperdir="));
            let path = Path::new(upper.next().unwrap()).join(name);
            assert!(fs::read(&path).unwrap() == content_of(name), "{path:?}");
            seen.synced += 1;
        }
    }

    /// Reads all files of the data: those that are there must be right, others right or an error.
    async fn read(&self, dir: &Path, present: &BTreeMap<String, bool>, seen: &mut Seen) {
        let reading: Vec<_> = self
            .data
            .content
            .keys()
            .map(|path| {
                let at = container_of(dir).join(path);
                let read = tokio::task::spawn_blocking(move || fs::read(at));
                (path, read)
            })
            .collect();
        let (read, missing) = (seen.read, seen.missing);
        for (path, reading) in reading {
            match reading.await.unwrap() {
                Ok(bytes) => {
                    assert!(bytes == self.data.content[path], "wrong bytes in {path}");
                    seen.read += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(EIO), "{path}: {error}");
                    assert!(!present[path], "{path} is there, and cannot be read");
                    seen.missing += 1;
                }
            }
        }
        seen.partial += usize::from(seen.read > read && seen.missing > missing);
    }
}

/// Says which cut it was where something is wrong.
struct Say<'a>(&'a str);

impl Drop for Say<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {}", self.0);
        }
    }
}
