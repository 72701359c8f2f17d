//! Layers in every format that is read lazily, what a node is given to read them by, and what
//! their files hold.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::estargz::LAYER_DIGEST_ANNOTATION;
use lazarette_fetcher::index::write::{Flavour, Format, Options, write_layer};
use lazarette_fetcher::index::{ChunkId, Encoding};
use lazarette_fetcher::layer::open::{LayerRequest, OfferedIndex, core_digest};
use lazarette_fetcher::source::BlobRef;
use lazarette_fetcher::test_util::MemorySource;
use lazarette_fetcher::test_util::content::noise;
use lazarette_fetcher::trust::{SigningKey, Statement};
use lazarette_fetcher::types::{Descriptor, Digest, MediaType, Reference, Repository};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::node::{Node, index_of};

/// Content of every file by its path in the layer.
pub(crate) type Content = BTreeMap<String, Vec<u8>>;

/// Pieces all over the large file, which a start reads.
const HOT: [ChunkId; 8] = [14, 23, 32, 41, 50, 59, 68, 77];

/// What a node reads the layer by.
enum Table {
    /// Its own index, made while the layer was streamed.
    Own,
    /// A table in the blob.
    Inside,
    /// A table in the blob of another image.
    External(Bytes),
    /// A SOCI zTOC.
    Ztoc(Bytes),
    /// An index of another node, and the signature of it.
    Signed(Bytes, String),
}

/// A layer as a registry serves it.
pub(crate) struct Blob {
    pub(crate) name: &'static str,
    pub(crate) content: Arc<Content>,
    /// What some of its chunks are, read as they should be.
    pub(crate) is_encoded: fn(&Encoding) -> bool,
    /// What a start reads, of a layer whose index is shaped by that before.
    pub(crate) hot: &'static [ChunkId],
    bytes: Bytes,
    diff_id: Digest,
    annotations: BTreeMap<String, String>,
    table: Table,
}

impl Blob {
    pub(crate) fn digest(&self) -> Digest {
        Digest::sha256(&self.bytes)
    }

    /// Whether a node that has nothing of it can read it lazily.
    pub(crate) fn has_table(&self) -> bool {
        !matches!(self.table, Table::Own)
    }

    /// Whether its index comes without its details.
    pub(crate) fn is_offered(&self) -> bool {
        matches!(self.table, Table::Signed(..))
    }

    /// A registry that has it.
    pub(crate) fn serve(&self) -> MemorySource {
        let source = MemorySource::new();
        source.add_blob(self.bytes.clone());
        match &self.table {
            Table::Own | Table::Inside => {}
            Table::Ztoc(table) | Table::Signed(table, _) => {
                source.add_blob(table.clone());
            }
            Table::External(toc) => {
                let manifest = format!(
                    r#"{{"layers": [{{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                        "digest": "{}", "size": {}, "annotations": {{"{LAYER_DIGEST_ANNOTATION}": "{}"}}}}]}}"#,
                    source.add_blob(toc.clone()),
                    toc.len(),
                    self.digest()
                );
                let kind = MediaType::OciManifest;
                source.add_manifest("a", "b-esgztoc", kind, manifest);
            }
        }
        source
    }

    pub(crate) fn request(&self) -> LayerRequest {
        let size = self.bytes.len() as u64;
        let mut descriptor = Descriptor::new(MediaType::OciLayerGzip, self.digest(), size);
        descriptor.annotations.clone_from(&self.annotations);
        let request = LayerRequest::new(repository(), &descriptor, self.diff_id);
        let mut request = request.of_image(&image());
        match &self.table {
            Table::Own | Table::Inside | Table::External(_) => {}
            Table::Ztoc(ztoc) => request.ztoc = Some(blob_of(ztoc)),
            Table::Signed(index, signature) => {
                request.index = Some(OfferedIndex {
                    blob: blob_of(index),
                    signature: signature.clone(),
                    core_bytes: None,
                });
            }
        }
        request
    }

    /// The same layer, read by the index that another node made of it and signed.
    fn signed(self, name: &'static str) -> Self {
        let index = Bytes::from(index_of(&Node::new(), &self));
        let statement = Statement {
            blob_digest: self.digest(),
            core_digest: core_digest(&index).unwrap(),
        };
        let key = SigningKey::read(&fixture("index-key.pem")).unwrap();
        let signature = key.sign(&statement);
        Self {
            name,
            table: Table::Signed(index, signature),
            ..self
        }
    }

    /// The same layer, whose index is shaped for a start.
    fn shaped(self, name: &'static str) -> Self {
        Self {
            name,
            hot: &HOT,
            is_encoded: |encoding| matches!(encoding, Encoding::GzipSpan { .. }),
            ..self
        }
    }
}

