//! Recording what is present, so that it survives a crash.
//!
//! Invariant: bytes are on the device before a bit that speaks of them is, and a flush that
//! returned well has both there, and the names that lead to them. It brings nothing back
//! that somebody evicted.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::record::read_bitmap;
use super::{DATA, LayerFile, Recorded};
use crate::{Error, Result};

/// How often data is synced while others may evict, before it is synced while they may not.
const SYNCS_MAX: u32 = 3;

/// When unrecorded chunks are worth a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushPolicy {
    /// Decoded bytes written since the last flush.
    pub bytes: u64,
    /// Time since the first of them was noticed.
    pub age: Duration,
}

impl Default for FlushPolicy {
    /// What a crash may cost: 32 MiB or 5 s of fetching. Smaller means more syncs while
    /// an image starts, when the disk has better things to do.
    fn default() -> Self {
        Self {
            bytes: 32 << 20,
            age: Duration::from_secs(5),
        }
    }
}

impl LayerFile {
    /// Records every chunk that was present when the call began: syncs the data file,
    /// then merges the bits into the bitmap file. Blocks on the device.
    ///
    /// After a failed sync, chunks that no earlier flush recorded are absent again. A
    /// layer that was removed meanwhile has nothing to record, which is no error. Then
    /// the store is brought back within its bounds, if it has any.
    pub fn flush(&self) -> Result<()> {
        let Some(store) = self.store.upgrade() else {
            return self.flush_now();
        };
        store.with_room(|| self.flush_now())?;
        self.note_touched();
        self.write_copied();
        store.keep_within();
        Ok(())
    }

    /// [`LayerFile::flush`] and nothing else.
    pub(super) fn flush_now(&self) -> Result<()> {
        let _turn = self.flushing.lock();
        *self.due.lock() = None;
        let tried = self.came.begin_flush();
        self.flush_bits()?;
        self.came.set_recorded(tried);
        Ok(())
    }

    /// Readers who have to learn of an eviction wait for `recorded`, so data is synced without
    /// it, and once more where somebody evicted from this layer meanwhile; at last with it.
    fn flush_bits(&self) -> Result<()> {
        for _ in 0..SYNCS_MAX {
            let Some(generation) = self.unrecorded_since()? else {
                return Ok(());
            };
            let words = self.bits.snapshot();
            let synced = self.sync_all();
            synced.inspect_err(|_| self.go_back(&self.recorded.lock()))?;
            // Else what was synced may be a hole by now, and what is no hole not synced.
            let is_same = |recorded: &Recorded| recorded.stored.generation == generation;
            if self.record_if(|recorded| Ok(is_same(recorded).then_some(words)))? {
                return Ok(());
            }
        }
        let sync = |recorded: &Recorded| {
            let words = self.bits.snapshot();
            let synced = self.sync_all();
            synced.inspect_err(|_| self.go_back(recorded))?;
            Ok(Some(words))
        };
        self.record_if(sync).map(drop)
    }

    /// The generation of what is recorded; `None` where nothing else is present.
    fn unrecorded_since(&self) -> Result<Option<u32>> {
        let mut recorded = self.recorded.lock();
        if self.is_removed() {
            return Ok(None);
        }
        if self.bits.snapshot() == recorded.stored.words {
            return self.settle_names(&mut recorded).map(|()| None);
        }
        Ok(Some(recorded.stored.generation))
    }

    /// Returns once the data is on the device, and first what the digests of its chunks are.
    fn sync_all(&self) -> Result<()> {
        let learned = self.learned.as_ref();
        let synced = learned.map_or(Ok(()), |learned| learned.sync(&*self.disk));
        // Without these, what is recorded could not be told from what the disk lost.
        let synced = synced.and_then(|()| self.details.sync(&*self.disk));
        let synced = synced.and_then(|()| self.disk.sync_data(&self.data));
        synced.map_err(|error| {
            self.failed_syncs.fetch_add(1, Ordering::AcqRel);
            Error::io("sync", self.dir.join(DATA), error)
        })
    }

    /// After a failed sync: what is not recorded may be lost.
    fn go_back(&self, recorded: &Recorded) {
        self.bits.retain(&recorded.stored.words);
        self.recount();
    }

    /// Records the chunks that `words` says have their bytes on the device, if it names any;
    /// `false` if not. Nobody evicts from this layer from before it is asked.
    fn record_if(&self, words: impl FnOnce(&Recorded) -> Result<Option<Vec<u64>>>) -> Result<bool> {
        let mut recorded = self.recorded.lock();
        let Some(lock) = self.lock_own()? else {
            return Ok(true);
        };
        self.catch_up(&mut recorded)?;
        let Some(words) = words(&recorded)? else {
            return Ok(false);
        };
        let mut merged = read_bitmap(&self.dir, self.bits.count())?;
        merged
            .words
            .iter_mut()
            .zip(&words)
            .for_each(|(a, b)| *a |= b);
        self.record(&merged)?;
        self.bits.merge(&merged.words);
        self.recount();
        recorded.stored = merged;
        drop(lock);
        self.settle_names(&mut recorded).map(|()| true)
    }

    /// Returns once the layer's name and what its bitmap held when it was opened are on
    /// the device: the part of [`LayerFile::flush`] that needs no new chunk. Cheap when
    /// done before. Blocks on the device.
    pub fn settle(&self) -> Result<()> {
        self.settle_names(&mut self.recorded.lock())
    }

    fn settle_names(&self, recorded: &mut Recorded) -> Result<()> {
        if recorded.named || self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        for dir in [Some(&*self.dir), self.dir.parent()].into_iter().flatten() {
            match self.disk.sync_dir(dir) {
                Ok(()) => {}
                // Removed by another process meanwhile: nothing is left to promise.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(e) => return Err(Error::io("sync", dir, e)),
            }
        }
        recorded.named = true;
        Ok(())
    }

    /// Whether anything came that no flush has recorded yet, be it that one runs or failed.
    /// Looks only at memory.
    pub fn is_dirty(&self) -> bool {
        self.came.unrecorded() > 0
    }

    /// Whether `policy` says that [`LayerFile::flush`] is worth it at `now` for what came since
    /// the last one began. Looks only at memory.
    pub fn is_flush_due(&self, policy: FlushPolicy, now: Instant) -> bool {
        let fresh = self.came.untried();
        if fresh == 0 {
            return false;
        }
        let since = *self.due.lock().get_or_insert(now);
        fresh >= policy.bytes || now.saturating_duration_since(since) >= policy.age
    }
}
