//! What was read of a layer lately, for whoever evicts.
//!
//! Invariant: only a hint. It is not synced, and whatever the file holds costs nothing but
//! a worse choice.
//!
//! ```text
//! touched   u64 each, little endian: a bit per extent of the data file
//! ```

use std::io;

use super::{EXTENT_BYTES, LayerFile, TOUCHED};
use crate::store::bitmap::Bitmap;

impl LayerFile {
    /// Notes that the extent of this place was read.
    pub(super) fn touch(&self, offset: u64) {
        let extent = u32::try_from(offset / EXTENT_BYTES).unwrap_or(u32::MAX);
        if !self.touched.get(extent) {
            self.touched.set(extent);
        }
    }

    /// Writes down which extents were read, for whoever evicts after this process. Only a
    /// hint: it is not synced, and a failure costs nothing but a worse choice.
    pub(super) fn note_touched(&self) {
        let mut words = self.touched.snapshot();
        let noted = self.noted();
        words.iter_mut().zip(&noted).for_each(|(a, b)| *a |= b);
        if words == noted || words.iter().all(|word| *word == 0) || self.is_removed() {
            return;
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let path = self.dir.join(TOUCHED);
        let write = || {
            let file = self.disk.create(&path)?;
            self.disk.write_at(&file, 0, &bytes)
        };
        if let Err(error) = write() {
            tracing::debug!(path = %path.display(), %error, "cannot note what was read");
        }
    }

    /// Extents that were read since the last call, here or, as far as they noted it, in
    /// other processes; ascending.
    pub(in crate::store) fn take_touched(&self) -> Vec<u32> {
        let taken = Bitmap::empty(self.touched.count());
        taken.merge(&self.touched.snapshot());
        self.touched.retain(&vec![0; self.touched.snapshot().len()]);
        taken.merge(&self.noted());
        match self.disk.remove_file(&self.dir.join(TOUCHED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(%error, "cannot forget what was read");
            }
            _ => {}
        }
        taken.ones().collect()
    }

    /// What the hint says; nothing if it is not as long as it should be.
    fn noted(&self) -> Vec<u64> {
        let words = self.touched.snapshot().len();
        let max = words as u64 * 8;
        let bytes = crate::store::read_bounded(&self.dir.join(TOUCHED), max).unwrap_or_default();
        let (whole, _) = bytes.as_chunks::<8>();
        let mut noted: Vec<u64> = whole.iter().map(|word| u64::from_le_bytes(*word)).collect();
        noted.resize(words, 0);
        noted
    }
}
