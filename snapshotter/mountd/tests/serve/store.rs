//! A store of one layer on disk, as small as can be, that keeps the rules the real one keeps:
//! the number changes before a hole is made, and whoever makes one has the lock.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::sys;

pub(crate) const PAGE: u64 = 4096;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a page of any layer holds; never a zero.
pub(crate) fn content(page: u64) -> Vec<u8> {
    let mut random = Random(page);
    let words = (0..PAGE / 8).map(|_| random.next() | 0x0101_0101_0101_0101);
    words.flat_map(u64::to_le_bytes).collect()
}

/// One layer, open in this process.
pub(crate) struct Layer {
    pub(crate) pages: u64,
    dir: PathBuf,
    data: File,
    /// A byte per page: whether it is there.
    present: File,
    number: File,
}

impl Layer {
    pub(crate) fn create(dir: &Path, pages: u64) {
        fs::create_dir_all(dir).unwrap();
        File::create(dir.join("data"))
            .unwrap()
            .set_len(pages * PAGE)
            .unwrap();
        fs::write(
            dir.join("present"),
            vec![0; usize::try_from(pages).unwrap()],
        )
        .unwrap();
        fs::write(dir.join("number"), [0; 8]).unwrap();
        File::create(dir.join("lock")).unwrap();
    }

    pub(crate) fn open(dir: &Path) -> Self {
        let open = |name| {
            File::options()
                .read(true)
                .write(true)
                .open(dir.join(name))
                .unwrap()
        };
        let data = open("data");
        Self {
            pages: data.metadata().unwrap().len() / PAGE,
            dir: dir.to_path_buf(),
            data,
            present: open("present"),
            number: open("number"),
        }
    }

    /// What a server gets: its own open files of data and number.
    pub(crate) fn lend(&self) -> [File; 2] {
        ["data", "number"].map(|name| File::open(self.dir.join(name)).unwrap())
    }

    fn lock(&self) -> File {
        let lock = File::open(self.dir.join("lock")).unwrap();
        lock.lock().unwrap();
        lock
    }

    fn is_present(&self, page: u64) -> bool {
        let mut byte = [0];
        self.present.read_exact_at(&mut byte, page).unwrap();
        byte == [1]
    }

    /// Writes what is absent; the store's number while all of it was there.
    pub(crate) fn fill(&self, pages: std::ops::Range<u64>) -> u64 {
        let _lock = self.lock();
        for page in pages {
            if !self.is_present(page) {
                self.data.write_all_at(&content(page), page * PAGE).unwrap();
                self.present.write_all_at(&[1], page).unwrap();
            }
        }
        self.number_now()
    }

    pub(crate) fn number_now(&self) -> u64 {
        let mut bytes = [0; 8];
        self.number.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Says that something was evicted, somewhere in the store.
    pub(crate) fn advance(&self) {
        let next = self.number_now() + 1;
        self.number.write_all_at(&next.to_le_bytes(), 0).unwrap();
    }

    /// Makes a hole; `false` if somebody keeps that from happening. `between` runs where a
    /// process that dies does the most harm.
    pub(crate) fn evict(&self, pages: std::ops::Range<u64>, between: impl Fn()) -> bool {
        let _lock = self.lock();
        if !sys::lock_to_evict(&self.data) {
            return false;
        }
        for page in pages.clone() {
            self.present.write_all_at(&[0], page).unwrap();
        }
        self.advance();
        between();
        for page in pages {
            sys::punch(&self.data, page * PAGE, PAGE);
            between();
        }
        sys::unlock(&self.data);
        true
    }
}
