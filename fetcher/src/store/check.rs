//! Verifying everything the store keeps.
//!
//! Invariant: what does not have its digest is not present any more when the check ends.
//! A layer that cannot even be opened is reported and stays, for whoever can say whether
//! it is worth pulling again. Never touches the network.

mod beside;

use super::{LayerCheck, Store};
use crate::Result;
use crate::types::Digest;

/// What a check of the whole store found.
#[derive(Debug, Default)]
pub struct StoreCheck {
    /// Each layer, or why it cannot be read.
    pub layers: Vec<(Digest, Result<LayerCheck>)>,
    /// The small blobs.
    pub blobs: BlobCheck,
}

/// What a check of the small blobs found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlobCheck {
    /// How many are right.
    pub right: u64,
    /// Those that were not; they are gone.
    pub dropped: Vec<Digest>,
}

impl Store {
    /// Reads all of it and drops what is not right. Blocks on the device, for as long as
    /// reading everything takes.
    pub fn check(&self) -> Result<StoreCheck> {
        let mut found = StoreCheck::default();
        for digest in self.digests_in("layers")? {
            if let Some(outcome) = self.check_layer(&digest).transpose() {
                found.layers.push((digest, outcome));
            }
        }
        for digest in self.blobs()? {
            if self.get_blob(&digest)?.is_some() {
                found.blobs.right += 1;
            } else {
                found.blobs.dropped.push(digest);
            }
        }
        Ok(found)
    }

    /// What is kept beside the data first: by that the data is compared.
    fn check_layer(&self, digest: &Digest) -> Result<Option<LayerCheck>> {
        let damaged_files = beside::check(self, digest)?;
        let Some(file) = self.open_layer(digest)? else {
            return Ok(None);
        };
        let found = file.check_all()?;
        Ok(Some(LayerCheck {
            damaged_files,
            ..found
        }))
    }
}