fn image() -> Reference {
    Reference::parse("example.com/a:b").unwrap()
}

fn repository() -> Repository {
    image().repository().clone()
}

fn blob_of(bytes: &Bytes) -> BlobRef {
    BlobRef {
        repository: repository(),
        digest: Digest::sha256(bytes),
        size: bytes.len() as u64,
    }
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fetcher/tests/fixtures");
    fixtures.join(name)
}

/// Files of every size class: empty, smaller than a page, around a page and a chunk, and
/// some of many chunks; half of them compress well.
fn many() -> Content {
    let mut rng = StdRng::seed_from_u64(7);
    let sizes = [
        0, 1, 100, 4095, 4096, 4097, 65_535, 65_537, 200_000, 700_000,
    ];
    let file = |number: usize, size: usize, rng: &mut StdRng| {
        let mask = if number.is_multiple_of(2) { 0x07 } else { 0xff };
        let bytes = (0..size).map(|_| rng.random::<u8>() & mask).collect();
        (format!("d{}/f{number}", number % 3), bytes)
    };
    let all = sizes.iter().chain(&sizes).enumerate();
    all.map(|(number, size)| file(number, *size, &mut rng))
        .collect()
}

/// Bytes of the large file.
const LARGE: usize = (5 << 20) + 77;

/// Bytes that copy what was shortly before, so that none can be decoded without a window.
fn copying() -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(8);
    let mut bytes: Vec<u8> = Vec::with_capacity(LARGE + 64);
    while bytes.len() < LARGE {
        bytes.extend((0..8).map(|_| rng.random::<u8>()));
        let back = rng.random_range(24_000..=30_000).min(bytes.len());
        let from = bytes.len() - back;
        bytes.extend_from_within(from..bytes.len().min(from + 24));
    }
    bytes.truncate(LARGE);
    bytes
}

/// Bytes of which a fifth copies what was before: windows are short.
fn mild() -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(LARGE + 128);
    for (number, fresh) in (0..).zip(noise(2, 0x7f, LARGE).chunks(64)) {
        bytes.extend(fresh);
        let back = (number * 7919_usize % 20_000).clamp(16, bytes.len());
        let from = bytes.len() - back;
        bytes.extend_from_within(from..bytes.len().min(from + 16));
    }
    bytes.truncate(LARGE);
    bytes
}

/// A large file between small ones.
fn around(large: Vec<u8>) -> Content {
    Content::from([
        ("a".to_owned(), noise(1, 0x7f, 3000)),
        ("b".to_owned(), large),
        ("c".to_owned(), noise(3, 0x7f, 100_000)),
    ])
}

/// Runs a filter program.
fn pipe(program: &str, args: &[&str], input: Vec<u8>) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn tar(content: &Content) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in content {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let dir = dir.path().to_str().unwrap();
    let args = ["-C", dir, "--sort=name", "-cf", "-", "."];
    pipe("tar", &args, Vec::new())
}

/// What a tar holds and a layer does not show: whiteouts, and what is of a format.
const NOT_SHOWN: [&str; 2] = [".wh.", "prefetch.landmark"];

