//! Profiles beside their image in a registry.
//!
//! Invariant: what is found is a hint from anyone: parsed as such, used only for the very
//! image it names, and never the reason why something fails.

use std::collections::BTreeMap;

use lazarette_fetcher::source::{BlobRef, read_verified};
use lazarette_fetcher::types::{Descriptor, Digest, Reference};

use super::{Engine, is_of};
use crate::image::Image;
use crate::image::artifact::{self, ArtifactBlob};
use crate::profile::ImageProfiles;
use crate::profile::document::{DOCUMENT_BYTES_MAX, MEDIA_TYPE};
use crate::{Error, Result};

impl Engine {
    /// Pushes the profiles of a pulled image beside it; what was pushed, and the digest of
    /// the artifact.
    pub async fn push_profiles(&self, reference: &Reference) -> Result<(ImageProfiles, Digest)> {
        let profiles = self.profiles(reference).await?;
        let image = self.image(reference).await?;
        let blob = ArtifactBlob {
            bytes: serde_json::to_vec(&profiles).unwrap_or_default().into(),
            annotations: BTreeMap::new(),
        };
        let repository = image.reference.repository();
        let registry = self.registry.registry_of(repository).await?;
        let ends = (&registry, &self.pusher);
        let pushed = artifact::push(ends, repository, &image.manifest, MEDIA_TYPE, vec![blob]);
        Ok((profiles, pushed.await?))
    }

    /// Adds the newest profiles that the registry has beside the image to those here.
    pub async fn pull_profiles(&self, reference: &Reference) -> Result<ImageProfiles> {
        let image = self.image(reference).await?;
        match self.find_profiles(&image).await? {
            Some(theirs) => self.learn_from(&image, theirs).await,
            None => {
                let what = format!("a profile of {reference}");
                let host = format!(
                    "{}; `laz image profile push` puts one there",
                    reference.host()
                );
                Err(lazarette_fetcher::Error::NotFound { what, host }.into())
            }
        }
    }

    /// [`Engine::pull_profiles`] for a start, which goes on without. Leaves the database open:
    /// `lazd` must not give it up.
    pub(in crate::engine) async fn ask_for_profiles(&self, image: &Image) -> Option<ImageProfiles> {
        let theirs = match self.find_profiles(image).await {
            Ok(theirs) => theirs?,
            Err(error) => {
                tracing::debug!(image = %image.reference, %error, "cannot look for a profile beside the image");
                return None;
            }
        };
        if let Err(error) = self.add(image, theirs.clone()).await {
            tracing::warn!(image = %image.reference, %error, "the profile found could not be remembered");
        }
        Some(theirs)
    }

    /// The first usable profiles among those the registry has beside the image.
    async fn find_profiles(&self, image: &Image) -> Result<Option<ImageProfiles>> {
        let source = self.resolver.source.as_ref();
        let repository = image.reference.repository();
        let found = artifact::find(source, repository, &image.manifest.digest, MEDIA_TYPE).await?;
        for blob in found {
            match self.read_profiles(image, &blob).await {
                Ok(profiles) => return Ok(Some(profiles)),
                Err(error) => {
                    tracing::warn!(blob = %blob.digest, %error, "passing over a profile");
                }
            }
        }
        Ok(None)
    }

    async fn read_profiles(&self, image: &Image, blob: &Descriptor) -> Result<ImageProfiles> {
        let what = format!("profile {}", blob.digest);
        if blob.size > DOCUMENT_BYTES_MAX {
            let detail = format!("{} bytes, at most {DOCUMENT_BYTES_MAX}", blob.size);
            return Err(lazarette_fetcher::Error::limit(what, detail).into());
        }
        let blob = BlobRef {
            repository: image.reference.repository().clone(),
            digest: blob.digest,
            size: blob.size,
        };
        let source = self.resolver.source.as_ref();
        let bytes = read_verified(source, &blob, || what.clone()).await?;
        let profiles = ImageProfiles::parse(&what, &bytes.into_bytes())?;
        if !is_of(&profiles, image) {
            return Err(Error::Refused {
                what: format!("{what} is of another image, {}", profiles.manifest),
                todo: "push it for the image it was recorded from".to_owned(),
            });
        }
        Ok(profiles)
    }
}
