//! Makes a copy of an image with every layer in another format: lazily startable ones
//! (eStargz, zstd:chunked), or the plain gzip that everything reads.
//!
//! Invariant: what is read is verified (manifest, config, each blob and diff_id) before
//! anything made of it is pushed, and the manifest is pushed last: an interrupted
//! conversion leaves no image. Layer order, history and every field of the documents that
//! a conversion does not change are kept. Memory is bounded for layers of any size: a few
//! are under way at a time, of which one is being compressed, on all cores, while the
//! others are fetched or pushed. A layer being converted takes its uncompressed and its new
//! size in spool files, which have no name and vanish with the process. With hot files all
//! layers are unpacked before the first is written, because paths lead from layer to layer.
//!
//! Of an image for several platforms the one for [`ConvertOptions::platform`] is converted.

mod document;
mod jobs;
mod layer;
mod prioritize;
mod retry;
mod sink;
mod spool;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lazarette_fetcher::index::write::{HotFiles, Options, Survey, resolve};
use lazarette_fetcher::source::{BlobRef, BlobSource, Document, read_twice, read_verified};
use lazarette_fetcher::store::disk::{Disk, RealDisk};
use lazarette_fetcher::types::{Descriptor, Digest, Platform, Reference};
use lazarette_fetcher::{Error, Result};
use serde::Serialize;
use tokio::sync::Semaphore;

use self::document::{Config, Manifest};
use self::jobs::{Job, Jobs};
use self::layer::{Staged, joined};
pub use self::prioritize::parse_prioritized;
use self::retry::retried;
pub use self::sink::{BlobSink, file_stream};
use self::spool::Spooled;
use super::IndexDocument;

/// Layers under way: enough that fetching, compressing and pushing overlap.
const LAYERS_AT_ONCE: usize = 3;
/// Default of [`ConvertOptions::push_pause`]: a registry that restarts is back in 15 s.
const PUSH_PAUSE_DEFAULT: Duration = Duration::from_secs(1);
/// Largest image config in bytes that is read; real ones are below 100 KiB.
const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Default of [`ConvertOptions::layer_bytes_max`].
const LAYER_BYTES_MAX_DEFAULT: u64 = 256 << 30;

/// How to convert.
#[derive(Clone)]
pub struct ConvertOptions {
    /// How to write each layer.
    pub write: Options,
    /// What starts need, with paths as in a container: it goes first, and is cut into
    /// smaller chunks than the rest. None means that nothing is known.
    pub hot: Option<HotFiles>,
    /// Which platform's image to take from an index.
    pub platform: Platform,
    /// Directory for spool files. Needs room for the largest layers, uncompressed and
    /// compressed; with hot files for all layers uncompressed.
    pub spool_dir: PathBuf,
    /// How they are written.
    pub disk: Arc<dyn Disk>,
    /// Most bytes a layer may decompress to: stops decompression bombs.
    pub layer_bytes_max: u64,
    /// How long to wait before the second try of a push. Each further pause is twice as
    /// long as the one before.
    pub push_pause: Duration,
}

impl ConvertOptions {
    /// Defaults for this host, spooling into `spool_dir`.
    pub fn new(spool_dir: impl Into<PathBuf>) -> Self {
        Self {
            write: Options::default(),
            hot: None,
            platform: Platform::host(),
            spool_dir: spool_dir.into(),
            disk: Arc::new(RealDisk),
            layer_bytes_max: LAYER_BYTES_MAX_DEFAULT,
            push_pause: PUSH_PAUSE_DEFAULT,
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
    /// Digest of the new blob.
    pub blob_digest: Digest,
    /// Size of the new blob in bytes.
    pub blob_size: u64,
    /// Its new diff_id.
    pub diff_id: Digest,
    /// Digest of its TOC's JSON, of a format with a TOC.
    pub toc_digest: Option<Digest>,
    /// Length of its TOC's JSON in bytes; 0 of a format without.
    pub toc_size: u64,
    /// Length of what the blob decompresses to in bytes.
    pub uncompressed_size: u64,
    /// What its descriptor says of it.
    pub annotations: BTreeMap<&'static str, String>,
}

/// What a conversion made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// The new manifest.
    pub manifest: Descriptor,
    /// The layers in the order of the manifest.
    pub layers: Vec<ConvertedLayer>,
    /// Hot files that the image does not have; worth a warning.
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
    /// Writes a copy of `src` as `dst`, which must name a tag.
    ///
    /// Dropping the future stops before the next step of a layer; blobs that were pushed
    /// stay.
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
        let jobs = Jobs::new(sources);
        let run = Run {
            src,
            dst,
            compressing: Semaphore::new(1),
        };
        let (converted, missing) = match &self.options.hot {
            None => (self.convert_each(&jobs, &run).await?, Vec::new()),
            Some(hot) => self.convert_hot(&jobs, hot, &run).await?,
        };
        let layers = jobs.in_order(&converted);
        config.set_diff_ids(layers.iter().map(|layer| layer.diff_id));
        let config = self.push_config(dst, config.to_bytes()?).await?;
        manifest.replace(config, &layers, self.options.write.format);
        let manifest = self.push_manifest(dst, &manifest).await?;
        Ok(ConvertReport {
            manifest,
            missing_prioritized: missing,
            layers,
        })
    }

