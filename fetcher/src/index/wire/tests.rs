//! The committed bytes, round trips, and damage.

use proptest::prelude::*;

use super::*;

/// Bytes of version 3, committed: a change of the format must not pass unseen.
const GOLDEN: &[u8] = include_bytes!("../../../tests/fixtures/index-v3.bin");

fn entry(path: String, kind: FileKind) -> FileEntry {
    FileEntry {
        path: path.into_bytes(),
        kind,
        mode: 0o4755,
        uid: 1000,
        gid: u32::MAX,
        mtime: Timestamp {
            secs: -1,
            nanos: 999_999_999,
        },
        xattrs: vec![
            (b"user.a".to_vec(), vec![0, 255]),
            (b"user.b".to_vec(), Vec::new()),
        ],
    }
}

/// One file of each kind that has no data.
fn other_files() -> Vec<FileEntry> {
    let kinds = [
        FileKind::Directory,
        FileKind::Symlink {
            target: b"../x".to_vec(),
        },
        FileKind::Hardlink {
            target: b"usr/lib/1".to_vec(),
        },
        FileKind::CharDevice { major: 1, minor: 3 },
        FileKind::BlockDevice { major: 8, minor: 0 },
        FileKind::Fifo,
    ];
    let first = [
        entry(String::new(), FileKind::Directory),
        entry("usr/lib/1".to_owned(), FileKind::Fifo),
    ];
    let numbered = kinds.into_iter().enumerate();
    let others = numbered.map(|(number, kind)| entry(format!("usr/lib/x{number}"), kind));
    first.into_iter().chain(others).collect()
}

/// Some encoding of `format`; of gzip, `in_span` counts the chunks that are in a span.
fn encoding(format: LayerFormat, start: u64, len: u32, in_span: Option<u64>) -> Encoding {
    let blob = ByteRange::at(start, 1 + start % 7).unwrap();
    match (format, in_span) {
        (LayerFormat::Estargz, _) => Encoding::GzipMember { blob, skip: start },
        (LayerFormat::ZstdChunked, _) => Encoding::ZstdFrame { blob, skip: start },
        (LayerFormat::Tar, _) => Encoding::Stored {
            blob: ByteRange::at(start, u64::from(len)).unwrap(),
        },
        (LayerFormat::Gzip, Some(number)) => {
            let span = u32::from(number > 3);
            Encoding::GzipSpan {
                blob: ByteRange::at(u64::from(span) * 50_000, number * 9).unwrap(),
                skip: number * 5000,
                span,
            }
        }
        (LayerFormat::Gzip | LayerFormat::Zstd, _) => Encoding::Stream,
    }
}

/// The two spans of a gzip sample.
fn two_spans() -> Vec<Span> {
    let span = |start, bits, details| Span {
        start,
        bits,
        first_chunk: 0,
        chunk_count: 0,
        details: ByteRange::at(details, 2000).unwrap(),
        details_digest: [7; 32],
    };
    vec![span(0, 0, 0), span(50_000, 3, 2000)]
}

fn sample(format: LayerFormat, sizes: &[u32]) -> LayerIndex {
    let mut tables = Tables::new("layer".to_owned());
    for file in other_files() {
        tables.file(file).unwrap();
    }
    let mut in_span = 0;
    for (number, size) in sizes.iter().enumerate() {
        let kind = FileKind::Regular {
            size: u64::from(*size),
            data_offset: 0,
        };
        tables
            .file(entry(format!("usr/share/{number}"), kind))
            .unwrap();
        // The first files in the first span, then in the second, the rest in none.
        let spanned = format == LayerFormat::Gzip && number * 3 < sizes.len() * 2;
        let mut left = *size;
        while left > 0 {
            let len = left.min(5000);
            in_span += u64::from(spanned);
            let start = u64::from(left) * 31 % 100_000;
            let encoding = encoding(format, start, len, spanned.then_some(in_span));
            let digest = (!spanned).then_some([left.to_le_bytes()[0]; 32]);
            tables.chunk_of_span(encoding, len, digest);
            left -= len;
        }
    }
    let spans = if format == LayerFormat::Gzip {
        two_spans()
    } else {
        Vec::new()
    };
    let blob = LayerBlob {
        digest: Digest::sha256(b"blob"),
        size: 200_000,
        format,
    };
    tables.finish_with(blob, spans).unwrap()
}

/// Of the two spans of a gzip sample.
const DETAILS: [u8; 4000] = [9; 4000];

const FORMATS: [LayerFormat; 5] = [
    LayerFormat::Estargz,
    LayerFormat::Tar,
    LayerFormat::Gzip,
    LayerFormat::Zstd,
    LayerFormat::ZstdChunked,
];

