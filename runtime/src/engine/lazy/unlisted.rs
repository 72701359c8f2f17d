//! Layers that leave out directories which layers below them describe.
//!
//! Invariant: containerd unpacks such a layer, and gives the directory what it has below: brought
//! by us it would be `root:root` 0755, as overlay shows what the layer's mount has. Layers below
//! that containerd unpacked itself are not looked at.

use std::sync::Arc;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::task::blocking;
use lazarette_snapshotter::remote::Wanted;
use lazarette_snapshotter::tree::unlisted::Unlisted;

use super::NodeLayers;
use crate::image::Image;
use crate::{Error, Result};

impl NodeLayers {
    /// Fails where `layer`, which is `number` of the image, is to be unpacked for that.
    pub(super) async fn must_list(
        &self,
        (image, number): (&Image, usize),
        layer: &Arc<Layer>,
        wanted: &Wanted,
    ) -> Result<()> {
        let listing = Arc::clone(layer);
        if blocking(move || Unlisted::of(listing.index()).is_empty()).await {
            return Ok(());
        }
        let below = self.layers_below(image, number).await;
        let layer = Arc::clone(layer);
        match blocking(move || first_that_differs(&layer, &below)).await {
            None => Ok(()),
            Some(path) => Err(left_out(wanted, &path)),
        }
    }

    /// What lies below layer `number` and is a layer of ours, the uppermost first.
    async fn layers_below(&self, image: &Image, number: usize) -> Vec<Arc<Layer>> {
        let mut below = Vec::new();
        for layer in image.layers.iter().take(number).rev() {
            let digest = &layer.descriptor.digest;
            // After a restart it may not be mounted yet.
            if let Err(error) = self.mount(digest).await {
                tracing::debug!(%digest, error = error.report(), "a layer below is not ours");
                continue;
            }
            below.extend(self.held_layer(digest));
        }
        below
    }
}

fn first_that_differs(layer: &Layer, below: &[Arc<Layer>]) -> Option<Vec<u8>> {
    let mut unlisted = Unlisted::of(layer.index());
    below
        .iter()
        .find_map(|below| unlisted.differs(below.index()).map(<[u8]>::to_vec))
}

fn left_out(wanted: &Wanted, path: &[u8]) -> Error {
    lazarette_fetcher::Error::Unsupported {
        what: format!("layer {} of {}", wanted.blob_digest, wanted.reference),
        detail: format!(
            "it has files in /{} and does not list that directory, which has another mode or owner \
             than root's 0755 in a layer below",
            path.escape_ascii()
        ),
    }
    .into()
}
