//! The FUSE file system below an EROFS mount: two files for the kernel alone.
//!
//! `metadata` is the image, in memory; `data` is the layer's data file, as long as the
//! image says, read from the same data as [`LayerFs`](super::fs::LayerFs) reads. EROFS is
//! mounted over the directory that shows them, so no path leads here any more.
//!
//! Invariant: `data` is never cached here. EROFS has a cache of its own, and asks for what
//! a file of the layer needs and nothing beside it: no read-ahead runs from the end of one
//! file into the next.

use std::ffi::OsStr;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use lazarette_fetcher::types::ByteRange;

use super::miss::Wanted;
use super::reader::Reader;
use super::session;
use crate::erofs;

/// Name of the image.
pub(super) const METADATA: &str = "metadata";
/// Name of the data file.
pub(super) const DATA: &str = "data";

const ROOT: u64 = 1;
const METADATA_INO: u64 = 2;
const DATA_INO: u64 = 3;

/// How long the kernel may keep an answer: none of them changes.
const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Lengths of the data file.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataLen {
    /// Where the layer's bytes end.
    pub(super) layer: u64,
    /// What EROFS is told: whole blocks, with zeros behind the layer's bytes.
    pub(super) device: u64,
}

/// The two files.
pub(super) struct DeviceFs {
    metadata: Box<[u8]>,
    len: DataLen,
    reader: Reader,
}

impl DeviceFs {
    pub(super) fn new(metadata: Box<[u8]>, len: DataLen, reader: Reader) -> Self {
        Self {
            metadata,
            len,
            reader,
        }
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let (kind, size, perm) = match ino {
            ROOT => (FileType::Directory, 0, 0o500),
            METADATA_INO => (FileType::RegularFile, self.metadata.len() as u64, 0o400),
            DATA_INO => (FileType::RegularFile, self.len.device, 0o400),
            _ => return None,
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: erofs::BLOCK,
            flags: 0,
        })
    }
}

/// What a read of `size` bytes at `offset` takes of the layer's data.
fn wanted(len: DataLen, offset: u64, size: u32) -> Option<Wanted> {
    let start = offset.min(len.device);
    let end = offset.saturating_add(size.into()).min(len.device);
    let (from, to) = (start.min(len.layer), end.min(len.layer));
    let range = ByteRange::at(from, to - from)?;
    // Less than a block.
    let zeros = usize::try_from((end - start) - range.len()).ok()?;
    Some(Wanted { range, zeros })
}

impl Filesystem for DeviceFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        session::negotiate(
            config,
            &[
                InitFlags::FUSE_ASYNC_READ,
                InitFlags::FUSE_ASYNC_DIO,
                InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            ],
        );
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = match (parent.0, name.to_str()) {
            (ROOT, Some(METADATA)) => METADATA_INO,
            (ROOT, Some(DATA)) => DATA_INO,
            _ => return reply.error(Errno::ENOENT),
        };
        match self.attr(ino) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match ino.0 {
            DATA_INO => FopenFlags::FOPEN_DIRECT_IO,
            _ => FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(FileHandle(0), flags);
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
        match ino.0 {
            METADATA_INO => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = self.metadata.get(start..).unwrap_or_default();
                let len = usize::try_from(size).map_or(rest.len(), |size| size.min(rest.len()));
                reply.data(rest.get(..len).unwrap_or_default());
            }
            DATA_INO => match wanted(self.len, offset, size) {
                Some(wanted) => self.reader.answer(wanted, reply),
                None => reply.error(Errno::EIO),
            },
            _ => reply.error(Errno::EISDIR),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_where_the_device_does_and_have_zeros_behind_the_layer() {
        let len = DataLen {
            layer: 5000,
            device: 8192,
        };
        for (offset, size, start, bytes, zeros) in [
            (0, 4096, 0, 4096, 0),
            (0, 1 << 20, 0, 5000, 3192),
            (4096, 4096, 4096, 904, 3192),
            (6000, 100, 5000, 0, 100),
            (8192, 4096, 5000, 0, 0),
            (u64::MAX, u32::MAX, 5000, 0, 0),
        ] {
            let wanted = wanted(len, offset, size).unwrap();
            let range = wanted.range;
            let found = (range.start(), range.len(), wanted.zeros);
            assert_eq!(found, (start, bytes, zeros), "{offset} {size}");
        }
    }
}
