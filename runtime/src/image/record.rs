//! Facts about pulled images, in the database.
//!
//! Invariant: an image is recorded only when its manifest and config are in the store.
//! Whether its layers are complete is the store's knowledge, never repeated here.

use lazarette_fetcher::db::Table;
use lazarette_fetcher::types::{Descriptor, Digest, Reference};
use serde::{Deserialize, Serialize};

use super::Image;
use crate::spec::bundle::AccountFiles;

/// Images by reference.
pub struct ImageTable;

impl Table for ImageTable {
    const NAME: &'static str = "images";
    type Key = String;
    type Value = ImageRecord;
}

/// What is remembered of a pulled image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The reference it was pulled by.
    pub reference: Reference,
    /// The platform's manifest.
    pub manifest: Descriptor,
    /// Its layers from the base up, by blob digest.
    pub layers: Vec<LayerRecord>,
    /// The config blob.
    pub config_digest: Digest,
    /// When it was pulled, seconds since 1970.
    pub pulled_at: u64,
}

/// Accounts of images, by manifest digest. What a manifest names never changes, so neither
/// do they; entries stay when an image is removed.
pub struct AccountsTable;

impl Table for AccountsTable {
    const NAME: &'static str = "accounts";
    type Key = Digest;
    type Value = AccountFiles;
}

/// What is remembered of a layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The blob.
    pub blob_digest: Digest,
    /// Its size in the registry, bytes.
    pub blob_size: u64,
    /// The snapshot that has this layer on top.
    pub stack_id: Digest,
}

impl ImageRecord {
    /// The record of `image`, pulled at `pulled_at` seconds since 1970.
    pub fn new(image: &Image, pulled_at: u64) -> Self {
        let layer = |layer: &super::ImageLayer| LayerRecord {
            blob_digest: layer.descriptor.digest,
            blob_size: layer.descriptor.size,
            stack_id: layer.stack_id,
        };
        Self {
            reference: image.reference.clone(),
            manifest: image.manifest.clone(),
            layers: image.layers.iter().map(layer).collect(),
            config_digest: image.config_descriptor.digest,
            pulled_at,
        }
    }

    /// Sum of the layers' sizes in the registry, bytes.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob_size).sum()
    }
}
