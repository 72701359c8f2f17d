//! How much of a layer came from other layers of this node, for whoever asks.
//!
//! Invariant: only a number to look at. It is not synced, and two processes that add to it
//! at once may lose what one of them adds.
//!
//! ```text
//! copied   u64, little endian: decoded bytes
//! ```

use std::sync::atomic::Ordering;

use super::LayerFile;

const COPIED: &str = "copied";

impl LayerFile {
    /// Decoded bytes that were copied from other layers, ever.
    pub fn copied_bytes(&self) -> u64 {
        let not_yet = self.copied_bytes.load(Ordering::Relaxed);
        self.noted_copied().saturating_add(not_yet)
    }

    /// Adds to it; written by the next flush.
    pub(in crate::store) fn note_copied(&self, bytes: u64) {
        self.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Writes down what was added.
    pub(super) fn write_copied(&self) {
        let bytes = self.copied_bytes.swap(0, Ordering::Relaxed);
        if bytes == 0 || self.is_removed() {
            return;
        }
        let all = self.noted_copied().saturating_add(bytes);
        let path = self.dir.join(COPIED);
        let write = || {
            let file = self.disk.create(&path)?;
            self.disk.write_at(&file, 0, &all.to_le_bytes())
        };
        if let Err(error) = write() {
            tracing::debug!(path = %path.display(), %error, "cannot note what was copied");
        }
    }

    fn noted_copied(&self) -> u64 {
        let bytes = crate::store::read_bounded(&self.dir.join(COPIED), 8).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }
}
