//! Which layer of an image labels mean.

use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use lazarette_snapshotter::remote::Wanted;

use super::{must_know_parent, position};
use crate::image::{ConfigDocument, Image, ImageLayer};

fn digest(text: &str) -> Digest {
    Digest::sha256(text.as_bytes())
}

fn descriptor(text: &str) -> Descriptor {
    Descriptor {
        media_type: MediaType::OciLayerGzip,
        digest: digest(text),
        size: 1,
        annotations: Default::default(),
        platform: None,
    }
}

/// An image whose layers have these names; a name that comes twice is one blob.
fn image(names: &[&str]) -> Image {
    let layer = |name: &&str| ImageLayer {
        descriptor: descriptor(name),
        diff_id: digest(&format!("{name} unpacked")),
        stack_id: digest("unused"),
    };
    let config =
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    Image {
        reference: Reference::parse("reg.example/app:1").unwrap(),
        manifest: descriptor("manifest"),
        config_descriptor: descriptor("config"),
        config: ConfigDocument::parse("config", config).unwrap(),
        layers: names.iter().map(layer).collect(),
        soci_index: None,
    }
}

fn wanted(chain_id: Digest, blob: &str) -> Wanted {
    Wanted {
        chain_id,
        has_parent: true,
        reference: Reference::parse("reg.example/app:1").unwrap(),
        manifest_digest: None,
        blob_digest: digest(blob),
        ahead: Vec::new(),
    }
}

#[test]
fn a_layer_is_found_by_its_chain() {
    let image = image(&["a", "b", "a"]);
    let a = digest("a unpacked");
    let ab = digest(&format!("{a} {}", digest("b unpacked")));
    let aba = digest(&format!("{ab} {a}"));
    assert_eq!(position(&image, &wanted(a, "a")).unwrap(), 0);
    assert_eq!(position(&image, &wanted(ab, "b")).unwrap(), 1);
    assert_eq!(position(&image, &wanted(aba, "a")).unwrap(), 2);
    // A blob under another's chain is not what containerd would have unpacked there.
    for (chain, blob) in [(a, "b"), (ab, "a"), (digest("other"), "a"), (aba, "c")] {
        let error = position(&image, &wanted(chain, blob))
            .unwrap_err()
            .to_string();
        assert!(error.contains("reg.example/app:1"), "{error}");
    }
}

#[test]
fn a_layer_that_others_are_below_needs_its_parent() {
    let mut layer = wanted(digest("chain"), "a");
    for (has_parent, number, is_brought) in [
        (false, 0, true),
        (true, 0, true),
        (true, 1, true),
        (false, 1, false),
    ] {
        layer.has_parent = has_parent;
        let outcome = must_know_parent(&layer, number);
        assert_eq!(outcome.is_ok(), is_brought, "{has_parent} {number}");
    }
}
