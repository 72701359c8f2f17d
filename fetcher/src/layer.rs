//! A layer that file systems read from: what is present comes from the data file, what
//! is not is fetched, verified and kept.
//!
//! Invariant: [`Layer::try_read`] and [`Layer::fill`] never expose a byte that was not
//! verified against the index. One fetch per chunk however many readers wait for it.

use std::sync::Arc;

use crate::Result;
use crate::index::LayerIndex;
use crate::source::{BlobRef, BlobSource};
use crate::store::LayerFile;
use crate::types::ByteRange;

/// What reading a layer has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Ranged requests sent to the source.
    pub requests: u64,
    /// Encoded bytes received from the source.
    pub bytes_fetched: u64,
    /// Chunks verified and stored.
    pub chunks_filled: u64,
}

/// One layer: its index, its data file, and the source that fills it.
pub struct Layer {
    file: Arc<LayerFile>,
}

impl Layer {
    /// Joins a stored layer with the source that can fill it.
    pub fn new(file: Arc<LayerFile>, source: Arc<dyn BlobSource>, blob: BlobRef) -> Arc<Self> {
        let _ = (source, blob);
        Arc::new(Self { file })
    }

    /// The file and chunk tables.
    pub fn index(&self) -> &Arc<LayerIndex> {
        self.file.index()
    }

    /// Reads `buf.len()` bytes at `data_offset` of the data file if all of them are
    /// present, without waiting for the network. `false` (and `buf` unspecified) if not.
    pub fn try_read(&self, data_offset: u64, buf: &mut [u8]) -> Result<bool> {
        let _ = (data_offset, buf);
        Ok(false)
    }

    /// Makes every chunk that touches `range` of the data file present. Dropping the
    /// future abandons only this wait, never the fetch that others wait for.
    pub async fn fill(&self, range: ByteRange) -> Result<()> {
        let _ = range;
        Ok(())
    }

    /// What it has cost so far.
    pub fn counters(&self) -> LayerCounters {
        LayerCounters::default()
    }
}
