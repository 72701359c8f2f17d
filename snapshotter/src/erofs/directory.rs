//! Directories as the format writes them: blocks of entries in byte order.
//!
//! Pure. A block holds its entries of 12 bytes each and then their names; the first
//! entry's offset of the name tells how many there are. `.` and `..` stand among the
//! others, where byte order puts them: the kernel searches by halves.

use std::iter;

use super::BLOCK;
use super::disk::FileType;
use crate::tree::{Entry, Ino, InodeRef, Kind, Tree};

const ENTRY_LEN: usize = 12;

/// How long a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Blocks before the last.
    pub(super) full: u64,
    /// Bytes of the last block, never 0.
    pub(super) tail: u32,
}

impl Shape {
    /// Bytes of the directory, what its last block does not fill left out.
    pub(super) fn len(self) -> u64 {
        self.full * u64::from(BLOCK) + u64::from(self.tail)
    }
}

/// All entries of a directory, sorted.
fn entries<'t>(tree: &'t Tree, dir: InodeRef<'t>) -> impl Iterator<Item = Entry<'t>> {
    let parent = match dir.kind() {
        Kind::Directory { parent } => tree.get(parent).unwrap_or(dir),
        Kind::Regular { .. }
        | Kind::Symlink { .. }
        | Kind::CharDevice { .. }
        | Kind::BlockDevice { .. }
        | Kind::Fifo => dir,
    };
    let entry = |name, inode| Entry { name, inode };
    let dots: [Entry<'t>; 2] = [entry(b".", dir), entry(b"..", parent)];
    let mut dots = dots.into_iter().peekable();
    let mut rest = dir.entries(0).peekable();
    iter::from_fn(move || match (dots.peek(), rest.peek()) {
        (Some(dot), Some(next)) if next.name < dot.name => rest.next(),
        (Some(_), _) => dots.next(),
        (None, _) => rest.next(),
    })
}

pub(super) fn shape(tree: &Tree, dir: InodeRef<'_>) -> Shape {
    let (mut full, mut tail) = (0, 0);
    for entry in entries(tree, dir) {
        let len = ENTRY_LEN + entry.name.len();
        if tail + len > BLOCK as usize {
            (full, tail) = (full + 1, 0);
        }
        tail += len;
    }
    let tail = u32::try_from(tail).unwrap_or(BLOCK);
    Shape { full, tail }
}

/// Calls `each` with every block in order, and the slots of inodes as `slot_of` has them;
/// none is padded.
pub(super) fn blocks<E>(
    tree: &Tree,
    dir: InodeRef<'_>,
    slot_of: impl Fn(Ino) -> u32,
    mut each: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (mut block, mut len, mut bytes) = (Vec::new(), 0, Vec::new());
    for entry in entries(tree, dir) {
        let more = ENTRY_LEN + entry.name.len();
        if len + more > BLOCK as usize {
            encode(&block, &slot_of, &mut bytes);
            each(&bytes)?;
            block.clear();
            len = 0;
        }
        len += more;
        block.push(entry);
    }
    encode(&block, &slot_of, &mut bytes);
    each(&bytes)
}

fn encode(block: &[Entry<'_>], slot_of: &impl Fn(Ino) -> u32, out: &mut Vec<u8>) {
    out.clear();
    let mut name_at = ENTRY_LEN * block.len();
    for entry in block {
        out.extend(u64::from(slot_of(entry.inode.ino())).to_le_bytes());
        // A block has 4096 bytes, so no offset in it is cut.
        out.extend(u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
        out.extend([file_type(entry.inode) as u8, 0]);
        name_at += entry.name.len();
    }
    for entry in block {
        out.extend_from_slice(entry.name);
    }
}

pub(super) fn file_type(inode: InodeRef<'_>) -> FileType {
    match inode.kind() {
        Kind::Directory { .. } => FileType::Directory,
        Kind::Regular { .. } => FileType::Regular,
        Kind::Symlink { .. } => FileType::Symlink,
        Kind::CharDevice { .. } => FileType::CharDevice,
        Kind::BlockDevice { .. } => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
    }
}
