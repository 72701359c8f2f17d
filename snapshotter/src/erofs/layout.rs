//! Decides where every byte of an image goes.
//!
//! Pure. Invariant: a tail that is inline lies in one block with nothing of it outside, as
//! the kernel demands; everything else behind an inode may cross blocks. Blocks are handed
//! out in the order of the inodes.

use super::disk::{CHUNK_BITS_MAX, CHUNK_INDEX_LEN, Content, INODE_LEN, NO_BLOCK, SLOT};
use super::xattr::Shared;
use super::{BLOCK, Unfit, directory, fit};
use crate::tree::{Ino, InodeRef, Kind, Tree};

/// Inodes begin in this block.
const FIRST_BLOCK: u64 = 1;
const BLOCK_LEN: u64 = BLOCK as u64;
/// What counts blocks has 32 bits: 16 TiB. The last value means "none".
const BLOCKS_MAX: u64 = NO_BLOCK as u64 - 1;

/// Where one inode is and where its content is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Its number in the image: its place in units of [`SLOT`].
    pub(super) slot: u32,
    pub(super) content: Content,
}

/// The layout of an image.
#[derive(Debug)]
pub(super) struct Plan<'t> {
    /// By inode number minus one.
    places: Vec<Place>,
    pub(super) shared: Shared<'t>,
    /// First of the blocks behind the inodes.
    pub(super) tail_block: u32,
    /// First block of the shared attributes, 0 without any.
    pub(super) xattr_block: u32,
    pub(super) blocks: u32,
    pub(super) data_blocks: u32,
}

impl<'t> Plan<'t> {
    pub(super) fn of(tree: &'t Tree) -> Result<Self, Unfit> {
        let data_blocks = tree.data_len().div_ceil(BLOCK_LEN);
        let data_blocks = fit(
            "the number of blocks of the data file",
            data_blocks,
            BLOCKS_MAX,
        )?;
        let shared = Shared::of(tree)?;
        let mut cursor = Cursor {
            at: FIRST_BLOCK * BLOCK_LEN,
            blocks: 0,
        };
        let mut places = Vec::with_capacity(tree.len());
        for inode in (1..).map_while(|ino| tree.get(ino)) {
            places.push(cursor.place(tree, inode, &shared)?);
        }
        let what = "the number of blocks of the image";
        let tail_block: u32 = fit(what, cursor.at.div_ceil(BLOCK_LEN), BLOCKS_MAX)?;
        let xattr_at = u64::from(tail_block) + u64::from(cursor.blocks);
        let blocks = xattr_at + shared.area_len().div_ceil(BLOCK_LEN);
        let blocks: u32 = fit(what, blocks, BLOCKS_MAX)?;
        let has_shared = shared.area_len() > 0;
        for place in &mut places {
            place.content = shift(place.content, tail_block);
        }
        Ok(Self {
            places,
            shared,
            tail_block,
            xattr_block: if has_shared {
                fit(what, xattr_at, BLOCKS_MAX)?
            } else {
                0
            },
            blocks,
            data_blocks,
        })
    }

    pub(super) fn image_len(&self) -> u64 {
        u64::from(self.blocks) * BLOCK_LEN
    }

    pub(super) fn device_len(&self) -> u64 {
        u64::from(self.data_blocks) * BLOCK_LEN
    }

    /// The place of an inode of the tree this was made of.
    pub(super) fn place(&self, ino: Ino) -> Place {
        let at = usize::try_from(ino.wrapping_sub(1)).ok();
        let place = at.and_then(|at| self.places.get(at));
        *place.expect("the plan was made of every inode of the tree")
    }
}

/// Blocks are counted from the first one behind the inodes until that one is known.
fn shift(content: Content, first: u32) -> Content {
    let shift = |block: u32| {
        if block == NO_BLOCK {
            NO_BLOCK
        } else {
            // Their sum was checked.
            block.saturating_add(first)
        }
    };
    match content {
        Content::Blocks(block) => Content::Blocks(shift(block)),
        Content::Inline(block) => Content::Inline(shift(block)),
        Content::Chunks { .. } | Content::Device(_) => content,
    }
}

/// What is taken so far.
struct Cursor {
    /// Where the next inode may begin, bytes from the start of the image.
    at: u64,
    /// Blocks behind the inodes.
    blocks: u32,
}

/// Content that is written into the image: `full` blocks and a last one of `tail` bytes.
#[derive(Clone, Copy)]
struct Written {
    full: u64,
    tail: u32,
}

