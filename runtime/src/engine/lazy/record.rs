//! How to open a layer again that containerd's snapshots name.
//!
//! Invariant: a record is written before the store has anything of its layer and removed after
//! the last snapshot of it. Holds no credentials.

use lazarette_fetcher::db::Table;
use lazarette_fetcher::source::REPOSITORIES_MAX;
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
    /// Images of other repositories that have it, the last one brought first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Reference>,
}

impl ServedLayer {
    /// Notes that `image` has it, too; whether that was news.
    pub(super) fn also(&mut self, image: &Reference) -> bool {
        let all = std::iter::once(&self.reference).chain(&self.others);
        let mut known = all.map(Reference::repository);
        if known.any(|repository| repository == image.repository()) {
            return false;
        }
        self.others.insert(0, image.clone());
        self.others.truncate(REPOSITORIES_MAX);
        true
    }
}
