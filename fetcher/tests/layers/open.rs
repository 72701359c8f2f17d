//! Layers of real tools through an opener: read lazily where that can be trusted, whole
//! where it cannot, refused where a digest does not match.

#![expect(
    clippy::unwrap_used,
    reason = "a fixture that cannot be read fails the test"
)]

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lazarette_fetcher::index::estargz::{LAYER_DIGEST_ANNOTATION, TOC_DIGEST_ANNOTATION};
use lazarette_fetcher::index::zstdchunked::PREFETCH_END_ANNOTATION;
use lazarette_fetcher::index::{FileKind, LayerFormat};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{LayerOpener, LayerRequest, OpenedBy};
use lazarette_fetcher::source::BlobSource;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::test_util::{FaultySource, MemorySource, ReadFault};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference};
use lazarette_fetcher::{Error, Result};

const TAR: &[u8] = include_bytes!("../fixtures/zstdchunked/layer.tar.gz");
const STORAGE: &[u8] = include_bytes!("../fixtures/zstdchunked/storage.zst");
const STORAGE_NOTES: &str = include_str!("../fixtures/zstdchunked/storage.zst.json");
const STARGZ: &[u8] = include_bytes!("../fixtures/zstdchunked/stargz.zst");
const STARGZ_NOTES: &str = include_str!("../fixtures/zstdchunked/stargz.zst.json");
const EXTERNAL: &[u8] = include_bytes!("../fixtures/zstdchunked/external.esgz");
const EXTERNAL_NOTES: &str = include_str!("../fixtures/zstdchunked/external.esgz.json");
const EXTERNAL_TOC: &[u8] = include_bytes!("../fixtures/zstdchunked/external-toc.tgz");

struct Fixture {
    source: Arc<MemorySource>,
    opener: LayerOpener,
    dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = Arc::new(MemorySource::new());
    Fixture {
        opener: LayerOpener::new(store, Arc::clone(&source) as Arc<dyn BlobSource>),
        source,
        dir,
    }
}

fn image() -> Reference {
    Reference::parse("example.com/a/b:v1").unwrap()
}

fn descriptor(blob: &[u8], notes: &str) -> Descriptor {
    let digest = Digest::sha256(blob);
    let mut d = Descriptor::new(MediaType::OciLayerZstd, digest, blob.len() as u64);
    d.annotations = serde_json::from_str(notes).unwrap();
    d
}

/// The digest of what `blob` decodes to.
fn diff_id(blob: &[u8]) -> Digest {
    let mut tar = Vec::new();
    let mut decoder =
        lazarette_fetcher::codec::unpack::decoder(std::io::Cursor::new(blob.to_vec())).unwrap();
    decoder.read_to_end(&mut tar).unwrap();
    Digest::sha256(&tar)
}

impl Fixture {
    async fn open(&self, blob: &[u8], layer: &Descriptor) -> Result<(Arc<Layer>, OpenedBy)> {
        self.source.add_blob(blob.to_vec());
        let repository = image().repository().clone();
        let request = LayerRequest::new(repository, layer, diff_id(blob)).of_image(&image());
        self.opener.open(&request, &AtomicU64::new(0)).await
    }

    fn add_toc_image(&self, layer: &Digest) {
        add_toc_image(&self.source, layer);
    }
}

/// A TOC image with one layer that says it is of `layer`.
fn add_toc_image(source: &MemorySource, layer: &Digest) {
    let digest = source.add_blob(EXTERNAL_TOC);
    let manifest = serde_json::json!({ "layers": [{
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": digest, "size": EXTERNAL_TOC.len(),
        "annotations": { LAYER_DIGEST_ANNOTATION: layer },
    }] });
    let tag = "v1-esgztoc";
    source.add_manifest("a/b", tag, MediaType::OciManifest, manifest.to_string());
}

