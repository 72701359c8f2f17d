//! Conversion against real readers: umoci, skopeo with docker-registry, gzip, GNU tar, and
//! stargz-snapshotter's Go package. `tests/peers/install.sh` brings what is missing.
//!
//! Set `LAZARETTE_CONVERT_TAR=x.tar` to measure and check a real tree as well.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step is a failed test, also in helper functions"
)]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use lazarette_fetcher::index::write::{Flavour, Format, HotFiles, Options, write_layer};
use lazarette_fetcher::source::{BlobRef, BlobSource, Body, Document};
use lazarette_fetcher::types::{
    ByteRange, Descriptor, Digest, MediaType, Platform, Reference, Repository,
};
use lazarette_fetcher::{Error, Result};
use lazarette_runtime::image::convert::{
    BlobSink, ConvertOptions, ConvertReport, ConvertedLayer, Converter, file_stream,
};
use serde_json::{Value, json};

/// An OCI layout on disk as source and destination; references differ by their tag.
struct Layout(PathBuf);

impl Layout {
    fn blob(&self, digest: &Digest) -> PathBuf {
        self.0.join("blobs/sha256").join(digest.hex())
    }

    fn index(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap()
    }
}

#[async_trait]
impl BlobSource for Layout {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        let index = self.index();
        let entry = index["manifests"].as_array().unwrap().iter().find(|entry| {
            entry["annotations"]["org.opencontainers.image.ref.name"].as_str() == reference.tag()
        });
        let entry: Descriptor = serde_json::from_value(entry.unwrap().clone()).unwrap();
        let bytes = std::fs::read(self.blob(&entry.digest)).unwrap();
        Ok(Document::new(entry.media_type, entry.digest, bytes.into()))
    }

    async fn stat(&self, _: &Repository, digest: &Digest) -> Result<u64> {
        Ok(std::fs::metadata(self.blob(digest)).unwrap().len())
    }

    async fn read_range(&self, blob: &BlobRef, _: ByteRange) -> Result<Body> {
        self.read_all(blob).await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        Ok(file_stream(File::open(self.blob(&blob.digest)).unwrap()).boxed())
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
impl BlobSink for Layout {
    async fn blob_exists(&self, _: &Repository, digest: &Digest) -> Result<bool> {
        Ok(self.blob(digest).exists())
    }

    async fn push_blob(
        &self,
        _: &Repository,
        digest: &Digest,
        size: u64,
        file: File,
    ) -> Result<()> {
        let mut out = File::create(self.blob(digest)).unwrap();
        let mut pieces = std::pin::pin!(file_stream(file));
        while let Some(piece) = pieces.try_next().await? {
            out.write_all(&piece).unwrap();
        }
        assert_eq!(out.metadata().unwrap().len(), size);
        Ok(())
    }

    async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<Digest> {
        let digest = Digest::sha256(&bytes);
        std::fs::write(self.blob(&digest), &bytes).unwrap();
        let mut index = self.index();
        index["manifests"].as_array_mut().unwrap().push(json!({
            "mediaType": media_type.as_str(), "digest": digest, "size": bytes.len(),
            "annotations": {"org.opencontainers.image.ref.name": reference.tag()},
        }));
        std::fs::write(self.0.join("index.json"), index.to_string()).unwrap();
        Ok(digest)
    }
}

fn reference(tag: &str) -> Reference {
    Reference::parse(&format!("localhost/image:{tag}")).unwrap()
}

async fn convert(layout: &Layout, to: &str, format: Format, prioritized: &[&str]) -> ConvertReport {
    let mut options = ConvertOptions::new(&layout.0);
    options.write = Options::new(format);
    let paths = prioritized.iter().map(|path| (*path).to_owned());
    options.hot = (!prioritized.is_empty()).then(|| HotFiles::whole(paths));
    options.write.chunk_bytes = 64 << 10;
    options.platform = Platform::new("linux", "amd64", None);
    let converter = Converter {
        source: layout,
        sink: layout,
        options,
        progress: &|_| {},
    };
    converter
        .convert(&reference("src"), &reference(to))
        .await
        .unwrap()
}

fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers")
}

/// Runs a program to its end and yields its standard output.
fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> String {
    let program = program.as_ref();
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|error| panic!("cannot run {program:?}: {error}"));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program:?} {args:?}: {stderr}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Whether this test can run; says so loudly if not.
fn ready(name: &str) -> bool {
    let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        eprintln!("SKIPPED (needs root): {name}");
    }
    root
}

/// Installs the peers and yields the directory of those that are built from source; `None`
/// without Go.
fn install() -> Option<PathBuf> {
    let output = Command::new(peers().join("install.sh")).output().unwrap();
    if output.status.code() == Some(3) {
        return None;
    }
    assert!(output.status.success(), "{output:?}");
    let out = String::from_utf8(output.stdout).unwrap();
    Some(PathBuf::from(out.lines().last().unwrap()))
}

