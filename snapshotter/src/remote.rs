//! The protocol by which containerd lets a snapshotter bring layers itself.
//!
//! Before it downloads a layer, containerd prepares a snapshot with a label that names the
//! committed one it wants to end up with. A snapshotter that can serve the layer commits it
//! by itself and answers that it exists already; any other answer makes containerd download
//! and unpack. Other labels say which image the layer is of.
//!
//! Pure but for the trait. Invariant: labels only say where a layer may be had. What it
//! holds is decided by digests: the manifest's, and the chain of diff_ids that the target
//! names, which an implementer of [`LazyLayers`] checks against the image's config.

use std::path::PathBuf;

use async_trait::async_trait;
use lazarette_fetcher::types::{Digest, Reference};

use crate::Result;
use crate::metastore::{Labels, Usage};

/// Names the committed snapshot that is wanted.
pub const REF: &str = "containerd.io/snapshot.ref";
/// Marks a snapshot whose layer the snapshotter brought itself.
pub const REMOTE: &str = "containerd.io/snapshot/remote";

/// Labels of containerd's CRI plugin, its clients and its transfer service.
const CRI: Names = Names {
    reference: "containerd.io/snapshot/cri.image-ref",
    layer: "containerd.io/snapshot/cri.layer-digest",
    layers: "containerd.io/snapshot/cri.image-layers",
};
/// Digest of the image's manifest; the first set has it only.
const CRI_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Labels of `ctr-remote`.
const STARGZ: Names = Names {
    reference: "containerd.io/snapshot/remote/stargz.reference",
    layer: "containerd.io/snapshot/remote/stargz.digest",
    layers: "containerd.io/snapshot/remote/stargz.layers",
};
/// Most layers that are resolved ahead: as many as fit into a label.
const AHEAD_MAX: usize = 64;

struct Names {
    reference: &'static str,
    layer: &'static str,
    layers: &'static str,
}

/// A layer that containerd would rather not download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The chain of diff_ids up to this layer.
    pub chain_id: Digest,
    /// Whether it was said what it shall lie on. Containerd that unpacks layers at the same time
    /// says so when it commits them, and it commits none that was brought: one that others are
    /// below would be an image without these.
    pub has_parent: bool,
    /// The image, as the user named it.
    pub reference: Reference,
    /// Its manifest, if that is known.
    pub manifest_digest: Option<Digest>,
    /// The layer's blob.
    pub blob_digest: Digest,
    /// Layers of the image that will be asked for next. Some may be missing.
    pub ahead: Vec<Digest>,
}

/// What the labels of a snapshot ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// A plain snapshot.
    Plain,
    /// A layer, which we may bring.
    Layer(Box<Wanted>),
    /// A layer, but not such that we could bring it: containerd will.
    Unusable(String),
}

/// Reads what labels of a snapshot ask for that is to be made on a parent, or on none.
pub fn ask(labels: &Labels, has_parent: bool) -> Ask {
    let Some(target) = labels.get(REF) else {
        return Ask::Plain;
    };
    let Some(names) = [CRI, STARGZ]
        .into_iter()
        .find(|names| labels.contains_key(names.reference) && labels.contains_key(names.layer))
    else {
        return Ask::Unusable("no label names the image and the layer".to_owned());
    };
    match wanted(labels, &names, target) {
        Ok(wanted) => Ask::Layer(Box::new(Wanted {
            has_parent,
            ..wanted
        })),
        Err(detail) => Ask::Unusable(detail),
    }
}

fn wanted(labels: &Labels, names: &Names, target: &str) -> Result<Wanted, String> {
    let digest = |name: &str, text: &str| {
        Digest::parse(text).map_err(|error| format!("label {name}: {error}"))
    };
    let text = |name: &str| labels.get(name).map_or("", String::as_str);
    let reference = Reference::parse(text(names.reference))
        .map_err(|error| format!("label {}: {error}", names.reference))?;
    let manifest = labels.get(CRI_MANIFEST);
    let ahead = text(names.layers)
        .split(',')
        .filter(|item| !item.is_empty());
    Ok(Wanted {
        chain_id: digest(REF, target)?,
        has_parent: false,
        reference,
        manifest_digest: manifest
            .map(|text| digest(CRI_MANIFEST, text))
            .transpose()?,
        blob_digest: digest(names.layer, text(names.layer))?,
        // A hint: what is not a digest there is nothing to be resolved ahead.
        ahead: ahead
            .filter_map(|item| Digest::parse(item).ok())
            .take(AHEAD_MAX)
            .collect(),
    })
}

