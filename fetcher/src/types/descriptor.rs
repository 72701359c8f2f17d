//! OCI descriptors, and the media types this project understands.
//!
//! Invariant: `size` and `digest` come from a verified document, or from the user.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Digest, Platform};

/// What a blob is. Docker's types are the same documents under older names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum MediaType {
    /// `application/vnd.oci.image.index.v1+json`
    OciIndex,
    /// `application/vnd.docker.distribution.manifest.list.v2+json`
    DockerIndex,
    /// `application/vnd.oci.image.manifest.v1+json`
    OciManifest,
    /// `application/vnd.docker.distribution.manifest.v2+json`
    DockerManifest,
    /// `application/vnd.oci.image.config.v1+json`
    OciConfig,
    /// `application/vnd.docker.container.image.v1+json`
    DockerConfig,
    /// `application/vnd.oci.image.layer.v1.tar`
    OciLayerTar,
    /// `application/vnd.oci.image.layer.v1.tar+gzip`
    OciLayerGzip,
    /// `application/vnd.oci.image.layer.v1.tar+zstd`
    OciLayerZstd,
    /// `application/vnd.docker.image.rootfs.diff.tar`
    DockerLayerTar,
    /// `application/vnd.docker.image.rootfs.diff.tar.gzip`
    DockerLayerGzip,
    /// `application/vnd.docker.image.rootfs.diff.tar.zstd`, as buildkit makes it
    DockerLayerZstd,
    /// Anything else, kept to the letter.
    Other(String),
}

impl MediaType {
    const NAMES: [(Self, &'static str); 12] = [
        (Self::OciIndex, "application/vnd.oci.image.index.v1+json"),
        (
            Self::DockerIndex,
            "application/vnd.docker.distribution.manifest.list.v2+json",
        ),
        (
            Self::OciManifest,
            "application/vnd.oci.image.manifest.v1+json",
        ),
        (
            Self::DockerManifest,
            "application/vnd.docker.distribution.manifest.v2+json",
        ),
        (Self::OciConfig, "application/vnd.oci.image.config.v1+json"),
        (
            Self::DockerConfig,
            "application/vnd.docker.container.image.v1+json",
        ),
        (Self::OciLayerTar, "application/vnd.oci.image.layer.v1.tar"),
        (
            Self::OciLayerGzip,
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        (
            Self::OciLayerZstd,
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
        (
            Self::DockerLayerTar,
            "application/vnd.docker.image.rootfs.diff.tar",
        ),
        (
            Self::DockerLayerGzip,
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ),
        (
            Self::DockerLayerZstd,
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
        ),
    ];

    /// The registered name.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Other(name) => name,
            known => Self::NAMES
                .iter()
                .find(|(t, _)| t == known)
                .map_or("", |(_, name)| name),
        }
    }

    /// A list of manifests, one per platform.
    pub fn is_index(&self) -> bool {
        matches!(self, Self::OciIndex | Self::DockerIndex)
    }

    /// The manifest of one image.
    pub fn is_manifest(&self) -> bool {
        matches!(self, Self::OciManifest | Self::DockerManifest)
    }
}

impl From<String> for MediaType {
    fn from(name: String) -> Self {
        match Self::NAMES.iter().find(|(_, known)| *known == name) {
            Some((known, _)) => known.clone(),
            None => Self::Other(name),
        }
    }
}

impl From<&str> for MediaType {
    fn from(name: &str) -> Self {
        Self::from(name.to_owned())
    }
}

impl From<MediaType> for String {
    fn from(media_type: MediaType) -> Self {
        media_type.as_str().to_owned()
    }
}

/// Names a blob: what it is, its digest, its exact size in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default = "untyped")]
    pub media_type: MediaType,
    /// Digest of the blob as it is served.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Free-form facts; eStargz puts its TOC digest here.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "nullable"
    )]
    pub annotations: BTreeMap<String, String>,
    /// In an index: which platform this entry is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// A descriptor without annotations.
    pub fn new(media_type: MediaType, digest: Digest, size: u64) -> Self {
        Self {
            media_type,
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }
}

fn untyped() -> MediaType {
    MediaType::Other(String::new())
}

/// Go writes absent maps as `null`.
fn nullable<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_media_type_round_trips() {
        for (known, name) in MediaType::NAMES {
            assert_eq!(MediaType::from(name), known);
            assert_eq!(known.as_str(), name);
        }
        assert_eq!(MediaType::from("x/y").as_str(), "x/y");
    }

    #[test]
    fn reads_what_go_writes() {
        let json = format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":7,
                "annotations":null,"platform":{{"architecture":"arm64","os":"linux","variant":"v8"}}}}"#,
            Digest::sha256(b"")
        );
        let descriptor: Descriptor = serde_json::from_str(&json).unwrap();
        assert!(descriptor.media_type.is_manifest() && descriptor.annotations.is_empty());
    }
}
