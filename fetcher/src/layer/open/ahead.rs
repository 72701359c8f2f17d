//! Where tables of contents are, read before their layers are opened.
//!
//! The manifest says it. What else it takes to open a layer comes with the config, a round
//! trip later.
//!
//! Invariant: only bytes. Whoever opens the layer checks them as if they had come then, and
//! reads again what could not be had. At most [`LAYERS_MAX`] reads are kept, each for one
//! opening; those that nobody comes for end with this.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::toc;
use crate::Result;
use crate::source::{BlobRef, BlobSource};
use crate::store::Store;
use crate::task::blocking;
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
    bytes: JoinHandle<Result<Option<Bytes>>>,
}

impl Ahead {
    /// Begins to read `range` of a blob, unless the layer is in the store.
    pub(super) fn begin(
        &self,
        (store, source): (&Arc<Store>, &Arc<dyn BlobSource>),
        blob: BlobRef,
        range: ByteRange,
    ) {
        let mut reads = self.reads.lock();
        if reads.len() >= LAYERS_MAX || reads.contains_key(&blob.digest) {
            return;
        }
        let (store, source, digest) = (Arc::clone(store), Arc::clone(source), blob.digest);
        let bytes = tokio::spawn(async move {
            let is_here = blocking(move || store.open_index(&digest)).await?.is_some();
            match is_here {
                true => Ok(None),
                false => toc::read(source.as_ref(), &blob, range).await.map(Some),
            }
        });
        reads.insert(digest, Read { range, bytes });
    }

    /// What was read of the layer, if it is that range. Waits for it.
    pub(super) async fn take(&self, digest: &Digest, range: ByteRange) -> Option<Bytes> {
        let read = self.reads.lock().remove(digest)?;
        if read.range != range {
            read.bytes.abort();
            return None;
        }
        match read.bytes.await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => {
                tracing::debug!(%digest, %error, "reading a table ahead came to nothing");
                None
            }
            Err(_) => None,
        }
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
