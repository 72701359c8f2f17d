//! Images: from a reference to a verified manifest, config and list of layers.
//!
//! Invariant: an [`Image`] was built only from documents whose digests were checked, is
//! for this host's platform, and has one diff_id per layer. Never fetches layers: that is
//! [`pull`]'s work.

pub mod convert;
mod document;
pub mod pull;
mod record;
pub mod resolve;

pub use document::{ConfigDocument, IndexDocument, ManifestDocument};
pub use record::{ImageRecord, ImageTable, LayerRecord};

use lazarette_fetcher::types::{Descriptor, Digest, Reference};

/// A resolved image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The reference it was asked for by.
    pub reference: Reference,
    /// Descriptor of the platform's manifest (not of the index it may have come from).
    pub manifest: Descriptor,
    /// Descriptor of the config.
    pub config_descriptor: Descriptor,
    /// The parsed config.
    pub config: ConfigDocument,
    /// Layers from the base up.
    pub layers: Vec<ImageLayer>,
}

impl Image {
    /// Sum of the layers' sizes in the registry, bytes.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.descriptor.size).sum()
    }
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub struct ImageLayer {
    /// The blob in the registry.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Digest that names this layer on top of all below it.
    pub chain_id: Digest,
}

/// Chain ids of a stack of layers, base first, as the OCI image spec defines them.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => *diff_id,
            Some(below) => Digest::sha256(format!("{below} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_spec() {
        let [a, b] = [Digest::sha256(b"a"), Digest::sha256(b"b")];
        let chain = chain_ids(&[a, b]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::sha256(format!("{a} {b}").as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }
}
