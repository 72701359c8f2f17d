//! Everything that was written to a disk, in order, and what of it is left when the power goes.
//!
//! Invariant: what a flush that was answered covers is left at any later cut. Of what came after
//! the last such flush, every sector is left or lost by itself, as a disk writes its cache in
//! any order; of a sector that was written twice the older bytes may be left.
//!
//! ```text
//! record of a write   offset u64 | len u64 | len bytes     little endian
//! record of a flush   0 u64 | u64::MAX
//! ```

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// What a disk writes whole or not at all, and what is looked at together to keep images sparse.
/// Disks have sectors of this length today, and ext4 relies on it: were less of its superblock
/// written, as a mount does in place, its sum would be wrong and it could not be mounted.
const SECTOR: usize = 4096;
const ZEROS: [u8; SECTOR] = [0; SECTOR];
const HEAD: usize = 16;
const FLUSH: u64 = u64::MAX;

/// Adds to a history.
pub(super) struct Recorder(File);

impl Recorder {
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        File::create(path).map(Self)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let head = [offset, bytes.len() as u64].map(u64::to_le_bytes).concat();
        self.0.write_all(&[&head, bytes].concat())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.0.write_all(&[0, FLUSH].map(u64::to_le_bytes).concat())
    }
}

enum Entry {
    Write { offset: usize, bytes: Range<usize> },
    Flush,
}

struct Record {
    /// Where it ends in the history, which is when it was over.
    end: u64,
    entry: Entry,
}

/// All of it.
pub(crate) struct History {
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl History {
    /// Reads what was recorded so far; half a record is none.
    pub(super) fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 8)?;
            bytes.try_into().ok().map(u64::from_le_bytes)
        };
        let (mut records, mut at) = (Vec::new(), 0);
        while let (Some(offset), Some(len)) = (number(at), number(at + 8)) {
            at += HEAD;
            let entry = match len {
                FLUSH => Entry::Flush,
                _ => {
                    let written = at..at + usize::try_from(len).unwrap();
                    at = written.end;
                    Entry::Write {
                        offset: usize::try_from(offset).unwrap(),
                        bytes: written,
                    }
                }
            };
            if at > bytes.len() {
                break;
            }
            let end = at as u64;
            records.push(Record { end, entry });
        }
        Self { bytes, records }
    }

    /// When each flush was over.
    pub(crate) fn flushes(&self) -> Vec<u64> {
        let flushes = self.records.iter();
        let flushes = flushes.filter(|record| matches!(record.entry, Entry::Flush));
        flushes.map(|record| record.end).collect()
    }

    /// When each write was over.
    pub(crate) fn writes(&self) -> Vec<u64> {
        let writes = self.records.iter();
        let writes = writes.filter(|record| !matches!(record.entry, Entry::Flush));
        writes.map(|record| record.end).collect()
    }
}

/// What becomes of what no flush covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loses {
    /// All of it is lost.
    All,
    /// Each write is lost or not.
    Writes,
    /// Each sector of each write is lost or not.
    Sectors,
    /// Nothing is.
    Nothing,
}

/// When the power goes, and what is lost by that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) at: u64,
    pub(crate) loses: Loses,
    pub(crate) seed: u64,
}

/// A disk in the course of its history.
pub(crate) struct Platter<'a> {
    history: &'a History,
    bytes: Vec<u8>,
    /// Blocks that may be other than zeros.
    used: Vec<bool>,
    /// The first record that is not on it.
    next: usize,
}

impl<'a> Platter<'a> {
    /// One that holds what is in `start`, at the beginning of its history.
    pub(super) fn new(history: &'a History, start: &Path) -> Self {
        let bytes = fs::read(start).unwrap();
        let used = bytes.chunks(SECTOR);
        let used = used.map(|block| block != &ZEROS[..block.len()]);
        Self {
            used: used.collect(),
            history,
            bytes,
            next: 0,
        }
    }

