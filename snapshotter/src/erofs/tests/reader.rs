//! Reads images the slow and simple way, to compare them with what they were made of.
//!
//! Shares nothing with the writer but what the format's description says; panics at the
//! first byte that breaks a rule.

use std::collections::BTreeMap;

use lazarette_fetcher::index::Timestamp;

use crate::tree::{InodeRef, Kind, Tree};

/// Everything that an image says of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// With the bits of the kind.
    pub(super) mode: u16,
    pub(super) owner: (u32, u32),
    pub(super) mtime: Timestamp,
    pub(super) nlink: u32,
    pub(super) ino: u64,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    Directory,
    Empty,
    Data { start: u64, size: u64 },
    Symlink(Vec<u8>),
    Device(u32),
    Fifo,
}

pub(super) type View = BTreeMap<Vec<u8>, Facts>;

/// What the tree says.
pub(super) fn of_tree(tree: &Tree) -> View {
    let mut view = View::new();
    let mut todo = vec![(Vec::new(), tree.root())];
    while let Some((path, inode)) = todo.pop() {
        for entry in inode.entries(0) {
            let path = [&path[..], b"/", entry.name].concat();
            todo.push((path, entry.inode));
        }
        view.insert(path, facts(inode));
    }
    view
}

fn facts(inode: InodeRef<'_>) -> Facts {
    let (kind, body) = match inode.kind() {
        Kind::Directory { .. } => (0o040_000, Body::Directory),
        Kind::Regular { size: 0, .. } => (0o100_000, Body::Empty),
        Kind::Regular { size, data_offset } => {
            let start = data_offset;
            (0o100_000, Body::Data { start, size })
        }
        Kind::Symlink { target } => (0o120_000, Body::Symlink(target.to_vec())),
        Kind::CharDevice { rdev } => (0o020_000, Body::Device(rdev)),
        Kind::BlockDevice { rdev } => (0o060_000, Body::Device(rdev)),
        Kind::Fifo => (0o010_000, Body::Fifo),
    };
    let attr = inode.attr();
    Facts {
        mode: kind | attr.mode,
        owner: (attr.uid, attr.gid),
        mtime: attr.mtime,
        nlink: inode.nlink(),
        ino: inode.ino(),
        xattrs: inode
            .xattrs()
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect(),
        body,
    }
}

/// What the image says.
pub(super) fn of_image(image: &[u8]) -> View {
    let reader = Reader(image);
    assert_eq!(reader.u32(1024), 0xe0f5_e1e2);
    assert_eq!(image.len() as u64, u64::from(reader.u32(1060)) * 4096);
    let root = u64::from(reader.u16(1038));
    let mut view = View::new();
    let mut todo = vec![(Vec::new(), root, root)];
    while let Some((path, nid, parent)) = todo.pop() {
        let inode = reader.inode(nid);
        if let Body::Directory = inode.body {
            for (name, child, kind) in reader.entries(nid) {
                match &name[..] {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let path = [&path[..], b"/", &name].concat();
                        assert_eq!(kind, kind_of(reader.inode(child).mode));
                        todo.push((path, child, nid));
                    }
                }
            }
        }
        view.insert(path, inode);
    }
    assert!(view.values().all(|facts| facts.ino <= reader.u64(1040)));
    view
}

