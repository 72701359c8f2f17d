//! What this kernel does with an EROFS and its data file, found out by having it do so.
//!
//! A version number says nothing: what was built in, what the file system that holds the store
//! can do and what this process may do count as much. So a layer of two files is made, shown
//! and read.
//!
//! Invariant: nothing is left mounted or on the disk, whatever fails, also when this process is
//! killed half way: the mounts are in no tree, and end with the descriptors. Nothing here
//! waits for longer than [`ANSWER_WAIT`].

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::types::Digest;
use lazarette_mountd::fanotify::{Group, QUESTIONS_BYTES};

use crate::erofs::Image;
use crate::fuse::create_image;
use crate::sys;
use crate::tree::Tree;

/// How long the kernel may take to ask, or to read some bytes. It takes microseconds.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// Bytes of each of the two files.
const FILE_BYTES: usize = 4096;
/// What the data file has of them: all of the first, and not all of the second.
const DATA_BYTES: usize = FILE_BYTES + 100;
/// In every byte of the data.
const CONTENT: u8 = 0x5a;

/// Whether it asks before an EROFS reads its data file, and keeps to the answer; found out in
/// `dir` on the file system that holds the store. Takes milliseconds and blocks for them.
///
/// # Errors
/// What it does otherwise, in words.
pub fn probe(dir: &Path) -> Result<(), String> {
    Probe::new(dir).and_then(|probe| probe.run())
}

/// A layer on the disk that is there to be read.
#[derive(Debug)]
struct Probe {
    dir: PathBuf,
}

impl Drop for Probe {
    fn drop(&mut self) {
        // What cannot be removed takes some KiB.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Probe {
    /// Writes the layer to a directory of its own in `dir`.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn new(dir: &Path) -> Result<Self, String> {
        let dir = dir.join(format!(".probe.{}", std::process::id()));
        let probe = Self { dir };
        let write = || {
            fs::create_dir_all(&probe.dir)?;
            fs::write(probe.data(), [CONTENT; DATA_BYTES])?;
            let mut image = File::create(probe.image())?;
            image.write_all(&image_bytes()?)
        };
        let written = write();
        written.map_err(|e| format!("cannot write to {}: {e}", probe.dir.display()))?;
        Ok(probe)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// Has the kernel ask, deny and allow.
    ///
    /// # Errors
    /// What it does otherwise than it must, in words.
    fn run(&self) -> Result<(), String> {
        let group = Group::new().map_err(|e| format!("no fanotify group: {e}"))?;
        let mounted = self.mount(&group)?;
        let read = |name: &str| {
            let path = sys::path_of(mounted.as_fd()).join(name);
            move || read_block(&path)
        };
        let by_name = self.data();
        let (asked, bytes) = ask(&group, Answer::Deny, move || read_block(&by_name))?;
        if asked || !is_content(bytes) {
            return Err("it asks about the data file by its name, too".to_owned());
        }
        let (asked, bytes) = ask(&group, Answer::Deny, read("whole"))?;
        if !asked {
            return Err("it reads the data file of an erofs without asking".to_owned());
        }
        if bytes.is_ok() {
            return Err("it reads what was denied".to_owned());
        }
        let (asked, bytes) = ask(&group, Answer::Allow, read("whole"))?;
        if !asked || !is_content(bytes) {
            return Err("it does not read what was allowed".to_owned());
        }
        // A reader that is killed reads less than it began to. If the kernel takes the rest for
        // zeros, it keeps them for everybody.
        let (_, bytes) = ask(&group, Answer::Allow, read("cut"))?;
        if bytes.is_ok() {
            return Err("it takes what it could not read for zeros".to_owned());
        }
        Ok(())
    }

    /// An EROFS in no tree, about whose data `group` is asked.
    fn mount(&self, group: &Group) -> Result<OwnedFd, String> {
        let data = File::open(self.data()).map_err(|e| format!("cannot open a file: {e}"))?;
        let own = sys::mount_of_its_own(&data);
        let own = own.map_err(|e| format!("no mount of one file: {e}"))?;
        let marked = group.mark(own.as_fd());
        marked.map_err(|e| format!("it cannot ask before it reads {}: {e}", self.dir.display()))?;
        let files = [self.image(), sys::path_of(own.as_fd())];
        create_image(&files, &self.dir).map_err(|e| e.to_string())
    }
}

#[derive(Clone, Copy)]
enum Answer {
    Allow,
    Deny,
}

type Bytes = io::Result<Vec<u8>>;

/// Runs `read` in a thread and answers what is asked meanwhile; whether something was, and what
/// was read.
fn ask(
    group: &Group,
    answer: Answer,
    read: impl FnOnce() -> Bytes + Send + 'static,
) -> Result<(bool, Bytes), String> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| format!("no pair of sockets: {e}"))?;
    let reader = std::thread::Builder::new().spawn(move || {
        let bytes = read();
        // Its end is what tells.
        drop(theirs);
        bytes
    });
    let reader = reader.map_err(|e| format!("no thread: {e}"))?;
    let mut asked = false;
    let mut buf = vec![0; QUESTIONS_BYTES];
    loop {
        let ready = group.wait(ours.as_fd(), ANSWER_WAIT);
        match ready.map_err(|e| format!("cannot wait for questions: {e}"))? {
            [false, false] => return Err("a read takes too long".to_owned()),
            [true, _] => {}
            // It has ended, and nothing is left to be answered.
            [false, true] => break,
        }
        // One that another thread has read is none of ours; there is no other.
        for question in group.next(&mut buf).unwrap_or_default() {
            asked = true;
            match answer {
                Answer::Allow => group.allow(question.unique),
                Answer::Deny => group.deny(question.unique),
            }
        }
    }
    let bytes = reader.join();
    Ok((asked, bytes.map_err(|_| "a thread panicked".to_owned())?))
}

fn read_block(path: &Path) -> Bytes {
    let mut bytes = vec![0; FILE_BYTES];
    File::open(path)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn is_content(bytes: Bytes) -> bool {
    bytes.is_ok_and(|bytes| bytes.iter().all(|byte| *byte == CONTENT))
}

/// An image of the two files.
fn image_bytes() -> io::Result<Vec<u8>> {
    let file = |path: &[u8], at: usize| FileEntry {
        path: path.to_vec(),
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
        files: vec![file(b"whole", 0), file(b"cut", FILE_BYTES)],
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
    use crate::test_util::must_be_root;

    #[test]
    fn privileged_this_kernel_asks_before_it_reads() {
        if !must_be_root("privileged_this_kernel_asks_before_it_reads") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            probe(dir.path()),
            Ok(()),
            "layers are shown another way here"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(dir.path().to_str().unwrap()));
    }

    #[test]
    fn privileged_a_file_system_that_cannot_ask_says_so() {
        if !must_be_root("privileged_a_file_system_that_cannot_ask_says_so") {
            return;
        }
        // What is there is memory, on every kernel.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let why = probe(dir.path()).unwrap_err();
        assert!(why.contains("before it reads"), "{why}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
