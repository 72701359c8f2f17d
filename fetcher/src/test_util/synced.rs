//! The real disk with syncs of a test's own.
//!
//! Invariant: everything but a sync is the kernel's.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::store::disk::{Disk, RealDisk, Stretch};

/// What is to be on the device.
#[derive(Debug, Clone, Copy)]
pub enum Synced<'a> {
    /// Bytes and length of a file.
    Data(&'a File),
    /// Names in a directory.
    Names(&'a Path),
}

/// The real disk, on which this is what a sync does.
pub struct SyncedBy<F>(pub F);

impl<F> Disk for SyncedBy<F>
where
    F: Fn(Synced<'_>) -> io::Result<()> + Send + Sync + 'static,
{
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        RealDisk.create(path)
    }
    fn create_nameless(&self, dir: &Path) -> io::Result<File> {
        RealDisk.create_nameless(dir)
    }
    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        RealDisk.write_at(file, offset, bytes)
    }
    fn share(&self, from: &File, to: &File, stretch: Stretch) -> io::Result<()> {
        RealDisk.share(from, to, stretch)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        RealDisk.set_len(file, len)
    }
    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        RealDisk.punch(file, offset, len)
    }
    fn sync_data(&self, file: &File) -> io::Result<()> {
        self.0(Synced::Data(file))
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0(Synced::Names(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        RealDisk.exchange(a, b)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
}
