//! The OCI documents of an image, parsed once from verified bytes.
//!
//! Invariant: limits hold (documents up to 4 MiB, [`LAYERS_MAX`] layers,
//! [`MANIFESTS_MAX`] platforms) and required fields are there. Docker's schema 2 is the
//! same shape under other media types. Unknown fields are ignored: registries add them.

use std::collections::BTreeMap;

use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Platform};
use lazarette_fetcher::{Error, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::spec::ImageConfig;

/// Largest document that is parsed, bytes; registries must accept 4 MiB and few accept more.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Most layers of an image. Overlay takes 500 lower directories.
const LAYERS_MAX: usize = 499;
/// Most platforms of an index.
const MANIFESTS_MAX: usize = 1024;

/// A list of manifests, one per platform.
#[derive(Debug, Clone, Deserialize)]
pub struct IndexDocument {
    /// One entry per platform (attestations name `unknown/unknown`).
    pub manifests: Vec<Descriptor>,
}

/// The manifest of one image.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestDocument {
    /// Media type, where the document names its own.
    pub media_type: Option<MediaType>,
    /// The config blob.
    pub config: Descriptor,
    /// Layers from the base up.
    pub layers: Vec<Descriptor>,
    /// What is said of the image.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
}

/// The image config.
#[derive(Debug, Clone, Deserialize)]
pub struct ConfigDocument {
    /// `linux`, or nothing: some tools that make an image without a base leave it empty.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// Go's architecture name, or nothing.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// Architecture variant.
    #[serde(default)]
    pub variant: Option<String>,
    /// What to run and how.
    #[serde(default, deserialize_with = "or_default")]
    pub config: ImageConfig,
    /// The layers, uncompressed.
    pub rootfs: RootFs,
}

/// Digests of the uncompressed layers.
#[derive(Debug, Clone, Deserialize)]
pub struct RootFs {
    /// From the base up.
    pub diff_ids: Vec<Digest>,
}

impl IndexDocument {
    /// Parses `bytes` of the index called `what`.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        let index: Self = parse(what, bytes)?;
        match index.manifests.len() {
            0..=MANIFESTS_MAX => Ok(index),
            n => Err(Error::limit(
                what,
                format!("{n} manifests, at most {MANIFESTS_MAX}"),
            )),
        }
    }

    /// The entry whose image runs on `host`. An exact variant wins over none. Where no entry
    /// does, the first that names no platform, which is optional: its config says for which it
    /// is, and whoever runs it looks there, as with an image that no index lists.
    pub fn select(&self, host: &Platform) -> Option<&Descriptor> {
        let runs = |d: &&Descriptor| {
            d.media_type.is_manifest() && d.platform.as_ref().is_some_and(|p| p.runs_on(host))
        };
        let exact = |d: &&Descriptor| {
            d.platform
                .as_ref()
                .is_some_and(|p| p.variant == host.variant)
        };
        let candidates = || self.manifests.iter().filter(runs);
        let unnamed = |d: &&Descriptor| d.media_type.is_manifest() && d.platform.is_none();
        candidates()
            .find(exact)
            .or_else(|| candidates().next())
            .or_else(|| self.manifests.iter().find(unnamed))
    }

    /// [`Self::select`], or an error that says what the index called `what` offers.
    pub fn require(&self, what: &str, host: &Platform) -> Result<&Descriptor> {
        self.select(host).ok_or_else(|| {
            let offered = self.platforms();
            if offered.is_empty() {
                let detail = "it lists no image manifest of any platform";
                return Error::malformed(what, detail);
            }
            foreign(what, host, &offered)
        })
    }

    /// The platforms it offers, for error texts.
    fn platforms(&self) -> String {
        let mut names: Vec<String> = self
            .manifests
            .iter()
            .filter(|d| d.media_type.is_manifest())
            .filter_map(|d| d.platform.as_ref())
            .map(Platform::to_string)
            .collect();
        names.dedup();
        names.truncate(20);
        names.join(", ")
    }
}

impl ManifestDocument {
    /// Parses `bytes` of the manifest called `what`.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        let manifest: Self = parse(what, bytes)?;
        if manifest.layers.len() > LAYERS_MAX {
            let detail = format!("{} layers, at most {LAYERS_MAX}", manifest.layers.len());
            return Err(Error::limit(what, detail));
        }
        if manifest.config.size > DOCUMENT_BYTES_MAX {
            let detail = format!("a config of {} bytes, at most 4 MiB", manifest.config.size);
            return Err(Error::limit(what, detail));
        }
        let total = manifest
            .layers
            .iter()
            .try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        match total {
            Some(_) => Ok(manifest),
            None => Err(Error::malformed(
                what,
                "its layer sizes add up to more than 2^64",
            )),
        }
    }
}