/// Reads every file through the layer.
async fn read_all(layer: &Arc<Layer>) -> Vec<u8> {
    layer.fill_all().await.unwrap();
    let index = layer.index();
    let mut all = Vec::new();
    let mut files: Vec<_> = index.files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    for file in files {
        if let FileKind::Regular { size, data_offset } = file.kind {
            let mut bytes = vec![0; usize::try_from(size).unwrap()];
            assert!(layer.file().read_at(data_offset, &mut bytes).unwrap());
            all.extend_from_slice(&file.path);
            all.extend_from_slice(&bytes);
        }
    }
    all
}

#[tokio::test]
async fn every_kind_of_toc_shows_the_files_of_the_tar() {
    let plain = fixture();
    let (layer, by) = plain.open(TAR, &descriptor(TAR, "{}")).await.unwrap();
    assert_eq!(by, OpenedBy::Stream);
    let expected = read_all(&layer).await;
    let only_json = serde_json::from_str::<serde_json::Value>(STARGZ_NOTES).unwrap();
    let only_json = serde_json::json!({
        TOC_DIGEST_ANNOTATION: only_json[TOC_DIGEST_ANNOTATION]
    });
    let table = [
        (STORAGE, STORAGE_NOTES, LayerFormat::ZstdChunked),
        (STARGZ, STARGZ_NOTES, LayerFormat::ZstdChunked),
        (STARGZ, &only_json.to_string(), LayerFormat::ZstdChunked),
        (EXTERNAL, EXTERNAL_NOTES, LayerFormat::Estargz),
    ];
    for (blob, notes, format) in table {
        let fixture = fixture();
        fixture.add_toc_image(&Digest::sha256(EXTERNAL));
        let (layer, by) = fixture.open(blob, &descriptor(blob, notes)).await.unwrap();
        assert_eq!(
            (by, layer.index().format),
            (OpenedBy::Toc, format),
            "{notes}"
        );
        assert!(read_all(&layer).await == expected, "{notes}");
    }
}

