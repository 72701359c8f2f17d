//! What a lazy layer costs through each of the mount server's backends, beside ext4: filling it
//! by reading in order, the first read of small files, and single pages of what is filled; then,
//! mounted anew with everything granted and nothing read, the same in order and shuffled.
//! Needs root, `laz-mountd` beside this program, and half a GiB of disk. What fetches is a copy from
//! a file that is in memory, so what is measured is the way of the data and nothing before it.
//!
//!     cargo bench --workspace --bench backends --profile dev [-- ROUNDS]

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::store::{Kept, Lent, Vouched};
use lazarette_fetcher::types::{ByteRange, Digest};
use lazarette_snapshotter::data::{Filling, LayerData};
use lazarette_snapshotter::mountd::{LentData, MountServer, Place, Shown, Through};
use lazarette_snapshotter::tree::Tree;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tokio::runtime::Runtime;

const BIG: u64 = 128 << 20;
/// The same, MiB.
const BIG_MIB: f64 = 128.0;
const SMALL: u64 = 8 << 10;
const SMALLS: u64 = 4000;
/// Small files that are read last.
const LEFT: u64 = 300;
/// The others.
const SMALLS_FIRST: f64 = 3700.0;
/// Half of all.
const SMALLS_HALF: f64 = 2000.0;
const LEN: u64 = BIG + SMALL * SMALLS;
/// What is fetched at a time.
const CHUNK: u64 = 1 << 20;
const PAGES: u32 = 20_000;

/// A layer's data, copied from elsewhere when it is asked for.
struct Copied {
    source: File,
    dir: PathBuf,
    data: File,
    present: Vec<AtomicBool>,
}

type Fetched<T> = lazarette_fetcher::Result<T>;

impl Copied {
    fn new(source: &Path, dir: &Path) -> Result<Self> {
        let path = dir.join("data");
        let mut options = File::options();
        let data = options.read(true).write(true).create(true).truncate(true);
        let data = data.open(path)?;
        data.set_len(LEN)?;
        fs::write(dir.join("evictions"), [0; 8])?;
        Ok(Self {
            source: File::open(source)?,
            dir: dir.to_path_buf(),
            data,
            present: (0..LEN.div_ceil(CHUNK))
                .map(|_| AtomicBool::new(false))
                .collect(),
        })
    }

    fn chunks(&self, range: ByteRange) -> impl Iterator<Item = (u64, &AtomicBool)> {
        let (first, last) = (range.start() / CHUNK, range.end().div_ceil(CHUNK));
        let all = (0..).zip(&self.present);
        all.filter(move |(at, _)| (first..last).contains(at))
    }