impl Cursor {
    fn place<'t>(
        &mut self,
        tree: &'t Tree,
        inode: InodeRef<'t>,
        shared: &Shared<'t>,
    ) -> Result<Place, Unfit> {
        let head = INODE_LEN + shared.len_of(inode)?;
        match inode.kind() {
            Kind::Regular { size: 0, .. } | Kind::Fifo => {
                self.take(head, Content::Blocks(NO_BLOCK))
            }
            Kind::Regular { size, data_offset } => {
                if !data_offset.is_multiple_of(BLOCK_LEN) {
                    let ino = inode.ino();
                    return Err(Unfit::Unaligned { ino, data_offset });
                }
                let bits = chunk_bits(size);
                let indexes = size.div_ceil(1 << bits);
                let indexes: u32 = fit("the number of chunks of a file", indexes, 1 << 16)?;
                let head = head.next_multiple_of(CHUNK_INDEX_LEN) + indexes * CHUNK_INDEX_LEN;
                self.take(head, Content::Chunks { bits })
            }
            Kind::CharDevice { rdev } | Kind::BlockDevice { rdev } => {
                self.take(head, Content::Device(rdev))
            }
            Kind::Symlink { target } => {
                let tail = fit(
                    "the length of a symbolic link",
                    target.len() as u64,
                    BLOCK_LEN,
                )?;
                self.write(head, Written { full: 0, tail })
            }
            Kind::Directory { .. } => {
                let directory::Shape { full, tail } = directory::shape(tree, inode);
                self.write(head, Written { full, tail })
            }
        }
    }

    /// Takes `len` bytes for an inode and what stands behind it.
    fn take(&mut self, len: u32, content: Content) -> Result<Place, Unfit> {
        let slot = self.at / u64::from(SLOT);
        let slot = fit("the length of the inodes in slots", slot, u32::MAX.into())?;
        self.at = (self.at + u64::from(len)).next_multiple_of(SLOT.into());
        Ok(Place { slot, content })
    }

    /// Takes an inode of `head` bytes with content of its own: inline where that wastes
    /// less than a block.
    fn write(&mut self, head: u32, content: Written) -> Result<Place, Unfit> {
        match inline_at(self.at, head, content.tail) {
            Some(at) => {
                self.at = at;
                let block = self.take_blocks(content.full)?;
                self.take(head + content.tail, Content::Inline(block))
            }
            None => {
                let block = self.take_blocks(content.full + 1)?;
                self.take(head, Content::Blocks(block))
            }
        }
    }

    fn take_blocks(&mut self, count: u64) -> Result<u32, Unfit> {
        if count == 0 {
            return Ok(NO_BLOCK);
        }
        let first = self.blocks;
        let end = u64::from(first) + count;
        self.blocks = fit("the length of directories in blocks", end, BLOCKS_MAX)?;
        Ok(first)
    }
}

/// Where an inode of `head` bytes goes at or after `at` so that `tail` bytes behind it lie
/// in one block; `None` if a block of their own costs less.
fn inline_at(at: u64, head: u32, tail: u32) -> Option<u64> {
    let fits = |at: u64| (at + u64::from(head)) % BLOCK_LEN + u64::from(tail) <= BLOCK_LEN;
    let next = at.next_multiple_of(BLOCK_LEN);
    if tail >= BLOCK {
        None
    } else if fits(at) {
        Some(at)
    } else {
        (fits(next) && next - at <= u64::from(BLOCK - tail)).then_some(next)
    }
}

/// Bits of the length of a chunk that takes all of `size` bytes, or as much as one can.
fn chunk_bits(size: u64) -> u32 {
    let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
    bits.clamp(BLOCK.trailing_zeros(), CHUNK_BITS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_one_chunk_until_chunks_end() {
        for (size, bits) in [
            (1, 12),
            (4096, 12),
            (4097, 13),
            (8192, 13),
            (1 << 30, 30),
            ((1 << 30) + 1, 31),
            (1 << 43, 43),
            ((1 << 43) + 1, 43),
            (1 << 44, 43),
        ] {
            assert_eq!(chunk_bits(size), bits, "{size}");
        }
    }

    #[test]
    fn tails_stay_in_one_block_and_waste_little() {
        for (at, head, tail, place) in [
            (4096, 64, 100, Some(4096)),
            // Up to the very end of a block.
            (8192 - 96, 64, 32, Some(8192 - 96)),
            // From the very start of one.
            (8192 - 64, 64, 4000, Some(8192 - 64)),
            // Moving wastes 96 bytes, a block of its own nearly all.
            (8192 - 96, 64, 33, Some(8192)),
            // Moving would waste 3,000 bytes, a block of its own 96.
            (8192 - 3008, 64, 4000, None),
            (4096, 64, 4033, None),
            (8192 - 64, 64, 4096, None),
        ] {
            assert_eq!(inline_at(at, head, tail), place, "{at} {head} {tail}");
        }
    }
}
