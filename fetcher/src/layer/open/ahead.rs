//! Where tables of contents are, read before their layers are opened.
//!
//! The manifest says it. What else it takes to open a layer comes with the config, a round
//! trip later.
//!
//! Invariant: only bytes. Whoever opens the layer checks them, or fails, as if they had come
//! then. At most [`LAYERS_MAX`] reads are kept, each for one opening; those that nobody comes
//! for end with this.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::toc;
use crate::Result;
use crate::source::{BlobRef, BlobSource};
use crate::types::{ByteRange, Digest};

/// Layers whose tables are read ahead: as many as are opened at once, so it takes no more
/// memory than that.
const LAYERS_MAX: usize = 8;

#[derive(Default)]
pub(super) struct Ahead {
    reads: Mutex<HashMap<Digest, Read>>,
}

/// A read that goes on by itself.
struct Read {
    range: ByteRange,
    bytes: JoinHandle<Result<Bytes>>,
}

impl Ahead {
    /// Begins to read `range` of a blob.
    pub(super) fn begin(&self, source: &Arc<dyn BlobSource>, blob: BlobRef, range: ByteRange) {
        let mut reads = self.reads.lock();
        if reads.len() >= LAYERS_MAX || reads.contains_key(&blob.digest) {
            return;
        }
        let (source, digest) = (Arc::clone(source), blob.digest);
        let bytes = tokio::spawn(async move { toc::read(source.as_ref(), &blob, range).await });
        reads.insert(digest, Read { range, bytes });
    }

    /// What came of reading this range of the layer, if that was begun. Waits for it.
    pub(super) async fn take(&self, digest: &Digest, range: ByteRange) -> Option<Result<Bytes>> {
        let read = self.reads.lock().remove(digest)?;
        if read.range != range {
            read.bytes.abort();
            return None;
        }
        // Ended before its time: as if it had not been begun.
        read.bytes.await.ok()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.reads
            .get_mut()
            .values()
            .for_each(|read| read.bytes.abort());
    }
}
