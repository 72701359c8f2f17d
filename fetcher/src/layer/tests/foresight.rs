//! What a miss brings of a file, of its directory and of a program.

use std::io::Write as _;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::support::{Sample, TestSource, gzip, join, range};
use crate::index::{Chunk, Encoding, LayerFormat, LayerIndex};
use crate::layer::foresight::{ask_together, follow};
use crate::layer::{Layer, LayerConfig, Needs, Priority};
use crate::store::Store;
use crate::test_util::layers::regular_file;
use crate::types::{ByteRange, Digest};

const CHUNK: usize = 64 << 10;

struct Bed {
    layer: Arc<Layer>,
    source: Arc<TestSource>,
    sample: Sample,
    /// Its path, which goes with it.
    _dir: tempfile::TempDir,
}

/// A layer of these files, in chunks that can be fetched alone. Nothing comes along.
fn bed(files: &[(&str, Vec<u8>)]) -> Bed {
    let (mut blob, mut data, mut chunks, mut entries) = (vec![], vec![], vec![], vec![]);
    for (path, bytes) in files {
        data.resize(data.len().next_multiple_of(4096), 0);
        entries.push(regular_file(path, bytes.len() as u64, data.len() as u64));
        for piece in bytes.chunks(CHUNK) {
            let encoded = gzip(piece);
            let place = range(blob.len() as u64, encoded.len() as u64);
            blob.extend(encoded);
            chunks.push(Chunk {
                encoding: Encoding::GzipMember {
                    blob: place,
                    skip: 0,
                },
                data_offset: data.len() as u64,
                len: u32::try_from(piece.len()).unwrap(),
                chunk_digest: Digest::sha256(piece).as_bytes().try_into().ok(),
            });
            data.extend_from_slice(piece);
        }
    }
    let index = LayerIndex {
        blob_digest: Digest::sha256(&blob),
        blob_size: blob.len() as u64,
        format: LayerFormat::Estargz,
        files: entries,
        chunks,
        spans: Vec::new(),
        data_len: data.len() as u64,
    };
    let sample = Sample { index, blob, data };
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let source = TestSource::new(sample.blob.clone());
    let config = LayerConfig {
        read_ahead_encoded_bytes_max: 0,
        ..LayerConfig::default()
    };
    let layer = join(&store, &sample, &source, config);
    layer.set_foresight(true);
    Bed {
        layer,
        source,
        sample,
        _dir: dir,
    }
}

impl Bed {
    /// Somebody waits for the byte at `offset` of file `number`, and all that follows.
    async fn miss(&self, number: usize, offset: u64) {
        self.follow(number, offset, true).await;
    }

    async fn follow(&self, number: usize, offset: u64, waited: bool) {
        let at = self.place(number, offset, 1);
        follow(&self.layer.shared, at.start(), waited)
            .await
            .unwrap();
        self.all_came().await;
    }

    async fn all_came(&self) {
        while !self.layer.shared.inflight.is_empty() {
            tokio::task::yield_now().await;
        }
    }

    fn place(&self, number: usize, offset: u64, len: u64) -> ByteRange {
        let crate::index::FileKind::Regular { data_offset, .. } =
            self.sample.index.files[number].kind
        else {
            unreachable!("all are regular")
        };
        range(data_offset + offset, len)
    }

    fn has(&self, number: usize, offset: u64, len: u64) -> bool {
        let place = self.place(number, offset, len);
        self.layer.file().missing(place).is_empty()
    }

    fn has_file(&self, number: usize) -> bool {
        let crate::index::FileKind::Regular { size, .. } = self.sample.index.files[number].kind
        else {
            unreachable!("all are regular")
        };
        self.has(number, 0, size)
    }
}

/// Bytes that hardly shrink.
fn noise(len: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(len as u64);
    (0..len).map(|_| rng.random()).collect()
}

const MIB: u64 = 1 << 20;
const TABLES: u64 = 256 << 10;
const DATA: u64 = 5 * MIB;
const STRINGS: u64 = 0x2000;

