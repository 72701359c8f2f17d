//! Tests of the writer: what comes out is read back with nothing but gunzip and JSON.

use std::io::Cursor;

use proptest::prelude::*;
use serde_json::Value;

use super::entry::{BLOCK, plain_header};
use super::*;
use crate::codec::unpack::decoder;

mod order;
mod round_trip;
mod zstd_chunked;

/// One entry of a test tar.
#[derive(Debug, Clone)]
struct Item {
    flag: u8,
    name: String,
    link: String,
    bytes: Vec<u8>,
}

fn item(flag: u8, name: &str, link: &str, bytes: &[u8]) -> Item {
    Item {
        flag,
        name: name.to_owned(),
        link: link.to_owned(),
        bytes: bytes.to_vec(),
    }
}

fn file(name: &str, bytes: &[u8]) -> Item {
    item(b'0', name, "", bytes)
}

fn dir(name: &str) -> Item {
    item(b'5', name, "", b"")
}

fn hard(name: &str, target: &str) -> Item {
    item(b'1', name, target, b"")
}

fn encode(item: &Item) -> Vec<u8> {
    let mut block = plain_header(&item.name, item.bytes.len() as u64);
    block[156] = item.flag;
    block[157..157 + item.link.len()].copy_from_slice(item.link.as_bytes());
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = block.to_vec();
    out.extend_from_slice(&item.bytes);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn tarball(items: &[Item]) -> Vec<u8> {
    let mut tar: Vec<u8> = items.iter().flat_map(encode).collect();
    tar.resize(tar.len() + 2 * BLOCK, 0);
    tar
}

fn options(chunk_bytes: u32, workers: usize) -> Options {
    Options {
        chunk_bytes,
        workers,
        ..Options::default()
    }
}

fn convert(tar: &[u8], options: &Options) -> Result<(Vec<u8>, Written)> {
    let mut blob = Vec::new();
    let written = write_layer("test layer", &mut Cursor::new(tar), &mut blob, options)?;
    Ok((blob, written))
}

/// As the layer of an image for which these paths are hot.
fn convert_hot(tar: &[u8], hot: &[&str], options: &Options) -> Result<(Vec<u8>, Written)> {
    let mut input = Cursor::new(tar);
    let survey = Survey::take("test layer", &mut input)?;
    let hot = HotFiles::whole(hot.iter().map(|path| (*path).to_owned()));
    let hot = &resolve(&[&survey], &hot).layers[0];
    let mut blob = Vec::new();
    let ends = (&mut input, &mut blob);
    let written = write_surveyed("test layer", &survey, Some(hot), ends, options)?;
    Ok((blob, written))
}

fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    decoder(blob).unwrap().read_to_end(&mut out).unwrap();
    out
}

/// Reads `len` bytes of what the members from `offset` on decompress to.
fn gunzip_at(blob: &[u8], offset: u64, len: u64) -> Vec<u8> {
    let start = usize::try_from(offset).unwrap();
    let mut out = Vec::new();
    let mut taken = decoder(&blob[start..]).unwrap().take(len);
    taken.read_to_end(&mut out).unwrap();
    out
}

/// TOC entries, found through the footer.
fn toc(blob: &[u8], written: &Written) -> Vec<Value> {
    let footer = &blob[blob.len() - 51..];
    let offset = std::str::from_utf8(&footer[16..32]).unwrap();
    let offset = u64::from_str_radix(offset, 16).unwrap();
    let tail = gunzip_at(blob, offset, 1 << 30);
    assert_eq!(tail[..512], plain_header(TOC_NAME, written.toc_size)[..]);
    let json = &tail[512..][..usize::try_from(written.toc_size).unwrap()];
    assert_eq!(Some(Digest::sha256(json)), written.toc_digest);
    let toc: Value = serde_json::from_slice(json).unwrap();
    assert_eq!(toc["version"], 1);
    toc["entries"].as_array().unwrap().clone()
}

fn names(entries: &[Value]) -> Vec<&str> {
    let firsts = entries.iter().filter(|entry| entry["type"] != "chunk");
    firsts
        .map(|entry| entry["name"].as_str().unwrap())
        .collect()
}