#[tokio::test]
async fn a_table_that_was_read_ahead_is_not_read_again() {
    for (blob, notes) in [(STORAGE, STORAGE_NOTES), (STARGZ, STARGZ_NOTES)] {
        // The first read of the two decides, whichever way it goes.
        for is_first_right in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let memory = MemorySource::new();
            memory.add_blob(blob.to_vec());
            let reads = [!is_first_right, is_first_right];
            let script = reads.map(|fails| fails.then_some(ReadFault::Unavailable));
            let source = Arc::new(FaultySource::scripted(memory, script));
            let opener = LayerOpener::new(Store::open(dir.path()).unwrap(), source);
            let (layer, reference) = (descriptor(blob, notes), image());
            let repository = reference.repository();
            let layers = std::slice::from_ref(&layer);
            opener.look_ahead(repository, layers).await;
            let request = LayerRequest::new(repository.clone(), &layer, diff_id(blob));
            let opened = opener.open(&request, &AtomicU64::new(0)).await;
            let by = opened.map(|(_, by)| by);
            match is_first_right {
                true => assert_eq!(by.unwrap(), OpenedBy::Toc),
                false => assert!(matches!(by, Err(Error::Unavailable { .. })), "{by:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_toc_with_other_bytes_is_read_once_more() {
    let table = [
        (STORAGE, STORAGE_NOTES, 0),
        (STARGZ, STARGZ_NOTES, 0),
        // Behind the footer.
        (EXTERNAL, EXTERNAL_NOTES, 1),
    ];
    for (blob, notes, reads_before) in table {
        for wrong in [1, 2] {
            let memory = MemorySource::new();
            add_toc_image(&memory, &Digest::sha256(EXTERNAL));
            memory.add_blob(blob.to_vec());
            let before = std::iter::repeat_n(None, reads_before);
            let wrongs = std::iter::repeat_n(Some(ReadFault::WrongBytes), wrong);
            let source = Arc::new(FaultySource::scripted(memory, before.chain(wrongs)));
            let dir = tempfile::tempdir().unwrap();
            let opener = LayerOpener::new(Store::open(dir.path()).unwrap(), source);
            let repository = image().repository().clone();
            let layer = descriptor(blob, notes);
            let request = LayerRequest::new(repository, &layer, diff_id(blob));
            let request = request.of_image(&image());
            let opened = opener.open(&request, &AtomicU64::new(0)).await;
            let by = opened.map(|(_, by)| by);
            match wrong {
                1 => assert_eq!(by.unwrap(), OpenedBy::Toc, "{notes}"),
                _ => assert!(
                    matches!(by, Err(Error::Corrupt { .. } | Error::Malformed { .. })),
                    "{by:?}"
                ),
            }
        }
    }
}

#[tokio::test]
async fn what_cannot_be_trusted_piece_by_piece_is_streamed() {
    let both = STARGZ_NOTES.replacen(
        '{',
        r#"{"io.github.containers.zstd-chunked.manifest-checksum":
        "sha256:706bdf4f7ce312fbaa6c0033bde1398ef3bae99483d0c5c2935700d68c5ceb2c","#,
        1,
    );
    let no_footer = EXTERNAL_NOTES;
    let emptied = format!(r#"{{"{TOC_DIGEST_ANNOTATION}":""}}"#);
    let unknown = format!(r#"{{"{TOC_DIGEST_ANNOTATION}":"SHA256:XYZ"}}"#);
    let three = r#"{"io.github.containers.zstd-chunked.manifest-position":"1:2:3"}"#;
    let table = [
        (TAR, emptied.as_str(), "an empty TOC digest"),
        (TAR, unknown.as_str(), "a TOC digest that is none"),
        (STORAGE, three, "a position of three numbers"),
        (STARGZ, both.as_str(), "promises of both tools"),
        (TAR, no_footer, "a TOC digest, but no footer"),
        (EXTERNAL, EXTERNAL_NOTES, "no TOC image"),
        (STORAGE, "{}", "no promise"),
    ];
    for (blob, notes, case) in table {
        let (_, by) = fixture()
            .open(blob, &descriptor(blob, notes))
            .await
            .unwrap();
        assert_eq!(by, OpenedBy::Stream, "{case}");
    }
    let other = fixture();
    other.add_toc_image(&Digest::sha256(b"of another layer"));
    let layer = descriptor(EXTERNAL, EXTERNAL_NOTES);
    let (_, by) = other.open(EXTERNAL, &layer).await.unwrap();
    assert_eq!(by, OpenedBy::Stream, "a TOC image without this layer's");
}

/// An eStargz blob of one file, whose TOC breaks a rule, with the notes that promise that TOC.
fn estargz_without_a_chunk_digest() -> (Vec<u8>, String) {
    use std::io::Write as _;

    use lazarette_fetcher::test_util::content::{tar_file, tar_header};
    let member = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let toc = br#"{"version":1,"entries":[
        {"name":"a","type":"reg","size":5,"offset":0,"mode":420},
        {"name":".no.prefetch.landmark","type":"reg","size":1,"offset":0,"mode":420}]}"#;
    let mut blob = member(&tar_file("a", b"hello"));
    let offset = blob.len();
    let header = tar_header(b"stargz.index.json", b'0', toc.len() as u64, |_| {});
    let filling = vec![0; toc.len().next_multiple_of(512) - toc.len() + 1024];
    blob.extend(member(&[&header, &toc[..], &filling].concat()));
    blob.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0]);
    blob.extend(format!("SG\x16\0{offset:016x}STARGZ").as_bytes());
    blob.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let notes = serde_json::json!({ TOC_DIGEST_ANNOTATION: Digest::sha256(toc) });
    (blob, notes.to_string())
}

#[tokio::test]
async fn a_promised_toc_that_breaks_a_rule_leaves_the_stream() {
    let (blob, notes) = estargz_without_a_chunk_digest();
    let opened = fixture().open(&blob, &descriptor(&blob, &notes)).await;
    let (layer, by) = opened.unwrap();
    assert_eq!(by, OpenedBy::Stream);
    assert_eq!(read_all(&layer).await, b"ahello");
    // A TOC that is too long by what the annotation says.
    let mut layer = descriptor(STORAGE, STORAGE_NOTES);
    let position = "io.github.containers.zstd-chunked.manifest-position";
    let position = layer.annotations.get_mut(position).unwrap();
    let mut numbers: Vec<_> = position.split(':').map(str::to_owned).collect();
    numbers[2] = (1_u64 << 40).to_string();
    *position = numbers.join(":");
    let (_, by) = fixture().open(STORAGE, &layer).await.unwrap();
    assert_eq!(by, OpenedBy::Stream);
}

#[tokio::test]
async fn a_toc_that_is_not_the_promised_one_fails_the_layer() {
    let wrong = |notes: &str| {
        let mut notes: serde_json::Value = serde_json::from_str(notes).unwrap();
        for (name, value) in notes.as_object_mut().unwrap() {
            if name.ends_with("checksum") || name.ends_with("toc.digest") {
                *value = serde_json::json!(Digest::sha256(b"another"));
            }
        }
        notes.to_string()
    };
    for (blob, notes) in [
        (STORAGE, STORAGE_NOTES),
        (STARGZ, STARGZ_NOTES),
        (EXTERNAL, EXTERNAL_NOTES),
        // The place of one blob's TOC in another.
        (STORAGE, STARGZ_NOTES),
    ] {
        let fixture = fixture();
        fixture.add_toc_image(&Digest::sha256(EXTERNAL));
        let opened = fixture.open(blob, &descriptor(blob, &wrong(notes))).await;
        let error = opened.map(|(_, by)| by).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{notes}: {error}");
    }
}

#[tokio::test]
async fn what_an_annotation_says_comes_first_is_fetched_at_once() {
    let fixture = fixture();
    let mut layer = descriptor(STORAGE, STORAGE_NOTES);
    let position = "io.github.containers.zstd-chunked.manifest-position";
    let position = layer.annotations.get(position).unwrap();
    let toc_start = position.split(':').next().unwrap().to_owned();
    let name = PREFETCH_END_ANNOTATION.to_owned();
    layer.annotations.insert(name, toc_start);
    let (layer, by) = fixture.open(STORAGE, &layer).await.unwrap();
    assert_eq!(by, OpenedBy::Toc);
    // Nobody reads it; where it is not honoured, this ends by the clock.
    let is_here = async {
        while !layer.file().is_complete() {
            tokio::task::yield_now().await;
        }
    };
    let wait = std::time::Duration::from_secs(60);
    tokio::time::timeout(wait, is_here).await.unwrap();
}

/// Another release of ours made it, before or after this one.
#[tokio::test]
async fn a_layer_with_an_index_of_another_version_is_made_again() {
    let f = fixture();
    let layer = descriptor(STORAGE, STORAGE_NOTES);
    let (opened, _) = f.open(STORAGE, &layer).await.unwrap();
    let expected = read_all(&opened).await;
    opened.close().await.unwrap();
    drop(opened);
    let path = f.dir.path().join("layers");
    let path = path.join(layer.digest.file_name()).join("index");
    // What would be gone back to, were it damaged.
    std::fs::copy(&path, path.with_extension("plain")).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] += 1;
    std::fs::write(&path, bytes).unwrap();
    // As after the start of another release.
    let store = Store::open(f.dir.path()).unwrap();
    let error = store.open_layer(&layer.digest).unwrap_err().to_string();
    let words = [layer.digest.to_string(), "remove the layer".to_owned()];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    let opener = LayerOpener::new(store, Arc::clone(&f.source) as Arc<dyn BlobSource>);
    let f = Fixture { opener, ..f };
    let (opened, by) = f.open(STORAGE, &layer).await.unwrap();
    assert_eq!(by, OpenedBy::Toc);
    assert_eq!(read_all(&opened).await, expected);
}
