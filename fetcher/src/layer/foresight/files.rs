//! Which file a byte of the data file belongs to, and which files are near it in the tree.
//!
//! Invariant: pure, made once of a validated index; memory is bounded by the number of its
//! files and of their directories.

use std::collections::HashMap;

use crate::index::{FileKind, LayerIndex};
use crate::types::ByteRange;

/// Directories above a file that are known; what is deeper belongs to the deepest of them.
const DEPTH_MAX: usize = 32;
/// Number of the root.
const ROOT: u32 = 0;

/// Regular files of a layer by where their bytes are.
#[derive(Debug)]
pub(super) struct FileMap {
    /// Ascending and apart.
    places: Box<[Place]>,
    directories: Box<[Directory]>,
}

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Its position among all.
    pub(super) number: u32,
    /// Its bytes of the data file.
    pub(super) range: ByteRange,
    /// Its position in [`LayerIndex::files`].
    pub(super) entry: usize,
    directory: u32,
}

#[derive(Debug, Clone, Copy)]
struct Directory {
    /// The one above; the root is its own.
    above: u32,
    /// Bytes of all files in it and below it.
    bytes: u64,
}

/// Some files of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Members {
    /// One file.
    File(u32),
    /// Those in a directory and below it.
    Directory(u32),
}

impl FileMap {
    pub(super) fn of(index: &LayerIndex) -> Self {
        let mut tree = Directories::new();
        let mut places = Vec::new();
        for (entry, file) in index.files.iter().enumerate() {
            let FileKind::Regular { size, data_offset } = file.kind else {
                continue;
            };
            let range = ByteRange::at(data_offset, size).filter(|range| !range.is_empty());
            let Some(range) = range else {
                continue;
            };
            let directory = tree.find(parent(&file.path), DEPTH_MAX);
            tree.add(directory, size);
            places.push(Place {
                number: 0,
                range,
                entry,
                directory,
            });
        }
        places.sort_unstable_by_key(|place| place.range.start());
        for (at, place) in places.iter_mut().enumerate() {
            place.number = number(at);
        }
        Self {
            places: places.into(),
            directories: tree.all.into(),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The file that has the byte at `offset`; between files the one before.
    pub(super) fn at(&self, offset: u64) -> Option<Place> {
        let starts_before = |place: &Place| place.range.start() <= offset;
        let behind = self.places.partition_point(starts_before);
        self.places.get(behind.checked_sub(1)?).copied()
    }

    /// What a file is a part of, the smallest first: itself, and the directories above it
    /// whose files have at most `bytes_max` bytes.
    pub(super) fn around(&self, file: &Place, bytes_max: u64) -> Vec<Members> {
        let mut found = Vec::new();
        if file.range.len() <= bytes_max {
            found.push(Members::File(file.number));
        }
        let mut at = file.directory;
        for _ in 0..=DEPTH_MAX {
            let Some(directory) = self.directory(at) else {
                break;
            };
            if directory.bytes > bytes_max {
                break;
            }
            found.push(Members::Directory(at));
            if directory.above == at {
                break;
            }
            at = directory.above;
        }
        found
    }

    /// Bytes of all the files that are meant.
    pub(super) fn bytes_of(&self, members: Members) -> u64 {
        match members {
            Members::File(file) => {
                let place = self.places.get(file as usize);
                place.map_or(0, |place| place.range.len())
            }
            Members::Directory(directory) => {
                self.directory(directory).map_or(0, |found| found.bytes)
            }
        }
    }

    /// The files that are meant, ascending.
    pub(super) fn of_group(&self, members: Members) -> Vec<Place> {
        let all = self.places.iter().copied();
        match members {
            Members::File(file) => all.skip(file as usize).take(1).collect(),
            Members::Directory(directory) => all
                .filter(|place| self.is_below(place.directory, directory))
                .collect(),
        }
    }

    fn is_below(&self, mut at: u32, directory: u32) -> bool {
        for _ in 0..=DEPTH_MAX {
            if at == directory {
                return true;
            }
            match self.directory(at) {
                // Those above were found before those below.
                Some(next) if next.above < at => at = next.above,
                Some(_) | None => return false,
            }
        }
        false
    }

    fn directory(&self, at: u32) -> Option<&Directory> {
        self.directories.get(usize::try_from(at).ok()?)
    }
}

/// Directories as they are met.
struct Directories<'a> {
    known: HashMap<&'a [u8], u32>,
    all: Vec<Directory>,
}

impl<'a> Directories<'a> {
    /// The root alone, which is the first.
    fn new() -> Self {
        let mut tree = Self {
            known: HashMap::new(),
            all: Vec::new(),
        };
        tree.put(&[], ROOT);
        tree
    }