/// Checks digests and sizes of everything, and that every chunk can be read alone.
fn check(blob: &[u8], written: &Written, chunk_bytes: u64) {
    assert_eq!(written.blob_digest, Digest::sha256(blob));
    assert_eq!(written.blob_size, blob.len() as u64);
    let plain = gunzip(blob);
    assert_eq!(written.diff_id, Digest::sha256(&plain));
    assert_eq!(written.uncompressed_size, plain.len() as u64);
    let entries = toc(blob, written);
    let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or(0);
    for (at, regular) in entries.iter().enumerate() {
        if regular["type"] != "reg" {
            continue;
        }
        let chunks = entries[at + 1..]
            .iter()
            .take_while(|e| e["type"] == "chunk");
        let mut whole = Vec::new();
        for chunk in std::iter::once(regular).chain(chunks) {
            assert_eq!(chunk["name"], regular["name"]);
            assert_eq!(number(chunk, "chunkOffset"), whole.len() as u64);
            let len = match number(chunk, "chunkSize") {
                0 => number(regular, "size") - whole.len() as u64,
                len => len,
            };
            assert!(len <= chunk_bytes);
            if len == 0 {
                continue;
            }
            let offset = number(chunk, "offset");
            let start = usize::try_from(offset).unwrap();
            assert_eq!(
                blob[start..start + 2],
                [0x1f, 0x8b],
                "no member starts at {offset}"
            );
            let bytes = gunzip_at(blob, offset, len);
            assert_eq!(chunk["chunkDigest"], Digest::sha256(&bytes).to_string());
            whole.extend(bytes);
        }
        assert_eq!(number(regular, "size"), whole.len() as u64);
        assert_eq!(regular["digest"], Digest::sha256(&whole).to_string());
    }
}

fn no_landmark() -> Item {
    file(NO_PREFETCH_LANDMARK, b"\x0f")
}

#[test]
fn headers_and_order_are_kept() {
    let big: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
    let items = [
        dir("./"),
        dir("./usr/"),
        file("./usr/big", &big),
        file("./usr/empty", b""),
        hard("./usr/link", "./usr/big"),
        item(b'2', "./bin", "usr/bin", b""),
        item(b'6', "./pipe", "", b""),
    ];
    let (blob, written) = convert(&tarball(&items), &options(4096, 2)).unwrap();
    check(&blob, &written, 4096);
    let plain = gunzip(&blob);
    // All headers are as they were, one member after another.
    let mut expected = encode(&no_landmark());
    expected.extend(items.iter().flat_map(encode));
    assert!(plain.starts_with(&expected));
    let entries = toc(&blob, &written);
    assert_eq!(
        names(&entries),
        [
            NO_PREFETCH_LANDMARK,
            "./",
            "usr/",
            "usr/big",
            "usr/empty",
            "usr/link",
            "bin",
            "pipe"
        ]
    );
    let link = entries.iter().find(|e| e["type"] == "hardlink").unwrap();
    assert_eq!(link["linkName"], "usr/big");
    assert_eq!(entries.iter().filter(|e| e["type"] == "chunk").count(), 19);
}

const FORMATS: [Format; 4] = [
    Format::Estargz,
    Format::ZstdChunked(Flavour::ContainersStorage),
    Format::ZstdChunked(Flavour::Stargz),
    Format::Gzip,
];

#[test]
fn output_does_not_depend_on_threads() {
    let items: Vec<Item> = (0..300u32)
        .map(|i| file(&format!("f{i}"), &vec![b'x'; (i * 97) as usize]))
        .collect();
    let tar = tarball(&items);
    for format in FORMATS {
        let with = |workers| Options {
            chunk_bytes: 4096,
            workers,
            ..Options::new(format)
        };
        let one = convert(&tar, &with(1)).unwrap();
        for workers in [0, 2, 5, 99] {
            let same = convert(&tar, &with(workers)).unwrap() == one;
            assert!(same, "{workers} {format:?}");
        }
    }
}

