//! EROFS metadata images: a layer's tree in the form that the kernel itself reads.
//!
//! An image holds names, attributes and links. Contents stay where they are: a regular
//! file is one chunk that points into the layer's data file, which is the image's only
//! extra device. Whoever mounts the image names that file, and pads it to a whole block. It
//! can be named twice ([`Devices`]), so that small files are read through a file of their own.
//!
//! ```text
//! block 0          superblock at 1024, its device slots from 1152 on
//! block 1 ...      inodes as the tree numbers them, the root first, each at a multiple of
//!                  32 bytes: inode, extended attributes, chunk index or inline tail
//! ... whole blocks what does not fit behind its inode: directories, long symbolic links
//! ... to the end   extended attributes that several inodes share
//! ```
//!
//! Invariant: one tree gives one image, byte for byte, and an image shows exactly its tree;
//! a tree that the format cannot hold exactly is refused as [`Unfit`], and then has to be
//! served some other way. Deciding (`layout`, pure) and writing (`write`, one pass, never
//! the whole image in memory) are apart. Never reads an image: the kernel mounts only what
//! this process wrote from a checked tree.

mod directory;
mod disk;
mod layout;
#[cfg(test)]
mod tests;
mod write;
mod xattr;

use std::io::{self, Write};

use crate::tree::{Ino, Tree};
use layout::Plan;

/// Size of a block in bytes: the kernel's page, which is also what `stat` then calls the
/// preferred size of a read. Contents must begin at multiples of it in the data file.
pub const BLOCK: u32 = 4096;

/// Files of at most so many bytes are small.
pub const SMALL_MAX: u64 = 64 << 10;

/// Through how many files an image has the data read, all with the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// One.
    One,
    /// Two: the second for small files, the first for the others.
    SmallApart,
}

/// Why a tree cannot become an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Content begins where no block does.
    #[error(
        "the content of inode {ino} begins at byte {data_offset}, which is no multiple of {BLOCK}"
    )]
    Unaligned {
        /// Whose content.
        ino: Ino,
        /// Where it begins in the data file, in bytes.
        data_offset: u64,
    },
    /// The format knows five kinds of extended attributes, and this is none of them.
    #[error("inode {ino} has the extended attribute {name:?}, which the format cannot name")]
    XattrName {
        /// Whose attribute.
        ino: Ino,
        /// Its name, what is not UTF-8 replaced.
        name: String,
    },
    /// A number of the format has too few bits.
    #[error("{what} is {value}, at most {max}")]
    Limit {
        /// What is counted or measured.
        what: &'static str,
        /// How much it is.
        value: u64,
        /// The most that the format holds.
        max: u64,
    },
}

/// An image that is decided, down to the place of every byte, and not yet written.
#[derive(Debug)]
pub struct Image<'t> {
    tree: &'t Tree,
    plan: Plan<'t>,
    devices: Devices,
}

impl<'t> Image<'t> {
    /// Lays out the image of a tree. Takes about 12 bytes of memory per inode.
    ///
    /// # Errors
    /// [`Unfit`] where the format cannot say what the tree says.
    pub fn of(tree: &'t Tree) -> Result<Self, Unfit> {
        let plan = Plan::of(tree)?;
        let devices = Devices::One;
        Ok(Self {
            tree,
            plan,
            devices,
        })
    }

    /// The same image for other devices: as long, and everything in the same places.
    pub fn for_devices(self, devices: Devices) -> Self {
        Self { devices, ..self }
    }

    /// Length of the image in bytes, whole blocks.
    pub fn image_len(&self) -> u64 {
        self.plan.image_len()
    }

    /// Length in bytes that the data file must have for the mount: its own, rounded up to a
    /// whole block.
    pub fn device_len(&self) -> u64 {
        self.plan.device_len()
    }

    /// Writes the image, from its first byte to its last and in small pieces.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_to(&self, out: impl Write) -> io::Result<()> {
        write::image(self.tree, &self.plan, self.devices, out)
    }
}

/// `value` in as many bits as the format has for it.
fn fit<T: TryFrom<u64>>(what: &'static str, value: u64, max: u64) -> Result<T, Unfit> {
    let limit = Unfit::Limit { what, value, max };
    if value > max {
        return Err(limit);
    }
    T::try_from(value).map_err(|_| limit)
}
