//! The operations that change what a crash leaves behind, behind one small trait.
//!
//! Invariant: every change to the store's directory that must survive a crash, or must not
//! show half of itself after one, goes through a [`Disk`], so a recording implementation
//! sees all of them and can stop at any one. Outside it change what may be anything after a
//! crash, and is no worse for it: the hints in `chunks` (`store/chunks.rs`), the number in
//! `evictions` (`store/evictions.rs`), files that are only locked, and the root itself.
//! Reading goes straight to the files: it changes nothing. Never decides, never retries.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::sys;

/// Which bytes of a file become which of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Where they begin in the file they come from.
    pub from: u64,
    /// Where they begin in the file they go to.
    pub to: u64,
    /// How many.
    pub len: u64,
}

/// Changes to files and directories. Each call may block on the device.
///
/// Written bytes survive a crash only after [`Disk::sync_data`] of their file; names of
/// files and directories only after [`Disk::sync_dir`] of the directory that holds them.
/// A failed call may have taken part of its effect.
pub trait Disk: Send + Sync + 'static {
    /// Makes one directory; its parent must exist, itself must not.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens a file for reading and writing, made if absent, emptied if present.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Makes a file in a directory that no name leads to, for reading and writing: it is gone
    /// with the last who has it open, or with the process.
    fn create_nameless(&self, dir: &Path) -> io::Result<File>;
    /// Opens a file that is there for writes past the page cache, of whole blocks from memory
    /// that begins one; `None` where there are no such writes. Changes nothing.
    fn open_past(&self, path: &Path) -> io::Result<Option<File>> {
        let _ = path;
        Ok(None)
    }
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes bytes of `to` those of `from` by sharing their blocks, which must be whole. Fails
    /// where the file system cannot share.
    fn share(&self, from: &File, to: &File, stretch: Stretch) -> io::Result<()>;
    /// Sets the length; what is added reads as zeros and takes no space.
    fn set_len(&self, file: &File, len: u64) -> io::Result<()>;
    /// Gives `len` bytes from `offset` back to the device: they read as zeros. Whole
    /// blocks of the file system; the length of the file stays.
    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()>;
    /// Returns once the bytes and length of the file are on the device.
    fn sync_data(&self, file: &File) -> io::Result<()>;
    /// Returns once the names in the directory are on the device.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames, replacing a file at `to`, in one step that a crash does not split.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Swaps two names in one step that a crash does not split.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The kernel's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
    }

    fn create_nameless(&self, dir: &Path) -> io::Result<File> {
        match sys::create_nameless(dir) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => create_and_unlink(dir),
            outcome => outcome,
        }
    }

    fn open_past(&self, path: &Path) -> io::Result<Option<File>> {
        sys::open_past(path)
    }

    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn share(&self, from: &File, to: &File, stretch: Stretch) -> io::Result<()> {
        sys::share(from, to, stretch)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        sys::punch(file, offset, len)
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        sys::exchange(a, b)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}

/// The same where the file system has no files without a name. What dies in between leaves
/// an empty one.
fn create_and_unlink(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!("nameless-{:016x}", rand::random::<u64>()));
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;

    #[test]
    fn a_nameless_file_is_written_and_read_and_seen_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        for make in [create_and_unlink, |dir: &Path| {
            RealDisk.create_nameless(dir)
        }] {
            let mut file = make(dir.path()).unwrap();
            file.write_all(b"bytes").unwrap();
            file.rewind().unwrap();
            let mut read = String::new();
            file.read_to_string(&mut read).unwrap();
            assert_eq!(read, "bytes");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        let error = RealDisk.create_nameless(&dir.path().join("absent"));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
