//! The layer of these tests, and the tree that it was made of.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazarette_fetcher::index::Encoding;
use lazarette_fetcher::index::write::{Format, Options, write_layer};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tokio::runtime::Runtime;

use crate::sys;

/// What the executable prints its argument with.
pub(crate) const ECHO: &str = "bin/echo";
/// Files of two sizes by turns, for tests that need one that was never read: small files may be
/// read in another way.
pub(crate) const FRESH: usize = 96;
const FRESH_BYTES: [usize; 2] = [150_001, 60_001];
const SIZES: [usize; 10] = [
    0, 1, 100, 4095, 4096, 4097, 65_536, 70_001, 300_000, 1_500_001,
];

/// In which form the layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Short chunks, each of which can be had alone.
    Chunks,
    /// One stream of gzip, of which this node has made an index.
    Spans,
    /// Long chunks of others: the pieces of one come, and are verified, together.
    Members,
}

/// A directory with `tree`, and the blob that was made of it.
pub(crate) fn write() -> tempfile::TempDir {
    write_as(Form::Chunks)
}

/// The same in any form.
pub(crate) fn write_as(form: Form) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    write_tree(&tree);
    let tar = Command::new("tar")
        .args(["--sort=name", "--xattrs", "--xattrs-include=*", "-cf", "-"])
        .arg("-C")
        .arg(&tree)
        .arg(".")
        .output()
        .unwrap();
    assert!(tar.status.success());
    let chunk_bytes = match form {
        Form::Spans => {
            write_gzip(dir.path(), &tar.stdout);
            return dir;
        }
        Form::Chunks => 32 << 10,
        // Longer than the larger files, and shorter than two: each is a member of its own then.
        Form::Members => 160 << 10,
    };
    let options = Options {
        chunk_bytes,
        ..Options::new(Format::Estargz)
    };
    let (mut input, mut blob) = (std::io::Cursor::new(&tar.stdout), Vec::new());
    let written = write_layer("layer", &mut input, &mut blob, &options).unwrap();
    fs::write(dir.path().join("blob"), blob).unwrap();
    let mut facts = format!("{}\n", written.diff_id);
    for (key, value) in written.annotations {
        facts.push_str(&format!("{key}={value}\n"));
    }
    fs::write(dir.path().join("facts"), facts).unwrap();
    dir
}

fn write_gzip(dir: &Path, tar: &[u8]) {
    let [plain, blob] = ["plain", "blob"].map(|name| dir.join(name));
    fs::write(&plain, tar).unwrap();
    let mut gzip = Command::new("gzip");
    let gzip = gzip.args(["-n", "-c"]).arg(plain);
    let done = gzip.stdout(File::create(blob).unwrap()).status().unwrap();
    assert!(done.success());
    fs::write(dir.join("facts"), format!("{}\n", Digest::sha256(tar))).unwrap();
}

/// Has the store at `store` know of the layer in `dir` what a first start leaves, and none of its
/// bytes.
pub(crate) fn prepare(dir: &Path, store: &Path, form: Form) {
    let runtime = Runtime::new().unwrap();
    let layer = open(dir, store, &runtime);
    if form == Form::Spans {
        // All of it came, for its index.
        runtime.block_on(layer.fill_all()).unwrap();
        layer.file().evict_all().unwrap();
    }
    let encodings = layer.index().chunks.iter().map(|chunk| &chunk.encoding);
    let is_of = |encoding: &Encoding| match form {
        Form::Chunks => matches!(encoding, Encoding::GzipMember { .. }),
        Form::Spans => matches!(
            encoding,
            Encoding::GzipSpan { .. } | Encoding::WholeSpan { .. }
        ),
        Form::Members => matches!(encoding, Encoding::WholeMember { .. }),
    };
    let (of, here) = (
        encodings.filter(|it| is_of(it)).count(),
        layer.present_bytes(),
    );
    runtime.block_on(layer.close()).unwrap();
    assert!(of > 50 && here == 0, "{form:?}: {of} chunks, {here} bytes");
}

/// Never a zero, so that a hole is not mistaken for it.
fn random(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes.iter_mut().for_each(|byte| *byte |= 1);
    bytes
}

