//! System calls of this crate.
//!
//! Invariant: the only files that name `nix` or `rustix`, or have anything `unsafe`, are this and
//! those below it. Every function does one thing, takes and returns owned or borrowed descriptors and
//! paths, and decides nothing.

mod owners;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

pub(crate) use self::owners::{map_owners, user_namespace};

/// Whether this process is root in its user namespace.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether this process, the mount server or the machine has as many files open as it may.
pub(crate) fn has_no_descriptors(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

/// Lets this process have no descriptor of that number, or above.
#[cfg(test)]
pub(crate) fn limit_files(most: u64) -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, hard)?)
}

/// Device number as `stat` gives it, split into major and minor.
pub(crate) fn split_dev(dev: u64) -> (u64, u64) {
    (nix::sys::stat::major(dev), nix::sys::stat::minor(dev))
}

/// Unmounts `target`; fails with `EBUSY` while anything in it is open.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    Ok(nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW)?)
}

/// Takes `target` out of the tree of mounts at once; it ends when its last user does.
pub(crate) fn detach(target: &Path) -> io::Result<()> {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    Ok(nix::mount::umount2(target, flags)?)
}

/// Binds the directory `source` to `target`.
pub(crate) fn bind(source: &Path, target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    Ok(nix::mount::mount(
        Some(source),
        target,
        none,
        MsFlags::MS_BIND,
        none,
    )?)
}

/// Makes the bind mount at `target` read-only.
pub(crate) fn make_read_only(target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(nix::mount::mount(none, target, none, flags, none)?)
}

/// Mounts overlay by mount(2) with options in one string.
pub(crate) fn mount_overlay(target: &Path, data: &str, read_only: bool) -> io::Result<()> {
    let flags = if read_only {
        MsFlags::MS_RDONLY
    } else {
        MsFlags::empty()
    };
    let kind = Some("overlay");
    Ok(nix::mount::mount(kind, target, kind, flags, Some(data))?)
}

/// Writes everything of the file system that holds `dir` to its device.
pub(crate) fn sync_file_system(dir: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::syncfs(dir)?)
}

/// Has the kernel read a part of `file` into its cache, without waiting for it.
pub(crate) fn read_early(file: &std::fs::File, offset: u64, len: u64) -> io::Result<()> {
    let len = std::num::NonZeroU64::new(len);
    let advice = rustix::fs::Advice::WillNeed;
    Ok(rustix::fs::fadvise(file, offset, len, advice)?)
}

/// Whether what is seen at `path` is an EROFS.
pub(crate) fn is_erofs(path: &Path) -> io::Result<bool> {
    const MAGIC: u32 = 0xe0f5_e1e2;
    let kind = rustix::fs::statfs(path)?.f_type;
    Ok(u32::try_from(kind).is_ok_and(|kind| kind == MAGIC))
}

/// A descriptor that only names the directory `path`.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens `path` below the directory `root` to be read, and nothing that is elsewhere: neither
/// symbolic links nor mounts lead anywhere.
pub(crate) fn open_below(root: BorrowedFd<'_>, path: &Path) -> io::Result<std::fs::File> {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?.into())
}

/// A mount of the file alone, in nobody's tree; whatever is opened through it is told apart
/// from what is opened by name.
pub(crate) fn mount_of_its_own(file: &std::fs::File) -> io::Result<OwnedFd> {
    clone_mount(&path_of(file.as_fd()))
}

/// Another mount, in nobody's tree, of what is seen at `path`, without what is mounted below.
pub(crate) fn clone_mount(path: &Path) -> io::Result<OwnedFd> {
    use rustix::mount::OpenTreeFlags;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(rustix::fs::CWD, path, flags)?)
}

