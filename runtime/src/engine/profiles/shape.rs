//! Making the indexes of layers fit for what starts read of them.
//!
//! Invariant: only an improvement for later starts: it runs when a start is over or a user
//! asked, never before one, and what fails is logged.

use std::collections::BTreeSet;
use std::sync::Arc;

use lazarette_fetcher::db::Db;
use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::prefetch::chunks_of;
use lazarette_fetcher::store::LayerFile;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;

use super::{Engine, layers_of, places_of};
use crate::image::Image;
use crate::profile::{ImageProfiles, ProfileTable};

impl Engine {
    /// Shapes the indexes of the image's layers by all profiles this node has of them, also
    /// those of other images that share a layer.
    pub async fn shape(&self, image: &Image) {
        let (db, store) = (Arc::clone(&self.db), Arc::clone(&self.store));
        let layers: BTreeSet<Digest> = layers_of(image).into_iter().collect();
        blocking(move || {
            let profiles = match profiles_of(&db, &layers) {
                Ok(profiles) => profiles,
                Err(error) => {
                    tracing::warn!(%error, "cannot read the profiles to shape indexes by");
                    return;
                }
            };
            for digest in layers {
                // One that cannot be opened has no index to shape.
                if let Ok(Some(file)) = store.open_layer(&digest) {
                    shape(&file, &profiles);
                }
            }
        })
        .await;
    }
}

/// Profiles that name one of `layers`.
fn profiles_of(
    db: &Db,
    layers: &BTreeSet<Digest>,
) -> Result<Vec<ImageProfiles>, lazarette_fetcher::Error> {
    let mut found = Vec::new();
    for entry in db.scan::<ProfileTable>(b"") {
        let (manifest, profiles) = entry?;
        let is_sound = profiles.check(&format!("profile of {manifest}")).is_ok();
        if is_sound && profiles.layers.iter().any(|layer| layers.contains(layer)) {
            found.push(profiles);
        }
    }
    Ok(found)
}

fn shape(file: &LayerFile, profiles: &[ImageProfiles]) {
    let digest = file.digest();
    match file.shape(&hot_chunks(file, profiles)) {
        Ok(Some(shaped)) => tracing::info!(
            %digest,
            before = shaped.before_bytes,
            after = shaped.after_bytes,
            index = shaped.index_bytes,
            "shaped the index for what starts read"
        ),
        Ok(None) => {}
        Err(error) => tracing::debug!(%digest, %error, "the index stays as it is"),
    }
}

/// What any of the profiles reads of the layer.
fn hot_chunks(file: &LayerFile, profiles: &[ImageProfiles]) -> Vec<ChunkId> {
    let mut hot = BTreeSet::new();
    for image in profiles {
        let mut numbers = (0..).zip(&image.layers);
        let numbers = numbers
            .by_ref()
            .filter(|(_, layer)| *layer == file.digest());
        let numbers: Vec<usize> = numbers.map(|(number, _)| number).collect();
        for command in &image.commands {
            let mut places = places_of(command);
            for number in &numbers {
                let places = places.remove(number).unwrap_or_default();
                let wanted = chunks_of(file.index(), places).wanted;
                hot.extend(wanted.iter().map(|wanted| wanted.id));
            }
        }
    }
    hot.into_iter().collect()
}
