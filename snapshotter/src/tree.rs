//! Inode tree of one layer.
//!
//! Invariant: a [`Tree`] is complete, consistent and immutable: every directory entry
//! names an inode, every inode is reachable from the root, names in a directory are
//! sorted and unique, link counts are exact, and every byte range of a regular file lies
//! inside the layer's data file. Inode numbers depend on the index alone, so two mounts
//! of one layer agree. Lookups never allocate. Never reads file contents and knows
//! nothing of FUSE or overlay beyond how a whiteout looks to them.

mod build;
mod check;
mod freeze;
pub mod merged;
mod name;
#[cfg(test)]
mod tests;
pub mod unlisted;

use lazarette_fetcher::index::{LayerIndex, Timestamp};

use crate::Result;

/// Most inodes in one layer. The largest images seen have 80,000; at about 100 bytes per
/// inode this bounds a hostile layer to half a gigabyte.
pub const INODES_MAX: usize = 5_000_000;
/// Deepest directory. A path of the kernel's 4,096 bytes cannot name anything deeper than
/// twice this, and real images stay under a hundred.
pub const DEPTH_MAX: usize = 1024;
/// Longest file name in bytes, the kernel's `NAME_MAX`.
pub const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link in bytes: the kernel's `PATH_MAX` without its NUL.
pub const SYMLINK_LEN_MAX: usize = 4095;
/// Longest chain of hard links that name hard links.
pub const LINK_CHAIN_MAX: usize = 64;
/// Longest extended attribute value, and longest list of names, in bytes (the kernel's own).
pub const XATTR_SIZE_MAX: usize = 65_536;

/// `xattrs` of an inode without any.
const NO_XATTRS: u32 = u32::MAX;

/// Number of an inode: 1 is the root, the rest follow breadth first, names in byte order.
pub type Ino = u64;
/// Number of the root directory.
pub const ROOT_INO: Ino = 1;

/// The inode tree of one layer.
#[derive(Debug)]
pub struct Tree {
    inodes: Box<[Inode]>,
    dirents: Box<[Dirent]>,
    /// File names and targets of symbolic links, back to back.
    names: Box<[u8]>,
    xattrs: Box<[XattrSet]>,
    data_len: u64,
}

/// Name and value.
type Xattr = (Box<[u8]>, Box<[u8]>);
type XattrSet = Box<[Xattr]>;

#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    len: u32,
}

#[derive(Debug, Clone, Copy)]
struct Dirent {
    name: Span,
    inode: u32,
}

#[derive(Debug, Clone, Copy)]
struct Inode {
    attr: Attr,
    nlink: u32,
    xattrs: u32,
    body: Body,
}

#[derive(Debug, Clone, Copy)]
enum Body {
    Directory { entries: Span, parent: u32 },
    Regular { size: u64, data_offset: u64 },
    Symlink { target: Span },
    CharDevice { rdev: u32 },
    BlockDevice { rdev: u32 },
    Fifo,
}

/// Attributes that every kind of file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Permission bits, `0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
}

/// What an inode is, and what only that kind has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory.
    Directory {
        /// The directory above; the root's is itself.
        parent: Ino,
    },
    /// A regular file: `size` bytes at `data_offset` of the layer's data file.
    Regular {
        /// Length in bytes.
        size: u64,
        /// Where it starts in the data file, in bytes.
        data_offset: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, uninterpreted.
        target: &'a [u8],
    },
    /// A character device. `rdev` 0 is a whiteout.
    CharDevice {
        /// Device number in the kernel's 32-bit encoding.
        rdev: u32,
    },
    /// A block device.
    BlockDevice {
        /// Device number in the kernel's 32-bit encoding.
        rdev: u32,
    },
    /// A named pipe.
    Fifo,
}

/// One inode, as a view into its tree.
#[derive(Debug, Clone, Copy)]
pub struct InodeRef<'a> {
    tree: &'a Tree,
    index: u32,
    inode: &'a Inode,
}

/// One name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The name, not necessarily UTF-8.
    pub name: &'a [u8],
    /// What it names.
    pub inode: InodeRef<'a>,
}

impl Tree {
    /// Builds the tree of a layer.
    ///
    /// Of two entries with one path the last counts, except that a directory over a
    /// directory keeps the children. Missing parents become `root:root` 0755 (see [`unlisted`]). What lies below a
    /// symbolic link of an earlier entry goes where that leads. Hard links are resolved in the
    /// final tree, so their target may come later.
    ///
    /// # Errors
    /// `Malformed` names the path that breaks a rule, `Limit` the one that exceeds a bound.
    pub fn build(index: &LayerIndex) -> Result<Self> {
        build::build(index)
    }