/// The name of the snapshot that is committed for `target` on `parent`: one for both, so
/// that two who ask at once get the same.
pub fn name(parent: Option<&str>, target: &str) -> String {
    let parent = parent.unwrap_or_default();
    let both = Digest::sha256(format!("{}:{parent}{target}", parent.len()).as_bytes());
    format!("remote/{}", both.hex())
}

/// Brings lazy layers, and keeps them mounted.
///
/// An implementer must be safe to call from any number of tasks at once, and must do what
/// it began to do when a caller goes away.
#[async_trait]
pub trait LazyLayers: Send + Sync + 'static {
    /// Makes a layer readable and mounts it. It stays so until [`Self::release`], though
    /// nothing names it yet.
    ///
    /// # Errors
    /// Whatever the reason is that this layer cannot be had lazily: containerd is told to
    /// bring it.
    async fn claim(&self, wanted: &Wanted) -> Result<()>;

    /// Where a layer is mounted that was claimed once, in this process or in one before;
    /// mounts it first where it is not.
    async fn mountpoint(&self, blob_digest: &Digest) -> Result<PathBuf>;

    /// What the store holds of it: bytes that are allocated, and files with their directory.
    async fn usage(&self, blob_digest: &Digest) -> Result<Usage>;

    /// Nothing names the layer any more: unmounts it and removes what the store holds,
    /// unless something else there needs that.
    async fn release(&self, blob_digest: &Digest) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn both_label_sets_are_read() {
        let [chain, layer, manifest] = [b"c", b"l", b"m"].map(|text| Digest::sha256(text));
        let (c, l, m) = (chain.to_string(), layer.to_string(), manifest.to_string());
        let ahead = format!("{l},nonsense,,{c}");
        let image = "reg.example:5000/app:1";
        let cri = labels(&[
            (REF, &c),
            (CRI.reference, image),
            (CRI.layer, &l),
            (CRI.layers, &ahead),
            (CRI_MANIFEST, &m),
        ]);
        let Ask::Layer(wanted) = ask(&cri, true) else {
            panic!()
        };
        assert_eq!(wanted.reference, Reference::parse(image).unwrap());
        assert_eq!((wanted.chain_id, wanted.blob_digest), (chain, layer));
        assert!(wanted.has_parent);
        assert_eq!(wanted.manifest_digest, Some(manifest));
        assert_eq!(wanted.ahead, [layer, chain]);
        let stargz = labels(&[(REF, &c), (STARGZ.reference, image), (STARGZ.layer, &l)]);
        let Ask::Layer(wanted) = ask(&stargz, false) else {
            panic!()
        };
        assert_eq!((wanted.blob_digest, wanted.manifest_digest), (layer, None));
        assert!(!wanted.has_parent);
    }

    #[test]
    fn what_cannot_be_brought_is_told_apart() {
        let digest = Digest::sha256(b"x").to_string();
        let (image, layer) = ((CRI.reference, "reg/app:1"), (CRI.layer, digest.as_str()));
        assert_eq!(ask(&Labels::new(), false), Ask::Plain);
        assert_eq!(ask(&labels(&[image, layer]), false), Ask::Plain);
        let table: [(&[(&str, &str)], &str); 5] = [
            (&[(REF, &digest)], "no label names"),
            (&[(REF, &digest), image], "no label names"),
            (&[(REF, "latest"), image, layer], REF),
            (
                &[(REF, &digest), (CRI.reference, "UPPER CASE"), layer],
                CRI.reference,
            ),
            (
                &[(REF, &digest), image, (CRI.layer, "sha256:12")],
                CRI.layer,
            ),
        ];
        for (pairs, word) in table {
            match ask(&labels(pairs), false) {
                Ask::Unusable(why) => assert!(why.contains(word), "{why}"),
                other => panic!("{pairs:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_name_tells_parent_and_target_apart() {
        assert_eq!(name(Some("a"), "b"), name(Some("a"), "b"));
        assert_ne!(name(Some("a"), "bc"), name(Some("ab"), "c"));
        assert_ne!(name(None, "b"), name(Some("b"), ""));
    }
}
