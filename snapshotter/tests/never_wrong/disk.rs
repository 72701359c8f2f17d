//! Bits that flipped in the files of the store.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::source::BlobSource;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::blobs::{self, Blob};
use crate::node::{Node, Shows, assert_is_damage, evict};
use crate::read_everything;

/// Bits that flip in a file.
const FLIPS: usize = 3;
/// Times that a layer is opened until reads of it succeed: where an index was damaged, they
/// may fail until it is.
const OPENINGS_MAX: usize = 3;
/// What a start reads that the index was not shaped for.
const OTHER_HOT: [ChunkId; 3] = [20, 50, 51];

/// What is damaged, and what happens before that is read.
struct Damage {
    files: &'static [&'static str],
    /// Only the beginning of the layer is here.
    is_partial: bool,
    /// The index is shaped, by what may be damaged, and everything is evicted: so all is
    /// read by it.
    is_shaped_by: bool,
}

const fn to(files: &'static [&'static str]) -> Damage {
    Damage {
        files,
        is_partial: false,
        is_shaped_by: false,
    }
}

const fn shaped_by(files: &'static [&'static str]) -> Damage {
    Damage {
        is_shaped_by: true,
        ..to(files)
    }
}

/// What can be damaged of any layer.
const OF_ALL: [Damage; 3] = [to(&["data"]), to(&["index"]), to(&["bitmap"])];
/// What only some layers have.
const OF_SOME: [Damage; 7] = [
    to(&["learned"]),
    to(&["learned", "data"]),
    shaped_by(&["seams"]),
    shaped_by(&["entries"]),
    shaped_by(&["index.plain"]),
    to(&["index.plain", "index"]),
    Damage {
        is_partial: true,
        ..to(&["origin"])
    },
];

/// Damages one file that every layer has, another in each way to show it, and every file that
/// only some have. Panics if some kind of file was none's.
pub(crate) fn flip(shows: Shows) {
    let mut rng = StdRng::seed_from_u64(11);
    let mut done = [0; OF_SOME.len()];
    for (number, blob) in (shows as usize..).zip(blobs::all()) {
        let source: Arc<dyn BlobSource> = Arc::new(blob.serve());
        let mut node = Node::new();
        node.close(&node.open_lazily(blob, &source));
        let has = |name: &&str| node.file(blob, name).exists();
        let had = OF_SOME.map(|damage| damage.files.iter().all(has));
        let all = &OF_ALL[number % OF_ALL.len()];
        let with = (blob, &source);
        damage_and_read(&mut node, with, all, (shows, &mut rng));
        for (at, damage) in OF_SOME.iter().enumerate().filter(|(at, _)| had[*at]) {
            damage_and_read(&mut node, with, damage, (shows, &mut rng));
            done[at] += 1;
        }
    }
    assert!(!done.contains(&0), "{done:?}");
}

/// Gets the layer, damages it, and reads everything.
fn damage_and_read(
    node: &mut Node,
    (blob, source): (&Blob, &Arc<dyn BlobSource>),
    damage: &Damage,
    (shows, rng): (Shows, &mut StdRng),
) {
    let what = format!("{}, {:?} damaged, {shows:?}", blob.name, damage.files);
    node.forget(blob);
    let layer = node.open_lazily(blob, source);
    let ids = damage.is_partial.then_some(&[0][..]);
    assert!(node.fill(&layer, ids), "{what}");
    node.close(&layer);
    drop(layer);
    for name in damage.files {
        flip_bits(&node.file(blob, name), rng);
    }
    let is_clean = (0..OPENINGS_MAX).any(|_| {
        if damage.is_shaped_by {
            shape_and_evict(&node.open(blob, source).0, &what);
        }
        let layer = node.open(blob, source).0;
        let mount = node.show(&layer, shows);
        let is_clean = mount.is_some_and(|mount| {
            let read = |_| read_everything(mount.path(), &blob.content, &what);
            let is_clean = (0..3).map(read).any(|failed| failed == 0);
            node.hide(mount);
            is_clean
        });
        node.close(&layer);
        is_clean
    });
    assert!(is_clean, "{what}: some reads never succeed");
}

fn shape_and_evict(layer: &Layer, what: &str) {
    let is_there = |id: &ChunkId| (*id as usize) < layer.index().chunks.len();
    let hot: Vec<ChunkId> = OTHER_HOT.into_iter().filter(is_there).collect();
    if let Err(error) = layer.file().shape(&hot) {
        assert_is_damage(&error, what);
    }
    evict(layer);
}

fn flip_bits(path: &Path, rng: &mut StdRng) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for _ in 0..FLIPS {
        let at = rng.random_range(0..file.metadata().unwrap().len());
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 1_u8 << rng.random_range(0..8);
        file.write_all_at(&byte, at).unwrap();
    }
}
