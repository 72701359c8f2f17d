//! Tests of the conversion with a registry in memory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::index::write::{Flavour, Format};
use lazarette_fetcher::source::Body;
use lazarette_fetcher::test_util::content;
use lazarette_fetcher::test_util::disk::{CrashDisk, Fault, scratch};
use lazarette_fetcher::types::{ByteRange, MediaType, Repository};
use serde_json::{Value, json};
use tokio::sync::{Mutex, Notify};

use super::*;

const FORMATS: [Format; 4] = [
    Format::Estargz,
    Format::ZstdChunked(Flavour::ContainersStorage),
    Format::ZstdChunked(Flavour::Stargz),
    Format::Gzip,
];

/// Blobs and manifests in memory, both readable and writable.
#[derive(Default)]
struct Registry {
    blobs: Mutex<HashMap<Digest, Bytes>>,
    manifests: Mutex<HashMap<String, (MediaType, Bytes)>>,
    pushes: Mutex<Vec<Digest>>,
    /// How many more pushes fail for now.
    outages: Mutex<u32>,
    reads: Mutex<Vec<Digest>>,
    /// Of which a damaged copy is read until it is distrusted.
    damaged: parking_lot::Mutex<HashSet<Digest>>,
    /// How many more calls return, if not all: the caller dies in the next one.
    lives: Mutex<Option<u32>>,
    dead: Notify,
}

impl Registry {
    async fn put(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::sha256(&bytes);
        self.blobs.lock().await.insert(digest, bytes);
        digest
    }

    async fn tag(&self, reference: &Reference, media_type: MediaType, document: &Value) -> Digest {
        let bytes = Bytes::from(document.to_string());
        let digest = Digest::sha256(&bytes);
        let pinned = reference.repository().with_digest(digest).to_string();
        let mut manifests = self.manifests.lock().await;
        manifests.insert(pinned, (media_type.clone(), bytes.clone()));
        manifests.insert(reference.to_string(), (media_type, bytes));
        digest
    }

    async fn document(&self, reference: &Reference) -> Value {
        let manifests = self.manifests.lock().await;
        serde_json::from_slice(&manifests[&reference.to_string()].1).unwrap()
    }