/// Everything that can be seen of the image `tag`, unpacked by umoci.
fn listing(layout: &Layout, tag: &str, scratch: &Path) -> String {
    let bundle = scratch.join(format!("bundle-{tag}"));
    let image = format!("{}:{tag}", text(&layout.0));
    run("umoci", &["unpack", "--image", &image, text(&bundle)]);
    let listing = run(
        peers().join("tree-listing.sh"),
        &[text(&bundle.join("rootfs"))],
    );
    std::fs::remove_dir_all(bundle).unwrap();
    listing
}

/// The image `tag` with its zstd layers as gzip: Debian's umoci does not read zstd. Yields
/// the new tag.
async fn with_gzip(layout: &Layout, tag: &str) -> String {
    let document = layout.resolve(&reference(tag)).await.unwrap();
    let mut manifest: Value = serde_json::from_slice(&document.bytes).unwrap();
    for layer in manifest["layers"].as_array_mut().unwrap() {
        let blob = layout.blob(&Digest::parse(layer["digest"].as_str().unwrap()).unwrap());
        let script = "zstd -qdc <\"$1\" | gzip -1nc >\"$2\"";
        let new = layout.0.join("new");
        run("sh", &["-c", script, "sh", text(&blob), text(&new)]);
        let bytes = std::fs::read(&new).unwrap();
        layer["mediaType"] = json!(MediaType::OciLayerGzip.as_str());
        layer["size"] = json!(bytes.len());
        layer["digest"] = json!(Digest::sha256(&bytes));
        std::fs::rename(&new, layout.blob(&Digest::sha256(&bytes))).unwrap();
    }
    let new_tag = format!("{tag}-gzip");
    let bytes = Bytes::from(manifest.to_string());
    let (to, media_type) = (reference(&new_tag), &document.descriptor.media_type);
    layout.push_manifest(&to, media_type, bytes).await.unwrap();
    new_tag
}

/// A docker-registry on a free port of loopback, ended when dropped.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(scratch: &Path) -> Self {
        // It takes a port that is free, and says which.
        let config = scratch.join("registry.yml");
        let storage = scratch.join("registry");
        let yaml = format!(
            "version: 0.1\nlog: {{level: info}}\nhttp: {{addr: \"127.0.0.1:0\"}}\n\
             storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n",
            text(&storage)
        );
        std::fs::write(&config, yaml).unwrap();
        let mut child = Command::new("docker-registry")
            .args(["serve", text(&config)])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        let mut said = said.lines().map_while(Result::ok);
        let port = said.find_map(|line| {
            let (_, port) = line.split_once("listening on 127.0.0.1:")?;
            Some(port.split('"').next()?.to_owned())
        });
        // What it says later is of no interest, and must not stop it.
        std::thread::spawn(move || said.for_each(drop));
        let address = format!("127.0.0.1:{}", port.expect("docker-registry listens"));
        Self { child, address }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_converted_images_are_the_same_to_other_readers() {
    if !ready("privileged_converted_images_are_the_same_to_other_readers") {
        return;
    }
    let Some(cache) = install() else {
        eprintln!(
            "SKIPPED (needs Go 1.24 or later, which Debian 12 has not): \
             privileged_converted_images_are_the_same_to_other_readers"
        );
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let layout = Layout(scratch.path().join("layout"));
    run(
        peers().join("make-image.sh"),
        &[text(&layout.0), text(scratch.path())],
    );
    let before = listing(&layout, "src", scratch.path());
    for needed in [
        "xattr",
        "security.capability",
        "device",
        "link ",
        "p ./dev/pipe",
        "6755",
    ] {
        assert!(before.contains(needed), "the test image lacks {needed}");
    }
    let wanted = [
        "/usr/bin/numbers",
        "usr/lib/deep/more",
        "/etc/lib",
        "not/there",
    ];
    let registry = Registry::start(scratch.path());
    let zstd = Format::ZstdChunked(Flavour::ContainersStorage);
    let stargz = Format::ZstdChunked(Flavour::Stargz);
    for (tag, format, prioritized) in [
        ("plain", Format::Estargz, &[][..]),
        ("first", Format::Estargz, &wanted[..]),
        ("gzip", Format::Gzip, &wanted[..]),
        ("zstd", zstd, &wanted[..]),
        ("zstd-stargz", stargz, &wanted[..]),
    ] {
        let report = convert(&layout, tag, format, prioritized).await;
        assert_eq!(report.layers.len(), 2);
        let missing = report.missing_prioritized.iter().map(String::as_str);
        assert!(
            missing.eq(prioritized
                .iter()
                .copied()
                .filter(|path| *path == "not/there"))
        );
        let readable = match format {
            Format::Estargz | Format::Gzip => tag.to_owned(),
            Format::ZstdChunked(_) => with_gzip(&layout, tag).await,
        };
        assert_eq!(listing(&layout, &readable, scratch.path()), before, "{tag}");
        for layer in &report.layers {
            let blob = layout.blob(&layer.blob_digest);
            check_blob(&blob, format, layer, &cache);
        }
        check_registry(&registry, &layout, tag, &report);
    }
}

/// gzip or zstd and GNU tar accept the blob, and the Go packages that read it lazily find
/// the same files in it.
fn check_blob(blob: &Path, format: Format, layer: &ConvertedLayer, cache: &Path) {
    let (test, unpack) = match format {
        Format::Estargz | Format::Gzip => ("gzip -t <\"$1\"", "gzip"),
        Format::ZstdChunked(_) => ("zstd -qt <\"$1\"", "zstd"),
    };
    run("sh", &["-c", test, "sh", text(blob)]);
    let unpack = format!("--use-compress-program={unpack}");
    let names = run("tar", &[&unpack, "-tvf", text(blob)]);
    let has_toc = names.trim_end().ends_with("stargz.index.json");
    assert_eq!(has_toc, format == Format::Estargz, "{names}");
    let Some(toc_digest) = layer.toc_digest else {
        return;
    };
    if format == Format::ZstdChunked(Flavour::ContainersStorage) {
        return check_storage(blob, layer, cache);
    }
    let read = run(
        cache.join("estargz-verify"),
        &[text(blob), &toc_digest.to_string()],
    );
    // Whiteouts are files in a layer, and tar prints them like the Go program does.
    let script = "tar \"$2\" -xf \"$1\" --to-command='echo $(sha256sum | cut -c1-64) $TAR_SIZE $TAR_FILENAME'";
    let extracted = run("sh", &["-c", script, "sh", text(blob), &unpack]);
    let files = |text: &str| -> Vec<String> {
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.replacen(" ./", " ", 1))
            .collect();
        lines.retain(|line| !line.ends_with("stargz.index.json"));
        lines.sort();
        lines
    };
    let (read, extracted) = (files(&read), files(&extracted));
    assert!(
        extracted.iter().all(|line| read.contains(line)),
        "{read:#?}\n{extracted:#?}"
    );
    assert!(!extracted.is_empty());
}