#[test]
fn plain_gzip_is_the_tar_that_extracting_leaves() {
    let noise: Vec<u8> = (0..1_500_000u32)
        .flat_map(|i| i.wrapping_mul(i).to_le_bytes())
        .collect();
    let items = [
        dir("./d"),
        file("./d/noise", &noise),
        file("x", b"x"),
        hard("y", "x"),
    ];
    let (esgz, _) = convert(&tarball(&items), &options(4096, 2)).unwrap();
    let (blob, written) = convert(&gunzip(&esgz), &Options::new(Format::Gzip)).unwrap();
    assert!(gunzip(&blob) == tarball(&items));
    assert_eq!(written.diff_id, Digest::sha256(&tarball(&items)));
    assert_eq!(
        (written.blob_size, written.blob_digest),
        (blob.len() as u64, Digest::sha256(&blob))
    );
    assert_eq!((written.toc_digest, written.toc_size), (None, 0));
    assert!(written.annotations.is_empty());
}

#[test]
fn comments_between_entries_are_left_out_and_other_globals_refused() {
    let global = |record: &[u8]| item(b'g', "pax_global_header", "", record);
    let items = [global(b"20 comment=abcdefgh\n"), file("a", b"1")];
    let (blob, _) = convert(&tarball(&items), &Options::new(Format::Gzip)).unwrap();
    assert!(gunzip(&blob) == tarball(&items[1..]));
    let items = [global(b"8 uid=1\n"), file("a", b"1")];
    let refused = convert(&tarball(&items), &options(4096, 1)).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("global extended header sets \"uid\""),
        "{refused}"
    );
}

#[test]
fn prioritised_files_come_first_with_what_they_need() {
    let items = [
        dir("./"),
        dir("a/"),
        file("a/x", b"x"),
        file("a/y", b"y"),
        dir("b/"),
        hard("b/z", "a/y"),
        hard("b/zz", "b/z"),
        file("c", b"c"),
    ];
    let wanted = ["/c", "./b/zz", "gone", "a/y", "..", "c"];
    let (blob, written) = convert_hot(&tarball(&items), &wanted, &options(4096, 2)).unwrap();
    check(&blob, &written, 4096);
    assert_eq!(
        names(&toc(&blob, &written)),
        [
            "./",
            "c",
            "a/",
            "a/y",
            "b/",
            "b/z",
            "b/zz",
            PREFETCH_LANDMARK,
            "a/x"
        ]
    );
    let (blob, written) = convert_hot(&tarball(&items), &["gone"], &options(4096, 2)).unwrap();
    assert_eq!(names(&toc(&blob, &written))[0], NO_PREFETCH_LANDMARK);
}

#[test]
fn the_last_of_two_entries_counts() {
    let items = [
        dir("d/"),
        file("d/old", b"1"),
        file("f", b"1"),
        dir("x/"),
        file("x/child", b"gone with x"),
        hard("f", "f"),
        file("f", b"2"),
        file("x", b"no directory any more"),
        dir("d/"),
        hard("g", "f"),
    ];
    let (blob, written) = convert(&tarball(&items), &options(4096, 1)).unwrap();
    check(&blob, &written, 4096);
    let entries = toc(&blob, &written);
    assert_eq!(
        names(&entries),
        [NO_PREFETCH_LANDMARK, "d/old", "f", "x", "d/", "g"]
    );
}

#[test]
fn a_converted_layer_can_be_converted_again() {
    let items = [dir("a/"), file("a/b", &[7; 9000]), file("c", b"c")];
    let (plain, _) = convert(&tarball(&items), &options(8192, 1)).unwrap();
    let (sorted, _) = convert_hot(&gunzip(&plain), &["c"], &options(4096, 1)).unwrap();
    let (again, written) = convert_hot(&gunzip(&sorted), &["a/b"], &options(8192, 1)).unwrap();
    check(&again, &written, 8192);
    assert_eq!(
        names(&toc(&again, &written)),
        ["a/", "a/b", PREFETCH_LANDMARK, "c"]
    );
}

#[test]
fn long_runs_of_headers_get_members_of_their_own() {
    let mut items = vec![file("f", b"x")];
    items.extend((0..1000).map(|i| file(&format!("empty-{i}"), b"")));
    items.push(file("g", b"y"));
    let (blob, written) = convert(&tarball(&items), &options(4096, 2)).unwrap();
    check(&blob, &written, 4096);
    let first_member_ends = flate_member_len(&blob, &toc(&blob, &written));
    assert!(
        first_member_ends < EXTRA_HEADERS + 4096,
        "{first_member_ends}"
    );
}

