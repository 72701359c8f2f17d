//! What a node does until its power fails: snapshots come and go, and a container reads the
//! layers of an image while others evict from them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::{join, join_all};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::types::Digest;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::{WORKERS, container_of};
use crate::grpc::bed::{EVICTABLE, clean, files, mount, program};
use crate::grpc::crash::log::{Known, Log, What};
use crate::grpc::crash::work::Worker;
use crate::grpc::crash::{Image, LAYERS};
use crate::grpc::{Node, Wanted, chain, config, push_two_with};
use crate::support::{File, Layer, Pushed, estargz, gzipped, tar};
use crate::sys;

/// Times that a node is stopped and started again.
const SESSIONS: u64 = 4;
/// What each worker does in one of them.
const STEPS: usize = 12;
/// Files that are read of the data in one of them.
const READS: usize = 24;
/// Between two times that the kernel is made to write.
const STIR_PAUSE: Duration = Duration::from_millis(30);

/// An image that is read in pieces: a layer that comes lazily, and one that is streamed on it.
pub(super) struct Data {
    /// What its files hold.
    pub(super) content: BTreeMap<String, Vec<u8>>,
    pub(super) layers: [Digest; 2],
}

impl Data {
    pub(super) fn push(registry: &FakeRegistry) -> (Image, Self) {
        let mut content = BTreeMap::new();
        let mut layer = |name, pack: fn(Vec<u8>) -> Layer| {
            let files = files::of_layer(name, 1);
            let list = files.iter().map(|(path, bytes)| File {
                path,
                mode: 0o644,
                bytes,
            });
            let layer = pack(tar(&list.collect::<Vec<_>>()));
            content.extend(files);
            layer
        };
        let (base, top) = (layer("base", estargz), layer("top", gzipped));
        let pushed = push_two_with(registry, [&base, &top], "data", &serde_json::json!({}));
        let layers = [&base, &top].map(|layer| Digest::sha256(&layer.blob));
        let image = Image {
            pushed: Pushed {
                reference: pushed.reference,
            },
            chains: [base.diff_id, chain(&base, &top)],
            blobs: layers,
        };
        (image, Self { content, layers })
    }
}

/// Brings the image, unless it is here.
async fn bring(node: &Node, image: &Image, log: &Mutex<Log>) -> String {
    let mut parent = String::new();
    for (number, name) in image.names().into_iter().enumerate() {
        let wanted = Wanted {
            image: &image.pushed,
            chain_id: image.chains[number],
            blob: image.blobs[number],
            all: &image.blobs[number..],
        };
        let known = Known {
            parent: parent.clone(),
            what: What::Layer(number),
        };
        log.lock().ask(WORKERS, vec![(name.clone(), Some(known))]);
        assert_eq!(node.bring(&parent, &wanted).await, name);
        log.lock().answered(WORKERS);
        parent = name;
    }
    parent
}

/// A file that a container wrote and synced.
pub(super) struct Synced {
    /// Of the container's snapshot.
    pub(super) key: String,
    pub(super) name: String,
    /// When it was synced.
    pub(super) at: u64,
}

/// What such a file holds.
pub(super) fn content_of(name: &str) -> Vec<u8> {
    name.repeat(2000).into_bytes()
}

/// Writes a file as a database does: its bytes, and its name.
fn write_synced(dir: &Path, name: &str) {
    let mut file = fs::File::create(dir.join(name)).unwrap();
    file.write_all(&content_of(name)).unwrap();
    file.sync_all().unwrap();
    fs::File::open(dir).unwrap().sync_all().unwrap();
}

/// Reads some of the files, and has all of what was read evicted in between.
async fn read(dir: &Path, data: &Data, rng: &mut StdRng) {
    let store = Store::open(dir.join("root")).unwrap();
    let paths: Vec<_> = data.content.keys().collect();
    for number in 0..READS {
        let path = paths[rng.random_range(0..paths.len())];
        let at = container_of(dir).join(path);
        let read = tokio::task::spawn_blocking(move || fs::read(at));
        assert!(read.await.unwrap().unwrap() == data.content[path], "{path}");
        if number % 9 != 8 {
            continue;
        }
        let digest = data.layers[rng.random_range(0..2)];
        let store = Arc::clone(&store);
        let evict = move || {
            let layer = store.open_layer(&digest).unwrap().unwrap();
            // Refused while somebody serves it by itself.
            let _ = layer.evict_all();
        };
        tokio::task::spawn_blocking(evict).await.unwrap();
    }
}

/// Has the kernel write to the disk whatever it has not written yet, at any time and in any
/// order, and flush nothing: what it does with memory that it wants back, in seconds and not
/// hours. Until it is dropped.
struct Stirring {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stirring {
    fn start(root: PathBuf) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let stopped = Arc::clone(&stop);
        let stir = move || {
            while !stopped.load(Ordering::Relaxed) {
                stir(&root);
                std::thread::sleep(STIR_PAUSE);
            }
        };
        let thread = Some(std::thread::spawn(stir));
        Self { stop, thread }
    }
}

impl Drop for Stirring {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || std::thread::panicking());
    }
}

/// What vanishes meanwhile is left out.
fn stir(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => stir(&entry.path()),
            Ok(kind) if kind.is_file() => {
                if let Ok(file) = fs::File::open(entry.path()) {
                    sys::forget(&file);
                }
            }
            Ok(_) | Err(_) => {}
        }
    }
}

/// Works in some sessions; what was synced meanwhile, by the time of `clock`.
pub(super) async fn work(
    dir: &Path,
    (images, data): (&[Image], &Data),
    log: &Mutex<Log>,
    clock: impl Fn() -> u64,
) -> Vec<Synced> {
    let _stirring = Stirring::start(dir.join("root"));
    let mut synced = Vec::new();
    for session in 0..SESSIONS {
        let mut rng = StdRng::seed_from_u64(session);
        let file = config(dir, "20s", EVICTABLE);
        let (node, _) = Node::open_as(&program("laz-mountd"), file).await;
        let image = &images[images.len() - 1];
        let top = bring(&node, image, log).await;
        let key = format!("container-{session}");
        let active = Known {
            parent: top.clone(),
            what: What::Active,
        };
        log.lock().ask(WORKERS, vec![(key.clone(), Some(active))]);
        let mounts = node.prepare(&key, &top, None).await.unwrap();
        log.lock().answered(WORKERS);
        let container = container_of(dir);
        mount(&mounts, &container);
        for name in ["first", "second"] {
            let (at, name) = (container.clone(), name.to_owned());
            let write = {
                let name = name.clone();
                move || write_synced(&at, &name)
            };
            tokio::task::spawn_blocking(write).await.unwrap();
            let (key, at) = (key.clone(), clock());
            synced.push(Synced { key, name, at });
        }
        let worker = |number: usize| {
            let worker = Worker {
                number,
                node: &node,
                images: &images[number * (LAYERS - 1)..][..LAYERS - 1],
                log,
                mounts_at: Some(dir.join(format!("worker-{number}"))),
            };
            let mut rng = StdRng::seed_from_u64(100 * session + number as u64);
            async move {
                for _ in 0..STEPS {
                    worker.step(&mut rng, dir).await;
                }
            }
        };
        join(
            join_all((0..WORKERS).map(worker)),
            read(dir, data, &mut rng),
        )
        .await;
        sys::detach(&container);
        node.close().await;
    }
    clean(dir);
    synced
}