    /// Counts a call; the one that is too many never returns.
    async fn live(&self) {
        if let Some(left) = &mut *self.lives.lock().await {
            match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => {
                    self.dead.notify_one();
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    /// One of the failures that are left.
    async fn outage(&self) -> Result<()> {
        let mut left = self.outages.lock().await;
        if *left == 0 {
            return Ok(());
        }
        *left -= 1;
        Err(Error::Unavailable {
            what: "x".to_owned(),
            host: "y".to_owned(),
            detail: "restarting".to_owned(),
        })
    }

    async fn blob(&self, descriptor: &Value) -> Bytes {
        let digest = Digest::parse(descriptor["digest"].as_str().unwrap()).unwrap();
        self.blobs.lock().await[&digest].clone()
    }
}

#[async_trait]
impl BlobSource for Registry {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.live().await;
        let manifests = self.manifests.lock().await;
        let found = manifests.get(&reference.to_string());
        let (media_type, bytes) = found.ok_or_else(|| Error::NotFound {
            what: reference.to_string(),
            host: String::new(),
        })?;
        Ok(Document::new(
            media_type.clone(),
            Digest::sha256(bytes),
            bytes.clone(),
        ))
    }

    async fn stat(&self, _: &Repository, digest: &Digest) -> Result<u64> {
        Ok(self.blobs.lock().await[digest].len() as u64)
    }

    async fn read_range(&self, blob: &BlobRef, _: ByteRange) -> Result<Body> {
        self.read_all(blob).await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        self.live().await;
        self.reads.lock().await.push(blob.digest);
        let mut bytes = self.blobs.lock().await[&blob.digest].to_vec();
        if self.damaged.lock().contains(&blob.digest) {
            bytes.iter_mut().skip(20).for_each(|byte| *byte ^= 1);
        }
        let pieces: Vec<_> = bytes
            .chunks(1000)
            .map(|p| Ok(Bytes::copy_from_slice(p)))
            .collect();
        Ok(stream::iter(pieces).boxed())
    }

    fn distrust(&self, blob: &BlobRef) {
        self.damaged.lock().remove(&blob.digest);
    }

    async fn referrers(
        &self,
        _: &Repository,
        _: &Digest,
        _: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl BlobSink for Registry {
    async fn blob_exists(&self, _: &Repository, digest: &Digest) -> Result<bool> {
        self.live().await;
        Ok(self.blobs.lock().await.contains_key(digest))
    }

    async fn push_blob(
        &self,
        _: &Repository,
        digest: &Digest,
        size: u64,
        file: File,
    ) -> Result<()> {
        self.live().await;
        self.outage().await?;
        let pieces: Vec<Bytes> = file_stream(file).try_collect().await?;
        let bytes = pieces.concat();
        assert_eq!(
            (bytes.len() as u64, Digest::sha256(&bytes)),
            (size, *digest)
        );
        self.pushes.lock().await.push(*digest);
        self.put(bytes).await;
        Ok(())
    }

    async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<Digest> {
        self.live().await;
        self.outage().await?;
        let document: Value = serde_json::from_slice(&bytes).unwrap();
        Ok(self.tag(reference, media_type.clone(), &document).await)
    }
}

/// A tar of one file.
fn tar(name: &str, bytes: &[u8]) -> Vec<u8> {
    content::tar(&[(name, bytes)])
}

/// A tar of one symlink.
fn link_tar(name: &str, target: &str) -> Vec<u8> {
    let mut out = content::tar_header(name.as_bytes(), b'2', 0, |block| {
        block[157..157 + target.len()].copy_from_slice(target.as_bytes());
    });
    out.extend_from_slice(&content::TAR_END);
    out
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    MemberCompressor::new(1).compress(plain)
}

fn src() -> Reference {
    Reference::parse("localhost/src:1").unwrap()
}

fn dst() -> Reference {
    Reference::parse("localhost/dst:1").unwrap()
}

/// An image of these tars: the even layers gzip, the odd ones plain.
async fn image(registry: &Registry, media_type: MediaType, tars: &[Vec<u8>]) -> Value {
    let mut layers = Vec::new();
    for (index, tar) in tars.iter().enumerate() {
        let (kind, bytes) = match index % 2 {
            0 => (MediaType::OciLayerGzip, gzip(tar)),
            _ => (MediaType::OciLayerTar, tar.clone()),
        };
        let size = bytes.len();
        layers.push(json!({
            "mediaType": kind.as_str(), "digest": registry.put(bytes).await, "size": size,
            "annotations": {"mine": "kept", "io.containers.zstd-chunked.manifest-position": "1:2"},
        }));
    }
    let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::sha256(tar)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "x-unknown": [1, {"a": null}],
        "history": [{"created_by": "me"}], "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type.as_str(), "layers": layers,
        "annotations": {"also": "kept"},
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::sha256(config.as_bytes()), "size": config.len()},
    });
    registry.put(config).await;
    registry.tag(&src(), media_type, &manifest).await;
    manifest
}

async fn convert(registry: &Registry, prioritized: &[&str]) -> Result<ConvertReport> {
    convert_to(registry, prioritized, Format::Estargz).await
}

async fn convert_to(
    registry: &Registry,
    prioritized: &[&str],
    format: Format,
) -> Result<ConvertReport> {
    let dir = scratch();
    convert_on(
        registry,
        (prioritized, format),
        (dir.path(), Arc::new(RealDisk)),
    )
    .await
}

/// Converts with spool files in `dir`, of which none is left.
async fn convert_on(
    registry: &Registry,
    (prioritized, format): (&[&str], Format),
    (dir, disk): (&Path, Arc<dyn Disk>),
) -> Result<ConvertReport> {
    let mut options = ConvertOptions::new(dir);
    options.disk = disk;
    options.write = Options::new(format);
    let paths = prioritized.iter().map(|path| (*path).to_owned());
    options.hot = (!prioritized.is_empty()).then(|| HotFiles::whole(paths));
    options.layer_bytes_max = 2 << 20;
    options.push_pause = Duration::ZERO;
    options.platform = Platform::new("linux", "amd64", None);
    let converter = Converter {
        source: registry,
        sink: registry,
        options,
        progress: &|_| {},
    };
    let report = converter.convert(&src(), &dst()).await;
    assert_eq!(
        std::fs::read_dir(dir).unwrap().count(),
        0,
        "spool files are left"
    );
    report
}

#[tokio::test]
async fn documents_keep_what_a_conversion_does_not_change() {
    let registry = Registry::default();
    let tars = [tar("a", b"1"), tar("b", &[2; 5000]), tar("a", b"1")];
    let before = image(&registry, MediaType::OciManifest, &tars).await;
    let report = convert(&registry, &["a", "/nowhere"]).await.unwrap();
    assert_eq!(report.missing_prioritized, ["/nowhere"]);
    let after = registry.document(&dst()).await;
    assert_eq!(after["annotations"], before["annotations"]);
    let config: Value = serde_json::from_slice(&registry.blob(&after["config"]).await).unwrap();
    assert_eq!(config["x-unknown"], json!([1, {"a": null}]));
    assert_eq!(config["history"], json!([{"created_by": "me"}]));
    for (index, layer) in report.layers.iter().enumerate() {
        let descriptor = &after["layers"][index];
        assert_eq!(descriptor["mediaType"], MediaType::OciLayerGzip.as_str());
        assert_eq!(
            descriptor["annotations"],
            json!({
                "mine": "kept",
                "containerd.io/snapshot/stargz/toc.digest": layer.toc_digest,
                "io.containers.estargz.uncompressed-size": layer.uncompressed_size.to_string(),
            })
        );
        let mut plain = Vec::new();
        let blob = registry.blob(descriptor).await;
        lazarette_fetcher::codec::unpack::decoder(&blob[..])
            .and_then(|mut decoder| decoder.read_to_end(&mut plain))
            .unwrap();
        assert_eq!(
            config["rootfs"]["diff_ids"][index],
            json!(Digest::sha256(&plain))
        );
        assert_eq!(plain.len() as u64, layer.uncompressed_size);
    }
}

#[tokio::test]
async fn a_repeated_layer_is_converted_once_and_docker_stays_docker() {
    let registry = Registry::default();
    let tars = [tar("a", b"1"), tar("b", b"2"), tar("a", b"1")];
    image(&registry, MediaType::DockerManifest, &tars).await;
    let report = convert(&registry, &[]).await.unwrap();
    assert_eq!(
        registry.pushes.lock().await.len(),
        3,
        "two layers and a config"
    );
    assert_eq!(registry.reads.lock().await.len(), 3);
    assert_eq!(report.layers[0].blob_digest, report.layers[2].blob_digest);
    assert_eq!(report.manifest.media_type, MediaType::DockerManifest);
    let after = registry.document(&dst()).await;
    assert_eq!(
        after["layers"][0]["mediaType"],
        MediaType::DockerLayerGzip.as_str()
    );
    // The same again pushes nothing but the manifest.
    let again = convert(&registry, &[]).await.unwrap();
    assert_eq!((again, registry.pushes.lock().await.len()), (report, 3));
}

#[tokio::test]
async fn every_format_becomes_every_other() {
    let tars = [tar("a", b"1"), tar("b", &[2; 50_000])];
    for first in FORMATS {
        for second in FORMATS {
            let registry = Registry::default();
            image(&registry, MediaType::DockerManifest, &tars).await;
            convert_to(&registry, &["b"], first).await.unwrap();
            let (media_type, bytes) = {
                let manifests = registry.manifests.lock().await;
                manifests[&dst().to_string()].clone()
            };
            let document = serde_json::from_slice(&bytes).unwrap();
            registry.tag(&src(), media_type, &document).await;
            let report = convert_to(&registry, &["b"], second).await.unwrap();
            assert_eq!(report.missing_prioritized, [""; 0]);
            check_format(&registry, second, &report, first).await;
        }
    }
}

/// Media types and annotations are those of `format`, and none are left of another.
async fn check_format(registry: &Registry, format: Format, report: &ConvertReport, was: Format) {
    let docker = format == Format::Estargz && was == Format::Estargz;
    let (manifest, layer) = match format {
        _ if docker => (MediaType::DockerManifest, MediaType::DockerLayerGzip),
        Format::Estargz | Format::Gzip => (MediaType::OciManifest, MediaType::OciLayerGzip),
        Format::ZstdChunked(_) => (MediaType::OciManifest, MediaType::OciLayerZstd),
    };
    let document = registry.document(&dst()).await;
    assert_eq!(report.manifest.media_type, manifest);
    let own_types = "application/vnd.oci.image.config.v1+json";
    assert_eq!(document["config"]["mediaType"], own_types);
    for (descriptor, converted) in document["layers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(&report.layers)
    {
        assert_eq!(descriptor["mediaType"], layer.as_str());
        let mut expected = serde_json::to_value(&converted.annotations).unwrap();
        expected["mine"] = json!("kept");
        assert_eq!(descriptor["annotations"], expected, "{format:?}");
        assert_eq!(converted.annotations.is_empty(), format == Format::Gzip);
    }
}

#[tokio::test]
async fn pushes_outlast_a_registry_that_restarts() {
    let registry = Registry::default();
    image(&registry, MediaType::OciManifest, &[tar("a", b"1")]).await;
    *registry.outages.lock().await = 4;
    convert(&registry, &[]).await.unwrap();
    let registry = Registry::default();
    image(&registry, MediaType::OciManifest, &[tar("a", b"1")]).await;
    *registry.outages.lock().await = 100;
    let error = convert(&registry, &[]).await.unwrap_err();
    assert!(error.to_string().contains("restarting"), "{error}");
    assert_eq!(*registry.outages.lock().await, 95, "five tries");
}

/// Each format, with nothing that is hot and with something.
fn ways() -> impl Iterator<Item = (&'static [&'static str], Format)> {
    let each = FORMATS.into_iter();
    each.flat_map(|format| [(&[][..], format), (&["b"][..], format)])
}

/// The destination is what the report says, down to the last blob.
async fn check_whole(registry: &Registry, report: &ConvertReport) {
    let document = registry.document(&dst()).await;
    let blobs = registry.blobs.lock().await;
    let layers = document["layers"].as_array().unwrap();
    assert_eq!(layers.len(), report.layers.len());
    let all = layers.iter().chain([&document["config"]]);
    for descriptor in all {
        let digest = Digest::parse(descriptor["digest"].as_str().unwrap()).unwrap();
        assert_eq!(Digest::sha256(&blobs[&digest]), digest);
        assert_eq!(blobs[&digest].len() as u64, descriptor["size"]);
    }
}

#[tokio::test]
async fn a_kill_at_any_call_leaves_no_image_or_a_whole_one() {
    let tars = [tar("a", b"1"), tar("b", &[2; 5000])];
    for (prioritized, format) in ways() {
        let mut whole = false;
        for calls in 0_u32.. {
            let registry = Registry::default();
            image(&registry, MediaType::OciManifest, &tars).await;
            let before = registry.blobs.lock().await.len();
            *registry.lives.lock().await = Some(calls);
            tokio::select! {
                done = convert_to(&registry, prioritized, format) => whole = done.is_ok(),
                () = registry.dead.notified() => {}
            }
            *registry.lives.lock().await = None;
            let pushed = registry.blobs.lock().await.len() - before;
            assert_eq!(
                registry.resolve(&dst()).await.is_ok(),
                whole,
                "{format:?} after {calls}"
            );
            if whole {
                // Two layers and a config, which is another one only where tars are changed; what
                // came before the last call was no image.
                let (old, made) = (
                    registry.document(&src()).await,
                    registry.document(&dst()).await,
                );
                let is_other = old["config"]["digest"] != made["config"]["digest"];
                let new = 2 + usize::from(is_other);
                assert!(
                    pushed == new && calls > 8,
                    "{pushed} blobs in {calls} calls"
                );
                break;
            }
            // Whatever was left behind, the next attempt makes it whole.
            let report = convert_to(&registry, prioritized, format).await.unwrap();
            check_whole(&registry, &report).await;
        }
        assert!(whole);
    }
}

/// What is done to spool files to convert `tars`: how often one is made or written to.
async fn spool_operations(tars: &[Vec<u8>], way: (&[&str], Format)) -> u64 {
    let (registry, dir) = (Registry::default(), scratch());
    image(&registry, MediaType::OciManifest, tars).await;
    let disk = Arc::new(CrashDisk::new(dir.path(), None));
    let spool = (dir.path(), Arc::clone(&disk) as Arc<dyn Disk>);
    convert_on(&registry, way, spool).await.unwrap();
    disk.ops()
}

/// Meets `fault` at each operation on spool files in turn. Those of a lone layer come in one
/// order; of two, which are unpacked beside each other, as they come.
async fn fail_the_spool(fault: Fault) {
    let large = || tar("b", &content::noise(1, 0x01, 1_200_000));
    for way in ways() {
        let mut tars = vec![large()];
        if !way.0.is_empty() {
            tars.push(tar("a", b"1"));
        }
        let ops = spool_operations(&tars, way).await;
        // Each layer twice and the config, each made and written; the large tar in two writes.
        let least = 2 * (2 * tars.len() as u64 + 1) + 1;
        assert!(ops >= least, "{way:?}: {ops} operations");
        for at in 0..ops {
            let when = format!("{way:?}, {fault:?} at {at} of {ops}");
            let (registry, dir) = (Registry::default(), scratch());
            image(&registry, MediaType::OciManifest, &tars).await;
            let disk = Arc::new(CrashDisk::new(dir.path(), Some((at, fault))));
            let spool = || (dir.path(), Arc::clone(&disk) as Arc<dyn Disk>);
            let error = convert_on(&registry, way, spool()).await.unwrap_err();
            let is_full = matches!(error, Error::NoSpace { .. });
            let is_told = matches!(fault, Fault::NoSpace | Fault::Full);
            assert_eq!(is_full, is_told, "{when}: {error}");
            let found = registry.resolve(&dst()).await;
            assert!(found.is_err(), "{when}: there is half an image");
            // What is pushed already is whole, and the next attempt needs no other room.
            let report = match disk.crashed() {
                true => convert_to(&registry, way.0, way.1).await,
                false => {
                    disk.relieve();
                    convert_on(&registry, way, spool()).await
                }
            };
            let report = report.unwrap_or_else(|error| panic!("{when}, then: {error}"));
            check_whole(&registry, &report).await;
        }
    }
}

#[tokio::test]
async fn a_kill_at_any_operation_on_the_spool_leaves_no_image() {
    fail_the_spool(Fault::Crash).await;
}

#[tokio::test]
async fn a_full_disk_at_any_operation_on_the_spool_leaves_no_image() {
    fail_the_spool(Fault::NoSpace).await;
    fail_the_spool(Fault::Full).await;
}

#[tokio::test]
async fn hot_paths_lead_from_layer_to_layer() {
    let registry = Registry::default();
    let tars = [tar("usr/x", b"1"), link_tar("bin", "usr"), tar("z", b"3")];
    image(&registry, MediaType::OciManifest, &tars).await;
    let report = convert(&registry, &["/bin/x", "/bin/y"]).await.unwrap();
    assert_eq!(report.missing_prioritized, ["/bin/y"]);
    let mut first = Vec::new();
    for layer in &report.layers {
        let blob = registry.blobs.lock().await[&layer.blob_digest].clone();
        let mut plain = Vec::new();
        lazarette_fetcher::codec::unpack::decoder(&blob[..])
            .and_then(|mut decoder| decoder.read_to_end(&mut plain))
            .unwrap();
        let name = plain.split(|byte| *byte == 0).next().unwrap();
        first.push(String::from_utf8(name.to_vec()).unwrap());
    }
    assert_eq!(first, ["usr/x", "bin", ".no.prefetch.landmark"]);
}

#[tokio::test]
async fn an_index_yields_the_hosts_image() {
    let registry = Registry::default();
    let manifest = image(&registry, MediaType::OciManifest, &[tar("a", b"1")]).await;
    let text = manifest.to_string();
    let entry = |architecture: &str, digest: Digest| {
        json!({"mediaType": MediaType::OciManifest.as_str(), "digest": digest, "size": text.len(),
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let right = entry("amd64", Digest::sha256(text.as_bytes()));
    let wrong = entry("s390x", Digest::sha256(b"other"));
    let index = json!({"schemaVersion": 2, "manifests": [wrong.clone(), right]});
    registry.tag(&src(), MediaType::OciIndex, &index).await;
    assert_eq!(convert(&registry, &[]).await.unwrap().layers.len(), 1);
    let index = json!({"schemaVersion": 2, "manifests": [wrong]});
    registry.tag(&src(), MediaType::OciIndex, &index).await;
    let message = convert(&registry, &[]).await.unwrap_err().to_string();
    assert!(
        message.contains("it is for linux/s390x, and this host is linux/amd64"),
        "{message}"
    );
}

#[tokio::test]
async fn nothing_unverified_is_pushed() {
    let one = || vec![tar("a", &[7; 3000])];
    type Damage = fn(&mut Value, &mut HashMap<Digest, Bytes>);
    let corrupt_all: Damage = |_, blobs| {
        for bytes in blobs.values_mut() {
            let mut changed = bytes.to_vec();
            *changed.last_mut().unwrap() ^= 1;
            *bytes = changed.into();
        }
    };
    let corrupt_layer: Damage = |manifest, blobs| {
        let digest = Digest::parse(manifest["layers"][0]["digest"].as_str().unwrap()).unwrap();
        let mut changed = blobs[&digest].to_vec();
        changed[20] ^= 0xff;
        blobs.insert(digest, changed.into());
    };
    let wrong_tar: Damage = |manifest, blobs| {
        let other = Bytes::from(gzip(&tar("b", b"")));
        manifest["layers"][0]["digest"] = json!(Digest::sha256(&other));
        blobs.insert(Digest::sha256(&other), other);
    };
    let not_gzip: Damage = |manifest, blobs| {
        let other = Bytes::from_static(b"\x1f\x8bnonsense");
        manifest["layers"][0]["digest"] = json!(Digest::sha256(&other));
        blobs.insert(Digest::sha256(&other), other);
    };
    let bomb: Damage = |manifest, blobs| {
        let other = Bytes::from(gzip(&tar("b", &vec![0; 3 << 20])));
        manifest["layers"][0]["digest"] = json!(Digest::sha256(&other));
        blobs.insert(Digest::sha256(&other), other);
    };
    let encrypted: Damage = |manifest, _| {
        manifest["layers"][0]["mediaType"] = json!("application/x+encrypted");
    };
    let one_more: Damage = |manifest, _| {
        let layer = manifest["layers"][0].clone();
        manifest["layers"].as_array_mut().unwrap().push(layer);
    };
    let table = [
        (corrupt_all, "config sha256:"),
        (corrupt_layer, "is corrupt"),
        (wrong_tar, "(uncompressed) is corrupt"),
        (not_gzip, "cannot be decompressed"),
        (bomb, "decompresses to more than 2097152 bytes"),
        (encrypted, "application/x+encrypted"),
        (one_more, "1 diff_ids for 2 layers"),
    ];
    for (damage, part) in table {
        let registry = Registry::default();
        let mut manifest = image(&registry, MediaType::OciManifest, &one()).await;
        damage(&mut manifest, &mut *registry.blobs.lock().await);
        registry
            .tag(&src(), MediaType::OciManifest, &manifest)
            .await;
        let message = convert(&registry, &[]).await.unwrap_err().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
        assert!(registry.pushes.lock().await.is_empty());
        assert!(registry.resolve(&dst()).await.is_err());
    }
}

#[tokio::test]
async fn a_damaged_copy_is_read_once_more_elsewhere() {
    for prioritized in [&[][..], &["a"]] {
        let registry = Registry::default();
        let tars = [tar("a", &[7; 3000]), tar("b", &[8; 3000])];
        image(&registry, MediaType::OciManifest, &tars).await;
        let all = registry.blobs.lock().await.keys().copied().collect();
        *registry.damaged.lock() = all;
        let report = convert(&registry, prioritized).await.unwrap();
        check_whole(&registry, &report).await;
        assert_eq!(registry.reads.lock().await.len(), 6);
    }
}

#[tokio::test]
async fn dockers_zstd_layers_are_layers() {
    let registry = Registry::default();
    let mut manifest = image(&registry, MediaType::DockerManifest, &[tar("a", b"1")]).await;
    manifest["layers"][0]["mediaType"] = json!("application/vnd.docker.image.rootfs.diff.tar.zstd");
    registry
        .tag(&src(), MediaType::DockerManifest, &manifest)
        .await;
    let report = convert(&registry, &[]).await.unwrap();
    let after = registry.document(&dst()).await;
    assert_eq!(
        after["layers"][0]["mediaType"],
        MediaType::DockerLayerGzip.as_str()
    );
    check_whole(&registry, &report).await;
}

#[tokio::test]
async fn the_destination_needs_a_tag_and_the_spool_a_directory() {
    let registry = Registry::default();
    image(&registry, MediaType::OciManifest, &[tar("a", b"1")]).await;
    let converter = Converter {
        source: &registry,
        sink: &registry,
        options: ConvertOptions::new("/nonexistent/spool"),
        progress: &|_| {},
    };
    let pinned = dst().repository().with_digest(Digest::sha256(b""));
    let refused = converter.convert(&src(), &pinned).await.unwrap_err();
    assert!(refused.to_string().contains("name a tag"), "{refused}");
    let refused = converter.convert(&src(), &dst()).await.unwrap_err();
    assert!(
        refused.to_string().contains("/nonexistent/spool"),
        "{refused}"
    );
}
