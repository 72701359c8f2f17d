//! zTOCs that are right, and zTOCs that lie about one thing each.

mod model;

use proptest::prelude::*;

use self::model::{File, Model, checkpoint, checkpoints};
use super::*;
use crate::codec::deflate::MemberCompressor;
use crate::codec::stream::{Compression, Decoder, Stop};
use crate::codec::whole::{SpanEncoding, WholeSpan};
use crate::codec::{unpack, verify};
use crate::index::details::SpanDetails;
use crate::index::{Encoding, FileKind, wire};
use crate::types::{ByteRange, Reference};

const TAR_ZTOC: &[u8] = include_bytes!("../../../tests/fixtures/soci/tar.ztoc.gz");
const BLOB_SIZE: u64 = 10_000;

fn blob(size: u64) -> BlobRef {
    let reference = Reference::parse("example.com/a:b").unwrap();
    BlobRef {
        repository: reference.repository().clone(),
        digest: Digest::sha256(b"blob"),
        size,
    }
}

fn parse_bytes(size: u64, ztoc: &[u8]) -> Result<Ztoc> {
    let ztoc = verify(String::new, &Digest::sha256(ztoc), ztoc.to_vec());
    parse(&blob(size), &ztoc.unwrap())
}

fn parse_model(model: &Model) -> Result<Ztoc> {
    parse_bytes(BLOB_SIZE, &model.encode())
}