/// What podman checks of a layer holds.
fn check_storage(blob: &Path, layer: &ConvertedLayer, cache: &Path) {
    let of = |key: &str| {
        let key = format!("io.github.containers.zstd-chunked.{key}");
        layer.annotations[key.as_str()].clone()
    };
    let (checksum, manifest) = (of("manifest-checksum"), of("manifest-position"));
    let (split, diff_id) = (of("tarsplit-position"), layer.diff_id.to_string());
    let args = [text(blob), &checksum, &manifest, &split, &diff_id];
    let said = run(cache.join("estargz-verify"), &args);
    assert!(said.contains(" entries, "), "{said}");
}

/// skopeo carries the image to a registry and back, unchanged.
fn check_registry(registry: &Registry, layout: &Layout, tag: &str, report: &ConvertReport) {
    let from = format!("oci:{}:{tag}", text(&layout.0));
    let to = format!("docker://{}/converted:{tag}", registry.address);
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--dest-tls-verify=false",
            &from,
            &to,
        ],
    );
    let manifest = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &to]);
    let digest = Digest::sha256(manifest.as_bytes());
    assert_eq!(
        digest, report.manifest.digest,
        "skopeo changed the manifest"
    );
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    for (layer, converted) in manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(&report.layers)
    {
        for (key, value) in &converted.annotations {
            assert_eq!(layer["annotations"][key], **value);
        }
    }
    let back = tempfile::tempdir().unwrap();
    let back = format!("dir:{}", text(&back.path().join("image")));
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--src-tls-verify=false",
            &to,
            &back,
        ],
    );
}

