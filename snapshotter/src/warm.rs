//! Bringing what will be read of a mounted layer into the page cache, before it is.
//!
//! A read that finds nothing there costs its reader a round trip to whoever serves the layer, for
//! every window of read-ahead, also where the bytes are on the disk by then. What a start is
//! known to read is read for it here, in larger pieces, by a thread that nobody waits for.
//!
//! Invariant: changes nothing that anybody sees. Asks the layer for no byte that was not wanted,
//! pages aside, and has nothing of it open between two calls. The plan is pure, and as large as what is
//! wanted, whatever the layer; what the kernel refuses is logged and passed over.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use lazarette_fetcher::types::ByteRange;

use crate::sys;
use crate::tree::{Ino, InodeRef, Kind, Tree};

/// Bytes that the kernel is told to read at a time: of more it would leave out the rest.
const PIECE: u64 = 128 << 10;

/// Bytes of paths that are kept for one layer: 100,000 usual ones. Of a layer with more, some
/// files are left to their readers.
const NAMES_BYTES_MAX: usize = 8 << 20;

/// Wanted bytes of a data file that lie in one file of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    /// Of the data file.
    range: ByteRange,
    /// Position in [`Plan::files`].
    file: usize,
    /// Where the file begins in the data file.
    file_start: u64,
}

/// What is to be read.
struct Wanted {
    /// Where it begins in the data file.
    data_start: u64,
    /// Position in [`Plan::files`].
    file: usize,
    /// Of that file.
    bytes: ByteRange,
}

/// Where the wanted bytes of a layer's data file are in its files.
#[derive(Debug, Default)]
struct Plan {
    /// Paths without a leading slash.
    files: Vec<PathBuf>,
    /// Bytes of all of them.
    names_bytes: usize,
    /// Ascending and disjoint, as the files of an index are.
    parts: Vec<Part>,
}

impl Plan {
    fn new(tree: &Tree, wanted: Vec<ByteRange>) -> Self {
        let wanted = ByteRange::joined(wanted);
        let mut plan = Self::default();
        let mut linked: HashSet<Ino> = HashSet::new();
        // Directories that are still to be gone through: how long the path above them is, and
        // their names. That path is what `path` begins with by the time they are.
        let mut dirs: Vec<(InodeRef<'_>, usize, &[u8])> = vec![(tree.root(), 0, b"")];
        let mut path: Vec<u8> = Vec::new();
        while let Some((dir, above, name)) = dirs.pop() {
            path.truncate(above);
            path.extend_from_slice(name);
            if !path.is_empty() {
                path.push(b'/');
            }
            for entry in dir.entries(0) {
                match entry.inode.kind() {
                    Kind::Directory { .. } => dirs.push((entry.inode, path.len(), entry.name)),
                    // By its first name.
                    Kind::Regular { size, data_offset }
                        if entry.inode.nlink() == 1 || linked.insert(entry.inode.ino()) =>
                    {
                        plan.add(&wanted, (data_offset, size), [&path, entry.name]);
                    }
                    Kind::Regular { .. }
                    | Kind::Symlink { .. }
                    | Kind::CharDevice { .. }
                    | Kind::BlockDevice { .. }
                    | Kind::Fifo => {}
                }
            }
        }
        plan.parts.sort_unstable_by_key(|part| part.range.start());
        plan
    }

    /// Adds what is wanted of the file that has these bytes of the data file, and is called this
    /// in this directory.
    fn add(
        &mut self,
        wanted: &[ByteRange],
        (file_start, size): (u64, u64),
        [dir, name]: [&[u8]; 2],
    ) {
        let names_bytes = self.names_bytes + dir.len() + name.len();
        let bytes = ByteRange::at(file_start, size);
        let Some(bytes) = bytes.filter(|_| names_bytes <= NAMES_BYTES_MAX) else {
            return;
        };
        let (before, file) = (self.parts.len(), self.files.len());
        self.parts.extend(within(wanted, bytes).map(|range| Part {
            range,
            file,
            file_start,
        }));
        if self.parts.len() > before {
            self.names_bytes = names_bytes;
            let path = [dir, name].concat();
            self.files.push(OsString::from_vec(path).into());
        }
    }

    /// What is wanted of `range`.
    fn of(&self, range: ByteRange) -> impl Iterator<Item = Wanted> + '_ {
        let from = self
            .parts
            .partition_point(|part| part.range.end() <= range.start());
        let parts = self.parts.iter().skip(from);
        parts
            .take_while(move |part| part.range.start() < range.end())
            .filter_map(move |part| {
                let both = part.range.common(&range)?;
                let at = both.start().checked_sub(part.file_start)?;
                Some(Wanted {
                    data_start: both.start(),
                    file: part.file,
                    bytes: ByteRange::at(at, both.len())?,
                })
            })
    }
}

