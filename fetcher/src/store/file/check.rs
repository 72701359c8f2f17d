//! Reading everything a layer claims to have, and dropping what is not right.
//!
//! Invariant: every byte of every present chunk is read from the data file and compared,
//! whatever was known of it. Never fetches: what was dropped is fetched by its next
//! reader, or by whoever asked for the check. Wrong bytes that the kernel reads by itself are
//! not made a hole of; they stay until right ones are written over them. Where the record of
//! what is present was lost, the data file itself says what is.

use super::evict::Bytes;
use super::record::try_read_bitmap;
use super::{BITMAP, LayerFile};
use crate::Result;
use crate::index::ChunkId;

/// What a check of a layer found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerCheck {
    /// Chunks whose bytes were compared.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
    /// Chunks that were not right and are absent now, ascending.
    pub dropped: Vec<ChunkId>,
    /// Whether the record of what is present was unreadable. It speaks now of what the data
    /// file has; more may have been there.
    pub bitmap_lost: bool,
    /// Files beside the data that were damaged. Each is gone now, or without what was wrong in
    /// it, and nothing is missing but what they help with.
    pub damaged_files: Vec<&'static str>,
    /// Whether that is right by the word of whoever made a zTOC, and by nothing else; see
    /// [`LayerIndex::is_by_ztoc`](crate::index::LayerIndex::is_by_ztoc).
    pub is_by_word: bool,
}

impl LayerFile {
    /// Compares every present chunk with its digest and drops those that are not right,
    /// on the device too. Blocks on the device.
    pub fn check_all(&self) -> Result<LayerCheck> {
        self.refresh()?;
        let mut found = LayerCheck {
            bitmap_lost: self.restore_bitmap()?,
            is_by_word: self.index.is_by_ztoc(),
            ..LayerCheck::default()
        };
        if found.bitmap_lost {
            self.recover()?;
        }
        let mut suspects = Vec::new();
        for id in self.bits.ones() {
            found.chunks += 1;
            found.bytes += u64::from(self.chunk(id)?.len);
            if !self.is_right(id)? {
                suspects.push(id);
            }
        }
        // Another process may have evicted one while it was read: that is no damage.
        self.refresh()?;
        for id in suspects {
            if self.is_present(id) && !self.is_right(id)? {
                found.dropped.push(id);
            }
        }
        self.drop_chunks(&found.dropped, Bytes::MayStay)?;
        self.note_present();
        Ok(found)
    }

    /// Makes present, and records, what the data file has all the same.
    fn recover(&self) -> Result<()> {
        for id in 0..self.bits.count() {
            // As for who puts it: no hole is made between its bytes and its bit.
            let _no_holes = self.holes.read();
            if !self.bits.get(id) && self.is_right(id)? {
                self.sound.set(id);
                self.bits.set(id);
            }
        }
        self.recount();
        self.flush_now()
    }

    /// Writes a bitmap file again that is gone, or does not check out; `true` if so. What only
    /// this process knows is recorded by its next flush.
    fn restore_bitmap(&self) -> Result<bool> {
        let mut recorded = self.recorded.lock();
        let Some(_lock) = self.lock_own()? else {
            return Ok(false);
        };
        let is_there = self.dir.join(BITMAP).exists();
        if is_there && try_read_bitmap(&self.dir, self.bits.count())?.is_some() {
            return Ok(false);
        }
        self.catch_up(&mut recorded)?;
        self.record(&recorded.stored)?;
        Ok(true)
    }
}
