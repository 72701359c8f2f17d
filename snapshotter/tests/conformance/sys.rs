//! System calls of these tests.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;

use crate::bed::soon;

/// Flags of an open that goes past the page cache.
pub(crate) const DIRECT: i32 = libc::O_DIRECT;

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Has the kernel forget the contents of a file, as far as nobody maps it.
pub(crate) fn forget(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Has the kernel read a file ahead of everybody.
pub(crate) fn read_soon(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
}

pub(crate) fn kill_by_id(pid: i32) {
    // One that is gone needs no killing.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

pub(crate) fn make_fifo(path: &Path) {
    nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o644)).unwrap();
}

pub(crate) fn make_device(path: &Path, major: u64, minor: u64) {
    let mode = Mode::from_bits_truncate(0o600);
    mknod(path, SFlag::S_IFBLK, mode, makedev(major, minor)).unwrap();
}

pub(crate) fn detach(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
}

/// Unmounts what nobody but this process uses.
#[track_caller]
pub(crate) fn unmount(path: &Path) {
    soon(|| umount2(path, MntFlags::empty()));
}

pub(crate) fn mount_overlay(at: &Path, options: &str) {
    let kind = Some("overlay");
    mount(kind, at, kind, MsFlags::empty(), Some(options)).unwrap();
}

fn text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

#[expect(unsafe_code, reason = "no crate in the tree sets extended attributes")]
pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let (path, name) = (text(path), CString::new(name).unwrap());
    let (bytes, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: both names end with a zero, and `bytes` has `len` bytes; all outlive the call.
    let set = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), bytes, len, 0) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

/// All extended attributes that were set above, sorted.
pub(crate) fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = call_sized(|buf| list(path, buf));
    names.pop();
    let names = String::from_utf8(names).unwrap();
    let names = names.split('\0').filter(|name| !name.is_empty());
    let mut all: Vec<_> = names
        .map(|name| (name.to_owned(), call_sized(|buf| get(path, name, buf))))
        .collect();
    all.sort();
    all
}

fn call_sized(call: impl FnOnce(&mut [u8]) -> isize) -> Vec<u8> {
    let mut buf = vec![0; 70_000];
    let len = usize::try_from(call(&mut buf));
    buf.truncate(len.unwrap_or_else(|_| panic!("{}", io::Error::last_os_error())));
    buf
}

#[expect(unsafe_code, reason = "no crate in the tree lists extended attributes")]
fn list(path: &Path, buf: &mut [u8]) -> isize {
    let path = text(path);
    // SAFETY: the path ends with a zero, and the kernel writes at most `buf.len()` bytes.
    unsafe { libc::llistxattr(path.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) }
}

#[expect(unsafe_code, reason = "no crate in the tree reads extended attributes")]
fn get(path: &Path, name: &str, buf: &mut [u8]) -> isize {
    let (path, name) = (text(path), CString::new(name).unwrap());
    let (at, len) = (buf.as_mut_ptr().cast(), buf.len());
    // SAFETY: both names end with a zero, and the kernel writes at most `len` bytes.
    unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), at, len) }
}

/// The bytes of a file and of the rest of its last page, read through a mapping.
#[expect(unsafe_code, reason = "a mapping is what is tested")]
pub(crate) fn read_mapped(file: &File) -> Vec<u8> {
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let Some(size) = NonZeroUsize::new(len.next_multiple_of(4096)) else {
        return Vec::new();
    };
    let (prot, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE);
    // SAFETY: no address is asked for, so nothing existing is replaced; all that is read lies
    // in pages of the file, which nobody truncates; the mapping is gone before this returns.
    unsafe {
        let at = mmap(None, size, prot, flags, file.as_fd(), 0).unwrap();
        let bytes = std::slice::from_raw_parts(at.as_ptr().cast::<u8>(), size.get()).to_vec();
        munmap(at, size.get()).unwrap();
        bytes
    }
}

/// Bytes of a file that are in the page cache, in whole pages.
#[expect(unsafe_code, reason = "no crate in the tree asks for that")]
pub(crate) fn cached_bytes(file: &File) -> usize {
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let size = NonZeroUsize::new(len).unwrap();
    let mut pages = vec![0_u8; len.div_ceil(4096)];
    let (prot, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    // SAFETY: no address is asked for, so nothing existing is replaced; nothing of the mapping is
    // read; the kernel writes a byte for each of its pages; it is gone before this returns.
    let asked = unsafe {
        let at = mmap(None, size, prot, flags, file.as_fd(), 0).unwrap();
        let asked = libc::mincore(at.as_ptr(), len, pages.as_mut_ptr());
        munmap(at, len).unwrap();
        asked
    };
    assert_eq!(asked, 0, "{}", io::Error::last_os_error());
    pages.iter().filter(|page| **page & 1 != 0).count() * 4096
}
