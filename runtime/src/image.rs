//! Images: from a reference to a verified manifest, config and list of layers.
//!
//! Invariant: an [`Image`] was built only from documents whose digests were checked, is
//! for this host's platform, and has one diff_id per layer. Never fetches layers: that is
//! [`pull`]'s work.

pub mod artifact;
pub mod convert;
mod document;
pub mod pull;
mod record;
pub mod resolve;
pub mod soci;

pub use document::{ConfigDocument, IndexDocument, ManifestDocument};
pub use record::{AccountsTable, ImageRecord, ImageTable, LayerRecord};

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
    /// Digest of the SOCI index that the manifest names.
    pub soci_index: Option<Digest>,
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
    /// Names this blob on top of the blobs below it: the OCI chain id, but over blob digests.
    /// Snapshots are named by it, because one content in two compressions has one chain id
    /// and two data files.
    pub stack_id: Digest,
}

/// Stack ids of blobs, base first: the chain rule of the OCI image spec, over blob digests.
pub fn stack_ids(blob_digests: &[Digest]) -> Vec<Digest> {
    let mut stack = Vec::with_capacity(blob_digests.len());
    for blob_digest in blob_digests {
        let next = match stack.last() {
            None => *blob_digest,
            Some(below) => Digest::sha256(format!("{below} {blob_digest}").as_bytes()),
        };
        stack.push(next);
    }
    stack
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stack_ids_follow_the_chain_rule() {
        let [a, b] = [Digest::sha256(b"a"), Digest::sha256(b"b")];
        let stack = stack_ids(&[a, b]);
        assert_eq!(stack[0], a);
        assert_eq!(stack[1], Digest::sha256(format!("{a} {b}").as_bytes()));
        assert!(stack_ids(&[]).is_empty());
    }
}
