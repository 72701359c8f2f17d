//! What snapshots cost where there are 10,000: all of them listed, and one prepared for a
//! container, by the library and over gRPC on a unix socket. The aims are 50 ms and a few.
//!
//!     cargo bench --workspace --bench snapshots --profile dev [-- ROUNDS]
//!
//! *Opening* is a list that opens the database first, *cold* one that finds it open and reads
//! it all, *warm* one that finds all of it known. Files are in the page cache throughout.

mod grpc;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lazarette_fetcher::db::{Db, Table as _};
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::metastore::{
    Change, Content, DbMetastore, Kind, Labels, Metastore as _, Record, SnapshotTable, Usage,
};
use lazarette_snapshotter::overlay::Snapshots;

/// Images of so many layers each, a snapshot each, and so many containers on it.
const IMAGES: usize = 1000;
const LAYERS: usize = 8;
const CONTAINERS: usize = 2;
const ALL: usize = IMAGES * (LAYERS + CONTAINERS);
/// Containers that are prepared in all rounds, of which one in a hundred is slower than the
/// slowest that counts.
const PREPARED: usize = 400;

/// The node's snapshots.
struct Node {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    /// What the layers show: one directory for all will do.
    layer: PathBuf,
    store: Arc<DbMetastore>,
    snapshots: Arc<Snapshots>,
}

fn main() -> Result<()> {
    let number = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let rounds: usize = number.unwrap_or(21);
    let node = Node::new()?;
    println!("{ALL} snapshots, medians and slowest of {rounds}");
    let mut by = grpc::Client::start(&node.snapshots, &node.socket, &node.layer)?;
    lists(&node, rounds, "library", &mut || {
        Ok(node.snapshots.list()?.len())
    })?;
    lists(&node, rounds, "gRPC", &mut || by.list())?;
    println!("a container is prepared on {LAYERS} layers, median and 99th of {PREPARED}");
    prepares(&node, "library", &mut |key, parent| {
        node.snapshots.prepare(key, Some(parent), &Labels::new())?;
        let layer = |_: &Digest| Ok(node.layer.clone());
        Ok(node.snapshots.mounts(key, &layer)?.len())
    })?;
    prepares(&node, "gRPC", &mut |key, parent| by.prepare(key, parent))
}

impl Node {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let db = Db::open(dir.path().join("db"), &[SnapshotTable::NAME])?;
        let store = Arc::new(DbMetastore::new(Arc::new(db)));
        store.update(&mut |_| Ok(records().map(Change::Put).collect()))?;
        let root = dir.path().join("root");
        let snapshots = Arc::new(Snapshots::open(&root, Arc::clone(&store) as _)?);
        let layer = dir.path().join("layer");
        std::fs::create_dir(&layer)?;
        Ok(Self {
            socket: dir.path().join("socket"),
            _dir: dir,
            layer,
            store,
            snapshots,
        })
    }
}

/// The name of a layer's snapshot, which for containerd is a text.
fn name(image: usize, layer: usize) -> String {
    format!("lazarette/{}", digest(image, layer).hex())
}

fn digest(image: usize, layer: usize) -> Digest {
    Digest::sha256(format!("{image} {layer}").as_bytes())
}

/// As containerd's CRI plugin has them: it says of each layer which image it is of, and which
/// layers follow.
fn labels(image: usize, layer: usize) -> Labels {
    let above: Vec<_> = (layer..LAYERS)
        .map(|layer| digest(image, layer).to_string())
        .collect();
    let reference = format!("registry.example.com/team/service-{image}:1.2.3");
    let labels = [
        ("snapshot.ref", digest(image, layer).to_string()),
        ("snapshot/remote", "remote snapshot".to_owned()),
        ("snapshot/cri.image-ref", reference),
        (
            "snapshot/cri.manifest-digest",
            digest(image, 99).to_string(),
        ),
        (
            "snapshot/cri.layer-digest",
            digest(image, layer).to_string(),
        ),
        ("snapshot/cri.image-layers", above.join(",")),
    ];
    let long = |(key, value)| (format!("containerd.io/{key}"), value);
    labels.into_iter().map(long).collect()
}

fn records() -> impl Iterator<Item = Record> {
    let record = |image, layer| {
        let is_layer = layer < LAYERS;
        let digest = digest(image, layer);
        let number = image * CONTAINERS + layer;
        Record {
            key: match is_layer {
                true => name(image, layer),
                false => format!("k8s.io/{number}/{}", digest.hex()),
            },
            kind: match is_layer {
                true => Kind::Committed,
                false => Kind::Active,
            },
            parent: (layer > 0).then(|| name(image, layer.min(LAYERS) - 1)),
            content: match is_layer {
                true => Content::Layer(digest),
                false => Content::Directory(number as u64),
            },
            labels: match is_layer {
                true => labels(image, layer),
                false => Labels::new(),
            },
            created: 1_700_000_000,
            updated: 1_700_000_000,
            usage: is_layer.then(Usage::default),
        }
    };
    (0..ALL).map(move |n| record(n / (LAYERS + CONTAINERS), n % (LAYERS + CONTAINERS)))
}

/// Times lists by `list`, which says how many there were.
fn lists(
    node: &Node,
    rounds: usize,
    by: &str,
    list: &mut dyn FnMut() -> Result<usize>,
) -> Result<()> {
    let mut timed = || -> Result<Duration> {
        let began = Instant::now();
        let count = list()?;
        let took = began.elapsed();
        ensure!(count == ALL, "{count} were listed");
        Ok(took)
    };
    let (mut opening, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        node.store.release();
        opening.push(timed()?);
        node.store.release();
        // Opens it.
        node.snapshots.stat(&name(0, 0))?;
        cold.push(timed()?);
        warm.push(timed()?);
    }
    for (what, took) in [("opening", opening), ("cold", cold), ("warm", warm)] {
        let [median, slowest] = at(took, [50, 100])?;
        println!("{by:>8} {what:>8}: {median:>10.1?} {slowest:>10.1?}");
    }
    Ok(())
}

/// Times containers that `prepare` makes, which says how many mounts they have.
fn prepares(
    node: &Node,
    by: &str,
    prepare: &mut dyn FnMut(&str, &str) -> Result<usize>,
) -> Result<()> {
    let mut took = Vec::new();
    for number in 0..PREPARED {
        let key = format!("k8s.io/{number}/{by}");
        let parent = name(number % IMAGES, LAYERS - 1);
        let began = Instant::now();
        let mounts = prepare(&key, &parent)?;
        took.push(began.elapsed());
        ensure!(mounts == 1, "{mounts} mounts");
    }
    for number in 0..PREPARED {
        node.snapshots.remove(&format!("k8s.io/{number}/{by}"))?;
    }
    let [median, slow] = at(took, [50, 99])?;
    println!("{by:>8}         : {median:>10.1?} {slow:>10.1?}");
    Ok(())
}

/// The durations below which so many in a hundred are.
fn at<const N: usize>(mut took: Vec<Duration>, percents: [usize; N]) -> Result<[Duration; N]> {
    took.sort_unstable();
    let last = took.len().checked_sub(1).context("no rounds")?;
    Ok(percents.map(|percent| took[(took.len() * percent / 100).min(last)]))
}
