//! The content-addressed store.

use std::sync::Arc;

use crate::index::LayerIndex;

/// A layer on disk.
pub struct LayerFile {
    index: Arc<LayerIndex>,
}

impl LayerFile {
    /// The file and chunk tables.
    pub fn index(&self) -> &Arc<LayerIndex> {
        &self.index
    }
}
