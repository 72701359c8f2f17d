//! A layer of two files to find out with what this kernel makes of such things.
//!
//! A version number says nothing: what was built in, what the file system that holds the store
//! can do and what this process may do count as much.
//!
//! Invariant: what is on the disk goes with the value; what a process that is killed leaves, the
//! next daemon removes. Mounts nothing.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::types::Digest;

use crate::erofs::Image;
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// Bytes of each of the two files.
const FILE_BYTES: usize = 4096;
/// What the data file has of them: all of the first, and not all of the second.
const DATA_BYTES: usize = FILE_BYTES + 100;
/// In every byte of the data.
const CONTENT: u8 = 0x5a;
/// The file that is all there.
pub(super) const WHOLE: &str = "whole";
/// The file whose data ends before it does: a read gets less than it wanted, as one whose reader
/// is killed does. It has to fail; a kernel that takes the rest for zeros keeps them for everybody.
pub(super) const CUT: &str = "cut";

/// What was read of a file, or why it was not.
pub(super) type Bytes = io::Result<Vec<u8>>;

/// A layer on the disk that is there to be read.
#[derive(Debug)]
pub(super) struct Sample {
    dir: PathBuf,
}

impl Drop for Sample {
    fn drop(&mut self) {
        // What cannot be removed takes some KiB.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Sample {
    /// Writes the layer to a directory of its own in `dir`, which is made if absent. `name` is
    /// what it is for: two of one process and one name are one.
    pub(super) fn new(dir: &Path, name: &str) -> Result<Self> {
        let dir = dir.join(format!(".{name}.{}", std::process::id()));
        let sample = Self { dir };
        let write = || {
            fs::create_dir_all(&sample.dir)?;
            fs::write(sample.data(), [CONTENT; DATA_BYTES])?;
            File::create(sample.image())?.write_all(&image_bytes()?)
        };
        write().map_err(|e| Error::io("write a small layer to", &sample.dir, e))?;
        Ok(sample)
    }

    /// The directory that both files are in.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What both files have of data.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The EROFS of the two, without data.
    pub(super) fn image(&self) -> PathBuf {
        self.dir.join("image")
    }
}

/// Reads `name` of a layer that is mounted in no tree.
pub(super) fn read(mounted: &OwnedFd, name: &str) -> Bytes {
    read_block(&sys::path_of(mounted.as_fd()).join(name))
}

/// Reads the first block of a file.
pub(super) fn read_block(path: &Path) -> Bytes {
    let mut bytes = vec![0; FILE_BYTES];
    File::open(path)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Whether that is what was written.
pub(super) fn is_content(bytes: &Bytes) -> bool {
    let is_right = |bytes: &Vec<u8>| bytes.iter().all(|byte| *byte == CONTENT);
    bytes.as_ref().is_ok_and(is_right)
}

/// An image of the two files.
fn image_bytes() -> io::Result<Vec<u8>> {
    let file = |path: &str, at: usize| FileEntry {
        path: path.as_bytes().to_vec(),
        kind: FileKind::Regular {
            size: FILE_BYTES as u64,
            data_offset: at as u64,
        },
        mode: 0o400,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    let index = LayerIndex {
        blob_digest: Digest::sha256(b""),
        blob_size: 0,
        format: LayerFormat::Tar,
        files: vec![file(WHOLE, 0), file(CUT, FILE_BYTES)],
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len: 2 * FILE_BYTES as u64,
    };
    let tree = Tree::build(&index).map_err(io::Error::other)?;
    let image = Image::of(&tree).map_err(|unfit| io::Error::other(unfit.to_string()))?;
    let mut bytes = Vec::new();
    image.write_to(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_all_of_one_file_and_goes_with_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let sample = Sample::new(&dir.path().join("made"), "sample").unwrap();
        assert!(is_content(&read_block(&sample.data())));
        assert!(fs::metadata(sample.data()).unwrap().len() < 2 * FILE_BYTES as u64);
        drop(sample);
        assert_eq!(fs::read_dir(dir.path().join("made")).unwrap().count(), 0);
    }
}
