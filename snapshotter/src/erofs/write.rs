//! Writes an image as it was laid out, from front to back.
//!
//! Invariant: everything is written at the place the plan says; [`Sink`] pads up to it and
//! a plan that would have to go back fails loudly instead of writing a wrong image. Decides
//! nothing.

use std::io::{self, BufWriter, Write};

use super::directory::{self, file_type};
use super::disk::{self, CHUNK_INDEX_LEN, Content, NO_BLOCK, SLOT, Superblock, append_chunk_index};
use super::layout::{Place, Plan};
use super::{BLOCK, Devices, xattr};
use crate::tree::{Ino, InodeRef, Kind, ROOT_INO, Tree};

/// Bytes handed to the writer at a time.
const PIECE: usize = 64 << 10;

/// Bytes of an image that go out in order.
struct Sink<W> {
    out: W,
    at: u64,
}

impl<W: Write> Sink<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to `at`.
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; 256] = [0; 256];
        let mut left = at.checked_sub(self.at).ok_or_else(|| {
            io::Error::other(format!("image is at byte {} already, not at {at}", self.at))
        })?;
        while left > 0 {
            let len = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            let zeros = ZEROS.get(..len).unwrap_or(&ZEROS);
            self.put(zeros)?;
            left -= len as u64;
        }
        Ok(())
    }

    fn pad_to_block(&mut self) -> io::Result<()> {
        self.pad_to(self.at.next_multiple_of(BLOCK.into()))
    }
}

pub(super) fn image(
    tree: &Tree,
    plan: &Plan<'_>,
    devices: Devices,
    out: impl Write,
) -> io::Result<()> {
    let out = BufWriter::with_capacity(PIECE, out);
    let mut sink = Sink { out, at: 0 };
    let root = u16::try_from(plan.place(ROOT_INO).slot).map_err(io::Error::other)?;
    let superblock = Superblock {
        root,
        inodes: tree.len() as u64,
        blocks: plan.blocks,
        xattr_block: plan.xattr_block,
        data_blocks: plan.data_blocks,
        devices,
    };
    sink.put(&superblock.block())?;
    let slot_of = |ino: Ino| plan.place(ino).slot;
    let mut bytes = Vec::new();
    for inode in (ROOT_INO..).map_while(|ino| tree.get(ino)) {
        let place = plan.place(inode.ino());
        bytes.clear();
        append_inode((tree, plan, devices), inode, &mut bytes);
        sink.pad_to(u64::from(place.slot) * u64::from(SLOT))?;
        sink.put(&bytes)?;
    }
    sink.pad_to(u64::from(plan.tail_block) * u64::from(BLOCK))?;
    for inode in (ROOT_INO..).map_while(|ino| tree.get(ino)) {
        write_blocks(tree, inode, plan.place(inode.ino()), slot_of, &mut sink)?;
    }
    bytes.clear();
    plan.shared.append_area(&mut bytes);
    sink.put(&bytes)?;
    sink.pad_to(plan.image_len())?;
    sink.out.flush()
}

/// Appends an inode and what stands behind it.
fn append_inode<'t>(
    (tree, plan, devices): (&'t Tree, &Plan<'t>, Devices),
    inode: InodeRef<'t>,
    out: &mut Vec<u8>,
) {
    let content = plan.place(inode.ino()).content;
    let attr = inode.attr();
    let mut xattrs = Vec::new();
    plan.shared.append_own(inode, &mut xattrs);
    let disk = disk::Inode {
        mode: file_type(inode).mode() | attr.mode,
        xattr_count: xattr::count_of(xattrs.len() as u64),
        size: match inode.kind() {
            Kind::Directory { .. } => directory::shape(tree, inode).len(),
            Kind::Regular { .. }
            | Kind::Symlink { .. }
            | Kind::CharDevice { .. }
            | Kind::BlockDevice { .. }
            | Kind::Fifo => inode.size(),
        },
        content,
        // A tree has at most INODES_MAX of them.
        number: u32::try_from(inode.ino()).unwrap_or(u32::MAX),
        uid: attr.uid,
        gid: attr.gid,
        mtime: attr.mtime,
        nlink: inode.nlink(),
    };
    disk.append(out);
    out.extend_from_slice(&xattrs);
    match (content, inode.kind()) {
        (Content::Chunks { bits }, Kind::Regular { size, data_offset }) => {
            let start = (devices.of_file(size), data_offset);
            append_chunks(bits, size, start, out);
        }
        (Content::Inline(_), Kind::Symlink { target }) => out.extend_from_slice(target),
        (Content::Inline(_), Kind::Directory { .. }) => append_last_block(tree, plan, inode, out),
        (
            Content::Inline(_) | Content::Chunks { .. } | Content::Blocks(_) | Content::Device(_),
            _,
        ) => {}
    }
}

/// The chunks of a file that begins at a byte of a device.
fn append_chunks(bits: u32, size: u64, (device, data_offset): (u16, u64), out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(CHUNK_INDEX_LEN as usize), 0);
    let starts = (0..size.div_ceil(1 << bits)).map(|chunk| data_offset + (chunk << bits));
    for start in starts {
        // Within the data file, whose blocks were counted.
        let block = u32::try_from(start / u64::from(BLOCK)).unwrap_or(NO_BLOCK);
        append_chunk_index(device, block, out);
    }
}

fn append_last_block(tree: &Tree, plan: &Plan<'_>, dir: InodeRef<'_>, out: &mut Vec<u8>) {
    let mut last = Vec::new();
    let keep = |block: &[u8]| {
        last.clear();
        last.extend_from_slice(block);
        Ok::<_, std::convert::Infallible>(())
    };
    match directory::blocks(tree, dir, |ino| plan.place(ino).slot, keep) {
        Ok(()) => out.extend_from_slice(&last),
    }
}

/// Writes the blocks that an inode has for itself.
fn write_blocks<W: Write>(
    tree: &Tree,
    inode: InodeRef<'_>,
    place: Place,
    slot_of: impl Fn(Ino) -> u32,
    sink: &mut Sink<W>,
) -> io::Result<()> {
    let (block, inline) = match place.content {
        Content::Blocks(block) => (block, false),
        Content::Inline(block) => (block, true),
        Content::Chunks { .. } | Content::Device(_) => (NO_BLOCK, false),
    };
    if block == NO_BLOCK {
        return Ok(());
    }
    sink.pad_to(u64::from(block) * u64::from(BLOCK))?;
    match inode.kind() {
        Kind::Symlink { target } => sink.put(target)?,
        Kind::Directory { .. } => {
            let full = directory::shape(tree, inode).full;
            let mut left = if inline { full } else { full + 1 };
            directory::blocks(tree, inode, slot_of, |bytes| {
                if left == 0 {
                    return Ok(());
                }
                left -= 1;
                sink.put(bytes)?;
                sink.pad_to_block()
            })?;
        }
        Kind::Regular { .. } | Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {}
    }
    sink.pad_to_block()
}