/// The parts of `bytes` that `wanted`, ascending and disjoint, covers.
fn within(wanted: &[ByteRange], bytes: ByteRange) -> impl Iterator<Item = ByteRange> + '_ {
    let from = wanted.partition_point(|range| range.end() <= bytes.start());
    let rest = wanted.iter().skip(from);
    rest.take_while(move |range| range.start() < bytes.end())
        .filter_map(move |range| range.common(&bytes))
}

/// What warms one mounted layer.
#[derive(Debug)]
pub struct Warmer {
    mount: PathBuf,
    plan: Plan,
}

impl Warmer {
    /// For the layer of `tree` that is mounted at `mount`, of whose data file these ranges are
    /// wanted.
    pub fn new(mount: &Path, tree: &Tree, wanted: Vec<ByteRange>) -> Self {
        Self {
            mount: mount.to_path_buf(),
            plan: Plan::new(tree, wanted),
        }
    }

    /// Has the kernel read what is wanted of these parts of the data file, which are present, for
    /// as long as it `goes_on`. Blocks for milliseconds.
    ///
    /// The last part first: who serves the layer may have a read-ahead of its own, which would
    /// take them for a sequence and go on to what nobody wants.
    pub fn warm(&self, present: &[ByteRange], goes_on: impl Fn() -> bool) {
        let mut wanted: Vec<Wanted> = present
            .iter()
            .flat_map(|range| self.plan.of(*range))
            .collect();
        wanted.sort_unstable_by_key(|part| std::cmp::Reverse(part.data_start));
        let mut open = None;
        for Wanted { file, bytes, .. } in wanted {
            if !goes_on() {
                return;
            }
            match self.read(open.take(), file, bytes) {
                Ok(read) => open = Some(read),
                Err(error) => {
                    let path = self.plan.files.get(file);
                    tracing::debug!(?path, %error, "file is not read ahead of its readers");
                }
            }
        }
    }

    /// Reads of the file with this number, which may be the one that was read of last.
    fn read(&self, last: Option<Opened>, file: usize, bytes: ByteRange) -> io::Result<Opened> {
        let opened = match last {
            Some(opened) if opened.number == file => opened,
            Some(Opened { root, .. }) => self.open(root, file)?,
            None => self.open(sys::open_path(&self.mount)?, file)?,
        };
        let mut at = bytes.start();
        while at < bytes.end() {
            let len = PIECE.min(bytes.end() - at);
            sys::read_early(&opened.file, at, len)?;
            at += len;
        }
        Ok(opened)
    }

    fn open(&self, root: OwnedFd, number: usize) -> io::Result<Opened> {
        let path = self.plan.files.get(number);
        let path = path.ok_or(io::ErrorKind::NotFound)?;
        let file = sys::open_below(root.as_fd(), path)?;
        Ok(Opened { root, number, file })
    }
}

/// A file of a layer.
struct Opened {
    root: OwnedFd,
    /// Position in [`Plan::files`].
    number: usize,
    file: File,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::test_util::LayerBuilder;

    const PAGE: u64 = 4096;

