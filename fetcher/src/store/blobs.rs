//! Small blobs, whole: manifests, indexes, configs.
//!
//! Invariant: bytes that leave [`Store::get_blob`] have the digest that was asked for; a
//! file that does not is dropped and counts as absent. Digests are checked on the way in
//! too: a caller that says it verified is not believed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::file::DATA;
use super::ingest::Draft;
use super::{Store, read_bounded, remove_tree};
use crate::types::Digest;
use crate::{Error, Result};

/// Largest blob kept whole: more is a layer. Read into memory at once.
pub const BLOB_BYTES_MAX: u64 = 64 << 20;

impl Store {
    /// Keeps `bytes` under `digest`, on the device when this returns. Idempotent.
    pub fn put_blob(self: &Arc<Self>, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let what = || format!("blob {digest}");
        if bytes.len() as u64 > BLOB_BYTES_MAX {
            let detail = format!("{} bytes, at most {BLOB_BYTES_MAX} are kept", bytes.len());
            return Err(Error::limit(what(), detail));
        }
        let actual = Digest::of(digest.algorithm(), bytes);
        if actual != *digest {
            return Err(Error::Corrupt {
                what: what(),
                expected: *digest,
                actual,
            });
        }
        let content = self.root.join("content");
        if self.get_blob(digest)?.is_some() {
            // Its name may have been made by someone who did not get to sync it.
            let synced = self.disk.sync_dir(&content);
            return synced.map_err(|e| Error::io("sync", content, e));
        }
        let draft = Draft::new(self)?;
        let write = || {
            self.disk.write_at(draft.data(), 0, bytes)?;
            self.disk.sync_data(draft.data())
        };
        self.with_room(|| write().map_err(|e| Error::io("write to", draft.path(DATA), e)))?;
        let to = self.blob_path(digest);
        self.disk
            .rename(&draft.path(DATA), &to)
            .and_then(|()| self.disk.sync_dir(&content))
            .map_err(|e| Error::io("create", to, e))
    }

    /// The blob, verified again, if the node has it.
    pub fn get_blob(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let path = self.blob_path(digest);
        let bytes = match read_bounded(&path, BLOB_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(Error::Limit { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        if Digest::of(digest.algorithm(), &bytes) == *digest {
            return Ok(Some(bytes.into()));
        }
        tracing::warn!(%digest, "stored blob is damaged, dropping it");
        self.remove_blob(digest)?;
        Ok(None)
    }

    /// Removes a blob; `false` if there was none.
    pub fn remove_blob(&self, digest: &Digest) -> Result<bool> {
        let _lock = self.lock()?;
        let path = self.blob_path(digest);
        if !path.exists() {
            return Ok(false);
        }
        let trash = self.discard(&path)?;
        remove_tree(self.disk(), &trash)?;
        Ok(true)
    }

    /// Digests of all blobs, sorted. Not verified: [`Store::get_blob`] does that.
    pub fn blobs(&self) -> Result<Vec<Digest>> {
        self.digests_in("content")
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("content").join(digest.file_name())
    }
}