fn write_tree(tree: &Path) {
    let mut rng = StdRng::seed_from_u64(5);
    for name in ["bin", "sizes", "names", "fresh", "kinds/empty"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy("/bin/echo", tree.join(ECHO)).unwrap();
    for size in SIZES {
        fs::write(tree.join(format!("sizes/{size}")), random(&mut rng, size)).unwrap();
    }
    for number in 0..300 {
        let name = format!("names/{number}-{}", "x".repeat(number % 200));
        fs::write(tree.join(name), number.to_string()).unwrap();
    }
    for number in 0..FRESH {
        fs::write(
            tree.join(fresh(number)),
            random(&mut rng, FRESH_BYTES[number % 2]),
        )
        .unwrap();
    }
    let kinds = tree.join("kinds");
    symlink("../sizes/100", kinds.join("symlink")).unwrap();
    symlink("t".repeat(3000), kinds.join("long-symlink")).unwrap();
    fs::hard_link(tree.join("sizes/70001"), kinds.join("linked")).unwrap();
    sys::make_fifo(&kinds.join("fifo"));
    sys::make_device(&kinds.join("device"), 259, 70_000);
    fs::write(kinds.join("attributed"), "of which much is said").unwrap();
    sys::set_xattr(&kinds.join("attributed"), "user.a", b"one");
    sys::set_xattr(&kinds.join("attributed"), "user.empty", b"");
    sys::set_xattr(&kinds.join("attributed"), "trusted.long", &[7; 1500]);
    let modes = [(0o4755, "setuid"), (0o640, "group"), (0o1777, "sticky")];
    for (number, (mode, name)) in (1..).zip(modes) {
        let path = kinds.join(name);
        fs::write(&path, name).unwrap();
        std::os::unix::fs::chown(&path, Some(number * 1000), Some(number * 100_000)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }
}

/// The name of a file that nobody has read.
pub(crate) fn fresh(number: usize) -> String {
    format!("fresh/{number:02}")
}

/// What the tree has in a file.
pub(crate) fn content(dir: &Path, name: &str) -> Vec<u8> {
    fs::read(dir.join("tree").join(name)).unwrap()
}

/// The regular files of the tree, by their names.
pub(crate) fn files(dir: &Path) -> Vec<String> {
    let tree = dir.join("tree");
    let mut names = Vec::new();
    let mut todo = vec![tree.clone()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let (kind, path) = entry.map(|e| (e.file_type().unwrap(), e.path())).unwrap();
            let name = path.strip_prefix(&tree).unwrap().to_str().unwrap();
            match (kind.is_dir(), kind.is_file()) {
                (true, _) => todo.push(path),
                (_, true) => names.push(name.to_owned()),
                _ => {}
            }
        }
    }
    names.sort();
    names
}

/// The layer in the store at `store`, fetched from the blob in `dir`.
pub(crate) fn open(dir: &Path, store: &Path, runtime: &Runtime) -> Arc<Layer> {
    let blob = Bytes::from(fs::read(dir.join("blob")).unwrap());
    let facts = fs::read_to_string(dir.join("facts")).unwrap();
    let mut facts = facts.lines();
    let diff_id = Digest::parse(facts.next().unwrap()).unwrap();
    let digest = Digest::sha256(&blob);
    let mut descriptor = Descriptor::new(MediaType::OciLayerGzip, digest, blob.len() as u64);
    for fact in facts {
        let (key, value) = fact.split_once('=').unwrap();
        let (key, value) = (key.to_owned(), value.to_owned());
        descriptor.annotations.insert(key, value);
    }
    let reference = Reference::parse("example.com/a:b").unwrap();
    let request = LayerRequest::new(reference.repository().clone(), &descriptor, diff_id);
    let memory = MemorySource::new();
    memory.add_blob(blob);
    let source: Arc<dyn BlobSource> = Arc::new(memory);
    let opener = LayerOpener::new(Store::open(store).unwrap(), source);
    let opened = runtime.block_on(opener.open(&request, &AtomicU64::new(0)));
    opened.unwrap().0
}

/// The server's program, which cargo builds beside this one.
pub(crate) fn program() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let program = me.parent().unwrap().parent().unwrap().join("laz-mountd");
    let how = "build it first: cargo build --workspace --bins";
    assert!(program.exists(), "{how}");
    program
}

/// Reads a file from the layer's data, not from what the kernel remembers of it.
pub(crate) fn read_anew(path: &Path) -> std::io::Result<Vec<u8>> {
    sys::forget(&File::open(path)?);
    fs::read(path)
}

/// Evicts all of a layer, as soon as the guard has let go of a mount that has ended; how many
/// chunks were there.
#[track_caller]
pub(crate) fn evict_soon(layer: &Layer) -> u64 {
    let since = Instant::now();
    loop {
        match layer.file().evict_all() {
            Ok(evicted) => return evicted.chunks,
            Err(error) => assert!(since.elapsed() < Duration::from_secs(60), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
