//! The JSON documents of an image, edited in place (pure).
//!
//! Invariant: a document is kept as a JSON value and only what a conversion changes is
//! touched, so fields that nobody here knows survive.

use lazarette_fetcher::index::write::Format;
use lazarette_fetcher::source::Document;
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use lazarette_fetcher::{Error, Result};
use serde_json::{Map, Value, json};

use super::ConvertedLayer;

/// Most layers of an image; overlayfs takes 500 lower directories.
const LAYERS_MAX: usize = 500;

/// Annotations that tell what is in the bytes of the old blobs.
const STALE_PREFIXES: [&str; 7] = [
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
    "io.containers.estargz.",
    "containerd.io/uncompressed",
    "com.amazon.soci.",
    "vnd.lazarette.prefetch.",
    "containerd.io/snapshot/stargz/",
];

/// Refuses layers that are not tars.
pub(super) fn check_layer_type(layer: &Descriptor) -> Result<()> {
    match &layer.media_type {
        MediaType::OciLayerTar
        | MediaType::OciLayerGzip
        | MediaType::OciLayerZstd
        | MediaType::DockerLayerTar
        | MediaType::DockerLayerGzip
        | MediaType::DockerLayerZstd => Ok(()),
        other => Err(Error::Unsupported {
            what: format!("layer {}", layer.digest),
            detail: format!(
                "{:?} is not a layer type that can be converted",
                other.as_str()
            ),
        }),
    }
}

/// An image manifest.
#[derive(Debug)]
pub(super) struct Manifest {
    pub(super) media_type: MediaType,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
    document: Map<String, Value>,
}

impl Manifest {
    pub(super) fn parse(src: &Reference, document: &Document) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Parts {
            config: Descriptor,
            layers: Vec<Descriptor>,
        }
        let what = format!("manifest of {src}");
        let media_type = document.descriptor.media_type.clone();
        if !media_type.is_manifest() {
            return Err(Error::Unsupported {
                what,
                detail: format!("its media type {:?} is not an image's", media_type.as_str()),
            });
        }
        let bad = |error: serde_json::Error| Error::malformed(what.as_str(), error.to_string());
        let parts: Parts = serde_json::from_slice(&document.bytes).map_err(bad)?;
        if parts.layers.len() > LAYERS_MAX {
            let detail = format!("{} layers, at most {LAYERS_MAX}", parts.layers.len());
            return Err(Error::limit(what, detail));
        }
        Ok(Self {
            media_type,
            config: parts.config,
            layers: parts.layers,
            document: serde_json::from_slice(&document.bytes).map_err(bad)?,
        })
    }

    /// Points the manifest at the new config (digest, size in bytes) and layers.
    ///
    /// A docker manifest stays one where docker has a type for the layers; the two kinds
    /// of manifest differ in nothing but their types.
    pub(super) fn replace(
        &mut self,
        config: (Digest, u64),
        layers: &[ConvertedLayer],
        format: Format,
    ) {
        let layer_type = match (format, &self.media_type) {
            (Format::Estargz, MediaType::DockerManifest) => MediaType::DockerLayerGzip,
            (Format::Estargz | Format::Gzip, _) => MediaType::OciLayerGzip,
            (Format::ZstdChunked(_), _) => MediaType::OciLayerZstd,
        };
        let becomes_oci = self.media_type == MediaType::DockerManifest
            && layer_type != MediaType::DockerLayerGzip;
        if becomes_oci {
            self.media_type = MediaType::OciManifest;
            put_type(&mut self.document, &MediaType::OciManifest);
        }
        if let Some(Value::Object(old)) = self.document.get_mut("config") {
            point(old, config);
            if becomes_oci {
                put_type(old, &MediaType::OciConfig);
            }
        }
        if let Some(Value::Array(old)) = self.document.get_mut("layers") {
            for (old, new) in old.iter_mut().zip(layers) {
                let Value::Object(old) = old else { continue };
                point(old, (new.blob_digest, new.blob_size));
                put_type(old, &layer_type);
                annotate(old, new);
            }
        }
        if let Some(Value::Object(annotations)) = self.document.get_mut("annotations") {
            drop_stale(annotations);
        }
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        serialize("converted manifest", &self.document)
    }
}

fn put_type(document: &mut Map<String, Value>, media_type: &MediaType) {
    document.insert("mediaType".to_owned(), json!(media_type.as_str()));
}

/// Makes a descriptor name another blob.
fn point(descriptor: &mut Map<String, Value>, (digest, size): (Digest, u64)) {
    descriptor.insert("digest".to_owned(), json!(digest.to_string()));
    descriptor.insert("size".to_owned(), json!(size));
    // Other places of the old bytes, and the old bytes themselves.
    descriptor.remove("urls");
    descriptor.remove("data");
}

fn annotate(descriptor: &mut Map<String, Value>, layer: &ConvertedLayer) {
    let mut annotations = match descriptor.remove("annotations") {
        Some(Value::Object(annotations)) => annotations,
        _ => Map::new(),
    };
    drop_stale(&mut annotations);
    for (key, value) in &layer.annotations {
        annotations.insert((*key).to_owned(), json!(value));
    }
    if !annotations.is_empty() {
        descriptor.insert("annotations".to_owned(), Value::Object(annotations));
    }
}

fn drop_stale(annotations: &mut Map<String, Value>) {
    annotations.retain(|key, _| !STALE_PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
}

/// An image config.
#[derive(Debug)]
pub(super) struct Config {
    what: String,
    diff_ids: Vec<Digest>,
    document: Map<String, Value>,
}

impl Config {
    pub(super) fn parse(descriptor: &Descriptor, bytes: &[u8]) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Parts {
            rootfs: RootFs,
        }
        #[derive(serde::Deserialize)]
        struct RootFs {
            #[serde(default)]
            diff_ids: Option<Vec<Digest>>,
        }
        let what = format!("config {}", descriptor.digest);
        let bad = |error: serde_json::Error| Error::malformed(what.as_str(), error.to_string());
        let parts: Parts = serde_json::from_slice(bytes).map_err(bad)?;
        let document = serde_json::from_slice(bytes).map_err(bad)?;
        Ok(Self {
            what,
            diff_ids: parts.rootfs.diff_ids.unwrap_or_default(),
            document,
        })
    }

    /// Each layer with its diff_id.
    pub(super) fn pair(&self, layers: Vec<Descriptor>) -> Result<Vec<(Descriptor, Digest)>> {
        if layers.len() != self.diff_ids.len() {
            let (have, want) = (self.diff_ids.len(), layers.len());
            let detail = format!("{have} diff_ids for {want} layers");
            return Err(Error::malformed(self.what.as_str(), detail));
        }
        Ok(layers
            .into_iter()
            .zip(self.diff_ids.iter().copied())
            .collect())
    }

    pub(super) fn set_diff_ids(&mut self, diff_ids: impl Iterator<Item = Digest>) {
        let diff_ids: Vec<Value> = diff_ids.map(|id| json!(id.to_string())).collect();
        if let Some(Value::Object(rootfs)) = self.document.get_mut("rootfs") {
            rootfs.insert("diff_ids".to_owned(), Value::Array(diff_ids));
        }
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        serialize("converted config", &self.document)
    }
}

fn serialize(what: &str, document: &Map<String, Value>) -> Result<Vec<u8>> {
    serde_json::to_vec(document).map_err(|error| Error::malformed(what, error.to_string()))
}
