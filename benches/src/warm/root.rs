//! A mounted image, and what of it is read.
//!
//! Invariant: lists of files are sorted by path, so that every root is read in the same order,
//! and name only regular files of the root's own file system. Nothing is followed.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Most bytes of a file that counts as small.
const SMALL_MAX: u64 = 64 << 10;
/// Bytes compared at a time.
const PIECE: usize = 1 << 20;

/// A mounted image.
#[derive(Debug)]
pub(super) struct Root {
    /// Who shows it.
    pub(super) name: String,
    /// Where.
    pub(super) path: PathBuf,
    /// Whether what it holds in memory is a copy of what a file below holds.
    pub(super) is_copy: bool,
    /// Every regular file and its length, by path.
    pub(super) files: Vec<(PathBuf, u64)>,
}

impl Root {
    /// Looks at what is mounted at `path`.
    pub(super) fn at(name: String, path: PathBuf, is_copy: bool) -> Result<Self> {
        let device = fs::symlink_metadata(&path)?.dev();
        let mut files = Vec::new();
        let mut left = vec![path.clone()];
        while let Some(dir) = left.pop() {
            let list = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
            for entry in list {
                let path = entry?.path();
                let stat = fs::symlink_metadata(&path)?;
                if stat.is_dir() && stat.dev() == device {
                    left.push(path);
                } else if stat.is_file() {
                    files.push((path, stat.len()));
                }
            }
        }
        files.sort();
        Ok(Self {
            name,
            path,
            is_copy,
            files,
        })
    }

    /// Files that are neither empty nor large.
    pub(super) fn small(&self) -> impl Iterator<Item = &Path> {
        let small = |(_, len): &&(PathBuf, u64)| (1..=SMALL_MAX).contains(len);
        self.files
            .iter()
            .filter(small)
            .map(|(path, _)| path.as_path())
    }

    /// The largest file.
    pub(super) fn largest(&self) -> Result<&(PathBuf, u64)> {
        let largest = self.files.iter().max_by_key(|(_, len)| len);
        largest.context("the image has no files")
    }

    /// For tests of what takes roots and does not look at them.
    #[cfg(test)]
    pub(super) fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            path: PathBuf::new(),
            is_copy: false,
            files: Vec::new(),
        }
    }
}

/// Fails unless all roots have the same files with the same bytes. Reads all of them.
pub(super) fn must_be_equal(roots: &[Root]) -> Result<()> {
    let Some((first, others)) = roots.split_first() else {
        return Ok(());
    };
    for other in others {
        if first.files.len() != other.files.len() {
            let (one, two) = (first.files.len(), other.files.len());
            bail!("{} has {one} files, {} has {two}", first.name, other.name);
        }
        for ((one, _), (two, _)) in first.files.iter().zip(&other.files) {
            let names = (
                one.strip_prefix(&first.path)?,
                two.strip_prefix(&other.path)?,
            );
            let equal = names.0 == names.1
                && is_equal(one, two).with_context(|| format!("compare {}", two.display()))?;
            if !equal {
                bail!("{} and {} differ", one.display(), two.display());
            }
        }
    }
    Ok(())
}

fn is_equal(one: &Path, two: &Path) -> Result<bool> {
    let (mut one, mut two) = (File::open(one)?, File::open(two)?);
    let mut pieces = (Vec::with_capacity(PIECE), Vec::with_capacity(PIECE));
    loop {
        pieces.0.clear();
        pieces.1.clear();
        one.by_ref().take(PIECE as u64).read_to_end(&mut pieces.0)?;
        two.by_ref().take(PIECE as u64).read_to_end(&mut pieces.1)?;
        if pieces.0 != pieces.1 {
            return Ok(false);
        }
        if pieces.0.is_empty() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, files: &[(&str, &[u8])]) -> Root {
        let dir = std::env::temp_dir().join(format!("laz-warm-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for (path, bytes) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let root = Root::at(name.to_owned(), dir.clone(), false).unwrap();
        // What the tests compare is read while it is there.
        root
    }

    #[test]
    fn roots_are_equal_by_name_and_byte() {
        let a = tree("a", &[("x/1", b"one"), ("y", b"")]);
        let same = tree("same", &[("x/1", b"one"), ("y", b"")]);
        let byte = tree("byte", &[("x/1", b"onE"), ("y", b"")]);
        let name = tree("name", &[("x/2", b"one"), ("y", b"")]);
        let more = tree("more", &[("x/1", b"one"), ("y", b""), ("z", b"")]);
        let dirs: Vec<_> = [&a, &same, &byte, &name, &more]
            .map(|root| root.path.clone())
            .into();
        assert_eq!(a.small().count(), 1);
        assert_eq!(a.largest().unwrap().1, 3);
        let roots = [a, same];
        must_be_equal(&roots).unwrap();
        let [a, _] = roots;
        let mut pair = [a, byte];
        for other in [name, more] {
            assert!(must_be_equal(&pair).is_err(), "{}", pair[1].name);
            pair[1] = other;
        }
        assert!(must_be_equal(&pair).is_err());
        for dir in dirs {
            fs::remove_dir_all(dir).unwrap();
        }
    }
}
