//! A data file that another process serves: what it gets, and what it is told.
//!
//! Invariant: bytes that were vouched for were present and right while the store's number
//! of evictions was the one that is given with them. Who has them serves them as long as it
//! finds that number after reading them, or, having found it after it took the read lock of
//! the eviction byte, as long as it holds that lock: an eviction from this layer, by any
//! process, takes the write lock of that byte first, and is refused where it cannot.

use std::fs::File;
use std::sync::atomic::Ordering;

use super::read::{READ_ATTEMPTS_MAX, touching};
use super::{DATA, LayerFile};
use crate::index::{ChunkId, align_up};
use crate::store::sys::{self, Holes};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Chunks vouched for on each side of those that were asked for.
const AROUND_MAX: u32 = 1024;

/// What a process needs to serve a layer's data.
#[derive(Debug)]
pub struct Lent {
    /// The data file, an open file of its own: a lock of it is nobody else's.
    pub data: File,
    /// The store's number of evictions, 8 bytes, little endian; shorter means 0.
    pub evictions: File,
}

/// Bytes that are present and right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vouched {
    /// Which, of the data file.
    pub range: ByteRange,
    /// The store's number of evictions while they were.
    pub evictions: u64,
}

/// A layer from which nobody evicts, in this process or another, until this is dropped. It goes
/// with the process, however that ends. The default is for data that nobody evicts from anyway.
#[derive(Debug, Default)]
pub struct Kept {
    /// Open for the lock alone.
    data: Option<File>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Closing is not enough while a process that another thread starts has it open, too.
        let _ = self
            .data
            .as_ref()
            .map(|data| sys::lock_holes(data, Holes::Done));
    }
}

/// The right to make holes in a data file. Given back on drop.
pub(super) struct MayMakeHoles<'a>(&'a File);

impl Drop for MayMakeHoles<'_> {
    fn drop(&mut self) {
        // It fails only where there are no locks, and then it had none.
        let _ = sys::lock_holes(self.0, Holes::Done);
    }
}

impl LayerFile {
    /// Lends the data file to a process that serves it. Nothing is promised by that alone.
    pub fn lend(&self) -> Result<Lent> {
        let data = sys::reopen(&self.data);
        Ok(Lent {
            data: data.map_err(|e| Error::io("open", self.dir.join(DATA), e))?,
            evictions: self.evictions.lend()?,
        })
    }

    /// Has everybody leave what is present, and what comes, until the result is dropped. Waits for
    /// an eviction that is under way, and for the device.
    pub fn keep(&self) -> Result<Kept> {
        let err = |e| Error::io("lock", self.dir.join(DATA), e);
        let Some(_lock) = self.lock_own()? else {
            return Ok(Kept::default());
        };
        let data = sys::reopen(&self.data).map_err(err)?;
        // Who makes holes holds the layer's lock, so nobody stands against it.
        sys::lock_holes(&data, Holes::Forbid).map_err(err)?;
        Ok(Kept { data: Some(data) })
    }

    /// Has the data file end with a block, as a kernel that reads it itself reads nothing less.
    /// What is behind the data is zeros, and nobody's.
    pub fn pad(&self) -> Result<()> {
        let err = |op| move |e| Error::io(op, self.dir.join(DATA), e);
        let len = self.padded_len();
        let now = self.data.metadata().map_err(err("inspect"))?.len();
        if now < len {
            self.disk.set_len(&self.data, len).map_err(err("extend"))?;
        }
        Ok(())
    }

    /// The length of the data up to the end of its last block.
    fn padded_len(&self) -> u64 {
        align_up(self.index.data_len).unwrap_or(self.index.data_len)
    }

    /// `range` and what is around it, if every chunk it touches is present and right. Reads
    /// the local disk, to compare with the digest what this process has not seen yet.
    pub fn vouch(&self, range: ByteRange) -> Result<Option<Vouched>> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let evictions = self.seen.load(Ordering::Acquire);
            let ids = touching(&self.index.chunks, range);
            let present = self.are_sound(ids.clone())?;
            let range = self.sound_around(ids, range);
            if self.evictions.now()? == evictions {
                self.touch(range.start());
                return Ok(present.then_some(Vouched { range, evictions }));
            }
            self.refresh()?;
        }
        Ok(None)
    }

    /// `range`, the chunks `ids` that touch it, and all between the nearest ones around them
    /// that are not known to be right.
    fn sound_around(&self, ids: std::ops::Range<ChunkId>, range: ByteRange) -> ByteRange {
        let is_sound = |id: &ChunkId| self.bits.get(*id) && self.sound.get(*id);
        let before = (ids.start.saturating_sub(AROUND_MAX)..ids.start).rev();
        let first = before.take_while(is_sound).last().unwrap_or(ids.start);
        let behind = ids.end..ids.end.saturating_add(AROUND_MAX).min(self.bits.count());
        let end = behind
            .take_while(is_sound)
            .last()
            .map_or(ids.end, |last| last + 1);
        // Padding between two chunks, and behind the last, is nobody's, and never anything but zeros.
        let start = match first.checked_sub(1) {
            Some(other) => self.chunk(other).map_or(0, |chunk| {
                chunk.data_offset.saturating_add(u64::from(chunk.len))
            }),
            None => 0,
        };
        let end = self
            .chunk(end)
            .map_or_else(|_| self.padded_len(), |chunk| chunk.data_offset);
        ByteRange::new(start, end).map_or(range, |around| around.cover(&range))
    }

    /// Whether somebody who serves the data file forbids holes in it, or the kernel reads it
    /// by itself.
    pub(in crate::store) fn is_kept(&self) -> bool {
        // Where there are no such locks nobody can forbid it.
        sys::may_make_holes(&self.data).is_ok_and(|may| !may)
            || self.is_shown_whole().unwrap_or(true)
    }

    /// The right to make holes. The caller holds the layer's lock, and is the only one of this
    /// object who makes some.
    pub(super) fn may_make_holes(&self) -> Result<MayMakeHoles<'_>> {
        self.must_not_be_shown_whole()?;
        let locked = sys::lock_holes(&self.data, Holes::Make);
        if locked.map_err(|e| Error::io("lock", self.dir.join(DATA), e))? {
            return Ok(MayMakeHoles(&self.data));
        }
        Err(Error::Unsupported {
            what: format!("evicting from layer {} now", self.index.blob_digest),
            detail: "it is mounted, and no daemon is there that could fetch it again; start \
                     the daemon, or unmount it"
                .to_owned(),
        })
    }
}
