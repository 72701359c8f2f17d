//! How to open a layer again that containerd's snapshots name.
//!
//! Invariant: a record is written before the store has anything of its layer and removed after
//! the last snapshot of it. Holds no credentials.

use lazarette_fetcher::db::Table;
use lazarette_fetcher::types::{Descriptor, Digest, Reference};
use serde::{Deserialize, Serialize};

/// Served layers by blob digest.
pub struct ServedLayerTable;

impl Table for ServedLayerTable {
    const NAME: &'static str = "served_layers";
    type Key = Digest;
    type Value = ServedLayer;
}

/// What has to be known to open a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedLayer {
    /// The image by which it was first asked for.
    pub reference: Reference,
    /// What that image's manifest says of it.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
}