/// What a layer of this tar shows.
fn untar(tar: Vec<u8>) -> Content {
    let dir = tempfile::tempdir().unwrap();
    let args = ["-C", dir.path().to_str().unwrap(), "-xf", "-"];
    pipe("tar", &args, tar);
    let (mut content, mut todo) = (Content::new(), vec![dir.path().to_path_buf()]);
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let (kind, path) = entry.map(|e| (e.file_type().unwrap(), e.path())).unwrap();
            let name = path.strip_prefix(dir.path()).unwrap().to_str().unwrap();
            if kind.is_dir() {
                todo.push(path);
            } else if kind.is_file() && !NOT_SHOWN.iter().any(|part| name.contains(part)) {
                content.insert(name.to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    content
}

fn unpacked(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut decoder = decoder(Cursor::new(bytes.to_vec())).unwrap();
    decoder.read_to_end(&mut out).unwrap();
    out
}

/// A tar, of which layers are made.
struct Origin {
    content: Arc<Content>,
    tar: Vec<u8>,
}

impl Origin {
    fn of(content: Content) -> Self {
        Self {
            tar: tar(&content),
            content: Arc::new(content),
        }
    }

    /// Nothing says how it can be read.
    fn plain(&self, name: &'static str, bytes: Vec<u8>) -> Blob {
        Blob {
            name,
            content: Arc::clone(&self.content),
            is_encoded: match name {
                "tar" => |encoding| matches!(encoding, Encoding::Stored { .. }),
                _ => |encoding| matches!(encoding, Encoding::GzipSpan { .. }),
            },
            hot: &[],
            bytes: bytes.into(),
            diff_id: Digest::sha256(&self.tar),
            annotations: BTreeMap::new(),
            table: Table::Own,
        }
    }

    fn gzip(&self, name: &'static str) -> Blob {
        self.plain(name, pipe("gzip", &["-6"], self.tar.clone()))
    }

    /// Written with a table of contents.
    fn written(&self, name: &'static str, format: Format, chunk_bytes: u32) -> Blob {
        let options = Options {
            chunk_bytes,
            ..Options::new(format)
        };
        let (mut input, mut bytes) = (Cursor::new(&self.tar), Vec::new());
        let written = write_layer("layer", &mut input, &mut bytes, &options).unwrap();
        let notes = written.annotations.into_iter();
        Blob {
            diff_id: written.diff_id,
            annotations: notes.map(|(key, value)| (key.to_owned(), value)).collect(),
            table: Table::Inside,
            is_encoded: match format {
                Format::Estargz => |encoding| matches!(encoding, Encoding::GzipMember { .. }),
                _ => |encoding| matches!(encoding, Encoding::ZstdFrame { .. }),
            },
            ..self.plain(name, bytes)
        }
    }
}

/// A layer that another tool made, with a table of its own.
fn made_by_others(name: &'static str, blob: Vec<u8>, table: Table) -> Blob {
    let tar = unpacked(&blob);
    let origin = Origin {
        content: Arc::new(untar(tar.clone())),
        tar,
    };
    Blob {
        table,
        is_encoded: |encoding| matches!(encoding, Encoding::WholeSpan { .. }),
        ..origin.plain(name, blob)
    }
}

fn soci(name: &'static str, blob: Vec<u8>, ztoc: &str) -> Blob {
    let ztoc = unpacked(&fs::read(fixture(ztoc)).unwrap());
    made_by_others(name, blob, Table::Ztoc(ztoc.into()))
}

fn external() -> Blob {
    let read = |name: &str| fs::read(fixture(&format!("zstdchunked/{name}"))).unwrap();
    let toc = Table::External(read("external-toc.tgz").into());
    let notes = String::from_utf8(read("external.esgz.json")).unwrap();
    // One pair of strings.
    let mut words = notes.split('"').skip(1).step_by(2);
    let note = (words.next().unwrap(), words.next().unwrap());
    Blob {
        annotations: BTreeMap::from([(note.0.to_owned(), note.1.to_owned())]),
        is_encoded: |encoding| matches!(encoding, Encoding::GzipMember { .. }),
        ..made_by_others(
            "eStargz with another image's TOC",
            read("external.esgz"),
            toc,
        )
    }
}

/// Layers in every format, made once for all tests.
pub(crate) fn all() -> &'static [Blob] {
    static ALL: LazyLock<Vec<Blob>> = LazyLock::new(make);
    &ALL
}

fn make() -> Vec<Blob> {
    const SMALL: u32 = 64 << 10;
    const LONG: u32 = 4 << 20;
    let (many, copying) = (Origin::of(many()), Origin::of(around(copying())));
    let mild = Origin::of(around(mild()));
    let storage = Format::ZstdChunked(Flavour::ContainersStorage);
    let stargz = Format::ZstdChunked(Flavour::Stargz);
    let gz = fs::read(fixture("soci/plain.tar.gz")).unwrap();
    let members = fs::read(fixture("soci/members.tar.gz")).unwrap();
    let long = || Blob {
        is_encoded: |encoding| matches!(encoding, Encoding::WholeMember { .. }),
        ..mild.written("eStargz in long chunks", Format::Estargz, LONG)
    };
    vec![
        many.gzip("gzip"),
        many.plain("tar", many.tar.clone()),
        // Frames that nobody says anything about.
        Blob {
            annotations: BTreeMap::new(),
            table: Table::Own,
            ..many.written("zstd in frames", stargz, SMALL)
        },
        many.written("eStargz", Format::Estargz, SMALL),
        many.written("podman's zstd:chunked", storage, SMALL),
        many.written("stargz's zstd:chunked", stargz, SMALL),
        external(),
        long(),
        soci("SOCI, tar", unpacked(&gz), "soci/tar.ztoc.gz"),
        soci("SOCI, gzip", gz, "soci/plain.ztoc.gz"),
        soci("SOCI, members", members, "soci/members.ztoc.gz"),
        copying.gzip("").signed("gzip by a signed index"),
        mild.gzip("").shaped("gzip, shaped"),
        long().shaped("eStargz in long chunks, shaped"),
    ]
}
