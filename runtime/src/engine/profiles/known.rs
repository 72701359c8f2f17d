//! What is known of an image's starts, in the database, and how it grows.
//!
//! Invariant: one change at a time in this process, each of what is there by then: starts end, and
//! registries answer, when they like, and none undoes what another one added. Nothing in it is
//! later than now.

use std::sync::Arc;

use lazarette_fetcher::db::{Batch, Db};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;

use super::super::{Engine, now_s};
use super::layers_of;
use crate::Result;
use crate::image::Image;
use crate::profile::{ImageProfiles, ProfileTable, Touch, merge};

impl Engine {
    /// What is known of the image; damaged profiles are as good as none.
    pub(super) async fn known(&self, manifest: Digest) -> Option<ImageProfiles> {
        let db = Arc::clone(&self.db);
        blocking(move || known_in(&db, manifest)).await
    }

    pub(super) async fn known_or_empty(&self, image: &Image) -> ImageProfiles {
        let manifest = image.manifest.digest;
        let known = self.known(manifest).await;
        known.unwrap_or_else(|| ImageProfiles::empty(manifest, layers_of(image)))
    }

    /// Adds `theirs`, which are of this image, to what is known of it; all of it.
    pub(super) async fn add(&self, image: &Image, theirs: ImageProfiles) -> Result<ImageProfiles> {
        let theirs = theirs.not_after(now_s());
        self.change(image, |mine| join(mine, theirs)).await
    }

    /// Changes what is known of the image; all of it.
    pub(super) async fn change(
        &self,
        image: &Image,
        change: impl FnOnce(ImageProfiles) -> ImageProfiles + Send + 'static,
    ) -> Result<ImageProfiles> {
        let (db, learning) = (Arc::clone(&self.db), Arc::clone(&self.learning));
        let nothing = ImageProfiles::empty(image.manifest.digest, layers_of(image));
        blocking(move || {
            let _turn = learning.lock();
            let known = known_in(&db, nothing.manifest).unwrap_or(nothing);
            let all = change(known.not_after(now_s()));
            let mut batch = Batch::new();
            batch.put::<ProfileTable>(&all.manifest.clone(), &all)?;
            db.commit(batch)?;
            Ok(all)
        })
        .await
    }
}

/// What is known of an image; damaged profiles are as good as none. Blocks.
fn known_in(db: &Db, manifest: Digest) -> Option<ImageProfiles> {
    let read = || {
        let found = db.get::<ProfileTable>(&manifest)?;
        if let Some(profiles) = &found {
            profiles.check(&format!("profile of {manifest}"))?;
        }
        Ok::<_, lazarette_fetcher::Error>(found)
    };
    match read() {
        Ok(found) => found.filter(|profiles| profiles.manifest == manifest),
        Err(error) => {
            tracing::warn!(digest = %manifest, %error, "profile cannot be used");
            None
        }
    }
}

/// `theirs` added to `mine`.
fn join(mut mine: ImageProfiles, theirs: ImageProfiles) -> ImageProfiles {
    for profile in theirs.commands {
        let old = mine
            .commands
            .iter()
            .find(|old| old.command == profile.command);
        let joined = match old {
            None => profile,
            Some(old) => {
                let touch = |block: &crate::profile::Block| Touch {
                    layer: block.layer,
                    place: block.place,
                };
                let touches: Vec<Touch> = profile.blocks.iter().map(touch).collect();
                merge::merge(old, &touches, old.updated_at.max(profile.updated_at))
            }
        };
        mine.put(joined);
    }
    mine
}
