//! How every process on a store learns that another one evicted.
//!
//! Invariant: the number in `<root>/evictions` is another one before the first hole of an
//! eviction is made. Who reads the same number before it looks at its bits and after it
//! read bytes knows that those bytes were no hole yet; see `store/file/evict.rs`. The
//! number need not survive a crash: nobody who remembers it does. So it changes outside
//! the [`super::disk::Disk`], like `store.lock`.
//!
//! ```text
//! <root>/evictions    u64, little endian; none yet reads as 0
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};

use super::LOCK_WAIT;
use crate::lock::{LockFile, lock_within};
use crate::{Error, Result};

const BYTES: usize = 8;

/// The number, shared by all processes on a store.
#[derive(Debug)]
pub(super) struct Evictions {
    path: PathBuf,
    file: File,
}

impl Evictions {
    /// The number in `root`, made if absent.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let path = root.join("evictions");
        let file = open(&path)?;
        reserve(&file).map_err(|e| Error::io("write to", &path, e))?;
        Ok(Self { path, file })
    }

    /// The number now. One system call; what this thread read before stays before it.
    pub(super) fn now(&self) -> Result<u64> {
        fence(Ordering::SeqCst);
        read(&self.file).map_err(|e| Error::io("read", &self.path, e))
    }

    /// The file of the number, for another process to read.
    pub(super) fn lend(&self) -> Result<File> {
        File::open(&self.path).map_err(|e| Error::io("open", &self.path, e))
    }

    /// Makes it another number, which is returned. Its lock is held for the moment.
    pub(super) fn advance(&self) -> Result<u64> {
        let file = LockFile::from(open(&self.path)?);
        let advance = || {
            if !lock_within(&file, LOCK_WAIT)? {
                let busy = "another process holds it; see which one with lslocks";
                return Err(io::Error::new(io::ErrorKind::TimedOut, busy));
            }
            let next = read(&file)?.wrapping_add(1);
            file.write_all_at(&next.to_le_bytes(), 0)?;
            Ok(next)
        };
        let next = advance().map_err(|e| Error::io("advance", &self.path, e))?;
        fence(Ordering::SeqCst);
        Ok(next)
    }
}

fn open(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| Error::io("open", path, e))
}

/// Takes the bytes now: an eviction from a full disk must not need new ones.
fn reserve(file: &File) -> io::Result<()> {
    if file.metadata()?.len() >= BYTES as u64 {
        return Ok(());
    }
    // Somebody may be advancing it; it holds the lock then.
    if lock_within(file, LOCK_WAIT)? && file.metadata()?.len() < BYTES as u64 {
        file.write_all_at(&[0; BYTES], 0)?;
    }
    file.unlock()
}

fn read(file: &File) -> io::Result<u64> {
    let mut bytes = [0; BYTES];
    match file.read_at(&mut bytes, 0)? {
        BYTES => Ok(u64::from_le_bytes(bytes)),
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_holder_sees_every_advance() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (
            Evictions::open(dir.path()).unwrap(),
            Evictions::open(dir.path()).unwrap(),
        );
        assert_eq!(a.now().unwrap(), 0);
        assert_eq!(b.advance().unwrap(), 1);
        assert_eq!(a.now().unwrap(), 1);
        std::thread::scope(|threads| {
            for each in [&a, &b] {
                threads.spawn(move || {
                    for _ in 0..50 {
                        each.advance().unwrap();
                    }
                });
            }
        });
        assert_eq!(a.now().unwrap(), 101, "none is lost");
    }
}
