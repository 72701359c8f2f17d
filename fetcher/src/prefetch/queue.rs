//! Wanted chunks of all layers, given out in batches.
//!
//! Invariant: every chunk that was added comes out in exactly one batch, unless its layer
//! was dropped. A batch is of one layer, begins with the lowest rank that is left of all
//! layers, has all chunks of a rank or none, and is at most as long as asked for, one rank
//! aside. Pure.

use std::collections::{BTreeMap, VecDeque};

use super::places::Wanted;
use crate::index::ChunkId;

/// Chunks that wait for their turn, by layer.
#[derive(Debug, Default)]
pub struct Queue {
    layers: BTreeMap<usize, VecDeque<Wanted>>,
}

/// Chunks of one layer to fetch together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Which layer, as it was added.
    pub layer: usize,
    /// Its chunks by rank, never empty.
    pub ids: Vec<ChunkId>,
    /// Decoded bytes of all of them.
    pub bytes: u64,
}

impl Queue {
    /// Adds chunks of `layer`, ranks ascending and not below those it has.
    pub fn add(&mut self, layer: usize, wanted: impl IntoIterator<Item = Wanted>) {
        self.layers.entry(layer).or_default().extend(wanted);
    }

    /// Forgets what is left of `layer`.
    pub fn drop_layer(&mut self, layer: usize) {
        self.layers.remove(&layer);
    }

    /// Takes up to `bytes_max` decoded bytes, and at least one rank, of the layer that has
    /// the lowest rank.
    pub fn next(&mut self, bytes_max: u64) -> Option<Batch> {
        let heads = self.layers.iter();
        let (_, layer) = heads
            .filter_map(|(layer, line)| Some((line.front()?.rank, *layer)))
            .min()?;
        let line = self.layers.get_mut(&layer)?;
        let mut batch = Batch {
            layer,
            ids: Vec::new(),
            bytes: 0,
        };
        while let Some(next) = line.front() {
            let rank = next.rank;
            let count = line.iter().take_while(|next| next.rank == rank).count();
            let lens = line.iter().take(count).map(|next| u64::from(next.len));
            let bytes = batch.bytes.saturating_add(lens.sum());
            if !batch.ids.is_empty() && bytes > bytes_max {
                break;
            }
            batch.bytes = bytes;
            batch.ids.extend(line.drain(..count).map(|next| next.id));
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wanted(rank: u32, id: ChunkId, len: u32) -> Wanted {
        Wanted { rank, id, len }
    }

    #[test]
    fn the_lowest_rank_goes_first_and_brings_its_layer_along() {
        let mut queue = Queue::default();
        queue.add(1, [wanted(3, 30, 10), wanted(4, 31, 10)]);
        queue.add(0, [wanted(0, 7, 10), wanted(9, 8, 10), wanted(10, 9, 500)]);
        let take = |queue: &mut Queue| queue.next(20).map(|batch| (batch.layer, batch.ids));
        assert_eq!(take(&mut queue), Some((0, vec![7, 8])));
        assert_eq!(take(&mut queue), Some((1, vec![30, 31])));
        assert_eq!(
            take(&mut queue),
            Some((0, vec![9])),
            "longer than asked, alone"
        );
        assert_eq!(take(&mut queue), None);
        queue.add(0, [wanted(1, 1, 15), wanted(2, 2, 5), wanted(2, 3, 5)]);
        assert_eq!(take(&mut queue), Some((0, vec![1])), "a rank is not split");
        assert_eq!(take(&mut queue), Some((0, vec![2, 3])));
        queue.add(2, [wanted(1, 1, 1)]);
        queue.drop_layer(2);
        assert_eq!(take(&mut queue), None);
    }

    proptest! {
        #[test]
        fn everything_comes_out_once_and_in_order(
            layers in prop::collection::vec(prop::collection::vec(1_u32..100_000, 0..40), 0..6),
            bytes_max in 0_u64..200_000,
        ) {
            let mut queue = Queue::default();
            let mut expected: Vec<Vec<ChunkId>> = Vec::new();
            for (layer, lens) in layers.iter().enumerate() {
                let ids = 0..u32::try_from(lens.len()).unwrap();
                queue.add(layer, ids.clone().zip(lens).map(|(id, len)| wanted(id, id, *len)));
                expected.push(ids.collect());
            }
            let mut out = vec![Vec::new(); layers.len()];
            while let Some(batch) = queue.next(bytes_max) {
                prop_assert!(batch.ids.len() == 1 || batch.bytes <= bytes_max);
                out[batch.layer].extend(batch.ids);
            }
            prop_assert_eq!(out, expected);
        }
    }
}