impl ConfigDocument {
    /// Parses `bytes` of the config called `what`.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        parse(what, bytes)
    }

    /// The platform the image was built for; what it does not say of it is as on `host`.
    pub fn platform(&self, host: &Platform) -> Platform {
        fn said<'a>(text: &'a str, host: &'a str) -> &'a str {
            if text.is_empty() { host } else { text }
        }
        let os = said(&self.os, &host.os);
        if self.architecture.is_empty() {
            return Platform::new(os, &host.architecture, host.variant.as_deref());
        }
        Platform::new(os, &self.architecture, self.variant.as_deref())
    }
}

/// The error for an image that is not for `host` but for what is `offered`.
pub(super) fn foreign(what: &str, host: &Platform, offered: &str) -> Error {
    Error::Unsupported {
        what: what.to_owned(),
        detail: format!("it is for {offered}, and this host is {host}"),
    }
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
        return Err(Error::limit(
            what,
            format!("{} bytes, at most 4 MiB", bytes.len()),
        ));
    }
    serde_json::from_slice(bytes).map_err(|e| Error::malformed(what, e.to_string()))
}

/// Go writes absent lists and maps as `null`.
fn or_default<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(arch: &str, variant: Option<&str>) -> Descriptor {
        let mut d = Descriptor::new(MediaType::OciManifest, Digest::sha256(arch.as_bytes()), 1);
        d.platform = Some(Platform::new("linux", arch, variant));
        d
    }

    #[test]
    fn an_index_gives_the_hosts_manifest() {
        let manifests = vec![
            entry("arm", Some("v6")),
            entry("arm", Some("v7")),
            entry("amd64", None),
            entry("unknown", None),
        ];
        let index = IndexDocument { manifests };
        let pick = |arch, variant| {
            index
                .select(&Platform::new("linux", arch, variant))
                .and_then(|d| d.platform.clone())
        };
        assert_eq!(
            pick("arm", Some("v7")).unwrap().variant.as_deref(),
            Some("v7")
        );
        assert_eq!(pick("x86_64", None).unwrap().architecture, "amd64");
        assert_eq!(pick("riscv64", None), None);
        assert!(
            index
                .platforms()
                .starts_with("linux/arm/v6, linux/arm/v7, linux/amd64")
        );
    }

    #[test]
    fn an_entry_without_a_platform_is_for_whom_nothing_else_is() {
        let unnamed =
            |content: &[u8]| Descriptor::new(MediaType::OciManifest, Digest::sha256(content), 1);
        let nested = Descriptor::new(MediaType::OciIndex, Digest::sha256(b"index"), 1);
        let manifests = vec![
            nested,
            unnamed(b"first"),
            unnamed(b"second"),
            entry("arm64", None),
        ];
        let index = IndexDocument { manifests };
        let pick = |arch| {
            let host = Platform::new("linux", arch, None);
            index.require("index", &host).unwrap().digest
        };
        assert_eq!(pick("arm64"), Digest::sha256(b"arm64"));
        assert_eq!(pick("amd64"), Digest::sha256(b"first"));
    }

    #[test]
    fn a_config_may_write_null_for_nothing() {
        let json =
            br#"{"os":"linux","architecture":"amd64","config":{"Cmd":["sh"],"Entrypoint":null,
            "Env":null,"Volumes":null},"rootfs":{"type":"layers","diff_ids":[]}}"#;
        let config = ConfigDocument::parse("config", json).unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert!(config.config.entrypoint.is_empty());
        let bare =
            br#"{"os":"linux","architecture":"amd64","config":null,"rootfs":{"diff_ids":[]}}"#;
        assert!(ConfigDocument::parse("config", bare).is_ok());
    }

    #[test]
    fn what_a_config_does_not_say_of_its_platform_is_as_on_the_host() {
        let host = Platform::new("linux", "arm", Some("v7"));
        for (said, platform) in [
            (r#""os":"","architecture":"""#, host.clone()),
            (r#""architecture":null"#, host.clone()),
            (r#""os":"linux""#, host.clone()),
            (
                r#""architecture":"amd64""#,
                Platform::new("linux", "amd64", None),
            ),
            (
                r#""os":"windows""#,
                Platform::new("windows", "arm", Some("v7")),
            ),
        ] {
            let json = format!(r#"{{{said},"config":null,"rootfs":{{"diff_ids":[]}}}}"#);
            let config = ConfigDocument::parse("config", json.as_bytes()).unwrap();
            assert_eq!(config.platform(&host), platform, "{said}");
        }
    }

    #[test]
    fn broken_documents_say_what_is_wrong() {
        let no_layers = br#"{"config":{"digest":"sha256:00","size":1}}"#;
        let error = ManifestDocument::parse("manifest of x", no_layers)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("manifest of x is malformed: invalid digest"),
            "{error}"
        );
        let big = format!(
            r#"{{"config":{{"digest":"{d}","size":1}},"layers":[{}]}}"#,
            vec![format!(r#"{{"digest":"{d}","size":1}}"#, d = Digest::sha256(b"")); 500].join(","),
            d = Digest::sha256(b"")
        );
        let error = ManifestDocument::parse("manifest", big.as_bytes())
            .unwrap_err()
            .to_string();
        assert_eq!(error, "manifest exceeds the limit: 500 layers, at most 499");
    }
}