    /// Writes the disk as it is after the cut to `image`; how many sectors of how many that no
    /// flush covered are left. Cuts come in their order.
    pub(crate) fn cut(&mut self, cut: &Cut, image: &Path) -> [usize; 2] {
        let history = self.history;
        let records = &history.records;
        let over = records.partition_point(|record| record.end <= cut.at);
        let is_flush = |record: &Record| matches!(record.entry, Entry::Flush);
        let flushed = records[..over]
            .iter()
            .rposition(is_flush)
            .map_or(0, |n| n + 1);
        while self.next < flushed {
            if let Entry::Write { offset, bytes } = &records[self.next].entry {
                self.put(*offset, &history.bytes[bytes.clone()]);
            }
            self.next += 1;
        }
        let file = File::create(image).unwrap();
        self.write_to(&file);
        let mut rng = StdRng::seed_from_u64(cut.seed);
        let (mut left, mut all) = (0, 0);
        for record in &records[flushed..over] {
            let Entry::Write { offset, bytes } = &record.entry else {
                continue;
            };
            let is_left = rng.random();
            for (number, sector) in history.bytes[bytes.clone()].chunks(SECTOR).enumerate() {
                all += 1;
                let is_left = match cut.loses {
                    Loses::All => false,
                    Loses::Writes => is_left,
                    Loses::Sectors => rng.random(),
                    Loses::Nothing => true,
                };
                if is_left {
                    left += 1;
                    let at = offset + number * SECTOR;
                    file.write_all_at(sector, at as u64).unwrap();
                }
            }
        }
        [left, all]
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        self.bytes[offset..end].copy_from_slice(bytes);
        self.used[offset / SECTOR..end.div_ceil(SECTOR)].fill(true);
    }

    fn write_to(&self, file: &File) {
        file.set_len(self.bytes.len() as u64).unwrap();
        let mut at = 0;
        for run in self.used.chunk_by(|a, b| a == b) {
            let (start, end) = (at * SECTOR, (at + run.len()) * SECTOR);
            if run[0] {
                let end = end.min(self.bytes.len());
                let bytes = &self.bytes[start..end];
                file.write_all_at(bytes, start as u64).unwrap();
            }
            at += run.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_was_flushed_is_left_and_of_the_rest_anything() {
        let dir = tempfile::tempdir().unwrap();
        let [start, log, image] = ["start", "log", "image"].map(|name| dir.path().join(name));
        fs::write(&start, vec![0; 4 * SECTOR]).unwrap();
        let mut recorder = Recorder::new(&log).unwrap();
        recorder.write(0, &[1; 2 * SECTOR]).unwrap();
        recorder.flush().unwrap();
        recorder.write(0, &[2; 2 * SECTOR]).unwrap();
        recorder.write(3 * SECTOR as u64, &[3; SECTOR]).unwrap();
        let before = fs::metadata(&log).unwrap().len();
        recorder.flush().unwrap();
        // Half a record.
        recorder.0.write_all(&[7; 20]).unwrap();
        let history = History::read(&log);
        assert_eq!((history.flushes().len(), history.writes().len()), (2, 3));
        let mut seen = BTreeSet::new();
        let at = |at, loses, seed| {
            let mut platter = Platter::new(&history, &start);
            let left = platter.cut(&Cut { at, loses, seed }, &image);
            let bytes = fs::read(&image).unwrap();
            assert_eq!(bytes.len(), 4 * SECTOR);
            ([bytes[0], bytes[2 * SECTOR - 1], bytes[3 * SECTOR]], left)
        };
        for seed in 0..200 {
            let (bytes, [left, all]) = at(before, Loses::Sectors, seed);
            let new = bytes.iter().zip([2, 2, 3]).filter(|(is, new)| *is == new);
            assert_eq!((new.count(), all), (left, 3));
            seen.insert(bytes);
            let ([a, b, _], _) = at(before, Loses::Writes, seed);
            assert_eq!(a, b, "one write");
        }
        let all = [1, 2]
            .into_iter()
            .flat_map(|a| [[a, 1, 0], [a, 2, 0], [a, 1, 3], [a, 2, 3]]);
        assert_eq!(seen, all.collect());
        assert_eq!(at(before, Loses::All, 0), ([1, 1, 0], [0, 3]));
        assert_eq!(at(before, Loses::Nothing, 0), ([2, 2, 3], [3, 3]));
        assert_eq!(at(u64::MAX, Loses::All, 0), ([2, 2, 3], [0, 0]));
        assert_eq!(at(0, Loses::Nothing, 0), ([0, 0, 0], [0, 0]));
    }
}
