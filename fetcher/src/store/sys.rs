//! The system calls of the store that the standard library lacks.
//!
//! Invariant: one call in, one call out; nothing is decided here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, FcntlArg, PosixFadviseAdvice, RenameFlags};
use nix::fcntl::{fallocate, fcntl, posix_fadvise, renameat2};
use nix::libc;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};

use super::disk::Stretch;

/// `struct file_clone_range` of `linux/fs.h`.
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

mod ioctl {
    nix::ioctl_write_ptr!(ficlonerange, 0x94, 13, super::FileCloneRange);
}

/// Makes bytes of `to` share the blocks of those of `from`.
#[expect(unsafe_code, reason = "blocks are shared by ioctl only")]
pub(super) fn share(from: &File, to: &File, stretch: Stretch) -> io::Result<()> {
    let range = FileCloneRange {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: stretch.from,
        src_length: stretch.len,
        dest_offset: stretch.to,
    };
    // SAFETY: both descriptors are open while their files are borrowed, and the kernel
    // only reads `range`, which is laid out as its header says and outlives the call.
    unsafe { ioctl::ficlonerange(to.as_raw_fd(), &raw const range) }
        .map(drop)
        .map_err(io::Error::from)
}

/// Whether a read failed as the device, or what checks its blocks, cannot give the bytes.
pub(super) fn is_unreadable(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// The byte of a data file that whoever makes holes in it has locked. No file has such a
/// byte, so this meets no lock on contents; it is apart from the locks of whole files.
/// `laz-mountd` names the same one.
const EVICTION_BYTE: i64 = i64::MAX - 1;

/// What is asked of the lock against evictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holes {
    /// To make holes, and have nobody forbid it meanwhile.
    Make,
    /// That nobody makes holes. Any number may ask for that.
    Forbid,
    /// Nothing any more.
    Done,
}

/// Takes or gives back the lock of who makes holes or forbids them, which belongs to the open
/// file; `false` if somebody's stands against it.
pub(super) fn lock_holes(data: &File, holes: Holes) -> io::Result<bool> {
    let kind = match holes {
        Holes::Make => libc::F_WRLCK,
        Holes::Forbid => libc::F_RDLCK,
        Holes::Done => libc::F_UNLCK,
    };
    match fcntl(data, FcntlArg::F_OFD_SETLK(&eviction_byte(kind))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether holes could be made now, as far as others' locks go.
pub(super) fn may_make_holes(data: &File) -> io::Result<bool> {
    let mut lock = eviction_byte(libc::F_WRLCK);
    fcntl(data, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(io::Error::from)?;
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

fn eviction_byte(kind: i32) -> libc::flock {
    let short = |number: i32| i16::try_from(number).unwrap_or_default();
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: EVICTION_BYTE,
        l_len: 1,
        l_pid: 0,
    }
}

/// Whether anybody but `file`, which is open for reading only, has its inode open: a process,
/// or the kernel for a file system that is made of it.
pub(super) fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    // Who opens the file in this moment waits until the lease is given back, and we would be
    // told by a signal, as a rule one that kills.
    set(file, F_SETSIG, libc::SIGURG)?;
    // It is given to the only one who has the file open, and to nobody else.
    match set(file, libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => set(file, libc::F_SETLEASE, libc::F_UNLCK).map(|()| false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

/// `F_SETSIG` of `asm-generic/fcntl.h`, which libc does not name.
const F_SETSIG: i32 = 10;

#[expect(unsafe_code, reason = "no crate in the tree wraps leases")]
fn set(file: &File, command: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open while `file` is borrowed; both commands take a number and
    // touch no memory of ours.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, value) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Another open file of the same inode, for reading, whatever its name is by now.
pub(super) fn reopen(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The file at `path` for writes past the page cache; `None` where its file system has none.
pub(super) fn open_past(path: &Path) -> io::Result<Option<File>> {
    let mut options = File::options();
    match options.write(true).custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

/// A new file in `dir` that has no name; `Unsupported` where its file system has none such.
pub(super) fn create_nameless(dir: &Path) -> io::Result<File> {
    let mut options = File::options();
    let options = options.read(true).write(true);
    let made = options.custom_flags(libc::O_TMPFILE).open(dir);
    made.map_err(|error| match error.raw_os_error() {
        // The latter two from kernels that know no such flag.
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL) => {
            io::Error::from(io::ErrorKind::Unsupported)
        }
        _ => error,
    })
}

/// Swaps the names `a` and `b`, both of which must exist on one file system.
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE).map_err(io::Error::from)
}

/// Makes a hole of `len` bytes at `offset`; the file keeps its length.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(too_far)?;
    let len = i64::try_from(len).map_err(too_far)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset, len).map_err(io::Error::from)
}

/// Whether the byte at `offset` is in no hole. Moves the file's own position.
pub(super) fn has_data(file: &File, offset: u64) -> bool {
    let Ok(offset) = i64::try_from(offset) else {
        return false;
    };
    lseek(file, offset, Whence::SeekData).is_ok_and(|data| data == offset)
}

/// What of a file is in no hole, ascending; all of it where its file system does not say.
/// Moves the file's own position.
pub(super) fn stretches(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut stretches = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole is left, or nothing at all.
            Err(Errno::ENXIO) => return Ok(stretches),
            Err(error) => return Err(error.into()),
        };
        at = lseek(file, start, Whence::SeekHole)?;
        stretches.push(start.cast_unsigned()..at.cast_unsigned());
    }
}

/// Has the kernel read all of a file soon, as far as it has memory for that.
pub(super) fn read_soon(file: &File) {
    // Without the advice reads are as right, and slower.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// Size of the file system that holds `path`, and what of it may still be used, bytes.
pub(super) fn capacity(path: &Path) -> io::Result<(u64, u64)> {
    let stat = statvfs(path).map_err(io::Error::from)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok((bytes(stat.blocks()), bytes(stat.blocks_available())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn blocks_are_shared_or_the_file_system_says_that_it_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name| {
            let path = dir.path().join(name);
            let mut options = File::options();
            let options = options.read(true).write(true).create_new(true);
            let file = options.open(path).unwrap();
            file.set_len(3 * 65_536).unwrap();
            file
        };
        let (from, to) = (make("from"), make("to"));
        from.write_all_at(&[7; 65_536], 65_536).unwrap();
        let stretch = Stretch {
            from: 65_536,
            to: 0,
            len: 65_536,
        };
        let mut bytes = [1; 65_536];
        match share(&from, &to, stretch) {
            Ok(()) => {
                to.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(bytes, [7; 65_536]);
            }
            // Any other answer would mean that the call was not understood.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
        }
    }
}
