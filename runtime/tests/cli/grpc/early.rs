//! What comes of a layer before anybody reads it.

use serde_json::json;

use super::*;
use crate::store::ok;
use crate::support::Laz;

const NO_FILL: &str = "[snapshotter]\nfill = false\n";

/// Bytes of the snapshot `name` on disk.
async fn bytes(node: &Node, name: &str) -> i64 {
    let request = UsageRequest {
        key: name.to_owned(),
        ..Default::default()
    };
    node.client.usage(request).await.unwrap().size
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_a_profile_names_comes_and_the_rest_only_if_it_is_to() {
    if !is_root("privileged_what_a_profile_names_comes_and_the_rest_only_if_it_is_to") {
        return;
    }
    const BIG: i64 = 300 << 10;
    for (has_profile, config, comes) in [
        (false, NO_FILL, false),
        (true, NO_FILL, true),
        (false, "", true),
    ] {
        let registry = FakeRegistry::start().await;
        let layer = estargz(layer("file", b"text"));
        let image = push(&registry, &layer, &Changes::default());
        let blob = Digest::sha256(&layer.blob);
        let laz = Laz::new();
        if has_profile {
            let pulled = ok(&laz, &["pull", &image.reference]).await;
            // All pages of the data file's first blocks, in that order.
            let blocks: Vec<Value> = (0..6).map(|at| json!([0, at, 65535, 1, 1])).collect();
            let command = json!({
                "command": Digest::sha256(b"any").to_string(), "program": "any",
                "runs": 1, "updatedAt": 1, "blocks": blocks,
            });
            let document = json!({
                "mediaType": "application/vnd.lazarette.profile.v1+json",
                "manifest": pulled["manifest_digest"],
                "layers": [blob.to_string()],
                "commands": [command],
            });
            let file = laz.path("profile.json");
            std::fs::write(&file, document.to_string()).unwrap();
            let file = file.to_str().unwrap();
            ok(
                &laz,
                &["image", "profile", "import", &image.reference, file],
            )
            .await;
            // Profiles stay when an image goes.
            ok(&laz, &["rmi", &image.reference]).await;
        }
        let (node, _) = Node::open_with(&laz.path(""), config).await;
        let wanted = Wanted {
            image: &image,
            chain_id: layer.diff_id,
            blob,
            all: &[blob],
        };
        let name = node.bring("", &wanted).await;
        let mounts = node.prepare("container", &name, None).await.unwrap();
        if comes {
            let has_come = async {
                while bytes(&node, &name).await < BIG {
                    tokio::task::yield_now().await;
                }
            };
            let bound = std::time::Duration::from_secs(60);
            tokio::time::timeout(bound, has_come).await.unwrap();
        } else {
            let place = &mounts[0];
            assert_eq!(place.r#type, "overlay", "{place:?}");
            assert_eq!(read(lowers(&mounts)[0].join("file")).await, b"text");
            assert!(bytes(&node, &name).await < BIG);
        }
        node.remove("container").await;
        node.remove(&name).await;
        node.close().await;
    }
}
