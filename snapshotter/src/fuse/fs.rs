//! The FUSE operations of one layer.
//!
//! Invariant: a request is answered from memory or the local disk, or handed to
//! a task ([`Reader`]); nothing here waits for anything else. The tree never changes, so every
//! answer may be cached for good, and neither files nor directories need to be opened.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use lazarette_fetcher::types::ByteRange;

use super::attr;
use super::miss::Wanted;
use super::reader::Reader;
use super::session;
use crate::tree::{InodeRef, Kind, NAME_LEN_MAX, Tree};

/// How long the kernel may keep an answer: a year, that is until it needs the memory.
const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Generation of every inode: numbers are never reused.
const GENERATION: Generation = Generation(0);

/// One layer as a file system.
pub(super) struct LayerFs {
    tree: Arc<Tree>,
    reader: Reader,
    /// Whether this kernel takes `ENOSYS` from open as "never ask again".
    skips_open: bool,
    /// The same for opendir.
    skips_opendir: bool,
}

impl LayerFs {
    pub(super) fn new(tree: Arc<Tree>, reader: Reader) -> Self {
        Self {
            tree,
            reader,
            skips_open: false,
            skips_opendir: false,
        }
    }

    fn inode(&self, ino: INodeNo) -> Option<InodeRef<'_>> {
        self.tree.get(ino.0)
    }
}

/// The part of a file that a read of `size` bytes at `offset` covers, in the data file.
fn wanted(inode: InodeRef<'_>, offset: u64, size: u32) -> Result<ByteRange, Errno> {
    match inode.kind() {
        Kind::Regular {
            size: file_size,
            data_offset,
        } => {
            let start = offset.min(file_size);
            let end = offset.saturating_add(u64::from(size)).min(file_size);
            data_offset
                .checked_add(start)
                .and_then(|from| ByteRange::at(from, end.saturating_sub(start)))
                .ok_or(Errno::EIO)
        }
        Kind::Directory { .. } => Err(Errno::EISDIR),
        Kind::Symlink { .. } | Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {
            Err(Errno::EINVAL)
        }
    }
}

/// Answers a question for `value` that may only have asked for its size.
fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        Ok(_) | Err(_) => reply.error(Errno::ERANGE),
    }
}

/// Position of an entry in a directory stream: 0 is `.`, 1 is `..`.
fn entries_from(
    dir: InodeRef<'_>,
    offset: u64,
) -> impl Iterator<Item = (u64, crate::tree::Entry<'_>)> {
    let skip = usize::try_from(offset.saturating_sub(2)).unwrap_or(usize::MAX);
    let first = offset.max(2);
    (first..).zip(dir.entries(skip))
}

impl Filesystem for LayerFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        session::negotiate(
            config,
            &[
                InitFlags::FUSE_ASYNC_READ,
                InitFlags::FUSE_PARALLEL_DIROPS,
                InitFlags::FUSE_CACHE_SYMLINKS,
                InitFlags::FUSE_DO_READDIRPLUS,
                InitFlags::FUSE_READDIRPLUS_AUTO,
                InitFlags::FUSE_EXPLICIT_INVAL_DATA,
                // Mounts that show other owners: the kernel alone checks permissions.
                InitFlags::FUSE_ALLOW_IDMAP,
            ],
        );
        let mut add = |flag| config.add_capabilities(flag).is_ok();
        self.skips_open = add(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.skips_opendir = add(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.reader.counters().lookup();
        if name.len() > NAME_LEN_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        match self.tree.lookup(parent.0, name.as_bytes()) {
            Some(inode) => reply.entry(&TTL, &attr::of(inode), GENERATION),
            None => reply.entry(&TTL, &attr::absent(self.tree.root()), GENERATION),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(ino) {
            Some(inode) => reply.attr(&TTL, &attr::of(inode)),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.inode(ino).map(|inode| inode.kind()) {
            Some(Kind::Symlink { target }) => reply.data(target),
            Some(_) => reply.error(Errno::EINVAL),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.skips_open {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let inode = self.inode(ino).ok_or(Errno::ESTALE);
        match inode.and_then(|inode| wanted(inode, offset, size)) {
            Ok(range) => self.reader.answer(Wanted { range, zeros: 0 }, reply),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        // The kernel then looks for holes by itself and finds none.
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.skips_opendir {
            reply.error(Errno::ENOSYS);
        } else {
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            reply.opened(FileHandle(0), flags);
        }
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some((dir, parent)) = self.directory(ino) else {
            return reply.error(Errno::ENOTDIR);
        };
        for (at, dot) in [dir, parent].into_iter().enumerate() {
            let (at, name) = if at == 0 { (0, ".") } else { (1, "..") };
            let ino = INodeNo(dot.ino());
            if offset <= at && reply.add(ino, at + 1, attr::file_type(dot), name) {
                return reply.ok();
            }
        }
        for (at, entry) in entries_from(dir, offset) {
            let ino = INodeNo(entry.inode.ino());
            let kind = attr::file_type(entry.inode);
            if reply.add(ino, at + 1, kind, OsStr::from_bytes(entry.name)) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some((dir, parent)) = self.directory(ino) else {
            return reply.error(Errno::ENOTDIR);
        };
        let mut add = |inode: InodeRef<'_>, at: u64, name: &OsStr| {
            let ino = INodeNo(inode.ino());
            reply.add(ino, at + 1, name, &TTL, &attr::of(inode), GENERATION)
        };
        let full = (offset == 0 && add(dir, 0, OsStr::new(".")))
            || (offset <= 1 && add(parent, 1, OsStr::new("..")));
        if !full {
            for (at, entry) in entries_from(dir, offset) {
                if add(entry.inode, at, OsStr::from_bytes(entry.name)) {
                    break;
                }
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let block = attr::BLOCK_SIZE;
        let blocks = self.tree.data_len().div_ceil(u64::from(block));
        let files = u64::try_from(self.tree.len()).unwrap_or(u64::MAX);
        let name_len = u32::try_from(NAME_LEN_MAX).unwrap_or(u32::MAX);
        reply.statfs(blocks, 0, 0, files, 0, block, name_len, block);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.tree.has_xattrs() {
            // The kernel never asks again: overlay would, for every directory.
            return reply.error(Errno::ENOSYS);
        }
        match self.inode(ino).map(|inode| inode.xattr(name.as_bytes())) {
            Some(Some(value)) => answer_xattr(value, size, reply),
            Some(None) => reply.error(Errno::ENODATA),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let Some(inode) = self.inode(ino) else {
            return reply.error(Errno::ESTALE);
        };
        let mut list = Vec::new();
        for (name, _) in inode.xattrs() {
            list.extend_from_slice(name);
            list.push(0);
        }
        answer_xattr(&list, size, reply);
    }
}

impl LayerFs {
    /// A directory and the one above it.
    fn directory(&self, ino: INodeNo) -> Option<(InodeRef<'_>, InodeRef<'_>)> {
        let dir = self.inode(ino)?;
        match dir.kind() {
            Kind::Directory { parent } => Some((dir, self.tree.get(parent)?)),
            Kind::Regular { .. }
            | Kind::Symlink { .. }
            | Kind::CharDevice { .. }
            | Kind::BlockDevice { .. }
            | Kind::Fifo => None,
        }
    }
}