    fn find(&mut self, path: &'a [u8], depth_left: usize) -> u32 {
        if let Some(known) = self.known.get(path) {
            return *known;
        }
        if depth_left == 0 {
            return self.put(path, ROOT);
        }
        let above = self.find(parent(path), depth_left - 1);
        self.put(path, above)
    }

    fn put(&mut self, path: &'a [u8], above: u32) -> u32 {
        let at = number(self.all.len());
        self.all.push(Directory { above, bytes: 0 });
        self.known.insert(path, at);
        at
    }

    fn add(&mut self, mut at: u32, bytes: u64) {
        for _ in 0..=DEPTH_MAX {
            let Some(directory) = self.all.get_mut(at as usize) else {
                return;
            };
            directory.bytes = directory.bytes.saturating_add(bytes);
            if directory.above == at {
                return;
            }
            at = directory.above;
        }
    }
}

fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

fn parent(path: &[u8]) -> &[u8] {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => path.get(..at).unwrap_or_default(),
        None => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Chunk, Encoding, LayerBlob, LayerFormat};
    use crate::test_util::layers::regular_file;
    use crate::types::Digest;

    fn index(files: &[(&str, u32)]) -> LayerIndex {
        let (mut entries, mut chunks, mut at) = (Vec::new(), Vec::new(), 0_u64);
        for (path, len) in files {
            if *len == 0 {
                entries.push(regular_file(path, 0, 0));
                continue;
            }
            entries.push(regular_file(path, u64::from(*len), at));
            chunks.push(Chunk {
                encoding: Encoding::Stream,
                data_offset: at,
                len: *len,
                chunk_digest: Some([0; 32]),
            });
            at = (at + u64::from(*len)).next_multiple_of(4096);
        }
        let blob = LayerBlob {
            digest: Digest::sha256(b"layer"),
            size: 1,
            format: LayerFormat::Tar,
        };
        LayerIndex::new(blob, entries, chunks).unwrap()
    }

    #[test]
    fn bytes_lead_to_their_file() {
        let index = index(&[("a/x", 5000), ("b", 10), ("e", 0), ("a/y", 1), ("a/d/z", 1)]);
        let map = FileMap::of(&index);
        let path = |offset| {
            let place = map.at(offset).unwrap();
            String::from_utf8(index.files[place.entry].path.clone()).unwrap()
        };
        let offsets = [0, 4999, 8191, 8192, 12_288, 16_384, 1 << 40];
        let found = offsets.map(path);
        assert_eq!(found, ["a/x", "a/x", "a/x", "b", "a/y", "a/d/z", "a/d/z"]);
        assert!(FileMap::of(&self::index(&[])).at(0).is_none());
    }

    #[test]
    fn files_lead_to_what_is_around_them() {
        let files = [
            ("a/d/z", 1),
            ("a/x", 5000),
            ("b", 10),
            ("a/y", 1),
            ("a/d/e/w", 7),
        ];
        let map = FileMap::of(&index(&files));
        let groups = |number: u32, bytes_max| {
            let file = map.places[number as usize];
            let around = map.around(&file, bytes_max);
            let numbers = |members: &Members| -> Vec<u32> {
                let places = map.of_group(*members);
                places.iter().map(|place| place.number).collect()
            };
            around.iter().map(numbers).collect::<Vec<_>>()
        };
        let all: Vec<u32> = (0..5).collect();
        assert_eq!(
            groups(0, 1 << 20),
            [vec![0], vec![0, 4], vec![0, 1, 3, 4], all.clone()]
        );
        assert_eq!(groups(0, 100), [vec![0], vec![0, 4]]);
        let around = map.around(&map.places[0], 1 << 20);
        let bytes: Vec<u64> = around.iter().map(|one| map.bytes_of(*one)).collect();
        assert_eq!(bytes, [1, 8, 5009, 5019]);
        assert_eq!(groups(1, 100), [[0_u32; 0]; 0]);
        assert_eq!(groups(2, 1 << 20), [vec![2], all]);
    }

    #[test]
    fn depth_is_bounded() {
        let deep = "d/".repeat(5 * DEPTH_MAX) + "f";
        let map = FileMap::of(&index(&[(&deep, 1), ("g", 1)]));
        assert!(map.around(&map.places[0], 100).len() <= DEPTH_MAX + 2);
        assert_eq!(map.around(&map.places[1], 100).len(), 2);
    }
}
