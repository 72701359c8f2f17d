//! Reference to verified manifest and config.
//!
//! Invariant: every document is checked against the digest its parent promised before a
//! byte of it is believed, and is kept in the store, so that an image once resolved can
//! be resolved again without a registry.

use std::sync::Arc;

use bytes::Bytes;
use lazarette_fetcher::source::{BlobRef, BlobSource, read_verified};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Descriptor, Digest, Platform, Reference, Repository};
use lazarette_fetcher::{Error, Result};

use super::document::{ConfigDocument, IndexDocument, ManifestDocument, foreign};
use super::{Image, ImageLayer, stack_ids};

/// The manifest a reference led to, before its config is known.
#[derive(Debug, Clone)]
pub struct ResolvedManifest {
    /// Descriptor of the platform's manifest.
    pub descriptor: Descriptor,
    /// The parsed manifest.
    pub manifest: ManifestDocument,
}

/// Resolves references against a source and keeps what it read in a store.
#[derive(Clone)]
pub struct Resolver {
    /// Where documents come from.
    pub source: Arc<dyn BlobSource>,
    /// Where they are kept.
    pub store: Arc<Store>,
    /// Which platform's image is wanted.
    pub platform: Platform,
}

impl Resolver {
    /// The manifest `reference` names now, for this platform.
    pub async fn manifest(&self, reference: &Reference) -> Result<ResolvedManifest> {
        let what = format!("manifest of {reference}");
        let top = self.source.resolve(reference).await?;
        let document = if top.descriptor.media_type.is_index() {
            let index = IndexDocument::parse(&what, &top.bytes)?;
            let entry = index.require(&what, &self.platform)?;
            self.source
                .resolve(&reference.repository().with_digest(entry.digest))
                .await?
        } else {
            top
        };
        if !document.descriptor.media_type.is_manifest() {
            return Err(Error::Unsupported {
                what,
                detail: format!(
                    "its media type is {:?}, not an image manifest",
                    document.descriptor.media_type.as_str()
                ),
            });
        }
        let manifest = ManifestDocument::parse(&what, &document.bytes)?;
        self.keep(document.descriptor.digest, document.bytes)
            .await?;
        Ok(ResolvedManifest {
            descriptor: document.descriptor,
            manifest,
        })
    }

    /// A manifest kept in the store by an earlier [`Self::manifest`].
    pub async fn stored_manifest(&self, descriptor: &Descriptor) -> Result<ResolvedManifest> {
        let what = format!("manifest {}", descriptor.digest);
        let bytes = self.stored(&descriptor.digest, &what).await?;
        let manifest = ManifestDocument::parse(&what, &bytes)?;
        Ok(ResolvedManifest {
            descriptor: descriptor.clone(),
            manifest,
        })
    }

    /// Reads and checks the config, and joins it with the manifest.
    pub async fn image(&self, reference: &Reference, resolved: ResolvedManifest) -> Result<Image> {
        let config = self
            .config(reference.repository(), &resolved.manifest.config)
            .await?;
        join(reference, resolved, config, &self.platform)
    }

    async fn config(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
    ) -> Result<ConfigDocument> {
        let what = format!("config {}", descriptor.digest);
        let bytes = match self.load(descriptor.digest).await? {
            Some(bytes) => bytes,
            None => {
                let blob = BlobRef {
                    repository: repository.clone(),
                    digest: descriptor.digest,
                    size: descriptor.size,
                };
                let bytes = read_verified(self.source.as_ref(), &blob, || what.clone()).await?;
                self.keep(descriptor.digest, bytes.into_bytes()).await?
            }
        };
        ConfigDocument::parse(&what, &bytes)
    }

    async fn stored(&self, digest: &Digest, what: &str) -> Result<Bytes> {
        self.load(*digest).await?.ok_or_else(|| Error::NotFound {
            what: what.to_owned(),
            host: String::new(),
        })
    }

    async fn load(&self, digest: Digest) -> Result<Option<Bytes>> {
        let store = Arc::clone(&self.store);
        blocking(move || store.get_blob(&digest)).await
    }

    /// The store checks the digest once more on the way in.
    async fn keep(&self, digest: Digest, bytes: Bytes) -> Result<Bytes> {
        let store = Arc::clone(&self.store);
        blocking(move || {
            store.put_blob(&digest, &bytes)?;
            Ok(bytes)
        })
        .await
    }
}

/// Checks that manifest and config describe one image for this host.
fn join(
    reference: &Reference,
    resolved: ResolvedManifest,
    config: ConfigDocument,
    host: &Platform,
) -> Result<Image> {
    let ResolvedManifest {
        descriptor,
        manifest,
    } = resolved;
    let what = format!("image {reference}");
    let platform = config.platform(host);
    if !platform.runs_on(host) {
        return Err(foreign(&what, host, &platform.to_string()));
    }
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        let detail = format!(
            "the manifest has {} layers and the config {} diff_ids",
            manifest.layers.len(),
            diff_ids.len()
        );
        return Err(Error::malformed(what, detail));
    }
    let blobs: Vec<Digest> = manifest.layers.iter().map(|layer| layer.digest).collect();
    let soci_index = super::soci::named_by(&manifest);
    let layers = manifest
        .layers
        .into_iter()
        .zip(diff_ids.iter().zip(stack_ids(&blobs)))
        .map(|(descriptor, (diff_id, stack_id))| ImageLayer {
            descriptor,
            diff_id: *diff_id,
            stack_id,
        })
        .collect();
    Ok(Image {
        reference: reference.clone(),
        manifest: descriptor,
        config_descriptor: manifest.config,
        config,
        layers,
        soci_index,
    })
}
