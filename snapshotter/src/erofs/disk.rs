//! The structures of the format, byte by byte. All numbers are little endian.
//!
//! Pure. Every function appends one structure of fixed length. What is written here was
//! tried on the kernels we serve; fields that are not named are zero.

use lazarette_fetcher::index::Timestamp;

use super::{BLOCK, Devices, SMALL_MAX};

/// Where the superblock stands in block 0.
pub(super) const SUPERBLOCK_AT: usize = 1024;
/// Length of an inode, before its extended attributes.
pub(super) const INODE_LEN: u32 = 64;
/// Inodes stand at multiples of this, and are named by the multiple.
pub(super) const SLOT: u32 = 32;
/// Length of a chunk index.
pub(super) const CHUNK_INDEX_LEN: u32 = 8;
/// "No block of its own", where the number of a block is expected.
pub(super) const NO_BLOCK: u32 = u32::MAX;

const MAGIC: u32 = 0xe0f5_e1e2;
/// A checksum, and times of modification (not of change).
const FEATURES_COMPAT: u32 = 0x1 | 0x2;
/// Chunked files and a table of devices.
const FEATURES_INCOMPAT: u32 = 0x4 | 0x8;
const BLOCK_BITS: u8 = 12;
/// Place of the first device slot, in units of its length of 128 bytes.
const DEVICE_SLOT: u16 = 9;
const DEVICE_SLOT_LEN: usize = 128;
/// What `dump.erofs` calls the image and its device; at most 16 bytes.
const LABEL: &[u8; 16] = b"lazarette\0\0\0\0\0\0\0";
/// Seed and polynomial of the checksum, a CRC-32C without the final inversion.
const CRC_SEED: u32 = 0x5045_b54a;
const CRC_POLYNOMIAL: u32 = 0x82f6_3b78;
/// Begins the checksum: magic and the checksum itself are not part of it.
const CRC_FROM: usize = SUPERBLOCK_AT + 8;
const CRC_AT: usize = SUPERBLOCK_AT + 4;

/// What the superblock says.
pub(super) struct Superblock {
    /// Slot of the root.
    pub(super) root: u16,
    /// Number of inodes.
    pub(super) inodes: u64,
    /// Blocks of the image.
    pub(super) blocks: u32,
    /// First block of the shared extended attributes, 0 without any.
    pub(super) xattr_block: u32,
    /// Blocks of the data file.
    pub(super) data_blocks: u32,
    /// How often that is named.
    pub(super) devices: Devices,
}

impl Superblock {
    /// All of block 0.
    pub(super) fn block(&self) -> Vec<u8> {
        let mut out = vec![0; SUPERBLOCK_AT];
        out.extend(MAGIC.to_le_bytes());
        out.extend([0; 4]);
        out.extend(FEATURES_COMPAT.to_le_bytes());
        out.extend([BLOCK_BITS, 0]);
        out.extend(self.root.to_le_bytes());
        out.extend(self.inodes.to_le_bytes());
        // Time of the build: none, so that one tree gives one image.
        out.extend([0; 12]);
        out.extend(self.blocks.to_le_bytes());
        // Slots count from block 0.
        out.extend([0; 4]);
        out.extend(self.xattr_block.to_le_bytes());
        // A UUID nobody looks for.
        out.extend([0; 16]);
        out.extend(LABEL);
        out.extend(FEATURES_INCOMPAT.to_le_bytes());
        out.extend([0; 2]);
        let devices = self.devices.count();
        out.extend(devices.to_le_bytes());
        out.extend(DEVICE_SLOT.to_le_bytes());
        out.resize(usize::from(DEVICE_SLOT) * DEVICE_SLOT_LEN, 0);
        for _ in 0..devices {
            let end = out.len() + DEVICE_SLOT_LEN;
            out.extend(LABEL);
            out.extend([0; 48]);
            out.extend(self.data_blocks.to_le_bytes());
            out.resize(end, 0);
        }
        out.resize(BLOCK as usize, 0);
        let sum = checksum(out.get(CRC_FROM..).unwrap_or_default());
        if let Some(place) = out.get_mut(CRC_AT..CRC_FROM) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
        out
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(CRC_SEED, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (CRC_POLYNOMIAL * (sum & 1))
        })
    })
}

/// Where an inode's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Whole blocks of the image from this one on; [`NO_BLOCK`] for no content.
    Blocks(u32),
    /// Whole blocks from this one on, the rest behind the inode.
    Inline(u32),
    /// Chunks of `1 << bits` bytes of the data file, whose indexes stand behind the inode.
    Chunks {
        /// At least those of a block, at most 31 more.
        bits: u32,
    },
    /// The number of a device.
    Device(u32),
}