/// A tmpfs of a given size, unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(dir: PathBuf, kib: u32) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let size = format!("size={kib}k");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", text(&dir)]);
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A thread that has not yet seen that it is not wanted may have a file open.
        run("umount", &["-l", text(&self.0)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_ends_a_conversion_and_leaves_nothing() {
    if !ready("privileged_a_full_disk_ends_a_conversion_and_leaves_nothing") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layout = Layout(scratch.path().join("layout"));
    run(
        peers().join("make-image.sh"),
        &[text(&layout.0), text(scratch.path())],
    );
    let mut failed = 0;
    let formats = [
        Format::ZstdChunked(Flavour::ContainersStorage),
        Format::Estargz,
        Format::Gzip,
    ];
    // From no room at all to room for everything: unpacking and writing run out in turn.
    for (number, kib) in (64..20_000).step_by(1500).enumerate() {
        let spool = Tmpfs::mount(scratch.path().join("spool"), kib);
        let mut options = ConvertOptions::new(&spool.0);
        options.write = Options::new(formats[number % formats.len()]);
        options.hot = (number % 2 == 0).then(|| HotFiles::whole(["/usr/lib/noise".to_owned()]));
        options.platform = Platform::new("linux", "amd64", None);
        let converter = Converter {
            source: &layout,
            sink: &layout,
            options,
            progress: &|_| {},
        };
        let to = format!("full-{kib}");
        let outcome = converter.convert(&reference("src"), &reference(&to)).await;
        assert_eq!(std::fs::read_dir(&spool.0).unwrap().count(), 0);
        let tagged = layout.index().to_string().contains(&to);
        assert_eq!(tagged, outcome.is_ok(), "{kib}");
        if let Err(error) = outcome {
            assert!(matches!(error, Error::NoSpace { .. }), "{kib}: {error}");
            failed += 1;
        } else {
            break;
        }
    }
    assert!((3..13).contains(&failed), "{failed} sizes were too small");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_killed_conversion_leaves_nothing() {
    if !ready("privileged_a_killed_conversion_leaves_nothing") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layout = Layout(scratch.path().join("layout"));
    run(
        peers().join("make-image.sh"),
        &[text(&layout.0), text(scratch.path())],
    );
    let registry = Registry::start(scratch.path());
    let from = format!("oci:{}:src", text(&layout.0));
    let src = format!("{}/image:src", registry.address);
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--dest-tls-verify=false",
            &from,
            &format!("docker://{src}"),
        ],
    );
    let root = scratch.path().join("root");
    // Killed when it says its first, second, ... line; it says seven.
    let formats = ["estargz", "zstd-chunked", "oci"];
    for (lines, format) in (1..=7).flat_map(|lines| formats.map(|format| (lines, format))) {
        let dst = format!("{}/image:killed-{format}-{lines}", registry.address);
        let mut child = Command::new(env!("CARGO_BIN_EXE_laz"))
            .args(["--root", text(&root), "image", "convert"])
            .args(["--to", format, &src, &dst])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
        let said: Vec<String> = said.take(lines).map(std::result::Result::unwrap).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(said.len(), lines, "{said:?}");
        let left = std::fs::read_dir(root.join("ingest")).unwrap().count();
        assert_eq!(left, 0, "after {said:?}");
    }
    for format in formats {
        let dst = format!("{}/image:whole-{format}", registry.address);
        let args = ["image", "convert", "--to", format, &src, &dst];
        run(
            env!("CARGO_BIN_EXE_laz"),
            &[&["--root", text(&root)], &args[..]].concat(),
        );
    }
}

/// Prints how fast conversion is and what chunk sizes cost. Asserts nothing of speed.
#[test]
fn speed_and_size_by_chunk_size() {
    let path = std::env::var_os("LAZARETTE_CONVERT_TAR").map(PathBuf::from);
    let tar = match &path {
        Some(path) => File::open(path).unwrap(),
        None => source_tree(),
    };
    let len = tar.metadata().unwrap().len();
    let mut gzip = Command::new("gzip")
        .args(["-6", "-c"])
        .stdin(tar.try_clone().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let whole = std::io::copy(gzip.stdout.as_mut().unwrap(), &mut std::io::sink()).unwrap();
    gzip.wait().unwrap();
    println!("{len} bytes of tar, {whole} by gzip -6");
    for chunk_kib in [64, 256, 1024, 4096] {
        let options = Options {
            chunk_bytes: chunk_kib << 10,
            ..Options::default()
        };
        let started = Instant::now();
        let mut input = tar.try_clone().unwrap();
        let written = write_layer("tar", &mut input, &mut std::io::sink(), &options).unwrap();
        assert!(written.uncompressed_size >= written.toc_size);
        println!(
            "chunks of {chunk_kib} KiB: {:.0} MB/s, {:.4} of gzip, TOC {} bytes",
            len as f64 / 1e6 / started.elapsed().as_secs_f64(),
            written.blob_size as f64 / whole as f64,
            written.toc_size,
        );
    }
}

/// A tar of this crate's own sources.
fn source_tree() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let mut tar = Command::new("tar");
    let tar = tar.args(["-C", env!("CARGO_MANIFEST_DIR"), "-c", "src", "tests"]);
    let mut child = tar.stdout(Stdio::piped()).spawn().unwrap();
    let mut bytes = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    assert!(child.wait().unwrap().success());
    file.write_all(&bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}
