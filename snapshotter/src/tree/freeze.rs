//! Packs a draft into a [`Tree`].
//!
//! Walks it breadth first, numbers the inodes, resolves hard links and counts names.
//! Invariant: numbers depend on names and structure alone, never on the order of entries.

use std::collections::{HashMap, VecDeque};

use lazarette_fetcher::index::{FileEntry, FileKind, Timestamp};

use super::build::{Draft, Node, NodeBody, NodeId, ROOT};
use super::check::rdev;
use super::name::{Name, OPAQUE_XATTR, OVERLAY_XATTRS};
use super::{Attr, Body, Dirent, Inode, NO_XATTRS, Span, Tree, Xattr, XattrSet};
use crate::Result;

/// Attributes of a directory that no entry describes.
pub(super) const SYNTHESISED: Attr = Attr {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: Timestamp { secs: 0, nanos: 0 },
};
/// Attributes of a whiteout, as overlay makes them itself.
const WHITEOUT: Attr = Attr {
    mode: 0,
    ..SYNTHESISED
};

/// The arrays of a tree while they grow.
struct Freezer<'a> {
    draft: &'a Draft<'a>,
    inodes: Vec<Inode>,
    dirents: Vec<Dirent>,
    names: Vec<u8>,
    xattrs: Vec<XattrSet>,
    /// Where a node that may have several names went.
    placed: HashMap<NodeId, u32>,
    /// Directories whose entries are still to come.
    queue: VecDeque<(NodeId, u32)>,
}

pub(super) fn freeze(draft: &Draft<'_>) -> Result<Tree> {
    let mut freezer = Freezer {
        draft,
        inodes: Vec::with_capacity(draft.nodes.len()),
        dirents: Vec::with_capacity(draft.nodes.len()),
        names: Vec::new(),
        xattrs: Vec::new(),
        placed: HashMap::new(),
        queue: VecDeque::new(),
    };
    freezer.add(ROOT, 0)?;
    while let Some((node, inode)) = freezer.queue.pop_front() {
        freezer.fill_directory(node, inode)?;
    }
    Ok(Tree {
        inodes: freezer.inodes.into(),
        dirents: freezer.dirents.into(),
        names: freezer.names.into(),
        xattrs: freezer.xattrs.into(),
        data_len: draft.what.0.data_len,
    })
}

impl<'a> Freezer<'a> {
    /// Adds the entries of one directory and the inodes they name.
    fn fill_directory(&mut self, node: NodeId, inode: u32) -> Result<()> {
        let Some(NodeBody::Directory { children, .. }) =
            self.draft.nodes.get(node).map(|node| &node.body)
        else {
            return Ok(());
        };
        let start = self.narrow(self.dirents.len())?;
        let mut subdirectories = 0;
        for (name, child) in children {
            if Name::of(name) == Name::Reserved {
                continue;
            }
            let (target, directory) = self.inode_of(*child, inode)?;
            subdirectories += u32::from(directory);
            let name = self.intern(name)?;
            self.dirents.push(Dirent {
                name,
                inode: target,
            });
        }
        let len = self.narrow(self.dirents.len())? - start;
        if let Some(own) = usize::try_from(inode)
            .ok()
            .and_then(|at| self.inodes.get_mut(at))
        {
            own.nlink = 2 + subdirectories;
            if let Body::Directory { entries, .. } = &mut own.body {
                *entries = Span { start, len };
            }
        }
        Ok(())
    }

    /// The inode that a name of `child` gets, and whether it is a directory.
    fn inode_of(&mut self, child: NodeId, parent: u32) -> Result<(u32, bool)> {
        let mut id = child;
        if let Some((link, target)) = self.draft.nodes.get(child).and_then(as_hardlink) {
            id = self.draft.resolve(link, target)?;
        }
        if let Some(&inode) = self.placed.get(&id) {
            if let Some(own) = usize::try_from(inode)
                .ok()
                .and_then(|at| self.inodes.get_mut(at))
            {
                own.nlink += 1;
            }
            return Ok((inode, false));
        }
        let directory = self.draft.nodes.get(id).is_some_and(Node::is_directory);
        Ok((self.add(id, parent)?, directory))
    }

