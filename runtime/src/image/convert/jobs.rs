//! Which layers there are to convert (pure).
//!
//! Invariant: a layer that the manifest names twice is converted once, and stands in the
//! new manifest wherever it stood.

use std::collections::HashMap;

use lazarette_fetcher::types::{Descriptor, Digest};

use super::ConvertedLayer;

/// One distinct layer to convert.
#[derive(Debug)]
pub(super) struct Job {
    /// Where the manifest names it first.
    pub(super) layer: usize,
    pub(super) from: Descriptor,
    pub(super) diff_id: Digest,
}

/// The layers of an image, each once.
#[derive(Debug)]
pub(super) struct Jobs {
    pub(super) distinct: Vec<Job>,
    /// For each layer of the manifest its descriptor's place in `distinct`.
    pub(super) order: Vec<usize>,
    from: Vec<Descriptor>,
}

impl Jobs {
    pub(super) fn new(sources: Vec<(Descriptor, Digest)>) -> Self {
        let mut places = HashMap::new();
        let (mut distinct, mut order, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, (from, diff_id)) in sources.into_iter().enumerate() {
            let place = *places.entry((from.digest, diff_id)).or_insert_with(|| {
                distinct.push(Job {
                    layer,
                    from: from.clone(),
                    diff_id,
                });
                distinct.len() - 1
            });
            order.push(place);
            all.push(from);
        }
        Self {
            distinct,
            order,
            from: all,
        }
    }

    /// What the distinct layers became, as the manifest lists them.
    pub(super) fn in_order(&self, converted: &[ConvertedLayer]) -> Vec<ConvertedLayer> {
        let places = self.order.iter().zip(&self.from);
        let layers = places.filter_map(|(place, from)| {
            Some(ConvertedLayer {
                from: from.clone(),
                ..converted.get(*place)?.clone()
            })
        });
        layers.collect()
    }
}