/// Decompressed length of the member of `f`.
fn flate_member_len(blob: &[u8], entries: &[Value]) -> usize {
    let entry = entries.iter().find(|e| e["name"] == "f").unwrap();
    let start = usize::try_from(entry["offset"].as_u64().unwrap()).unwrap();
    crate::codec::deflate::first_member(&blob[start..]).len()
}

const EXTRA_HEADERS: usize = 64 << 10;

#[test]
fn refusals_name_the_layer_and_the_entry() {
    let long = tarball(&[file("f", &[1; 5000])]);
    let table = [
        (tarball(&[hard("l", "gone")]), "hard link to \"gone\""),
        (
            tarball(&[hard("l", "f"), file("f", b"")]),
            "no file before it",
        ),
        (tarball(&[dir("d/"), hard("l", "d")]), "no file before it"),
        (
            tarball(&[file("f", b"1"), hard("l", "f"), file("f", b"2")]),
            "replaces later",
        ),
        (tarball(&[item(b'S', "f", "", b"")]), "sparse"),
        (long[..3000].to_vec(), "ends early"),
        (long[..300].to_vec(), "inside a header"),
        (vec![b'x'; 1024], "checksum"),
    ];
    for (tar, part) in table {
        let message = convert(&tar, &options(4096, 2)).unwrap_err().to_string();
        assert!(
            message.contains(part) && message.contains("test layer"),
            "{message}"
        );
    }
    for (chunk_bytes, level) in [(4095, 6), (u32::MAX, 6), (4096, 0), (4096, 10)] {
        let bad = Options {
            chunk_bytes,
            level,
            ..Options::default()
        };
        assert!(matches!(convert(&long, &bad), Err(Error::Limit { .. })));
    }
}

#[test]
fn an_output_that_fails_ends_the_write() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self
                .0
                .checked_sub(bytes.len())
                .ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let items: Vec<Item> = (0..100)
        .map(|i| file(&format!("f{i}"), &[1; 600]))
        .collect();
    for room in [0, 100, 700] {
        let mut input = Cursor::new(tarball(&items));
        for format in FORMATS {
            let options = Options {
                chunk_bytes: 4096,
                ..Options::new(format)
            };
            let written = write_layer("l", &mut input, &mut Full(room), &options);
            assert!(
                matches!(written, Err(Error::NoSpace { .. })),
                "{room} {format:?}"
            );
        }
    }
}

#[test]
fn an_empty_layer_is_a_landmark_and_a_toc() {
    for tar in [tarball(&[]), Vec::new()] {
        let (blob, written) = convert(&tar, &Options::default()).unwrap();
        check(&blob, &written, 1);
        assert_eq!(names(&toc(&blob, &written)), [NO_PREFETCH_LANDMARK]);
    }
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let bytes = prop::collection::vec(any::<u8>(), 0..20_000);
    let entry = (prop::sample::select(b"0000256".to_vec()), bytes);
    prop::collection::vec(entry, 0..24).prop_map(|entries| {
        let named = entries
            .into_iter()
            .enumerate()
            .map(|(i, (flag, bytes))| match flag {
                b'0' => file(&format!("f{i}"), &bytes),
                b'5' => dir(&format!("./d{i}/")),
                flag => item(flag, &format!("n{i}"), "target", b""),
            });
        named.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_is_lost_or_moved(items in items(), chunk_bytes in 4096u32..30_000, workers in 1usize..4) {
        let (blob, written) = convert(&tarball(&items), &options(chunk_bytes, workers)).unwrap();
        check(&blob, &written, u64::from(chunk_bytes));
        let mut expected = encode(&no_landmark());
        expected.extend(items.iter().flat_map(encode));
        let plain = gunzip(&blob);
        prop_assert!(plain.starts_with(&expected));
        // Behind it only the TOC and the end of the archive.
        let toc_len = usize::try_from(written.toc_size).unwrap().next_multiple_of(BLOCK);
        prop_assert_eq!(plain.len(), expected.len() + BLOCK + toc_len + 2 * BLOCK);
    }

    #[test]
    fn damage_gives_errors_not_panics(items in items(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut tar = tarball(&items);
        let at = at.index(tar.len());
        tar[at] = byte;
        if let Ok((blob, written)) = convert_hot(&tar, &["f0"], &options(4096, 1)) {
            // Nothing else is hot.
            check(&blob, &written, 1 << 20);
        }
    }
}