    fn copy(&self, range: ByteRange) -> io::Result<()> {
        for (at, present) in self.chunks(range) {
            let len = CHUNK.min(LEN - at * CHUNK);
            let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
            self.source.read_exact_at(&mut bytes, at * CHUNK)?;
            self.data.write_all_at(&bytes, at * CHUNK)?;
            present.store(true, Ordering::Release);
        }
        Ok(())
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> lazarette_fetcher::Error {
    move |source| lazarette_fetcher::Error::io("copy", path, source)
}

impl LayerData for Copied {
    fn try_read(&self, _: u64, _: &mut [u8]) -> Fetched<bool> {
        Ok(false)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        Box::pin(async move { self.copy(range).map_err(failed(&self.dir)) })
    }

    fn keep(&self) -> Fetched<Kept> {
        Ok(Kept::default())
    }
}

impl LentData for Copied {
    fn lend(&self) -> Fetched<Lent> {
        let open = |name| File::open(self.dir.join(name)).map_err(failed(&self.dir));
        Ok(Lent {
            data: open("data")?,
            evictions: open("evictions")?,
        })
    }

    fn vouch(&self, range: ByteRange) -> Fetched<Option<Vouched>> {
        let is_there = |(_, present): (u64, &AtomicBool)| present.load(Ordering::Acquire);
        let there = self.chunks(range).all(is_there);
        let start = range.start() / CHUNK * CHUNK;
        let end = range.end().next_multiple_of(CHUNK).min(LEN);
        let around = ByteRange::new(start, end).filter(|_| there);
        Ok(around.map(|range| Vouched {
            range,
            evictions: 0,
        }))
    }

    fn pad(&self) -> Fetched<()> {
        Ok(())
    }
}

fn index() -> LayerIndex {
    let file = |path: String, size, data_offset| FileEntry {
        path: path.into_bytes(),
        kind: FileKind::Regular { size, data_offset },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    let small = |number| file(format!("small/{number}"), SMALL, BIG + number * SMALL);
    let mut files = vec![file("big".to_owned(), BIG, 0)];
    files.extend((0..SMALLS).map(small));
    LayerIndex {
        blob_digest: Digest::sha256(b"layer"),
        blob_size: LEN,
        format: LayerFormat::Tar,
        files,
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len: LEN,
    }
}

/// MiB/s of the big file, and microseconds for a small file, for a page of the big one, and
/// for one that the kernel asks about no more; then, of what is there and was not read through
/// this mount: MiB/s, and microseconds for a small file in order, for one out of order, and for
/// a page.
type Row = [f64; 8];
type First = [f64; 4];

/// Reads all of it; `between` runs before the pages that are asked about no more, `forget`
/// before all pages.
fn measure(
    root: &Path,
    forget: impl Fn(&Path) -> Result<()>,
    between: impl FnOnce() -> Result<()>,
) -> Result<First> {
    let seq = in_order(&root.join("big"))?;
    let began = Instant::now();
    // Not all of them: a layer that is complete is asked about no more.
    read_small(root, 0..SMALLS - LEFT)?;
    let small = began.elapsed().as_secs_f64() * 1e6 / SMALLS_FIRST;
    forget(&root.join("big"))?;
    let first = pages(&root.join("big"))?;
    read_small(root, SMALLS - LEFT..SMALLS)?;
    between()?;
    forget(&root.join("big"))?;
    Ok([seq, small, first, pages(&root.join("big"))?])
}

/// Reads what is there through a mount that has nothing yet.
fn measure_again(root: &Path, forget: impl Fn(&Path) -> Result<()>) -> Result<First> {
    let big = root.join("big");
    let seq = in_order(&big)?;
    forget(&big)?;
    let half = SMALLS / 2;
    let began = Instant::now();
    read_small(root, 0..half)?;
    let ordered = began.elapsed().as_secs_f64() * 1e6 / SMALLS_HALF;
    let mut others: Vec<u64> = (half..SMALLS).collect();
    others.shuffle(&mut StdRng::seed_from_u64(3));
    let began = Instant::now();
    read_small(root, others)?;
    let shuffled = began.elapsed().as_secs_f64() * 1e6 / SMALLS_HALF;
    Ok([seq, ordered, shuffled, pages(&big)?])
}

/// MiB/s of the big file.
fn in_order(big: &Path) -> Result<f64> {
    let mut buf = vec![0; 1 << 20];
    let began = Instant::now();
    let mut big = File::open(big)?;
    while big.read(&mut buf)? > 0 {}
    Ok(BIG_MIB / began.elapsed().as_secs_f64())
}

fn read_small(root: &Path, numbers: impl IntoIterator<Item = u64>) -> Result<()> {
    for number in numbers {
        File::open(root.join(format!("small/{number}")))?.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

/// Has the kernel forget what it has of a file; what is below keeps its own.
fn forget(path: &Path) -> Result<()> {
    let gone = Command::new("dd")
        .args(["of=/dev/null", "count=0", "iflag=nocache", "status=none"])
        .arg(format!("if={}", path.display()))
        .status()?;
    ensure!(gone.success(), "dd failed");
    Ok(())
}

fn pages(path: &Path) -> Result<f64> {
    let file = File::open(path)?;
    let mut rng = StdRng::seed_from_u64(1);
    let mut page = [0; 4096];
    let began = Instant::now();
    for _ in 0..PAGES {
        file.read_exact_at(&mut page, rng.random_range(0..BIG / 4096) * 4096)?;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(PAGES))
}

fn through(through: Through, source: &Path, dir: &Path, runtime: &Runtime) -> Result<Row> {
    let dir = dir.join(format!("{through:?}"));
    fs::create_dir_all(&dir)?;
    let data = Arc::new(Copied::new(source, &dir)?);
    let program = std::env::current_exe()?;
    let program = program
        .ancestors()
        .nth(2)
        .context("no directory")?
        .join("laz-mountd");
    let (server, _) =
        MountServer::connect_or_start(&dir.join("socket"), &program, runtime.handle().clone())?;
    let index = index();
    let shown = Shown {
        blob_digest: index.blob_digest,
        tree: &Tree::build(&index)?,
        data: Arc::clone(&data) as _,
        through,
    };
    let place = Place {
        path: &dir.join("mnt"),
        metadata: &dir.join("metadata"),
    };
    let mounted = server.mount_shown(&shown, place)?;
    let row = measure(&mounted.path, forget, || {
        ensure!(
            server.tell_complete(&mounted, data.as_ref(), LEN)?,
            "not complete"
        );
        Ok(())
    });
    server.unmount_layer(&mounted)?;
    let mounted = server.mount_shown(&shown, place)?;
    ensure!(
        server.tell_complete(&mounted, data.as_ref(), LEN)?,
        "not complete"
    );
    let again = measure_again(&mounted.path, forget);
    drop(shown);
    server.unmount_layer(&mounted)?;
    drop(server);
    end_server(&dir.join("socket"))?;
    fs::remove_dir_all(&dir)?;
    Ok(joined(row?, again?))
}

fn joined(first: First, again: First) -> Row {
    let mut row = [0.0; 8];
    for (to, from) in row.iter_mut().zip(first.into_iter().chain(again)) {
        *to = from;
    }
    row
}

/// Ends whoever serves at a socket. Its guard has nothing to hold, and ends by itself.
fn end_server(socket: &Path) -> Result<()> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let args = fs::read(path.join("cmdline")).unwrap_or_default();
        let mut args = args.split(|byte| *byte == 0).skip(1);
        let first = args.next().unwrap_or_default();
        let second = args.next().unwrap_or_default();
        let is_it = first == b"--socket" && second == socket.as_os_str().as_encoded_bytes();
        if let (true, Some(pid)) = (is_it, path.file_name()) {
            let ended = Command::new("kill").arg(pid).status()?;
            ensure!(ended.success(), "the server goes on");
        }
    }
    Ok(())
}

fn native(source: &Path, dir: &Path) -> Result<Row> {
    let dir = dir.join("native");
    fs::create_dir_all(dir.join("small"))?;
    let source = File::open(source)?;
    let mut bytes = vec![0; usize::try_from(BIG)?];
    source.read_exact_at(&mut bytes, 0)?;
    fs::write(dir.join("big"), &bytes)?;
    for number in 0..SMALLS {
        let mut bytes = vec![0; usize::try_from(SMALL)?];
        source.read_exact_at(&mut bytes, BIG + number * SMALL)?;
        fs::write(dir.join(format!("small/{number}")), bytes)?;
    }
    let row = measure(&dir, |_| Ok(()), || Ok(()));
    let again = measure_again(&dir, |_| Ok(()));
    fs::remove_dir_all(&dir)?;
    Ok(joined(row?, again?))
}

fn main() -> Result<()> {
    if !std::env::args().any(|arg| arg == "--bench") {
        println!("SKIPPED: this measures, by cargo bench, and tests nothing");
        return Ok(());
    }
    let number = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let rounds: usize = number.unwrap_or(5);
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("source");
    let mut rng = StdRng::seed_from_u64(2);
    let mut out = File::create(&source)?;
    let mut bytes = vec![0; usize::try_from(CHUNK)?];
    let mut left = LEN;
    while left > 0 {
        rng.fill_bytes(&mut bytes);
        let len = left.min(CHUNK);
        out.write_all(bytes.get(..usize::try_from(len)?).unwrap_or_default())?;
        left -= len;
    }
    let runtime = Runtime::new()?;
    let mut rows: [Vec<Row>; 3] = Default::default();
    for _ in 0..rounds {
        let [fuse, fanotify, ext4] = &mut rows;
        fuse.push(through(Through::Fuse, &source, dir.path(), &runtime)?);
        fanotify.push(through(Through::Fanotify, &source, dir.path(), &runtime)?);
        ext4.push(native(&source, dir.path())?);
    }
    println!("medians of {rounds}: MiB/s in order; us per small file, page, page when complete;");
    println!("there and not read: MiB/s in order; us per small file, one out of order, page");
    for (name, rows) in ["erofs over fuse", "fanotify", "native"].iter().zip(&rows) {
        let column = |at: usize| {
            let mut all: Vec<f64> = rows.iter().filter_map(|row| row.get(at).copied()).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        let [seq, small, page, complete] = [0, 1, 2, 3].map(column);
        print!("{name:16} {seq:8.0} {small:8.1} {page:8.1} {complete:8.1}");
        let [seq, small, other, page] = [4, 5, 6, 7].map(column);
        println!("  {seq:8.0} {small:8.1} {other:8.1} {page:8.1}");
    }
    Ok(())
}
