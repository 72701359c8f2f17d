//! Tests of header decoding: the traps of three tar dialects.

use proptest::prelude::*;

use super::*;

/// A ustar header of `flag` with one field changed, its sum right.
fn header(flag: u8, name: &str, edit: impl FnOnce(&mut Block)) -> Vec<u8> {
    let mut block = plain_header(name, 0);
    block[156] = flag;
    edit(&mut block);
    seal(&mut block);
    block.to_vec()
}

fn seal(block: &mut Block) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// An extension header with its payload.
fn extension(flag: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = header(flag, "ext", |block| {
        block[124..135].copy_from_slice(format!("{:011o}", payload.len()).as_bytes());
    });
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len.to_string().len() + rest != len {
        len = len.to_string().len() + rest;
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

fn plain(name: &str) -> Vec<u8> {
    header(b'0', name, |_| {})
}

fn message(blocks: &[u8]) -> String {
    match entry_meta(blocks).unwrap_err() {
        Fault::Malformed(text) | Fault::Unsupported(text) | Fault::Limit(text) => text,
        Fault::Io(..) => panic!("decoding does no I/O"),
    }
}

#[test]
fn pax_beats_gnu_beats_the_header() {
    let gnu = extension(b'L', b"gnu/name\0");
    let pax = extension(b'x', &record("path", b"pax/name"));
    let name = |blocks: Vec<u8>| entry_meta(&blocks).unwrap().name;
    assert_eq!(name(plain("./own")), "own");
    assert_eq!(name([gnu.clone(), plain("own")].concat()), "gnu/name");
    assert_eq!(name([pax.clone(), gnu, plain("own")].concat()), "pax/name");
    let empty = extension(b'x', &record("path", b""));
    assert_eq!(name([empty, plain("own")].concat()), "own");
}

#[test]
fn pax_values_may_hold_any_byte() {
    let value = b"a\nb=\0\xff 7 x=y\n";
    let records = [
        record("SCHILY.xattr.user.k", value),
        record("size", b"8589934593"),
        record("uid", b"70000"),
        record("mtime", b"-1.25"),
        record("uname", "žofie".as_bytes()),
    ]
    .concat();
    let meta = entry_meta(&[extension(b'x', &records), plain("f")].concat()).unwrap();
    assert_eq!(
        meta.xattrs.get("user.k").map(Vec::as_slice),
        Some(&value[..])
    );
    assert_eq!(
        (meta.size, meta.uid, meta.user.as_str()),
        (8_589_934_593, 70_000, "žofie")
    );
    assert_eq!((meta.mtime.secs, meta.mtime.nanos), (-2, 750_000_000));
}

#[test]
fn numbers_are_octal_or_base_256() {
    let table: [(&[u8], Option<i64>); 9] = [
        (b"0000644\0", Some(0o644)),
        (b"   644 \0", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"\x80\0\0\0\0\0\x01\0", Some(256)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
        (b"0000648\0", None),
        (b"-000001\0", None),
        (b"+000001\0", None),
        (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
    ];
    for (field, value) in table {
        assert_eq!(tar::number(field), value, "{field:?}");
    }
}

#[test]
fn every_kind_is_known_and_only_files_have_bytes() {
    let table = [
        (b'0', "f", Kind::Regular, 5),
        (0, "f", Kind::Regular, 5),
        (0, "d/", Kind::Directory, 0),
        (b'7', "f", Kind::Regular, 5),
        (b'1', "l", Kind::Hardlink, 0),
        (b'2', "l", Kind::Symlink, 0),
        (b'3', "c", Kind::Char, 0),
        (b'4', "b", Kind::Block, 0),
        (b'5', "d/", Kind::Directory, 0),
        (b'6', "p", Kind::Fifo, 0),
    ];
    for (flag, name, kind, size) in table {
        let blocks = header(flag, name, |block| block[134] = b'5');
        let meta = entry_meta(&blocks).unwrap();
        assert_eq!((meta.kind, meta.size), (kind, size), "{flag}");
    }
}

#[test]
fn the_prefix_is_a_path_where_it_is_no_time() {
    let with = |magic: &'static [u8; 6], text: &'static [u8; 6]| {
        header(b'0', "name", |block| {
            block[257..263].copy_from_slice(magic);
            block[345..351].copy_from_slice(text);
        })
    };
    let name = |magic, text| entry_meta(&with(magic, text)).unwrap().name;
    assert_eq!(name(b"ustar\0", b"prefix"), "prefix/name");
    assert_eq!(name(b"ustar\0", b"123456"), "123456/name");
    assert_eq!(name(b"ustar ", b"prefix"), "prefix/name");
    assert_eq!(name(b"ustar ", b"123456"), "name");
}

#[test]
fn refusals_say_what_and_on_what() {
    let pax = |key: &str, value: &[u8]| {
        [extension(b'x', &record(key, value)), plain("the-file")].concat()
    };
    let table = [
        (header(b'S', "the-file", |_| {}), "sparse"),
        (pax("GNU.sparse.major", b"1"), "sparse"),
        (plain("a/../the-file"), "'..'"),
        (pax("path", b"the-file\xff"), "UTF-8"),
        (pax("path", b"the-file\0x"), "NUL"),
        (pax("uid", b"4294967296"), "32 bits"),
        (pax("size", b"many"), "not a number"),
        (header(b'M', "the-file", |_| {}), "type 'M'"),
        (
            [extension(b'g', &record("uid", b"1")), plain("f")].concat(),
            "global",
        ),
        (
            [extension(b'x', b"99 a=b\n"), plain("f")].concat(),
            "broken record",
        ),
        (
            {
                let mut bad = plain("f");
                bad[0] = b'g';
                bad
            },
            "checksum",
        ),
        (plain("f")[..300].to_vec(), "cut short"),
        (extension(b'x', b""), "cut short"),
    ];
    for (blocks, part) in table {
        let message = message(&blocks);
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    assert!(message(&pax("uid", b"4294967296")).contains("the-file"));
}

proptest! {
    #[test]
    fn never_panics(mut blocks in prop::collection::vec(any::<u8>(), 0..2048), flag in prop::sample::select(b"0xgLK25".to_vec())) {
        if let Some(block) = blocks.first_chunk_mut::<BLOCK>() {
            block[156] = flag;
            seal(block);
        }
        let _ = entry_meta(&blocks);
    }

    #[test]
    fn records_round_trip(key in "[a-zA-Z.]{1,120}", value in prop::collection::vec(any::<u8>(), 0..1100)) {
        let records = pax_records(&record(&key, &value)).unwrap();
        prop_assert_eq!(records.get(&key), Some(&value));
    }
}