/// Most bits of a chunk's length.
pub(super) const CHUNK_BITS_MAX: u32 = BLOCK_BITS as u32 + 31;

impl Content {
    /// What the format calls the layout, and the field that depends on it.
    fn fields(self) -> (u16, u32) {
        /// Chunk indexes that name a device each.
        const WITH_INDEXES: u32 = 0x20;
        match self {
            Self::Blocks(block) => (0, block),
            Self::Inline(block) => (2, block),
            Self::Chunks { bits } => (4, bits.saturating_sub(BLOCK_BITS.into()) | WITH_INDEXES),
            Self::Device(rdev) => (0, rdev),
        }
    }
}

/// An inode in the long form, which has room for owners, large files and times.
pub(super) struct Inode {
    /// Kind and permissions.
    pub(super) mode: u16,
    /// Length of the extended attributes as the format counts it.
    pub(super) xattr_count: u16,
    pub(super) size: u64,
    pub(super) content: Content,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) nlink: u32,
}

impl Inode {
    pub(super) fn append(&self, out: &mut Vec<u8>) {
        const LONG_FORM: u16 = 1;
        let (layout, union) = self.content.fields();
        out.extend((LONG_FORM | (layout << 1)).to_le_bytes());
        out.extend(self.xattr_count.to_le_bytes());
        out.extend(self.mode.to_le_bytes());
        out.extend([0; 2]);
        out.extend(self.size.to_le_bytes());
        out.extend(union.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.uid.to_le_bytes());
        out.extend(self.gid.to_le_bytes());
        // Seconds before 1970 are negative: the kernel takes them as signed.
        out.extend(self.mtime.secs.to_le_bytes());
        out.extend(self.mtime.nanos.to_le_bytes());
        out.extend(self.nlink.to_le_bytes());
        out.extend([0; 16]);
    }
}

impl Devices {
    fn count(self) -> u16 {
        match self {
            Self::One => 1,
            Self::SmallApart => 2,
        }
    }

    /// The number of the one through which a file of `size` bytes is read.
    pub(super) fn of_file(self, size: u64) -> u16 {
        match self {
            Self::SmallApart if size <= SMALL_MAX => 2,
            Self::One | Self::SmallApart => 1,
        }
    }
}

/// A chunk that begins at a block of a device.
pub(super) fn append_chunk_index(device: u16, data_block: u32, out: &mut Vec<u8>) {
    out.extend([0; 2]);
    out.extend(device.to_le_bytes());
    out.extend(data_block.to_le_bytes());
}

/// What directories call the kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileType {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Symlink = 7,
}

impl FileType {
    /// The bits of a mode that say the same.
    pub(super) fn mode(self) -> u16 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Symlink => 0o120_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_length_the_format_says() {
        let superblock = Superblock {
            root: 128,
            inodes: 1,
            blocks: 2,
            xattr_block: 0,
            data_blocks: 7,
            devices: Devices::One,
        };
        let block = superblock.block();
        assert_eq!(block.len(), BLOCK as usize);
        assert_eq!(&block[1024..1028], &MAGIC.to_le_bytes());
        assert_eq!(&block[1152 + 64..1152 + 68], &7_u32.to_le_bytes());
        assert!(block[1152 + 68..].iter().all(|byte| *byte == 0));
        let mut out = Vec::new();
        append_chunk_index(1, 3, &mut out);
        assert_eq!(out, [0, 0, 1, 0, 3, 0, 0, 0]);
        let devices = Devices::SmallApart;
        let two = Superblock {
            devices,
            ..superblock
        };
        let two = two.block();
        assert_eq!(two[1024 + 86..1024 + 88], [2, 0]);
        assert_eq!(two[1152..1280], two[1280..1408]);
        assert_eq!(two[1280 + 64..1280 + 68], 7_u32.to_le_bytes());
        for (size, device) in [(1, 2), (SMALL_MAX, 2), (SMALL_MAX + 1, 1)] {
            assert_eq!(devices.of_file(size), device, "{size}");
            assert_eq!(Devices::One.of_file(size), 1, "{size}");
        }
    }

    #[test]
    fn the_checksum_is_crc32c_without_its_last_step() {
        // The check value of CRC-32C is e3069283, seed and result inverted.
        let plain = b"123456789".iter().fold(u32::MAX, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
                (sum >> 1) ^ (CRC_POLYNOMIAL * (sum & 1))
            })
        });
        assert_eq!(!plain, 0xe306_9283);
        assert_eq!(checksum(&[]), CRC_SEED);
    }
}
