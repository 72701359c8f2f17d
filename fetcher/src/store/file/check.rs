//! Reading everything a layer claims to have, and dropping what is not right.
//!
//! Invariant: every byte of every present chunk is read from the data file and compared,
//! whatever was known of it. Never fetches: what was dropped is fetched by its next
//! reader, or by whoever asked for the check. Wrong bytes that the kernel reads by itself are
//! not made a hole of; they stay until right ones are written over them.

use super::LayerFile;
use super::evict::Bytes;
use super::record::try_read_bitmap;
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
    /// Whether the record of what is present was unreadable; it is empty now.
    pub bitmap_lost: bool,
}

impl LayerFile {
    /// Compares every present chunk with its digest and drops those that are not right,
    /// on the device too. Blocks on the device.
    pub fn check_all(&self) -> Result<LayerCheck> {
        self.refresh()?;
        let mut found = LayerCheck {
            bitmap_lost: self.restore_bitmap()?,
            ..LayerCheck::default()
        };
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

    /// Writes a bitmap file again that does not check out; `true` if it did not. What only
    /// this process knows is recorded by its next flush.
    fn restore_bitmap(&self) -> Result<bool> {
        let mut recorded = self.flushing.lock();
        let Some(_lock) = self.lock_own()? else {
            return Ok(false);
        };
        if try_read_bitmap(&self.dir, self.bits.count())?.is_some() {
            return Ok(false);
        }
        self.catch_up(&mut recorded)?;
        self.record(&recorded.stored)?;
        Ok(true)
    }
}