    /// Converts layers that need nothing of one another.
    async fn convert_each(&self, jobs: &Jobs, run: &Run<'_>) -> Result<Vec<ConvertedLayer>> {
        let each = jobs.distinct.iter().map(|job| async move {
            let staged = self.stage(run.src, job).await?;
            self.write(run, job, (staged, None)).await
        });
        stream::iter(each)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await
    }

    /// Converts layers with what is hot in each; yields what is hot and nowhere, too.
    async fn convert_hot(
        &self,
        jobs: &Jobs,
        hot: &HotFiles,
        run: &Run<'_>,
    ) -> Result<(Vec<ConvertedLayer>, Vec<String>)> {
        let each = jobs.distinct.iter().map(|job| self.stage(run.src, job));
        let staged = stream::iter(each).buffered(LAYERS_AT_ONCE);
        let staged: Vec<Staged> = staged.try_collect().await?;
        let (hot, order) = (hot.clone(), jobs.order.clone());
        let look_up = move || {
            let (hot, missing) = distribute(&staged, &order, &hot);
            Ok((staged, hot, missing))
        };
        let (staged, hot, missing) = joined(tokio::task::spawn_blocking(look_up).await)?;
        let parts = staged.into_iter().zip(hot.into_iter().map(Some));
        let each = jobs.distinct.iter().zip(parts);
        let each = each.map(|(job, part)| self.write(run, job, part));
        let converted = stream::iter(each).buffered(LAYERS_AT_ONCE);
        Ok((converted.try_collect().await?, missing))
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

    async fn read_config(&self, src: &Reference, config: &Descriptor) -> Result<Bytes> {
        let what = || format!("config {} of {src}", config.digest);
        if config.size > CONFIG_BYTES_MAX {
            let detail = format!("{} bytes, at most {CONFIG_BYTES_MAX}", config.size);
            return Err(Error::limit(what(), detail));
        }
        let bytes = read_verified(self.source, &blob(src, config), what).await?;
        Ok(bytes.into_bytes())
    }

    /// Fetches, verifies and unpacks a layer.
    async fn stage(&self, src: &Reference, job: &Job) -> Result<Staged> {
        document::check_layer_type(&job.from)?;
        (self.progress)(ConvertEvent::Fetching {
            layer: job.layer,
            from: &job.from,
        });
        let blob = blob(src, &job.from);
        let blob = &blob;
        read_twice(self.source, blob, || async move {
            let body = self.source.read_all(blob).await?;
            layer::spool(body, &job.from, &job.diff_id, &self.options).await
        })
        .await
    }

    /// Writes a layer anew and pushes it.
    async fn write(
        &self,
        run: &Run<'_>,
        job: &Job,
        (staged, hot): (Staged, Option<HotFiles>),
    ) -> Result<ConvertedLayer> {
        // Never closed; one that were would let everyone through.
        let turn = run.compressing.acquire().await.ok();
        (self.progress)(ConvertEvent::Compressing {
            layer: job.layer,
            uncompressed_size: staged.tar.len,
        });
        let (spooled, written) = layer::compress(staged, &job.from, hot, &self.options).await?;
        drop(turn);
        self.push(run.dst, &written.blob_digest, spooled).await?;
        let converted = ConvertedLayer {
            from: job.from.clone(),
            blob_digest: written.blob_digest,
            blob_size: written.blob_size,
            diff_id: written.diff_id,
            toc_digest: written.toc_digest,
            toc_size: written.toc_size,
            uncompressed_size: written.uncompressed_size,
            annotations: written.annotations,
        };
        (self.progress)(ConvertEvent::Pushed {
            layer: job.layer,
            to: &converted,
        });
        Ok(converted)
    }

    async fn push(&self, dst: &Reference, digest: &Digest, blob: Spooled) -> Result<()> {
        let repository = dst.repository();
        retried(self.options.push_pause, async || {
            if self.sink.blob_exists(repository, digest).await? {
                return Ok(());
            }
            let file = blob.file.try_clone();
            let file = file.map_err(|error| Error::io("read back", "a converted blob", error))?;
            self.sink
                .push_blob(repository, digest, blob.len, file)
                .await
        })
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
        let put = || self.sink.push_manifest(dst, media_type, bytes.clone());
        let digest = retried(self.options.push_pause, put).await?;
        Ok(Descriptor::new(media_type.clone(), digest, size))
    }
}

/// One conversion.
struct Run<'a> {
    src: &'a Reference,
    dst: &'a Reference,
    /// Whose turn it is: a compressor has tens of megabytes of tables on each core.
    compressing: Semaphore,
}

/// What is hot in each of the `staged` layers, and what is nowhere. `order` lists them
/// as the image stacks them.
fn distribute(staged: &[Staged], order: &[usize], hot: &HotFiles) -> (Vec<HotFiles>, Vec<String>) {
    let stacked = order.iter().filter_map(|place| staged.get(*place));
    let surveys: Vec<&Survey> = stacked.map(|staged| &staged.survey).collect();
    let resolved = resolve(&surveys, hot);
    let mut out = vec![HotFiles::default(); staged.len()];
    for (place, part) in order.iter().zip(resolved.layers) {
        if let Some(hot) = out.get_mut(*place) {
            hot.files.extend(part.files);
        }
    }
    (out, resolved.missing)
}

fn blob(src: &Reference, descriptor: &Descriptor) -> BlobRef {
    BlobRef {
        repository: src.repository().clone(),
        digest: descriptor.digest,
        size: descriptor.size,
    }
}

#[cfg(test)]
mod tests;
