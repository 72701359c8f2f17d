//! Makes a lazily startable copy of an image: every layer as eStargz.
//!
//! Invariant: what is read is verified (manifest, config, each blob and diff_id) before
//! anything made of it is pushed, and the manifest is pushed last: an interrupted
//! conversion leaves no image. Layer order, history and every field of the documents that
//! a conversion does not change are kept. Memory is bounded for layers of any size; a
//! layer being converted takes its uncompressed and its new size in spool files, which
//! have no name and vanish with the process.
//!
//! Of an image for several platforms the one for [`ConvertOptions::platform`] is converted.

mod document;
mod layer;
mod prioritize;
mod sink;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use lazarette_fetcher::index::estargz::write::Options;
use lazarette_fetcher::source::{BlobRef, BlobSource, Document};
use lazarette_fetcher::types::{Descriptor, Digest, Platform, Reference};
use lazarette_fetcher::{Error, Result};
use serde::Serialize;

use self::document::{Config, Manifest};

use self::layer::Spooled;
pub use self::prioritize::parse_prioritized;
pub use self::sink::{BlobSink, file_stream};
use super::IndexDocument;

/// Largest image config in bytes that is read; real ones are below 100 KiB.
const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Default of [`ConvertOptions::layer_bytes_max`].
const LAYER_BYTES_MAX_DEFAULT: u64 = 256 << 30;

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// How to write each layer, the prioritised paths included.
    pub write: Options,
    /// Which platform's image to take from an index.
    pub platform: Platform,
    /// Directory for spool files. Needs room for the largest layer, uncompressed and
    /// compressed.
    pub spool_dir: PathBuf,
    /// Most bytes a layer may decompress to: stops decompression bombs.
    pub layer_bytes_max: u64,
}

impl ConvertOptions {
    /// Defaults for this host, spooling into `spool_dir`.
    pub fn new(spool_dir: impl Into<PathBuf>) -> Self {
        Self {
            write: Options::default(),
            platform: Platform::host(),
            spool_dir: spool_dir.into(),
            layer_bytes_max: LAYER_BYTES_MAX_DEFAULT,
        }
    }
}

/// What a conversion is doing now.
#[derive(Debug, Clone, Copy)]
pub enum ConvertEvent<'a> {
    /// The manifest is known.
    Resolved {
        /// Number of layers, repeated ones included.
        layers: usize,
        /// Their compressed size in bytes.
        bytes: u64,
    },
    /// A layer is being fetched and unpacked.
    Fetching {
        /// Position in the manifest.
        layer: usize,
        /// The layer as it is.
        from: &'a Descriptor,
    },
    /// A layer is being compressed anew.
    Compressing {
        /// Position in the manifest.
        layer: usize,
        /// Length of its tar in bytes.
        uncompressed_size: u64,
    },
    /// A layer is at the destination.
    Pushed {
        /// Position in the manifest.
        layer: usize,
        /// The layer as it is now.
        to: &'a ConvertedLayer,
    },
}

/// One layer, before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertedLayer {
    /// The layer as it was.
    pub from: Descriptor,
    /// Digest of the eStargz blob.
    pub blob_digest: Digest,
    /// Size of the eStargz blob in bytes.
    pub blob_size: u64,
    /// Its new diff_id.
    pub diff_id: Digest,
    /// Digest of its TOC.
    pub toc_digest: Digest,
    /// Length of its TOC's JSON in bytes.
    pub toc_size: u64,
    /// Length of what the blob decompresses to in bytes.
    pub uncompressed_size: u64,
    /// Prioritised paths that are not in this layer.
    #[serde(skip)]
    missing: Vec<String>,
}

/// What a conversion made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// The new manifest.
    pub manifest: Descriptor,
    /// The layers in the order of the manifest.
    pub layers: Vec<ConvertedLayer>,
    /// Prioritised paths that no layer has, sorted; worth a warning.
    pub missing_prioritized: Vec<String>,
}

/// Converts images from one place to another.
pub struct Converter<'a> {
    /// Where images are read.
    pub source: &'a dyn BlobSource,
    /// Where the converted ones go.
    pub sink: &'a dyn BlobSink,
    /// How.
    pub options: ConvertOptions,
    /// Told of every step; must not block.
    pub progress: &'a (dyn Fn(ConvertEvent<'_>) + Send + Sync),
}