/// A gzip layer of two spans, the second of which begins inside a byte.
fn base() -> Model {
    Model {
        blob_size: 10_000,
        tar_len: 100_000,
        algorithm: Some(1),
        span_id_max: 1,
        digests: vec![
            Digest::sha256(b"0").to_string(),
            Digest::sha256(b"1").to_string(),
        ],
        checkpoints: checkpoints(
            2,
            &[checkpoint(10, 0, 0, 0), checkpoint(4000, 40_960, 3, 7)],
        ),
        files: vec![
            File::new("d/", "dir", 512, 0),
            File::new("./d/a", "reg", 1024, 50_000),
            File::new("/b", "reg", 51_712, 100),
            File::new("e", "reg", 52_736, 0),
        ],
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

#[test]
fn payloads_are_cut_where_spans_end() {
    let ztoc = parse_model(&base()).unwrap();
    let index = &ztoc.index;
    let paths: Vec<_> = index.files.iter().map(|file| &file.path[..]).collect();
    assert_eq!(paths, [&b"d"[..], b"d/a", b"b", b"e"]);
    let (first, second) = (range(10, 4000), range(3999, 10_000));
    let expected = [
        (first, 1024, 39_936, 0),
        (second, 0, 10_064, 1),
        (second, 10_752, 100, 1),
    ];
    let chunks: Vec<_> = index
        .chunks
        .iter()
        .map(|chunk| match chunk.encoding {
            Encoding::WholeSpan { blob, skip, span } => (blob, skip, chunk.len, span),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(chunks, expected);
    assert_eq!((index.spans[0].bits, index.spans[1].bits), (0, 3));
    let details = |number: usize| {
        let span = &index.spans[number];
        let at = |at: u64| usize::try_from(at).unwrap();
        let bytes = ztoc
            .details
            .slice(at(span.details.start())..at(span.details.end()));
        assert_eq!(index.digests_of(span), 1);
        SpanDetails::parse(span, 1, bytes).unwrap()
    };
    assert!(details(0).window.is_empty(), "nothing is before the first");
    assert_eq!(details(1).window, vec![7; 32 << 10]);
    assert_eq!(
        details(1).digest(0).unwrap(),
        *Digest::sha256(b"1").as_bytes()
    );
    let bytes = wire::encode(index, &ztoc.details).unwrap();
    assert_eq!(wire::decode(&bytes).unwrap(), *index);
}

#[test]
fn the_first_layout_begins_behind_the_shortest_header() {
    let mut model = base();
    model.checkpoints = checkpoints(2, &[checkpoint(4000, 40_960, 3, 7)]);
    assert_eq!(parse_model(&model).unwrap(), parse_model(&base()).unwrap());
    (model.span_id_max, model.checkpoints) = (0, checkpoints(1, &[]));
    model.digests.truncate(1);
    let ztoc = parse_model(&model).unwrap();
    assert_eq!(
        ztoc.index.chunks[0].encoding.blob(),
        Some(range(10, 10_000))
    );
    model.algorithm = None;
    assert_eq!(
        parse_model(&model).unwrap(),
        ztoc,
        "gzip is what is not said"
    );
}

#[test]
fn files_of_every_kind_keep_their_facts() {
    let mut model = base();
    let more = [
        ("l", "symlink", "../x"),
        ("h", "hardlink", "/d/a"),
        ("c", "char", ""),
        ("k", "block", ""),
        ("p", "fifo", ""),
        (".wh.gone", "reg", ""),
        (".prefetch.landmark", "reg", ""),
    ];
    for (number, (name, kind, link)) in (0..).zip(more) {
        let mut file = File::new(name, kind, 53_248 + number * 512, 0);
        file.link = link.into();
        (file.major, file.minor) = (5, 1);
        file.records = vec![
            ("SCHILY.xattr.user.a".into(), b"1".to_vec()),
            (
                "mtime".into(),
                b"what it says is in its place already".to_vec(),
            ),
        ];
        model.files.push(file);
    }
    let index = parse_model(&model).unwrap().index;
    assert_eq!(
        index.files.len(),
        model.files.len() - 1,
        "but the format's own"
    );
    let file = |path: &[u8]| index.files.iter().find(|file| file.path == path).unwrap();
    let expected = [
        (
            &b"l"[..],
            FileKind::Symlink {
                target: b"../x".to_vec(),
            },
        ),
        (
            b"h",
            FileKind::Hardlink {
                target: b"d/a".to_vec(),
            },
        ),
        (b"c", FileKind::CharDevice { major: 5, minor: 1 }),
        (b"k", FileKind::BlockDevice { major: 5, minor: 1 }),
        (b"p", FileKind::Fifo),
    ];
    for (path, kind) in expected {
        let file = file(path);
        assert_eq!(file.kind, kind);
        assert_eq!(file.xattrs, [(b"user.a".to_vec(), b"1".to_vec())]);
        assert_eq!((file.mode, file.uid, file.gid), (0o755, 7, 70_000));
        assert_eq!((file.mtime.secs, file.mtime.nanos), (1_700_000_000, 5));
    }
}

type Lie = (&'static str, fn(&mut Model), &'static str);

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn a_lie_about_one_thing_is_an_error_that_names_it() {
    let table: [Lie; 32] = [
        (
            "blob",
            |m| m.blob_size = 9999,
            "of a blob of 9999 bytes, not of 10000",
        ),
        ("blob", |m| m.blob_size = -1, "of -1 bytes"),
        ("tar", |m| m.tar_len = -1, "of -1 bytes"),
        ("tar", |m| m.tar_len = 51_000, "pass its end at 51000"),
        ("algorithm", |m| m.algorithm = Some(3), "unknown kind 3"),
        (
            "last span",
            |m| m.span_id_max = 2,
            "last span is 2, with 2 digests",
        ),
        ("last span", |m| m.span_id_max = i32::MAX, "with 2 digests"),
        ("last span", |m| m.span_id_max = i32::MIN, "with 2 digests"),
        ("digests", |m| m.digests.clear(), "with 0 digests"),
        (
            "digest",
            |m| m.digests[1] = "sha256:00".into(),
            "digest of span 1",
        ),
        (
            "digest",
            |m| m.digests[1] = "x".repeat(1 << 20),
            "digest of span 1",
        ),
        (
            "digest",
            |m| m.digests[0] = Digest::of(crate::types::Algorithm::Sha512, b"").to_string(),
            "not sha256",
        ),
        ("count", |m| m.checkpoints[0] = 4, "the length they say"),
        ("count", |m| m.checkpoints[0] = 1, "the length they say"),
        ("count", |m| m.checkpoints[3] = 0x7f, "the length they say"),
        (
            "count",
            |m| m.checkpoints[..4].fill(0xff),
            "the length they say",
        ),
        (
            "count",
            |m| m.checkpoints[0] = 3,
            "3 checkpoints, but 2 spans",
        ),
        ("cut", |m| m.checkpoints.truncate(11), "cut off"),
        (
            "cut",
            |m| m.checkpoints.truncate(65_581),
            "the length they say",
        ),
        (
            "first",
            |m| m.place(0, 10, 1),
            "not at the start of the tar",
        ),
        (
            "in",
            |m| m.place(1, 10, 40_960),
            "checkpoint 0 does not ascend",
        ),
        (
            "in",
            |m| m.place(1, 10_000, 40_960),
            "checkpoint 1 does not ascend",
        ),
        (
            "in",
            |m| m.place(1, u64::MAX, 40_960),
            "checkpoint 0 does not ascend",
        ),
        (
            "out",
            |m| m.place(1, 4000, 0),
            "span 0 of 3990 bytes decodes to 0",
        ),
        (
            "out",
            |m| m.place(1, 4000, 1 << 40),
            "decodes to 1099511627776",
        ),
        (
            "bits",
            |m| m.checkpoints[12 + 16] = 8,
            "checkpoint 0 does not ascend",
        ),
        (
            "overlap",
            |m| m.files[2].offset = 51_200,
            "overlap what is before",
        ),
        (
            "overlap",
            |m| m.files[2].offset = 512,
            "overlap what is before",
        ),
        ("order", |m| m.files.swap(1, 2), "overlap what is before"),
        (
            "place",
            |m| m.files[2].offset = 51_713,
            "at 51713 of the tar",
        ),
        ("place", |m| m.files[2].offset = i64::MIN, "of the tar"),
        ("size", |m| m.files[2].size = i64::MAX, "pass its end"),
    ];
    for (what, lie, says) in table {
        let mut model = base();
        lie(&mut model);
        let error = parse_model(&model).unwrap_err().to_string();
        assert!(error.contains(says), "{what}: {error}");
    }
}

#[test]
fn facts_of_a_file_that_make_no_sense_are_named() {
    let table: [Lie; 16] = [
        ("name", |m| m.files[1].name = "../a".into(), "'..'"),
        ("name", |m| m.files[1].name = "a\0b".into(), "NUL"),
        ("name", |m| m.files[1].name = "n".repeat(5000), "4095"),
        (
            "kind",
            |m| m.files[1].kind = "regular".into(),
            "its type is",
        ),
        (
            "kind",
            |m| m.files[1].kind = "x".repeat(100),
            "its type makes no sense",
        ),
        ("size", |m| m.files[1].size = -1, "its size is -1"),
        ("mode", |m| m.files[1].mode = -1, "its mode is -1"),
        ("time", |m| m.files[1].mtime = "now".into(), "RFC 3339"),
        (
            "time",
            |m| m.files[1].mtime = "0".repeat(100),
            "modtime makes no sense",
        ),
        (
            "device",
            |m| (m.files[3].kind, m.files[3].major) = ("char".into(), -1),
            "devMajor is -1",
        ),
        (
            "link",
            |m| m.files[3].kind = "symlink".into(),
            "link target is empty",
        ),
        (
            "link",
            |m| (m.files[3].kind, m.files[3].link) = ("hardlink".into(), "no".into()),
            "not in this layer",
        ),
        (
            "root",
            |m| m.files[3].name = "/".into(),
            "can only be a directory",
        ),
        (
            "xattr",
            |m| m.files[3].records = vec![("SCHILY.xattr.".into(), Vec::new())],
            "name of its xattr",
        ),
        (
            "xattr",
            |m| m.files[3].records = vec![("SCHILY.xattr.a".into(), vec![0; 90_000])],
            "PAX record 0 is too long",
        ),
        (
            "xattr",
            |m| m.files[3].records = vec![("SCHILY.xattr.a".into(), vec![0; 65_537])],
            "longer than 65536",
        ),
    ];
    for (what, lie, says) in table {
        let mut model = base();
        lie(&mut model);
        let error = parse_model(&model).unwrap_err().to_string();
        assert!(error.contains(says), "{what}: {error}");
    }
}

#[test]
fn what_would_be_dear_to_read_is_left_to_streaming() {
    let sparse: fn(&mut Model) = |m| {
        m.files[3].records = vec![("GNU.sparse.major".into(), b"1".to_vec())];
    };
    // A bomb: a span that decodes to far more than is decoded for one file.
    let bomb: fn(&mut Model) = |m| {
        m.tar_len = 1 << 40;
        (m.files[3].offset, m.files[3].size) = (52_736, 1 << 39);
    };
    for (lie, says) in [(sparse, "sparse"), (bomb, "span is too long")] {
        let mut model = base();
        lie(&mut model);
        let error = parse_model(&model).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let mut model = base();
    model.blob_size = 1 << 40;
    let error = parse_bytes(1 << 40, &model.encode()).unwrap_err();
    assert!(error.to_string().contains("span is too long"), "{error}");
}

#[test]
fn a_ztoc_whose_parts_share_bytes_is_read_no_longer_than_its_own() {
    // One vector of records, in all files.
    let mut model = base();
    let records = vec![("comment".to_owned(), b"again".to_vec()); 20_000];
    for number in 0..500 {
        let file = File::new(&format!("f{number}"), "reg", 53_248 + number * 512, 0);
        model.files.push(file);
    }
    model.tar_len = 1 << 20;
    let ztoc = model.encode_sharing(&records);
    let error = parse_bytes(BLOB_SIZE, &ztoc).unwrap_err().to_string();
    assert!(error.contains("its records overlap others"), "{error}");
}

#[test]
fn spans_of_a_tar_are_of_one_length() {
    let good = unpacked(TAR_ZTOC);
    // Its size is told by the error for another one.
    let error = parse_bytes(1, &good).unwrap_err().to_string();
    let size = error.rsplit("of a blob of ").next().unwrap();
    let size: u64 = size.split(' ').next().unwrap().parse().unwrap();
    let ztoc = parse_bytes(size, &good).unwrap();
    assert_eq!(ztoc.index.format, LayerFormat::Tar);
    for (number, span) in ztoc.index.spans.iter().enumerate() {
        assert_eq!((span.start % (32 << 10), span.bits), (0, 0), "{number}");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        if let Ok(ztoc) = parse_bytes(size, &bad) {
            let bytes = wire::encode(&ztoc.index, &ztoc.details).unwrap();
            assert_eq!(wire::decode(&bytes).unwrap(), ztoc.index);
        }
        assert!(
            at % 64 != 0 || parse_bytes(size, &good[..at]).is_err(),
            "{at}"
        );
    }
    let mut model = base();
    (model.algorithm, model.tar_len) = (Some(2), 10_000);
    model.files.truncate(1);
    let table = [
        ((5000, 10_000), None),
        ((9999, 10_000), None),
        ((0, 10_000), Some("spans are of 0 bytes")),
        ((-5000, 10_000), Some("spans are of -5000 bytes")),
        ((5000, 9999), Some("in 9999 of 10000")),
        ((4999, 10_000), Some("2 spans of 4999 bytes")),
        ((10_000, 10_000), Some("2 spans of 10000 bytes")),
        ((i64::MAX, 10_000), Some("2 spans of")),
    ];
    for ((span, size), says) in table {
        model.checkpoints = model::tar_zinfo(span, size);
        match (parse_model(&model), says) {
            (Ok(_), None) => {}
            (Err(error), Some(says)) => assert!(error.to_string().contains(says), "{error}"),
            (outcome, says) => panic!("{span}: {outcome:?}, {says:?}"),
        }
    }
}

fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut decoder = unpack::decoder(std::io::Cursor::new(packed.to_vec())).unwrap();
    std::io::Read::read_to_end(&mut decoder, &mut bytes).unwrap();
    bytes
}

/// Every place where `blob` can be entered: in the blob, in the tar, bits, window.
fn places(blob: &[u8]) -> Vec<(u64, u64, u8, Vec<u8>)> {
    let mut decoder = Decoder::new(Compression::Gzip, u64::MAX).unwrap();
    let (mut encoded, mut decoded, mut found) = (0, 0, Vec::new());
    let pushed = decoder.push(blob, &mut |run| {
        encoded += run.encoded.len() as u64;
        decoded += run.decoded.len() as u64;
        if let Stop::Block(end) = &run.stop {
            let known = end.window();
            let mut window = vec![0; (32 << 10) - known.len()];
            window.extend(known);
            found.push((encoded, decoded, end.bits, window));
        }
        Ok(())
    });
    pushed.unwrap();
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_chunk_of_a_true_ztoc_is_what_the_tar_has(
        seed in any::<u32>(),
        cuts in prop::collection::vec(1_usize..200_000, 0..4),
        sizes in prop::collection::vec(0_u64..90_000, 1..12),
        keep in any::<u16>(),
    ) {
        let tar_len: u64 = sizes.iter().map(|size| 512 + size.next_multiple_of(512)).sum();
        let tar: Vec<u8> = (0..usize::try_from(tar_len).unwrap())
            .map(|at| u32::try_from(at / 3).unwrap().wrapping_mul(seed | 1).to_le_bytes()[3] & 15)
            .collect();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < tar.len()).collect();
        cuts.extend([0, tar.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut gzip = MemberCompressor::new(6);
        let blob: Vec<u8> = cuts
            .windows(2)
            .flat_map(|pair| gzip.compress(&tar[pair[0]..pair[1]]))
            .collect();
        let mut kept = Vec::<(u64, u64, u8, Vec<u8>)>::new();
        for (number, place) in places(&blob).into_iter().enumerate() {
            if number == 0 || keep >> (number % 16) & 1 == 1 && place.1 > kept[kept.len() - 1].1 {
                kept.push(place);
            }
        }
        let mut model = Model {
            blob_size: i64::try_from(blob.len()).unwrap(),
            tar_len: i64::try_from(tar_len).unwrap(),
            span_id_max: i32::try_from(kept.len()).unwrap() - 1,
            files: Vec::new(),
            digests: Vec::new(),
            ..base()
        };
        let mut packed = Vec::new();
        for (number, (at, out, bits, window)) in kept.iter().enumerate() {
            let end = kept.get(number + 1).map_or(blob.len() as u64, |next| next.0);
            let start = at - u64::from(*bits > 0);
            let slice = |at: u64| usize::try_from(at).unwrap();
            model.digests.push(Digest::sha256(&blob[slice(start)..slice(end)]).to_string());
            let mut place = checkpoint(*at, *out, *bits, 0);
            place[17..].copy_from_slice(window);
            packed.push(place);
        }
        model.checkpoints = checkpoints(i32::try_from(kept.len()).unwrap(), &packed);
        let mut at = 0;
        for (number, size) in sizes.iter().enumerate() {
            let offset = i64::try_from(at + 512).unwrap();
            let size_i64 = i64::try_from(*size).unwrap();
            model.files.push(File::new(&format!("f{number}"), "reg", offset, size_i64));
            at += 512 + size.next_multiple_of(512);
        }
        let ztoc = parse_bytes(blob.len() as u64, &model.encode()).unwrap();
        assert_decodes(&ztoc, &blob, &tar, &sizes);
    }
}

/// Every chunk, of its span alone, is what `tar` has in its place.
fn assert_decodes(ztoc: &Ztoc, blob: &[u8], tar: &[u8], sizes: &[u64]) {
    let at = |at: u64| usize::try_from(at).unwrap();
    let mut decoded = Vec::new();
    for chunk in &ztoc.index.chunks {
        let Encoding::WholeSpan {
            blob: range,
            skip,
            span,
        } = chunk.encoding
        else {
            panic!("{:?}", chunk.encoding);
        };
        let span = &ztoc.index.spans[span as usize];
        let details = ztoc
            .details
            .slice(at(span.details.start())..at(span.details.end()));
        let details = SpanDetails::parse(span, 1, details).unwrap();
        let encoding = SpanEncoding::Gzip {
            bits: span.bits,
            window: &details.window,
        };
        let encoded = &blob[at(range.start())..at(range.end())];
        let digest = details.digest(0).unwrap();
        let mut whole = WholeSpan::verified(String::new, &digest, encoded, encoding).unwrap();
        decoded.extend_from_slice(&whole.take(skip, chunk.len).unwrap());
    }
    let (mut expected, mut start) = (Vec::new(), 0);
    for size in sizes {
        expected.extend_from_slice(&tar[at(start + 512)..at(start + 512 + size)]);
        start += 512 + size.next_multiple_of(512);
    }
    assert!(decoded == expected);
}
