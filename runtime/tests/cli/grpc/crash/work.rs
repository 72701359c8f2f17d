//! What is done to a node until it is killed, and what is looked at then.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lazarette_fetcher::types::Digest;
use lazarette_proto::snapshots::{CommitSnapshotRequest, UsageRequest, kind};
use lazarette_snapshotter::remote;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::log::{Changes, Known, Log, What};
use super::{Image, content};
use crate::grpc::bed::{mount, mounts};
use crate::grpc::{Node, Wanted, lowers, read};
use crate::support::wait_until_empty;
use crate::sys;

/// One who asks for snapshots that nobody else asks for: those of two images with the same
/// base, and directories on them and on each other.
pub(in crate::grpc) struct Worker<'a> {
    pub(in crate::grpc) number: usize,
    pub(in crate::grpc) node: &'a Node,
    pub(in crate::grpc) images: &'a [Image],
    pub(in crate::grpc) log: &'a Mutex<Log>,
    /// Where it mounts snapshots to write to them, as containers do; else it does without.
    pub(in crate::grpc) mounts_at: Option<PathBuf>,
}

impl Worker<'_> {
    /// Works until the process ends.
    pub(in crate::grpc) async fn work(&self, dir: &Path) {
        let mut rng = StdRng::seed_from_u64(u64::from(std::process::id()) + self.number as u64);
        loop {
            self.step(&mut rng, dir).await;
        }
    }

    /// Does one thing.
    pub(in crate::grpc) async fn step(&self, rng: &mut StdRng, dir: &Path) {
        match rng.random_range(0..6) {
            0 | 1 => self.bring(rng.random_range(1..3)).await,
            2 => self.look(rng.random()).await,
            3 | 4 => self.make(rng.random(), dir).await,
            _ => self.remove(rng.random()).await,
        }
    }

    /// Brings one of the two images, or finds it there.
    async fn bring(&self, top: usize) {
        let image = &self.images[top - 1];
        let mut parent = String::new();
        for (layer, number) in [0, top].into_iter().enumerate() {
            let wanted = Wanted {
                image: &image.pushed,
                chain_id: image.chains[layer],
                blob: image.blobs[layer],
                all: &image.blobs[layer..],
            };
            let target = image.chains[layer].to_string();
            let name = remote::name((layer > 0).then_some(&parent[..]), &target);
            let known = Known {
                parent: parent.clone(),
                what: What::Layer(number),
            };
            self.ask(vec![(name.clone(), Some(known))]);
            assert_eq!(self.node.bring(&parent, &wanted).await, name);
            self.answered();
            parent = name;
        }
    }

    /// Reads a layer's file through a container of its own.
    async fn look(&self, number: u64) {
        let Some((layer, name)) = self.pick(number, |known| match known.what {
            What::Layer(layer) => Some(layer),
            What::Active | What::Files { .. } => None,
        }) else {
            return;
        };
        let key = format!("{}/container/{number}", self.number);
        self.ask(vec![(key.clone(), Some(active(&name)))]);
        let mounts = self.node.prepare(&key, &name, None).await.unwrap();
        self.answered();
        let file = lowers(&mounts)[0].join("file");
        assert!(read(file).await == content(self.number, layer), "{name}");
        self.ask(vec![(key.clone(), None)]);
        self.node.remove(&key).await;
        self.answered();
    }

    /// Writes a directory and commits it, on nothing or on what is committed.
    async fn make(&self, seed: u64, dir: &Path) {
        let committed = |known: &Known| (known.what != What::Active).then_some(());
        let parent = match seed % 3 {
            0 => String::new(),
            _ => self.pick(seed, committed).unwrap_or_default().1,
        };
        let key = format!("{}/key/{seed}", self.number);
        self.ask(vec![(key.clone(), Some(active(&parent)))]);
        let mounts = self.node.prepare(&key, &parent, None).await.unwrap();
        self.answered();
        let upper = mounts[0]
            .options
            .iter()
            .find_map(|o| o.strip_prefix("upperdir="));
        let files = PathBuf::from(upper.unwrap_or(&mounts[0].source));
        assert!(files.starts_with(dir), "{mounts:?}");
        match &self.mounts_at {
            Some(at) if mounts[0].r#type == "overlay" => {
                mount(&mounts, at);
                write(at, seed);
                sys::detach(at);
            }
            Some(_) | None => write(&files, seed),
        }
        let [bytes, inodes] = du(&files);
        let name = format!("{}/name/{seed}", self.number);
        let what = What::Files {
            seed,
            bytes,
            inodes,
        };
        self.ask(vec![
            (key.clone(), None),
            (name.clone(), Some(Known { parent, what })),
        ]);
        let request = CommitSnapshotRequest {
            name,
            key,
            ..Default::default()
        };
        self.node.client.commit(request).await.unwrap();
        self.answered();
    }

    /// Removes one that nothing lies on.
    async fn remove(&self, number: u64) {
        let parents: BTreeSet<_> = {
            let log = self.log.lock();
            log.there()
                .values()
                .map(|known| known.parent.clone())
                .collect()
        };
        let name = self.pick_named(number, |name, _| (!parents.contains(name)).then_some(()));
        if let Some(((), name)) = name {
            self.ask(vec![(name.clone(), None)]);
            self.node.remove(&name).await;
            self.answered();
        }
    }

    /// One of this worker's snapshots for which there is an answer.
    fn pick<T>(&self, number: u64, wanted: impl Fn(&Known) -> Option<T>) -> Option<(T, String)> {
        self.pick_named(number, |_, known| wanted(known))
    }

    fn pick_named<T>(
        &self,
        number: u64,
        wanted: impl Fn(&str, &Known) -> Option<T>,
    ) -> Option<(T, String)> {
        let log = self.log.lock();
        let prefix = format!("{}/", self.number);
        let is_mine = |name: &str| name.starts_with(&prefix) || self.has_layer(name);
        let mine = log.there().iter().filter(|(name, _)| is_mine(name));
        let found = mine.filter_map(|(name, known)| Some((wanted(name, known)?, name.clone())));
        let mut found: Vec<_> = found.collect();
        let count = u64::try_from(found.len()).unwrap();
        (count > 0).then(|| found.swap_remove(usize::try_from(number % count).unwrap()))
    }

    fn has_layer(&self, name: &str) -> bool {
        self.images
            .iter()
            .any(|image| image.names().iter().any(|n| n == name))
    }

    fn ask(&self, changes: Changes) {
        self.log.lock().ask(self.number, changes);
    }

    fn answered(&self) {
        self.log.lock().answered(self.number);
    }
}