#[test]
fn the_format_is_what_it_was() {
    let index = sample(LayerFormat::Gzip, &[0, 1, 12_000]);
    // What zstd makes of a body may differ from version to version; the body may not.
    let body = |bytes: &[u8]| {
        let header = Header::parse(bytes).unwrap();
        let end = usize::try_from(header.core_end()).unwrap();
        super::body(&header, &bytes[HEADER_LEN..end]).unwrap()
    };
    let made = encode(&index, &DETAILS).unwrap();
    assert_eq!(
        body(&made),
        body(GOLDEN),
        "a new layout needs a new version"
    );
    assert_eq!(decode(GOLDEN).unwrap(), index);
}

#[test]
fn every_cut_and_every_flipped_bit_is_an_error() {
    for cut in 0..GOLDEN.len() {
        assert!(decode(&GOLDEN[..cut]).is_err(), "{cut}");
    }
    // The details behind the core have a digest each, which is looked at when they are read.
    let core_end = Header::parse(GOLDEN).unwrap().core_end();
    for at in 0..usize::try_from(core_end).unwrap() {
        let mut bad = GOLDEN.to_vec();
        bad[at] ^= 4;
        assert!(decode(&bad).is_err(), "{at}");
    }
}

/// What decodes to `body`.
fn sealed(body: &[u8]) -> Vec<u8> {
    let core = codec::Packer::new().unwrap().pack(body).unwrap();
    let crc = crc32fast::hash(&core).to_le_bytes();
    let lens = [core.len(), body.len(), DETAILS.len()];
    let lens: Vec<u8> = lens
        .iter()
        .flat_map(|len| (*len as u64).to_le_bytes())
        .collect();
    [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &crc,
        &lens,
        &core,
        &DETAILS,
    ]
    .concat()
}

fn golden_body() -> Vec<u8> {
    encode_body(&decode(GOLDEN).unwrap())
}

#[test]
fn damage_behind_a_right_checksum_never_panics() {
    let golden = golden_body();
    for at in 0..golden.len() {
        for bit in 0..8 {
            let mut body = golden.clone();
            body[at] ^= 1_u8 << bit;
            if let Ok(index) = decode(&sealed(&body)) {
                assert_eq!(encode_body(&index), body, "one index, one spelling");
            }
        }
    }
}

#[test]
fn says_what_is_wrong() {
    let mut version = GOLDEN.to_vec();
    version[8] = 4;
    let body = golden_body();
    let huge = |at: usize| {
        let mut huge = GOLDEN.to_vec();
        huge[at..at + 8].fill(0xff);
        huge
    };
    let table = [
        (Vec::new(), "does not begin with LAZINDEX"),
        (version, "it has version 4, this build reads 3"),
        (huge(16), "of at most 1073741824"),
        (huge(24), "of at most 1073741824"),
        (huge(32), "of at most 1073741824"),
        ([GOLDEN, b"x"].concat(), "does not have the length it says"),
        (
            sealed(&[&body[..], b"x"].concat()),
            "something follows the last file",
        ),
        (sealed(&body[..body.len() - 1]), "is damaged"),
        (sealed(&[0; 40]), "its description of the blob is damaged"),
        (
            sealed(&[&body[..33], &[1, 3, 0xff, 0xff, 3]].concat()),
            "its spans are damaged",
        ),
    ];
    for (bytes, text) in table {
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
}

#[test]
fn eighty_thousand_files_decode_in_no_time() {
    let sizes: Vec<u32> = (0..80_000).map(|n| n % 3000).collect();
    let mut index = sample(LayerFormat::Estargz, &sizes);
    // As in images: hardly a file has any.
    for file in &mut index.files {
        file.xattrs.clear();
    }
    let bytes = encode(&index, &[]).unwrap();
    let before = processor_time();
    let decoded = decode(&bytes).unwrap();
    let took = processor_time() - before;
    assert_eq!(decoded, index);
    println!("{} bytes, {took:?}", bytes.len());
    // Fifty times what it takes: only catches a change of complexity.
    assert!(took.as_secs() < 2, "{took:?}");
}

/// What this thread has had, however long others kept it from the processor.
fn processor_time() -> std::time::Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields.split(' ').skip(11).take(2);
    let ticks = ticks.map(|ticks| ticks.parse::<u64>().unwrap());
    std::time::Duration::from_millis(10 * ticks.sum::<u64>())
}

proptest! {
    #[test]
    fn any_index_comes_back(sizes in proptest::collection::vec(0_u32..20_000, 0..20), format in 0..FORMATS.len()) {
        let index = sample(FORMATS[format], &sizes);
        let details: &[u8] = if index.spans.is_empty() { &[] } else { &DETAILS };
        prop_assert_eq!(decode(&encode(&index, details).unwrap()).unwrap(), index);
    }
}