    /// The inode with this number, if there is one.
    pub fn get(&self, ino: Ino) -> Option<InodeRef<'_>> {
        let index = u32::try_from(ino.checked_sub(1)?).ok()?;
        self.at(index)
    }

    /// The root directory.
    pub fn root(&self) -> InodeRef<'_> {
        self.at(0).expect("build() always makes the root first")
    }

    /// The child of directory `parent` with this name. `None` also when `parent` is no directory.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Option<InodeRef<'_>> {
        let entries = self.get(parent)?.dirents();
        let at = entries
            .binary_search_by(|entry| self.bytes(entry.name).cmp(name))
            .ok()?;
        self.at(entries.get(at)?.inode)
    }

    /// Number of inodes.
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Never: a tree has its root at least.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }

    /// Length of the layer's data file in bytes.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Whether any inode has an extended attribute.
    pub fn has_xattrs(&self) -> bool {
        !self.xattrs.is_empty()
    }

    /// Heap bytes this tree holds.
    pub fn heap_bytes(&self) -> usize {
        let xattrs: usize = self.xattrs.iter().flatten().fold(0, |sum, (name, value)| {
            sum + name.len() + value.len() + size_of::<Xattr>()
        });
        size_of_val(&*self.inodes)
            + size_of_val(&*self.dirents)
            + self.names.len()
            + size_of_val(&*self.xattrs)
            + xattrs
    }

    fn at(&self, index: u32) -> Option<InodeRef<'_>> {
        let inode = self.inodes.get(usize::try_from(index).ok()?)?;
        Some(InodeRef {
            tree: self,
            index,
            inode,
        })
    }

    fn bytes(&self, span: Span) -> &[u8] {
        slice(&self.names, span)
    }
}

impl<'a> InodeRef<'a> {
    /// Its number.
    pub fn ino(&self) -> Ino {
        u64::from(self.index) + 1
    }

    /// Mode, owner and time.
    pub fn attr(&self) -> Attr {
        self.inode.attr
    }

    /// Number of names; for a directory 2 plus its subdirectories.
    pub fn nlink(&self) -> u32 {
        self.inode.nlink
    }

    /// What it is.
    pub fn kind(&self) -> Kind<'a> {
        match self.inode.body {
            Body::Directory { parent, .. } => Kind::Directory {
                parent: u64::from(parent) + 1,
            },
            Body::Regular { size, data_offset } => Kind::Regular { size, data_offset },
            Body::Symlink { target } => Kind::Symlink {
                target: self.tree.bytes(target),
            },
            Body::CharDevice { rdev } => Kind::CharDevice { rdev },
            Body::BlockDevice { rdev } => Kind::BlockDevice { rdev },
            Body::Fifo => Kind::Fifo,
        }
    }

    /// What `stat` calls its size, in bytes: content of a file, target of a link, else 0.
    pub fn size(&self) -> u64 {
        match self.inode.body {
            Body::Regular { size, .. } => size,
            Body::Symlink { target } => u64::from(target.len),
            Body::Directory { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo => 0,
        }
    }

    /// Whether overlay takes it for a deleted name.
    pub fn is_whiteout(&self) -> bool {
        matches!(self.inode.body, Body::CharDevice { rdev: 0 })
    }

    /// Its entries in byte order, without `.` and `..`, from position `skip` on.
    /// Empty for anything but a directory.
    pub fn entries(&self, skip: usize) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        let tree = self.tree;
        let entries = self.dirents();
        entries.iter().skip(skip).filter_map(move |entry| {
            Some(Entry {
                name: tree.bytes(entry.name),
                inode: tree.at(entry.inode)?,
            })
        })
    }

    /// Extended attributes, name and value, sorted by name.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let set = match usize::try_from(self.inode.xattrs) {
            Ok(at) => self.tree.xattrs.get(at).map_or(&[][..], |set| &**set),
            Err(_) => &[],
        };
        set.iter().map(|(name, value)| (&**name, &**value))
    }

    /// The value of one extended attribute.
    pub fn xattr(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.xattrs()
            .find_map(|(own, value)| (own == name).then_some(value))
    }

    fn dirents(&self) -> &'a [Dirent] {
        match self.inode.body {
            Body::Directory { entries, .. } => slice(&self.tree.dirents, entries),
            Body::Regular { .. }
            | Body::Symlink { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo => &[],
        }
    }
}

/// `span` of `all`; empty if it does not fit, which build() rules out.
fn slice<T>(all: &[T], span: Span) -> &[T] {
    let start = usize::try_from(span.start).unwrap_or(usize::MAX);
    let len = usize::try_from(span.len).unwrap_or(usize::MAX);
    all.get(start..start.saturating_add(len)).unwrap_or(&[])
}