    /// Adds an inode with one name.
    fn add(&mut self, id: NodeId, parent: u32) -> Result<u32> {
        let inode = self.narrow(self.inodes.len())?;
        let Some(node) = self.draft.nodes.get(id) else {
            return Err(self.draft.what.malformed(b"", "a node is missing"));
        };
        let (opaque, body) = match (&node.body, node.entry) {
            (NodeBody::Directory { opaque, .. }, _) => {
                self.queue.push_back((id, inode));
                let entries = Span { start: 0, len: 0 };
                (*opaque, Body::Directory { entries, parent })
            }
            (NodeBody::Leaf, Some(entry)) => {
                self.placed.insert(id, inode);
                (false, self.body(entry, parent)?)
            }
            (NodeBody::Whiteout, _) | (NodeBody::Leaf, None) => {
                (false, Body::CharDevice { rdev: 0 })
            }
        };
        let attr = match (&node.body, node.entry) {
            (_, Some(entry)) => attr(entry),
            (NodeBody::Directory { .. }, None) => SYNTHESISED,
            (NodeBody::Whiteout | NodeBody::Leaf, None) => WHITEOUT,
        };
        let xattrs = self.add_xattrs(node.entry, opaque)?;
        self.inodes.push(Inode {
            attr,
            nlink: 1,
            xattrs,
            body,
        });
        Ok(inode)
    }

    fn body(&mut self, entry: &'a FileEntry, parent: u32) -> Result<Body> {
        Ok(match &entry.kind {
            FileKind::Regular { size, data_offset } => Body::Regular {
                size: *size,
                data_offset: *data_offset,
            },
            FileKind::Symlink { target } => Body::Symlink {
                target: self.intern(target)?,
            },
            FileKind::CharDevice { major, minor } => Body::CharDevice {
                rdev: rdev(*major, *minor).unwrap_or(0),
            },
            FileKind::BlockDevice { major, minor } => Body::BlockDevice {
                rdev: rdev(*major, *minor).unwrap_or(0),
            },
            FileKind::Fifo => Body::Fifo,
            FileKind::Directory => Body::Directory {
                entries: Span { start: 0, len: 0 },
                parent,
            },
            FileKind::Hardlink { .. } => {
                let rule = "a hard link was not resolved";
                return Err(self.draft.what.malformed(&entry.path, rule));
            }
        })
    }

    /// Keeps an inode's extended attributes; returns where.
    fn add_xattrs(&mut self, entry: Option<&FileEntry>, opaque: bool) -> Result<u32> {
        let own = entry.map_or(&[][..], |entry| &entry.xattrs);
        let mut set: Vec<Xattr> = own
            .iter()
            .filter(|(name, _)| !name.starts_with(OVERLAY_XATTRS))
            .map(|(name, value)| (name.as_slice().into(), value.as_slice().into()))
            .collect();
        if opaque {
            set.push((OPAQUE_XATTR.0.into(), OPAQUE_XATTR.1.into()));
        }
        if set.is_empty() {
            return Ok(NO_XATTRS);
        }
        set.sort();
        set.dedup_by(|later, earlier| later.0 == earlier.0);
        let at = self.narrow(self.xattrs.len())?;
        self.xattrs.push(set.into());
        Ok(at)
    }

    fn intern(&mut self, bytes: &[u8]) -> Result<Span> {
        let start = self.narrow(self.names.len())?;
        let len = self.narrow(bytes.len())?;
        self.narrow(self.names.len().saturating_add(bytes.len()))?;
        self.names.extend_from_slice(bytes);
        Ok(Span { start, len })
    }

    fn narrow(&self, number: usize) -> Result<u32> {
        u32::try_from(number).map_err(|_| {
            let rule = "names and link targets of the layer exceed 4 GiB";
            self.draft.what.limit(b"", rule)
        })
    }
}

fn as_hardlink<'a>(node: &Node<'a>) -> Option<(&'a FileEntry, &'a [u8])> {
    let entry = node.entry?;
    match &entry.kind {
        FileKind::Hardlink { target } => Some((entry, target)),
        FileKind::Directory
        | FileKind::Regular { .. }
        | FileKind::Symlink { .. }
        | FileKind::CharDevice { .. }
        | FileKind::BlockDevice { .. }
        | FileKind::Fifo => None,
    }
}

pub(super) fn attr(entry: &FileEntry) -> Attr {
    Attr {
        mode: entry.mode & 0o7777,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
    }
}
