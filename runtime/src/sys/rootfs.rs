//! Opening, making and removing paths inside a root file system that nobody trusts.
//!
//! Every look-up goes through `openat2` with `RESOLVE_IN_ROOT`: symbolic links, absolute
//! ones included, and `..` stay inside the root, or links are refused. Kernel magic links
//! always are.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Mode of the directories made: everybody may enter them, only their owner changes them.
const DIR_MODE: u32 = 0o755;

/// A root directory to look paths up in.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
    links: ResolveFlag,
}

impl Root {
    /// Opens the directory `path` of the host as a root.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            dir: open(path, flags, Mode::empty())?,
            links: ResolveFlag::RESOLVE_NO_MAGICLINKS,
        })
    }

    /// Looks paths up without following symbolic links: those fail with
    /// [`is_link`]. For a part of a root, where links mean something else than in the whole.
    pub(crate) fn without_links(self) -> Self {
        Self {
            links: ResolveFlag::RESOLVE_NO_SYMLINKS,
            ..self
        }
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | self.links);
        Ok(openat2(self.dir.as_fd(), path, how)?)
    }

    /// Fails unless `path` is a directory.
    pub(crate) fn find_dir(&self, path: &Path) -> io::Result<()> {
        let found = self.resolve(path, OFlag::O_PATH | OFlag::O_DIRECTORY);
        found.map(drop)
    }

    /// Opens a regular file for reading; anything else (a fifo, a device) is refused
    /// without being waited for.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<File> {
        let probe = File::from(self.resolve(path, OFlag::O_PATH)?);
        if !probe.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(File::from(self.resolve(
            path,
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
        )?))
    }

    /// Creates the directory `path` and its missing parents with mode 0755, whatever the
    /// umask.
    pub(crate) fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut reached = PathBuf::from("/");
        for part in path.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            let parent = self.resolve(&reached, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
            reached.push(name);
            if self.resolve(&reached, OFlag::O_PATH).is_ok() {
                continue;
            }
            match mkdirat(parent.as_fd(), name, Mode::from_bits_retain(DIR_MODE)) {
                Ok(()) => open_up(&parent, name)?,
                Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.find_dir(path)
    }

    /// Removes the symbolic link `path` (absolute) if it leads to nothing inside the root.
    pub(crate) fn remove_dangling(&self, path: &Path) -> io::Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(());
        };
        if !leads_nowhere(&self.resolve(path, OFlag::O_PATH)) {
            return Ok(());
        }
        let parent = match self.resolve(parent, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(parent) => parent,
            lost if leads_nowhere(&lost) => return Ok(()),
            Err(error) => return Err(error),
        };
        match readlinkat(&parent, name) {
            Ok(_) => Ok(unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?),
            // Nothing is there, or no link is.
            Err(nix::Error::ENOENT | nix::Error::EINVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether a look-up ended without finding anything, rather than because it failed.
fn leads_nowhere(found: &io::Result<OwnedFd>) -> bool {
    found.as_ref().is_err_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        ) || is_link(error)
    })
}

/// Whether a look-up ended at a symbolic link: at too many, or at one not to be followed.
pub(crate) fn is_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ELOOP)
}

/// Lets everybody into the new directory `name`, from which the umask has taken that. Bits
/// that it has from `parent` stay.
fn open_up(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = File::from(openat(parent, name, flags, Mode::empty())?);
    let mode = made.metadata()?.permissions().mode();
    made.set_permissions(Permissions::from_mode(mode | DIR_MODE))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_never_leave_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root_dir = dir.path().join("root");
        std::fs::create_dir_all(root_dir.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::fs::write(root_dir.join("etc/real"), "inside").unwrap();
        symlink("/etc/real", root_dir.join("etc/absolute")).unwrap();
        symlink("../../../../etc/real", root_dir.join("etc/dots")).unwrap();
        symlink(dir.path().join("secret"), root_dir.join("etc/escape")).unwrap();
        symlink("../../secret", root_dir.join("etc/relative")).unwrap();
        let root = Root::open(&root_dir).unwrap();
        for (name, expected) in [
            ("/etc/absolute", Some("inside")),
            ("/etc/dots", Some("inside")),
            ("/etc/escape", None),
            ("/etc/relative", None),
            ("/etc", None),
        ] {
            let read = root.open_file(Path::new(name)).ok().map(|mut file| {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                text
            });
            assert_eq!(read.as_deref(), expected, "{name}");
        }
        symlink("/new", root_dir.join("alias")).unwrap();
        std::fs::create_dir(root_dir.join("new")).unwrap();
        root.create_dir_all(Path::new("/alias/a/b")).unwrap();
        assert!(root_dir.join("new/a/b").is_dir());
        assert!(root.create_dir_all(Path::new("/etc/real/x")).is_err());
        let plain = root.without_links();
        let error = plain.create_dir_all(Path::new("/alias/c")).unwrap_err();
        assert!(is_link(&error), "{error}");
        assert!(!root_dir.join("new/c").exists());
        plain.create_dir_all(Path::new("/new/c")).unwrap();
        plain.find_dir(Path::new("new/c")).unwrap();
    }

    #[test]
    fn only_links_to_nothing_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, outside) = (dir.path().join("root/etc"), dir.path().join("outside"));
        std::fs::create_dir_all(&etc).unwrap();
        std::fs::write(&outside, "").unwrap();
        std::fs::write(etc.join("file"), "").unwrap();
        symlink("/etc/file", etc.join("good")).unwrap();
        symlink("../run/none", etc.join("dangling")).unwrap();
        symlink(&outside, etc.join("escape")).unwrap();
        symlink("loop", etc.join("loop")).unwrap();
        symlink("file/below", etc.join("through")).unwrap();
        let root = Root::open(&dir.path().join("root")).unwrap();
        for (name, stays) in [
            ("file", true),
            ("good", true),
            ("dangling", false),
            ("escape", false),
            ("loop", false),
            ("through", false),
            ("absent", false),
        ] {
            root.remove_dangling(&Path::new("/etc").join(name)).unwrap();
            let there = std::fs::symlink_metadata(etc.join(name)).is_ok();
            assert_eq!(there, stays, "{name}");
        }
        assert!(outside.exists());
        root.remove_dangling(Path::new("/no/such/parent")).unwrap();
    }
}