    /// A layer with a file of each of these sizes, in directories of one another.
    fn layer(sizes: &[usize]) -> (LayerBuilder, Vec<String>) {
        let mut layer = LayerBuilder::new("warm");
        let mut names = Vec::new();
        let mut dir = String::new();
        for (number, size) in sizes.iter().enumerate() {
            let name = format!("{dir}f{number}");
            layer.file(&name, &vec![1; *size]);
            layer.link(&format!("{dir}also{number}"), &name);
            names.push(name);
            if number % 3 == 2 {
                dir = format!("{dir}d{number}/");
            }
        }
        layer.symlink("link", "f0");
        (layer, names)
    }

    fn pages(ranges: &[(u64, u64)]) -> Vec<ByteRange> {
        let range = |(from, len): &(u64, u64)| ByteRange::at(from * PAGE, len * PAGE).unwrap();
        ranges.iter().map(range).collect()
    }

    /// Bytes of all of them, by number.
    fn bytes<'a>(ranges: impl IntoIterator<Item = &'a ByteRange>) -> BTreeSet<u64> {
        ranges
            .into_iter()
            .flat_map(|range| range.start()..range.end())
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_wanted_of_a_range_is_found_in_its_files_and_nothing_else(
            sizes in proptest::collection::vec(0_usize..20_000, 0..9),
            wanted in proptest::collection::vec((0_u64..40, 0_u64..6), 0..8),
            asked in (0_u64..40, 0_u64..40),
        ) {
            let (layer, names) = layer(&sizes);
            let wanted = pages(&wanted);
            let asked = pages(&[asked])[0];
            let plan = Plan::new(&layer.tree(), wanted.clone());
            let mut found = BTreeSet::new();
            for Wanted { file, bytes: range, data_start } in plan.of(asked) {
                let path = plan.files[file].to_str().unwrap();
                // The same file, by whichever of its names came first.
                let name = path.replace("also", "f");
                prop_assert!(names.contains(&name), "{}", path);
                let whole = layer.range(&name);
                prop_assert!(range.end() <= whole.len());
                prop_assert_eq!(data_start, whole.start() + range.start());
                let here = ByteRange::at(whole.start() + range.start(), range.len()).unwrap();
                prop_assert!(bytes([&here]).is_disjoint(&found), "twice");
                found.extend(bytes([&here]));
            }
            let in_files: Vec<_> = names.iter().map(|name| layer.range(name)).collect();
            let (wanted, asked, there) = (bytes(&wanted), bytes([&asked]), bytes(&in_files));
            let expected = &(&wanted & &asked) & &there;
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn paths_take_no_more_memory_than_they_may() {
        let mut layer = LayerBuilder::new("deep");
        let dir = "d".repeat(250);
        let deep = vec![dir.as_str(); 900].join("/");
        for number in 0..100 {
            layer.file(&format!("{deep}/{number}"), b"x");
        }
        layer.file("short", b"x");
        let tree = layer.tree();
        let all = vec![ByteRange::at(0, tree.data_len()).unwrap()];
        let plan = Plan::new(&tree, all);
        let lens = plan.files.iter().map(|path| path.as_os_str().len());
        assert!(lens.sum::<usize>() <= NAMES_BYTES_MAX);
        assert_eq!(plan.files.len(), plan.parts.len());
        assert!((2..100).contains(&plan.files.len()));
        assert!(plan.files.contains(&PathBuf::from("short")));
    }

    #[test]
    fn what_is_no_file_any_more_is_passed_over() {
        let (layer, names) = layer(&[5000, 5000]);
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<_> = names.iter().map(|name| layer.range(name)).collect();
        let warmer = Warmer::new(dir.path(), &layer.tree(), all.clone());
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("f0")).unwrap();
        std::fs::create_dir(dir.path().join("f1")).unwrap();
        assert!(
            warmer
                .read(None, 0, ByteRange::at(0, 100).unwrap())
                .is_err()
        );
        warmer.warm(&all, || true);
        let gone = Warmer::new(&dir.path().join("gone"), &layer.tree(), all.clone());
        gone.warm(&all, || true);
    }
}