/// A name for a descriptor, in this process and while it is open.
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// A file system that is being configured by the new mount API.
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    /// Starts with the file system type `name`; `ENOSYS` before Linux 5.2.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        Ok(Self(rustix::mount::fsopen(
            name,
            FsOpenFlags::FSOPEN_CLOEXEC,
        )?))
    }

    /// Sets one option. The kernel refuses a value over 255 bytes.
    pub(crate) fn set(&self, key: &str, value: &Path) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_string(&self.0, key, value)?)
    }

    /// Turns one option on.
    pub(crate) fn set_flag(&self, key: &str) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_flag(&self.0, key)?)
    }

    /// Makes the file system; returns it mounted nowhere.
    pub(crate) fn create(&self, read_only: bool) -> io::Result<OwnedFd> {
        let attrs = if read_only {
            MountAttrFlags::MOUNT_ATTR_RDONLY
        } else {
            MountAttrFlags::empty()
        };
        rustix::mount::fsconfig_create(&self.0)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        Ok(rustix::mount::fsmount(&self.0, flags, attrs)?)
    }

    /// What the kernel has to say about the last failure, at most `LINES_MAX` lines.
    pub(crate) fn log(&self) -> String {
        const LINES_MAX: usize = 8;
        let mut lines = Vec::new();
        let mut buf = [0; 512];
        while lines.len() < LINES_MAX {
            match nix::unistd::read(&self.0, &mut buf) {
                Ok(len @ 1..) => lines.push(said(&buf[..len])),
                Ok(0) | Err(_) => break,
            }
        }
        lines.join("; ")
    }
}

/// A line without its first letter, which says how bad it is.
fn said(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    let line = line.trim();
    let bare = ["e ", "w ", "i "]
        .iter()
        .find_map(|level| line.strip_prefix(level));
    bare.unwrap_or(line).to_owned()
}

/// Mounts what [`FsContext::create`] made at `target`.
pub(crate) fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        mount,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

#[cfg(test)]
pub(crate) mod test_support {
    //! Calls that only tests need.

    use super::{Path, io};

    /// Value of an extended attribute, the link itself where `path` is one.
    pub(crate) fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
        let mut value = vec![0; 70_000];
        let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice())?;
        value.truncate(len);
        Ok(value)
    }

    /// What the kernel answers when asked for an attribute with a buffer of `size` bytes.
    pub(crate) fn get_xattr_sized(path: &Path, name: &str, size: usize) -> io::Result<usize> {
        if size == 0 {
            return Ok(rustix::fs::lgetxattr_query(path, name)?);
        }
        let mut value = vec![0; size];
        Ok(rustix::fs::lgetxattr(path, name, value.as_mut_slice())?)
    }

    /// Names of the extended attributes.
    pub(crate) fn list_xattrs(path: &Path) -> io::Result<Vec<String>> {
        let mut list = vec![0; 70_000];
        let len = rustix::fs::llistxattr(path, list.as_mut_slice())?;
        list.truncate(len);
        Ok(list
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    /// (block size, blocks, inodes, longest name) of the file system at `path`.
    pub(crate) fn statfs(path: &Path) -> io::Result<(i64, u64, u64, u64)> {
        let statvfs = rustix::fs::statvfs(path)?;
        let statfs = rustix::fs::statfs(path)?;
        Ok((
            statfs.f_bsize,
            statvfs.f_blocks,
            statvfs.f_files,
            statvfs.f_namemax,
        ))
    }

    /// Sum of the bytes of a file, read through a private mapping.
    #[expect(unsafe_code, reason = "a mapping is what is tested")]
    pub(crate) fn sum_by_mmap(file: &std::fs::File, len: usize) -> io::Result<u64> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        let size = std::num::NonZeroUsize::new(len).expect("the test maps a file with bytes");
        // SAFETY: no address is asked for, so nothing existing is replaced; the mapping is
        // read-only and private, `len` bytes of a file that no one truncates (it is on a
        // read-only file system), and is gone before this returns.
        unsafe {
            let at = mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_PRIVATE,
                file,
                0,
            )?;
            let bytes = std::slice::from_raw_parts(at.as_ptr().cast::<u8>(), len);
            let sum = bytes.iter().map(|byte| u64::from(*byte)).sum();
            munmap(at, len)?;
            Ok(sum)
        }
    }
}
