//! What a removal leaves of what `lazd` has under way.

use lazarette_fetcher::db::Batch;
use lazarette_fetcher::test_util::FakeRegistry;

use super::*;
use crate::engine::lazy::{ServedLayer, ServedLayerTable};

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_brought_for_containerd_is_kept_before_there_is_a_snapshot() {
    for is_named in [true, false] {
        let (registry, dir) = (FakeRegistry::start().await, scratch());
        let [reference, _] = push(&registry);
        let engine = open(dir.path(), &Arc::default());
        let trace = Trace::new(Instant::now());
        let image = engine.resolve(&reference, &trace).await.unwrap();
        let puller = engine.puller(PullMode::Full, trace);
        for layer in engine.pull(&image, &puller).await.unwrap() {
            layer.close().await.unwrap();
        }
        let layer = &image.layers[0];
        let digest = layer.descriptor.digest;
        let served = ServedLayer {
            reference: reference.clone(),
            descriptor: layer.descriptor.clone(),
            diff_id: layer.diff_id,
            others: Vec::new(),
        };
        if !is_named {
            engine.remove_image(&reference).await.unwrap();
            let again = engine.puller(PullMode::Full, Trace::new(Instant::now()));
            for layer in engine.pull(&image, &again).await.unwrap() {
                layer.close().await.unwrap();
            }
        }
        let mut batch = Batch::new();
        batch.put::<ServedLayerTable>(&digest, &served).unwrap();
        engine.db.commit(batch).unwrap();
        if is_named {
            engine.remove_image(&reference).await.unwrap();
        } else {
            let pruned = engine.prune().await.unwrap();
            assert_eq!(pruned.kept.len(), 1, "{pruned:?}");
        }
        let left = engine.store.layers().unwrap();
        let left: Vec<Digest> = left.into_iter().map(|(digest, _)| digest).collect();
        assert_eq!(left, [digest], "is_named: {is_named}");
    }
}
