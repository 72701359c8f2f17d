//! A disk that loses what it was not told to keep, with a file system on it.
//!
//! ```text
//! ext4  ->  loop device  ->  one file of a FUSE file system (`device`)  ->  `history`
//! ```
//!
//! The loop device passes every flush on, so the history has the writes and the flushes of
//! a real file system as a disk gets them, and an image can be made of what any power cut would leave.
//! It needs no device mapper, which not every kernel has. To be used in
//! [`confined`](crate::confined) parts only, which clean up.

mod device;
mod history;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub(crate) use self::history::{Cut, History, Loses, Platter};
use crate::sys;

/// Names the directory of the disk to the process that serves it.
const DIR: &str = "LAZ_DISK_TEST_DIR";
const READY: &str = "the disk is there";

/// A file system that a node may be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Debian's usual one.
    Ext4,
    /// One that shares blocks between files.
    Xfs,
    /// One that tells an answered sync of a file from one of its directory.
    Btrfs,
}

impl Kind {
    /// MiB of a disk that holds one.
    fn mib(self) -> u64 {
        match self {
            Self::Ext4 => 192,
            Self::Xfs => 320,
            Self::Btrfs => 384,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Has it made as on a large disk, with nothing left to be done in the background.
    fn make(self, image: &Path) {
        let options: &[&str] = match self {
            Self::Ext4 => &[
                "-q",
                "-b4096",
                "-I256",
                "-m0",
                "-Elazy_itable_init=0,lazy_journal_init=0",
            ],
            Self::Xfs | Self::Btrfs => &["-q"],
        };
        let file = File::create(image).unwrap();
        file.set_len(self.mib() << 20).unwrap();
        let mut make = Command::new(format!("mkfs.{}", self.name()));
        assert!(make.args(options).arg(image).status().unwrap().success());
    }

    /// Mounts the one in `image`. Another of the same origin may be mounted.
    pub(crate) fn mount(self, image: &Path, at: &Path) -> Mounted {
        fs::create_dir_all(at).unwrap();
        let options = match self {
            Self::Ext4 | Self::Btrfs => "loop",
            Self::Xfs => "loop,nouuid",
        };
        let mounted = Command::new("mount")
            .args(["-t", self.name(), "-o", options])
            .args([image, at])
            .output()
            .unwrap();
        assert!(mounted.status.success(), "{mounted:?}");
        Mounted(at.to_path_buf())
    }
}

/// A disk.
pub(crate) struct Disk {
    dir: PathBuf,
    kind: Kind,
    server: Child,
}

impl Disk {
    /// Makes one in `dir`, with such a file system.
    pub(crate) fn new(dir: &Path, kind: Kind) -> Self {
        fs::create_dir_all(dir.join("fuse")).unwrap();
        let image = dir.join("image");
        kind.make(&image);
        fs::copy(&image, dir.join("start")).unwrap();
        let server = Command::new(std::env::current_exe().unwrap())
            .args(["disk::serve", "--exact", "--ignored", "--nocapture"])
            .env(DIR, dir)
            .stdout(Stdio::piped())
            .spawn();
        let mut disk = Self {
            dir: dir.to_path_buf(),
            kind,
            server: server.unwrap(),
        };
        let mut lines = BufReader::new(disk.server.stdout.take().unwrap()).lines();
        let is_ready = |line: std::io::Result<String>| line.is_ok_and(|l| l.contains(READY));
        assert!(lines.any(is_ready), "there is no disk");
        // Whoever writes to a pipe that nobody reads ends, and the test harness has its say.
        std::thread::spawn(move || lines.for_each(drop));
        disk
    }

    /// Mounts its file system.
    pub(crate) fn mount(&self, at: &Path) -> Mounted {
        self.kind
            .mount(&self.dir.join("fuse").join(device::NAME), at)
    }

    /// How far its history has come.
    pub(crate) fn now(&self) -> u64 {
        now(&self.history_path())
    }

    /// The same, asked from elsewhere.
    pub(crate) fn clock(&self) -> impl Fn() -> u64 + Send + use<> {
        let path = self.history_path();
        move || now(&path)
    }

    /// What happened to it so far.
    pub(crate) fn history(&self) -> History {
        History::read(&self.history_path())
    }

    /// The disk at the beginning of `history`.
    pub(crate) fn platter<'a>(&self, history: &'a History) -> Platter<'a> {
        Platter::new(history, &self.dir.join("start"))
    }

    fn history_path(&self) -> PathBuf {
        self.dir.join("history")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A mounted file system.
pub(crate) struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        sys::detach(&self.0);
    }
}

fn now(history: &Path) -> u64 {
    fs::metadata(history).unwrap().len()
}

#[test]
#[ignore = "a disk runs it, as a process"]
fn serve() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("a disk runs this"));
    let device = device::Device::new(&dir.join("image"), &dir.join("history")).unwrap();
    let ready = || {
        let _ = writeln!(std::io::stdout(), "{READY}");
    };
    device.serve(&dir.join("fuse"), ready).unwrap();
}

#[cfg(test)]
mod tests;