fn kind_of(mode: u16) -> u8 {
    match mode & 0o170_000 {
        0o100_000 => 1,
        0o040_000 => 2,
        0o020_000 => 3,
        0o060_000 => 4,
        0o010_000 => 5,
        0o120_000 => 7,
        other => panic!("kind {other:o}"),
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().unwrap()
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn inode(&self, nid: u64) -> Facts {
        let at = usize::try_from(nid * 32).unwrap();
        assert_eq!(self.u16(at) & 1, 1, "the long form");
        let mode = self.u16(at + 4);
        let size = self.u64(at + 8);
        let body = match mode & 0o170_000 {
            0o040_000 => Body::Directory,
            0o100_000 if size == 0 => Body::Empty,
            0o100_000 => self.data(at, size),
            0o120_000 => Body::Symlink(self.content(at)),
            0o010_000 => Body::Fifo,
            _ => Body::Device(self.u32(at + 16)),
        };
        Facts {
            mode,
            owner: (self.u32(at + 24), self.u32(at + 28)),
            mtime: Timestamp {
                secs: i64::from_le_bytes(self.array(at + 32)),
                nanos: self.u32(at + 40),
            },
            nlink: self.u32(at + 44),
            ino: u64::from(self.u32(at + 20)),
            xattrs: self.xattrs(at),
            body,
        }
    }

    fn xattrs_len(&self, at: usize) -> usize {
        match self.u16(at + 2) {
            0 => 0,
            count => 12 + (usize::from(count) - 1) * 4,
        }
    }

    fn xattrs(&self, at: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let (mut place, end) = (at + 64, at + 64 + self.xattrs_len(at));
        let mut found = BTreeMap::new();
        if place == end {
            return found;
        }
        let area = usize::try_from(self.u32(1068)).unwrap() * 4096;
        let ids = usize::from(self.0[place + 4]);
        place += 12;
        for _ in 0..ids {
            let id = usize::try_from(self.u32(place)).unwrap();
            let (name, value, _) = self.xattr(area + id * 4);
            assert!(found.insert(name, value).is_none());
            place += 4;
        }
        while place < end {
            let (name, value, len) = self.xattr(place);
            assert!(found.insert(name, value).is_none());
            place += len;
        }
        assert_eq!(place, end);
        found
    }

    fn xattr(&self, at: usize) -> (Vec<u8>, Vec<u8>, usize) {
        let (name_len, value_len) = (usize::from(self.0[at]), usize::from(self.u16(at + 2)));
        let prefix: &[u8] = match self.0[at + 1] {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            other => panic!("xattr of kind {other}"),
        };
        let (name, value) = self.0[at + 4..].split_at(name_len);
        let len = (4 + name_len + value_len).next_multiple_of(4);
        ([prefix, name].concat(), value[..value_len].to_vec(), len)
    }

    /// Where the data of a regular file is.
    fn data(&self, at: usize, size: u64) -> Body {
        assert_eq!(self.u16(at) >> 1, 4, "made of chunks");
        let format = self.u32(at + 16);
        assert_eq!(format & !0x1f, 0x20, "chunks with indexes");
        let chunk = 1_u64 << (12 + (format & 0x1f));
        let indexes = (at + 64 + self.xattrs_len(at)).next_multiple_of(8);
        let start = u64::from(self.u32(indexes + 4)) * 4096;
        for number in 0..size.div_ceil(chunk) {
            let index = indexes + usize::try_from(number).unwrap() * 8;
            let device = match self.u16(1110) {
                2 if size <= 65_536 => 2,
                _ => 1,
            };
            assert_eq!(self.u16(index + 2), device);
            assert_eq!(
                u64::from(self.u32(index + 4)) * 4096,
                start + number * chunk
            );
        }
        assert!(start + size <= u64::from(self.u32(1152 + 64)) * 4096);
        Body::Data { start, size }
    }

    /// Bytes of a directory or a symbolic link.
    fn content(&self, at: usize) -> Vec<u8> {
        let size = usize::try_from(self.u64(at + 8)).unwrap();
        let block = || usize::try_from(self.u32(at + 16)).unwrap() * 4096;
        match self.u16(at) >> 1 {
            0 => self.0[block()..block() + size].to_vec(),
            2 => {
                let (full, tail) = (size / 4096 * 4096, size % 4096);
                let behind = at + 64 + self.xattrs_len(at);
                assert!(tail > 0);
                assert_eq!(behind / 4096, (behind + tail - 1) / 4096, "in one block");
                let first = if full == 0 { 0 } else { block() };
                [&self.0[first..first + full], &self.0[behind..behind + tail]].concat()
            }
            other => panic!("layout {other}"),
        }
    }

    /// Names, inodes and kinds; names in order.
    fn entries(&self, nid: u64) -> Vec<(Vec<u8>, u64, u8)> {
        let content = self.content(usize::try_from(nid * 32).unwrap());
        let mut found = Vec::new();
        for block in content.chunks(4096) {
            let inner = Reader(block);
            let count = usize::from(inner.u16(8)) / 12;
            for number in 0..count {
                let start = usize::from(inner.u16(number * 12 + 8));
                let end = if number + 1 < count {
                    usize::from(inner.u16((number + 1) * 12 + 8))
                } else {
                    let used = block.iter().rposition(|byte| *byte != 0).unwrap();
                    used + 1
                };
                let name = block[start..end].to_vec();
                found.push((name, inner.u64(number * 12), block[number * 12 + 10]));
            }
        }
        assert!(found.is_sorted_by(|a, b| a.0 < b.0), "{found:?}");
        found
    }
}