impl Converter<'_> {
    /// Writes an eStargz copy of `src` as `dst`, which must name a tag.
    ///
    /// Dropping the future stops before the next layer; blobs that were pushed stay.
    pub async fn convert(&self, src: &Reference, dst: &Reference) -> Result<ConvertReport> {
        self.options.write.check()?;
        if dst.tag().is_none() || dst.digest().is_some() {
            return Err(Error::Unsupported {
                what: format!("destination {dst}"),
                detail: "its digest is not known before it is made; name a tag".to_owned(),
            });
        }
        let document = self.resolve_manifest(src).await?;
        let mut manifest = Manifest::parse(src, &document)?;
        let config_bytes = self.read_config(src, &manifest.config).await?;
        let mut config = Config::parse(&manifest.config, &config_bytes)?;
        let sources = config.pair(manifest.layers.clone())?;
        (self.progress)(ConvertEvent::Resolved {
            layers: sources.len(),
            bytes: sources.iter().map(|(layer, _)| layer.size).sum(),
        });
        let mut done: HashMap<(Digest, Digest), ConvertedLayer> = HashMap::new();
        let mut layers = Vec::with_capacity(sources.len());
        for (index, (from, diff_id)) in sources.into_iter().enumerate() {
            let key = (from.digest, diff_id);
            let converted = match done.get(&key) {
                Some(same) => ConvertedLayer {
                    from,
                    ..same.clone()
                },
                None => self.layer((src, dst), index, (from, diff_id)).await?,
            };
            (self.progress)(ConvertEvent::Pushed {
                layer: index,
                to: &converted,
            });
            done.insert(key, converted.clone());
            layers.push(converted);
        }
        config.set_diff_ids(layers.iter().map(|layer| layer.diff_id));
        let config = self.push_config(dst, config.to_bytes()?).await?;
        manifest.replace(config, &layers);
        let manifest = self.push_manifest(dst, &manifest).await?;
        Ok(ConvertReport {
            manifest,
            missing_prioritized: missing_everywhere(&layers),
            layers,
        })
    }

    async fn resolve_manifest(&self, src: &Reference) -> Result<Document> {
        let document = self.source.resolve(src).await?;
        if !document.descriptor.media_type.is_index() {
            return Ok(document);
        }
        let what = format!("index of {src}");
        let index = IndexDocument::parse(&what, &document.bytes)?;
        let entry = index.require(&what, &self.options.platform)?;
        self.source
            .resolve(&src.repository().with_digest(entry.digest))
            .await
    }

    async fn read_config(&self, src: &Reference, config: &Descriptor) -> Result<Vec<u8>> {
        let what = || format!("config {} of {src}", config.digest);
        if config.size > CONFIG_BYTES_MAX {
            let detail = format!("{} bytes, at most {CONFIG_BYTES_MAX}", config.size);
            return Err(Error::limit(what(), detail));
        }
        let mut body = self.source.read_all(&blob(src, config)).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = body.try_next().await? {
            if (bytes.len() + piece.len()) as u64 > config.size {
                return Err(Error::malformed(what(), "more bytes came than announced"));
            }
            bytes.extend_from_slice(&piece);
        }
        let actual = Digest::of(config.digest.algorithm(), &bytes);
        if actual != config.digest {
            return Err(Error::Corrupt {
                what: what(),
                expected: config.digest,
                actual,
            });
        }
        Ok(bytes)
    }

    /// Fetches, converts and pushes one layer.
    async fn layer(
        &self,
        (src, dst): (&Reference, &Reference),
        index: usize,
        (from, diff_id): (Descriptor, Digest),
    ) -> Result<ConvertedLayer> {
        document::check_layer_type(&from)?;
        (self.progress)(ConvertEvent::Fetching {
            layer: index,
            from: &from,
        });
        let body = self.source.read_all(&blob(src, &from)).await?;
        let tar = layer::spool(body, &from, &diff_id, &self.options).await?;
        (self.progress)(ConvertEvent::Compressing {
            layer: index,
            uncompressed_size: tar.len,
        });
        let (file, written) = layer::compress(tar, &from, &self.options).await?;
        let (blob_digest, blob_size) = (written.blob_digest, written.blob_size);
        self.push(
            dst,
            &blob_digest,
            Spooled {
                file,
                len: blob_size,
            },
        )
        .await?;
        Ok(ConvertedLayer {
            from,
            blob_digest,
            blob_size,
            diff_id: written.diff_id,
            toc_digest: written.toc_digest,
            toc_size: written.toc_size,
            uncompressed_size: written.uncompressed_size,
            missing: written.missing,
        })
    }

    async fn push(&self, dst: &Reference, digest: &Digest, blob: Spooled) -> Result<()> {
        let repository = dst.repository();
        if self.sink.blob_exists(repository, digest).await? {
            return Ok(());
        }
        self.sink
            .push_blob(repository, digest, blob.len, blob.file)
            .await
    }

    async fn push_config(&self, dst: &Reference, bytes: Vec<u8>) -> Result<(Digest, u64)> {
        let digest = Digest::sha256(&bytes);
        let blob = layer::spool_bytes(bytes, &self.options).await?;
        let size = blob.len;
        self.push(dst, &digest, blob).await?;
        Ok((digest, size))
    }

    async fn push_manifest(&self, dst: &Reference, manifest: &Manifest) -> Result<Descriptor> {
        let bytes = Bytes::from(manifest.to_bytes()?);
        let size = bytes.len() as u64;
        let media_type = &manifest.media_type;
        let digest = self.sink.push_manifest(dst, media_type, bytes).await?;
        Ok(Descriptor::new(media_type.clone(), digest, size))
    }
}

fn blob(src: &Reference, descriptor: &Descriptor) -> BlobRef {
    BlobRef {
        repository: src.repository().clone(),
        digest: descriptor.digest,
        size: descriptor.size,
    }
}

/// The paths that every layer misses. An image without layers misses none: there was
/// nothing to look in.
fn missing_everywhere(layers: &[ConvertedLayer]) -> Vec<String> {
    let mut sets = layers
        .iter()
        .map(|layer| layer.missing.iter().cloned().collect::<BTreeSet<_>>());
    let first = sets.next().unwrap_or_default();
    let everywhere = sets.fold(first, |missing, layer| &missing & &layer);
    everywhere.into_iter().collect()
}

#[cfg(test)]
mod tests;