fn active(parent: &str) -> Known {
    Known {
        parent: parent.to_owned(),
        what: What::Active,
    }
}

/// Says whose files these are.
const SEED: &str = "seed";

fn write(dir: &Path, seed: u64) {
    fs::write(dir.join(SEED), seed.to_string()).unwrap();
    for (path, bytes) in files(seed) {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn files(seed: u64) -> BTreeMap<String, Vec<u8>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut file = |number: u32| {
        let len = rng.random_range(0..40_000);
        (
            format!("d{}/f{number}", number % 2),
            vec![rng.random(); len],
        )
    };
    (0..4).map(&mut file).collect()
}

/// Bytes and inodes below a directory.
fn du(dir: &Path) -> [i64; 2] {
    ["--block-size=1", "--inodes"].map(|option| {
        let du = Command::new("du")
            .args(["-s", option])
            .arg(dir)
            .output()
            .unwrap();
        let out = String::from_utf8(du.stdout).unwrap();
        out.split_whitespace().next().unwrap().parse().unwrap()
    })
}

async fn usage(node: &Node, key: &str) -> [i64; 2] {
    let key = key.to_owned();
    let request = UsageRequest {
        key,
        ..Default::default()
    };
    let usage = node.client.usage(request).await.unwrap();
    [usage.size, usage.inodes]
}

/// That all that was answered is there, whole, and nothing of what was not.
pub(in crate::grpc) async fn check(node: &Node, dir: &Path, images: &[Image], log: &mut Log) {
    let all = node.list("").await;
    log.settle(&all.iter().map(|info| info.name.clone()).collect());
    let places = directories(dir);
    let mut count = 0;
    for info in &all {
        let known = &log.there()[&info.name];
        assert_eq!(info.parent, known.parent, "{}", info.name);
        match known.what {
            What::Layer(_) => assert_eq!(info.kind, kind::COMMITTED),
            What::Active => {
                assert_eq!(info.kind, kind::ACTIVE);
                usage(node, &info.name).await;
                count += 1;
            }
            What::Files {
                seed,
                bytes,
                inodes,
            } => {
                assert_eq!(info.kind, kind::COMMITTED);
                let place = &places[&Some(seed)][0];
                assert_eq!(usage(node, &info.name).await, [bytes, inodes]);
                assert_eq!(du(place), [bytes, inodes]);
                for (path, bytes) in files(seed) {
                    assert!(fs::read(place.join(&path)).unwrap() == bytes, "{path}");
                }
                count += 1;
            }
        }
    }
    let found: usize = places.values().map(Vec::len).sum();
    assert_eq!(found, count, "directories: {places:?}");
    wait_until_empty(&dir.join("root/trash"));
    check_layers(node, dir, images, log);
}

/// That the layers of committed snapshots are mounted and stored, and no others.
fn check_layers(node: &Node, dir: &Path, images: &[Image], log: &Log) {
    let named = images.iter().flat_map(|image| {
        let layers = image.names().into_iter().zip(image.blobs);
        layers
            .filter(|(name, _)| log.there().contains_key(name))
            .map(|(_, blob)| blob)
    });
    let named: BTreeSet<Digest> = named.collect();
    assert_eq!(node.restored, named.len());
    let stored = fs::read_dir(dir.join("root/layers")).unwrap().count();
    assert_eq!(stored, named.len());
    let places = mounts(dir)
        .into_iter()
        .filter(|path| path.starts_with(dir.join("state")));
    let mounted: BTreeSet<_> = places.collect();
    assert_eq!(mounted.len(), named.len(), "{mounted:?}");
}

/// Where the files of snapshots are, by their seed.
fn directories(dir: &Path) -> BTreeMap<Option<u64>, Vec<PathBuf>> {
    let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for entry in fs::read_dir(dir.join("root/snapshots")).unwrap() {
        let files = entry.unwrap().path().join("fs");
        let seed = fs::read_to_string(files.join(SEED)).ok();
        let seed = seed.and_then(|text| text.parse().ok());
        found.entry(seed).or_default().push(files);
    }
    found
}
