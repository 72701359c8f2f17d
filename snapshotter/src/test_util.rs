//! What the tests of this crate share: layers made by hand and data that obeys the test.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use lazarette_fetcher::db::{Db, Table as _};
use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::store::Kept;
use lazarette_fetcher::types::{ByteRange, Digest};
use lazarette_fetcher::{Error, Result};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::data::{Filling, LayerData};
use crate::metastore::{DbMetastore, SnapshotTable};
use crate::sys;
use crate::tree::Tree;

/// Whether this process is root; if not, says loudly that `test` does not run.
pub(crate) fn must_be_root(test: &str) -> bool {
    if !sys::is_root() {
        // Not through print!, which a passing test swallows.
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
    }
    sys::is_root()
}

/// Records of snapshots in a database in this directory.
pub(crate) fn database(dir: &Path) -> Arc<DbMetastore> {
    let db = Db::open(dir.join("db"), &[SnapshotTable::NAME]).unwrap();
    Arc::new(DbMetastore::new(Arc::new(db)))
}

/// Makes two tests, for root, of each function that takes a backend.
macro_rules! on_each_backend {
    ($($name:ident)*) => {
        on_each_backend!(@ through_fuse Fuse $($name)*);
        on_each_backend!(@ through_erofs Erofs $($name)*);
    };
    (@ $module:ident $backend:ident $($name:ident)*) => {
        mod $module {
            use crate::fuse::Backend;
            $(
                #[test]
                fn $name() {
                    let test = concat!(stringify!($module), "::", stringify!($name));
                    if crate::test_util::must_be_root(test) {
                        super::$name(Backend::$backend);
                    }
                }
            )*
        }
    };
}
pub(crate) use on_each_backend;

/// A layer that is being made up, with its data.
pub(crate) struct LayerBuilder {
    name: &'static str,
    files: Vec<FileEntry>,
    data: Vec<u8>,
}

impl LayerBuilder {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            files: Vec::new(),
            data: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, path: &str, kind: FileKind) -> &mut FileEntry {
        self.files.push(FileEntry {
            path: path.as_bytes().to_vec(),
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        });
        self.files.last_mut().unwrap()
    }

    pub(crate) fn dir(&mut self, path: &str) -> &mut FileEntry {
        self.add(path, FileKind::Directory)
    }

    pub(crate) fn file(&mut self, path: &str, content: &[u8]) -> &mut FileEntry {
        let data_offset = self.data.len() as u64;
        let size = content.len() as u64;
        self.data.extend_from_slice(content);
        self.data.resize(self.data.len().next_multiple_of(4096), 0);
        self.add(path, FileKind::Regular { size, data_offset })
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        let target = target.as_bytes().to_vec();
        self.add(path, FileKind::Symlink { target });
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        let target = target.as_bytes().to_vec();
        self.add(path, FileKind::Hardlink { target });
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::sha256(self.name.as_bytes())
    }

    pub(crate) fn tree(&self) -> Arc<Tree> {
        Arc::new(Tree::build(&self.index()).unwrap())
    }

    pub(crate) fn index(&self) -> LayerIndex {
        LayerIndex {
            blob_digest: self.digest(),
            blob_size: 1,
            format: LayerFormat::Estargz,
            files: self.files.clone(),
            chunks: Vec::new(),
            spans: Vec::new(),
            data_len: self.data.len() as u64,
        }
    }

    /// The layer's data, all of it absent.
    pub(crate) fn data(&self) -> Arc<FakeData> {
        Arc::new(FakeData::new(self.data.clone()))
    }

    /// The bytes of that data.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.data.clone()
    }

    /// Where the content of a file is in the data.
    pub(crate) fn range(&self, path: &str) -> ByteRange {
        let entry = self
            .files
            .iter()
            .find(|entry| entry.path == path.as_bytes())
            .unwrap();
        match entry.kind {
            FileKind::Regular { size, data_offset } => ByteRange::at(data_offset, size).unwrap(),
            _ => panic!("{path} is no file"),
        }
    }
}

/// Data of which nothing is there until it is filled, and whose fills wait and fail when
/// the test says so.
pub(crate) struct FakeData {
    bytes: Vec<u8>,
    state: Mutex<State>,
    changed: Condvar,
    held: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    /// Per page of 4096 bytes.
    present: Vec<bool>,
    /// Fills that began.
    fills: usize,
    /// Fills that will fail.
    failures: usize,
}

impl FakeData {
    fn new(bytes: Vec<u8>) -> Self {
        let present = vec![false; bytes.len().div_ceil(4096)];
        Self {
            bytes,
            state: Mutex::new(State {
                present,
                ..State::default()
            }),
            changed: Condvar::new(),
            held: watch::channel(false).0,
        }
    }

    /// Lets fills wait from now on.
    pub(crate) fn hold(&self) {
        self.held.send_replace(true);
    }

    /// Lets them go.
    pub(crate) fn release(&self) {
        self.held.send_replace(false);
    }

    /// Blocks until `count` fills have begun since the start.
    pub(crate) fn wait_for_fills(&self, count: usize) {
        let mut state = self.state.lock();
        self.changed
            .wait_while(&mut state, |state| state.fills < count);
    }

    /// Lets the next `count` fills fail, and no more than those.
    pub(crate) fn fail_next(&self, count: usize) {
        self.state.lock().failures = count;
    }

    pub(crate) fn make_present(&self, range: ByteRange) {
        let pages = pages(range);
        self.state.lock().present[pages].fill(true);
    }
}

fn pages(range: ByteRange) -> std::ops::Range<usize> {
    let page = |offset: u64| usize::try_from(offset).unwrap();
    page(range.start() / 4096)..page(range.end().div_ceil(4096))
}

impl LayerData for FakeData {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let range = ByteRange::at(offset, buf.len() as u64).unwrap();
        if !self.state.lock().present[pages(range)]
            .iter()
            .all(|page| *page)
        {
            buf.fill(0xee);
            return Ok(false);
        }
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(true)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        Box::pin(async move {
            let fails = {
                let mut state = self.state.lock();
                state.fills += 1;
                let fails = state.failures > 0;
                state.failures = state.failures.saturating_sub(1);
                fails
            };
            self.changed.notify_all();
            let mut held = self.held.subscribe();
            let _ = held.wait_for(|held| !held).await;
            if fails {
                return Err(Error::Unavailable {
                    what: format!("bytes {range}"),
                    host: "the test".to_owned(),
                    detail: "it said so".to_owned(),
                });
            }
            self.make_present(range);
            Ok(())
        })
    }

    fn keep(&self) -> Result<Kept> {
        Ok(Kept::default())
    }
}
