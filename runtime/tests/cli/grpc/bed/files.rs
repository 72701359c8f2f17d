//! A container's files, and threads that read them.
//!
//! Promise: every read is compared byte for byte, fails as is expected of it and in no other way,
//! and ends: one that hangs fails the test, with what it read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::content::noise;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::WAIT_MAX;
use crate::sys;

/// What a read fails with that cannot be answered now.
pub(in super::super) const EIO: i32 = 5;
/// What may come in its place once nobody is left who could answer.
const ENOTCONN: i32 = 107;

/// Bytes of a chunk of the layers.
const CHUNK: usize = 64 << 10;
/// Files of each layer.
const FILES: u32 = 18;

/// A container's files.
pub(in super::super) struct Files {
    pub(in super::super) rootfs: PathBuf,
    content: BTreeMap<String, Vec<u8>>,
    log: PathBuf,
}

impl Files {
    /// Those of a container whose daemon logs in `dir`.
    pub(super) fn new(rootfs: PathBuf, content: BTreeMap<String, Vec<u8>>, dir: &Path) -> Self {
        let log = dir.join("lazd.log");
        Self {
            rootfs,
            content,
            log,
        }
    }

    /// The same of another mount of the container.
    pub(super) fn at(&self, rootfs: &Path) -> Self {
        Self {
            rootfs: rootfs.to_path_buf(),
            content: self.content.clone(),
            log: self.log.clone(),
        }
    }

    /// Reads everything from the disk, as far as the kernel can be made to forget it.
    pub(in super::super) fn read_all(&self) {
        for path in self.content.keys() {
            self.read(path)
                .unwrap_or_else(|e| panic!("{path}: {e}: {}", self.log()));
        }
    }

    /// Reads a file anew. It may fail with [`EIO`], and in no other way.
    pub(in super::super) fn read(&self, path: &str) -> io::Result<()> {
        self.read_or(path, &[EIO])
    }

    /// The same for a read that may fail with these.
    fn read_or(&self, path: &str, errors: &[i32]) -> io::Result<()> {
        let read = within(path, self.rootfs.join(path));
        match read.unwrap_or_else(|hangs| panic!("{hangs}: {}", self.log())) {
            Ok(bytes) => {
                let right = bytes == self.content[path];
                assert!(right, "wrong bytes in {path}: {}", self.log());
                Ok(())
            }
            Err(error) => {
                let is_known = |errno| errors.contains(&errno);
                let known = error.raw_os_error().is_some_and(is_known);
                assert!(known, "{path}: {error}: {}", self.log());
                Err(error)
            }
        }
    }

    /// Files that cannot be read now.
    pub(in super::super) fn failing(&self) -> usize {
        let failing = self.content.keys().filter(|path| self.read(path).is_err());
        failing.count()
    }

    /// The same after the mount server and its guard died both: then it is the kernel that answers.
    pub(in super::super) fn failing_unguarded(&self) -> usize {
        let read = |path: &&String| self.read_or(path, &[EIO, ENOTCONN]);
        self.content
            .keys()
            .filter(|path| read(path).is_err())
            .count()
    }

    /// Reads until all of it can be read.
    pub(in super::super) fn wait_until_readable(&self) {
        let since = Instant::now();
        while self.failing() > 0 {
            assert!(since.elapsed() < WAIT_MAX, "never again: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many names are to be seen; nothing of contents is read.
    pub(in super::super) fn names(&self) -> usize {
        let dirs = fs::read_dir(&self.rootfs).unwrap();
        let names = dirs.map(|dir| fs::read_dir(dir.unwrap().path()).unwrap().count());
        names.sum()
    }

    /// Writes all of them there, for others to compare with; how many bytes they have.
    pub(in super::super) fn copy_to(&self, dir: &Path) -> u64 {
        let copy = |(path, bytes): (&String, &Vec<u8>)| {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
            bytes.len() as u64
        };
        self.content.iter().map(copy).sum()
    }

    /// Their first bytes, `len` at most, in pieces as layers have them as chunks.
    pub(in super::super) fn pieces(&self, len: usize) -> Vec<Vec<u8>> {
        let pieces = self.content.values().flat_map(|bytes| bytes.chunks(CHUNK));
        let pieces = pieces.take(len.div_ceil(CHUNK)).map(<[u8]>::to_vec);
        pieces.collect()
    }

    /// Whether these are the bytes of a file.
    pub(in super::super) fn is(&self, path: &str, bytes: &[u8]) -> bool {
        self.content[path] == bytes
    }

    /// How many there are.
    pub(in super::super) fn count(&self) -> usize {
        self.content.len()
    }

    pub(in super::super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Threads that read everything, until they are dropped. What they read must be right.
pub(in super::super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    right: AtomicU64,
    failed: AtomicU64,
}

impl Readers {
    pub(in super::super) fn start(files: &Arc<Files>, count: u64) -> Self {
        let shared: Arc<Shared> = Arc::default();
        let start = |seed| {
            let (files, shared) = (Arc::clone(files), Arc::clone(&shared));
            std::thread::spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                let paths: Vec<_> = files.content.keys().collect();
                while !shared.stop.load(Ordering::Relaxed) {
                    let path = paths[rng.random_range(0..paths.len())];
                    let counter = match files.read(path) {
                        Ok(()) => &shared.right,
                        Err(_) => &shared.failed,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..count).map(start).collect();
        Self { shared, threads }
    }

    pub(in super::super) fn right(&self) -> u64 {
        self.shared.right.load(Ordering::Relaxed)
    }

    pub(in super::super) fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits until `count` more files were read, and no reader has found anything wrong.
    pub(in super::super) fn wait_for(&self, count: u64) {
        let (goal, since) = (self.right() + count, Instant::now());
        while self.right() < goal {
            assert!(
                !self.threads.iter().any(JoinHandle::is_finished),
                "a reader failed"
            );
            assert!(since.elapsed() < WAIT_MAX, "readers hang");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends them; whatever one of them met is met here. Each of their reads ends.
    pub(in super::super) fn end(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// The files of a layer, none with a zero in it: a hole is not mistaken for one.
pub(in super::super) fn of_layer(layer: &str, times: usize) -> BTreeMap<String, Vec<u8>> {
    let file = |number: u32| {
        let len = [1, 100, 4096, 5000, 70_000 * times, 300_000 * times][number as usize % 6];
        let seed = number + 1000 * u32::try_from(layer.len()).unwrap();
        let bytes = noise(seed, 0xff, len)
            .into_iter()
            .map(|byte| byte | 1)
            .collect();
        (format!("{layer}/f{number}"), bytes)
    };
    (0..FILES).map(file).collect()
}

/// Reads a file in a thread of its own, which is left behind where it hangs; an error then.
fn within(name: &str, path: PathBuf) -> Result<io::Result<Vec<u8>>, String> {
    let (done, read) = sync_channel(1);
    // Nobody may be there to be told.
    std::thread::spawn(move || drop(done.send(read_anew(&path))));
    let read = read.recv_timeout(WAIT_MAX);
    read.map_err(|_| format!("reading {name} has not ended after {WAIT_MAX:?}"))
}

fn read_anew(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    sys::forget(&file);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