/// A library of six megabytes: tables, code from [`TABLES`] to [`DATA`], and what is
/// written to from there on, with the table of what it needs in front.
fn library() -> Vec<u8> {
    let mut file = noise(usize::try_from(6 * MIB).unwrap());
    let mut put = |at: u64, fields: &[(u64, usize)]| {
        let mut out = &mut file[usize::try_from(at).unwrap()..];
        for (value, len) in fields {
            out.write_all(&value.to_le_bytes()[..*len]).unwrap();
        }
    };
    put(0, &[(0x0001_0102_464c_457f, 8), (0, 8)]);
    let tail = [
        (3, 2),
        (62, 2),
        (1, 4),
        (0, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
    ];
    put(16, &tail);
    put(54, &[(56, 2), (4, 2), (0, 2), (0, 2), (0, 2)]);
    // Type, flags, offset, address twice, length in the file and in memory, alignment.
    let segments = [
        (1, 4, 0, TABLES),
        (1, 5, TABLES, DATA - TABLES),
        (1, 6, DATA, MIB),
        (2, 6, DATA, 64),
    ];
    for (number, (kind, flags, start, len)) in (0_u64..).zip(segments) {
        let fields = [
            (kind, 4),
            (flags, 4),
            (start, 8),
            (start, 8),
            (start, 8),
            (len, 8),
        ];
        put(64 + 56 * number, &fields);
        put(64 + 56 * number + 40, &[(len, 8), (4096, 8)]);
    }
    // DT_STRTAB, two DT_NEEDED and DT_RUNPATH.
    let dynamic = [(5, STRINGS), (1, 1), (1, 6), (29, 11)];
    for (number, (tag, value)) in (0_u64..).zip(dynamic) {
        put(DATA + 16 * number, &[(tag, 8), (value, 8)]);
    }
    let strings = b"\0ab.c\0de.f\0$ORIGIN/x:/y\0";
    let at = usize::try_from(STRINGS).unwrap();
    file[at..at + strings.len()].copy_from_slice(strings);
    file
}

#[tokio::test]
async fn a_small_file_comes_whole_and_a_large_one_does_not() {
    let bed = bed(&[("a/small", noise(200_000)), ("b/large", noise(3_000_000))]);
    bed.miss(0, 0).await;
    assert!(bed.has_file(0));
    bed.miss(1, 0).await;
    assert!(bed.has(1, 0, 4096) && !bed.has(1, 1 << 20, 1));
}

#[tokio::test]
async fn who_waits_again_in_a_directory_gets_the_rest_of_it() {
    let files: Vec<(String, Vec<u8>)> = (0..8)
        .map(|n| match n {
            0..6 => (format!("d/e/f{n}"), noise(70_000 + n)),
            _ => (format!("x/f{n}"), noise(2_000_000 + n)),
        })
        .collect();
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(p, b)| (p.as_str(), b.clone())).collect();
    let bed = bed(&files);
    let has = || (0..8).filter(|n| bed.has_file(*n)).collect::<Vec<_>>();
    bed.miss(0, 0).await;
    assert_eq!(has(), [0]);
    bed.miss(7, 0).await;
    assert_eq!(has(), [0], "that is elsewhere, and all of both is too much");
    bed.miss(3, 0).await;
    assert_eq!(has(), [0, 1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn what_linking_reads_of_a_program_comes_and_its_code_does_not() {
    let bed = bed(&[("lib/a.so", library())]);
    bed.miss(0, 0).await;
    assert!(bed.has(0, 0, TABLES), "tables");
    assert!(bed.has(0, DATA, MIB), "data");
    assert!(!bed.has(0, TABLES, 1) && !bed.has(0, DATA - 1, 1), "code");
}

#[tokio::test]
async fn what_a_program_needs_is_told() {
    let bed = bed(&[("lib/a.so", library())]);
    let told: Arc<Mutex<Vec<Needs>>> = Arc::default();
    let list = Arc::clone(&told);
    bed.layer
        .on_needs(Some(Arc::new(move |needs| list.lock().push(needs))));
    bed.follow(0, 0, false).await;
    bed.miss(0, 4096).await;
    let needs = Needs {
        path: b"lib/a.so".to_vec(),
        programs: Vec::new(),
        libraries: vec![b"ab.c".to_vec(), b"de.f".to_vec()],
        search: vec![b"$ORIGIN/x".to_vec(), b"/y".to_vec()],
    };
    assert_eq!(*told.lock(), [needs], "once");
}

#[tokio::test]
async fn files_that_are_expected_together_are_asked_for_at_once() {
    let files = [
        ("a", noise(3000)),
        ("b", noise(5000)),
        ("c", noise(3_000_000)),
    ];
    let bed = bed(&files);
    let offsets = [0, 1, 2].map(|number| bed.place(number, 0, 1).start());
    ask_together(&bed.layer.shared, &offsets, Priority::Profile).await;
    bed.all_came().await;
    assert!(bed.has_file(0) && bed.has_file(1));
    assert!(bed.has(2, 0, 4096) && !bed.has(2, MIB, 1), "its head alone");
    assert_eq!(bed.source.asked.lock().len(), 1);
    for number in [0, 1, 2] {
        bed.follow(number, 0, false).await;
    }
    assert_eq!(bed.source.asked.lock().len(), 1, "all that was needed came");
}

#[tokio::test]
async fn what_runs_a_script_is_told() {
    let script = b"#!/usr/bin/env python3\nprint(1)\n".to_vec();
    let bed = bed(&[("app/run", script), ("app/text", b"# no\n".to_vec())]);
    let told: Arc<Mutex<Vec<Needs>>> = Arc::default();
    let list = Arc::clone(&told);
    bed.layer
        .on_needs(Some(Arc::new(move |needs| list.lock().push(needs))));
    bed.miss(1, 0).await;
    bed.follow(0, 0, false).await;
    let needs = Needs {
        path: b"app/run".to_vec(),
        programs: vec![b"/usr/bin/env".to_vec(), b"python3".to_vec()],
        libraries: Vec::new(),
        search: Vec::new(),
    };
    assert_eq!(*told.lock(), [needs]);
}

/// What it says of itself leads out of the file, or nowhere.
#[tokio::test]
async fn a_program_that_lies_is_only_a_file() {
    for (at, value) in [
        (32_usize, u64::MAX),
        (32, 5 * MIB),
        (64 + 8, u64::MAX),
        (64 + 56 + 32, u64::MAX),
        (64 + 2 * 56 + 32, u64::MAX),
        (64 + 3 * 56 + 8, 6 * MIB),
    ] {
        let mut file = library();
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let bed = bed(&[("lib/a.so", file)]);
        bed.layer.on_needs(Some(Arc::new(|_| {})));
        bed.miss(0, 0).await;
        assert!(bed.has(0, 0, 4096), "{at} {value:#x}");
    }
}

#[tokio::test]
async fn a_read_that_waits_is_followed_unless_that_is_off() {
    for on in [true, false] {
        let bed = bed(&[("lib/a.so", library())]);
        bed.layer.set_foresight(on);
        bed.layer.fill(bed.place(0, 0, 1)).await.unwrap();
        let came = async {
            while !bed.has(0, DATA, MIB) {
                tokio::task::yield_now().await;
            }
        };
        if on {
            came.await;
        } else {
            assert!(!bed.has(0, DATA, 1));
        }
    }
}
