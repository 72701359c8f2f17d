//! Archives of GNU tar, and headers no tar would write.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::index::{FileEntry, FileKind, Timestamp};
use crate::test_util::content::tar_header as header;
use crate::{Error, Result};

/// Entries and payloads of a whole tar, pushed in pieces.
fn read(tar: &[u8], piece: usize) -> Result<Vec<(FileEntry, Vec<u8>)>> {
    let mut parser = Parser::new("layer x".to_owned());
    let mut out: Vec<(FileEntry, Vec<u8>)> = Vec::new();
    for mut input in tar.chunks(piece) {
        loop {
            match parser.step(&mut input)? {
                Step::NeedInput => break,
                Step::Entry(entry) => out.push((entry, Vec::new())),
                Step::Data(bytes) => out.last_mut().unwrap().1.extend_from_slice(bytes),
                Step::EndOfFile => {
                    let (entry, data) = out.last().unwrap();
                    assert!(
                        matches!(entry.kind, FileKind::Regular { size, .. } if size == data.len() as u64)
                    );
                }
            }
        }
    }
    parser.finish()?;
    Ok(out)
}

fn error(tar: &[u8]) -> Error {
    read(tar, 1 << 20).expect_err("it is refused")
}

fn plain(name: &[u8], type_flag: u8) -> Vec<u8> {
    header(name, type_flag, 0, |_| {})
}

fn padded(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    out.resize(data.len().next_multiple_of(512), 0);
    out
}

fn pax(type_flag: u8, records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut len = rest.len() + 1;
        while len.to_string().len() + rest.len() != len {
            len += 1;
        }
        body.extend_from_slice(format!("{len}{rest}").as_bytes());
    }
    [
        header(b"pax", type_flag, body.len() as u64, |_| {}),
        padded(&body),
    ]
    .concat()
}

const END: [u8; 1024] = [0; 1024];

/// Files of every kind that needs no root, some with names that need extensions.
fn make_tree(root: &Path) {
    let long = root
        .join("d".repeat(90))
        .join("e".repeat(90))
        .join("f".repeat(90));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("file"), b"deep").unwrap();
    fs::write(root.join("big"), vec![7; 3000]).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::hard_link(root.join("big"), root.join("hard")).unwrap();
    symlink("t".repeat(180), root.join("long-link")).unwrap();
    symlink("big", root.join("link")).unwrap();
    fs::write(root.join("späß"), b"utf8").unwrap();
    let status = Command::new("mkfifo")
        .arg(root.join("pipe"))
        .status()
        .unwrap();
    assert!(status.success());
}

fn gnu_tar(dir: &Path, args: &[&str]) -> Vec<u8> {
    let out = Command::new("tar")
        .args(["--sort=name", "--mtime=@1700000000.25", "-cf", "-"])
        .args(args)
        .args(["-C", dir.to_str().unwrap(), "."])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

#[test]
fn reads_every_format_of_gnu_tar() {
    let dir = tempfile::tempdir().unwrap();
    make_tree(dir.path());
    for format in ["--format=gnu", "--format=pax", "--format=oldgnu"] {
        let tar = gnu_tar(dir.path(), &[format, "--owner=:3000000", "--group=:70000"]);
        let entries = read(&tar, 1 << 20).unwrap();
        for piece in [1, 511, 512, 4097] {
            assert_eq!(
                read(&tar, piece).unwrap(),
                entries,
                "{format} in pieces of {piece}"
            );
        }
        let get = |path: &str| {
            entries
                .iter()
                .find(|(e, _)| e.path == path.as_bytes())
                .unwrap_or_else(|| panic!("{format}: {path}"))
        };
        assert_eq!(get("").0.kind, FileKind::Directory);
        let deep = format!(
            "{}/{}/{}/file",
            "d".repeat(90),
            "e".repeat(90),
            "f".repeat(90)
        );
        assert_eq!(get(&deep).1, b"deep");
        assert_eq!(get("big").1, vec![7; 3000]);
        assert_eq!(
            get("empty").0.kind,
            FileKind::Regular {
                size: 0,
                data_offset: 0
            }
        );
        assert_eq!(
            get("hard").0.kind,
            FileKind::Hardlink {
                target: b"big".to_vec()
            }
        );
        assert_eq!(
            get("long-link").0.kind,
            FileKind::Symlink {
                target: vec![b't'; 180]
            }
        );
        assert_eq!(get("pipe").0.kind, FileKind::Fifo);
        assert_eq!(get("späß").1, b"utf8");
        let nanos = if format == "--format=pax" {
            250_000_000
        } else {
            0
        };
        for (entry, _) in &entries {
            assert_eq!((entry.uid, entry.gid), (3_000_000, 70_000), "{format}");
            assert_eq!(
                entry.mtime,
                Timestamp {
                    secs: 1_700_000_000,
                    nanos
                }
            );
        }
    }
}

#[test]
fn a_file_told_twice_is_a_link_to_itself() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), b"x").unwrap();
    let out = Command::new("tar")
        .args(["-cf", "-", "-C", dir.path().to_str().unwrap(), "a", "a"])
        .output()
        .unwrap();
    let entries = read(&out.stdout, 1000).unwrap();
    assert_eq!(
        entries[1].0.kind,
        FileKind::Hardlink {
            target: b"a".to_vec()
        }
    );
}

#[test]
fn sparse_files_of_gnu_tar_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::File::create(dir.path().join("holes"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    for args in [
        &["--format=gnu"][..],
        &["--format=pax"],
        &["--format=pax", "--sparse-version=0.1"],
    ] {
        let tar = gnu_tar(dir.path(), &[&["--sparse"], args].concat());
        let error = error(&tar);
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("holes\" of layer x") && text.contains("sparse"),
            "{text}"
        );
    }
}

#[test]
fn xattrs_as_gnu_tar_writes_them() {
    // A file system that keeps user xattrs is not a given, so the records are made here
    // as `tar --xattrs` makes them.
    let tar = [
        pax(
            b'x',
            &[
                ("SCHILY.xattr.user.note", "hello"),
                ("SCHILY.xattr.security.capability", "\u{1}\0"),
            ],
        ),
        plain(b"a", b'0'),
    ]
    .concat();
    let entries = read(&tar, 100).unwrap();
    let expected = [
        (b"user.note".to_vec(), b"hello".to_vec()),
        (b"security.capability".to_vec(), b"\x01\0".to_vec()),
    ];
    assert_eq!(entries[0].0.xattrs, expected);
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn headers_of_other_writers() {
    let v7 = |block: &mut [u8; 512]| block[257..265].fill(0);
    let star = |block: &mut [u8; 512]| {
        block[345..348].copy_from_slice(b"pre");
        block[476..488].copy_from_slice(b"00000000000 ");
        block[508..512].copy_from_slice(b"tar\0");
    };
    let gnu = |block: &mut [u8; 512]| {
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..348].copy_from_slice(b"123");
    };
    let go_1_7 = |block: &mut [u8; 512]| {
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..360].copy_from_slice(b"usr/local/lib/x");
    };
    let times = |block: &mut [u8; 512]| {
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..357].copy_from_slice(b"14600000000\0");
        block[357..369].copy_from_slice(b"14600000001\0");
    };
    let base256 = |block: &mut [u8; 512]| {
        block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe])
    };
    let table: [(Vec<u8>, &[u8], FileKind, u32); 11] = [
        (header(b"dir/", 0, 0, v7), b"dir", FileKind::Directory, 0),
        (plain(b"dir/", b'5'), b"dir", FileKind::Directory, 0),
        (
            header(b"f", 0, 0, v7),
            b"f",
            FileKind::Regular {
                size: 0,
                data_offset: 0,
            },
            0,
        ),
        (
            plain(b"f", b'7'),
            b"f",
            FileKind::Regular {
                size: 0,
                data_offset: 0,
            },
            0,
        ),
        (
            header(b"f", b'0', 0, star),
            b"pre/f",
            FileKind::Regular {
                size: 0,
                data_offset: 0,
            },
            0,
        ),
        (
            header(b"f", b'0', 0, gnu),
            b"f",
            FileKind::Regular {
                size: 0,
                data_offset: 0,
            },
            0,
        ),
        (
            header(b"f", b'0', 0, |b| b[345..347].copy_from_slice(b"ab")),
            b"ab/f",
            FileKind::Regular {
                size: 0,
                data_offset: 0,
            },
            0,
        ),
        (
            header(b"p", b'6', 0, base256),
            b"p",
            FileKind::Fifo,
            u32::MAX - 1,
        ),
        (
            header(b"p", b'6', 0, go_1_7),
            b"usr/local/lib/x/p",
            FileKind::Fifo,
            0,
        ),
        (header(b"p", b'6', 0, times), b"p", FileKind::Fifo, 0),
        (plain(b"/abs/.wh.x", b'6'), b"abs/.wh.x", FileKind::Fifo, 0),
    ];
    for (tar, path, kind, uid) in table {
        let entries = read(&[&tar[..], &END].concat(), 300).unwrap();
        assert_eq!(
            (&entries[0].0.path[..], &entries[0].0.kind, entries[0].0.uid),
            (path, &kind, uid)
        );
    }
    let device = header(b"null", b'3', 0, |b| {
        b[329..336].copy_from_slice(b"0000001");
        b[337..344].copy_from_slice(b"0000003");
    });
    assert_eq!(
        read(&device, 512).unwrap()[0].0.kind,
        FileKind::CharDevice { major: 1, minor: 3 }
    );
}

#[test]
fn extended_headers_apply_where_they_should() {
    let tar = [
        pax(b'g', &[("uid", "5"), ("comment", "x")]),
        pax(b'x', &[("path", "renamed"), ("size", "3")]),
        header(b"short", b'0', 99, |_| {}),
        padded(b"abc"),
        pax(b'x', &[("uid", "7"), ("linkpath", "to")]),
        plain(b"l", b'2'),
        plain(b"last", b'5'),
        END.to_vec(),
        b"whatever follows the end".to_vec(),
    ]
    .concat();
    let entries = read(&tar, 77).unwrap();
    let seen: Vec<_> = entries
        .iter()
        .map(|(e, d)| (&e.path[..], e.uid, &d[..]))
        .collect();
    assert_eq!(
        seen,
        [
            (&b"renamed"[..], 5, &b"abc"[..]),
            (b"l", 7, b""),
            (b"last", 5, b"")
        ]
    );
    assert_eq!(
        entries[1].0.kind,
        FileKind::Symlink {
            target: b"to".to_vec()
        }
    );
}

#[test]
fn says_what_is_wrong() {
    let long_name = |size| [header(b"././@LongLink", b'L', size, |_| {})].concat();
    let mut bad_sum = plain(b"f", b'0');
    bad_sum[0] ^= 1;
    let table: [(Vec<u8>, &str); 16] = [
        (vec![b'x'; 512], "its checksum field is not a number"),
        (bad_sum, "its header checksum is"),
        (plain(b"../x", b'0'), "\"../x\": its name has a '..' part"),
        (
            header(b"l", b'1', 0, |b| b[157..159].copy_from_slice(b"..")),
            "\"l\": its name has a '..' part",
        ),
        (
            plain(b"v", b'V'),
            "its type is 'V', which no layer should have",
        ),
        (
            plain(b"s", b'S'),
            "file \"s\" of layer x is not supported: it is a sparse file",
        ),
        (
            pax(b'x', &[("uid", "-1")]),
            "its PAX uid \"-1\" makes no sense",
        ),
        (
            pax(b'x', &[("path", "a\0b")])
                .into_iter()
                .chain(plain(b"f", b'0'))
                .collect(),
            "NUL",
        ),
        (
            header(b"f", b'0', 0, |b| b[108..115].copy_from_slice(b"999    ")),
            "its uid field is not a number",
        ),
        (
            header(b"f", b'0', 0, |b| b[124..136].fill(0xff)),
            "its size is -1",
        ),
        (
            long_name(1 << 21),
            "an extended header has 2097152 bytes of at most 1048576",
        ),
        (long_name(10), "it is cut off (before byte 512)"),
        (pax(b'x', &[("path", "x")]), "it is cut off"),
        (header(b"f", b'0', 10, |_| {}), "it is cut off"),
        (
            plain(b"f", b'0')[..100].to_vec(),
            "it is cut off (before byte 100)",
        ),
        (
            [&[0; 512][..], &plain(b"f", b'0')].concat(),
            "a header follows a single zero block",
        ),
    ];
    for (tar, text) in table {
        let error = error(&tar).to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
}

#[test]
fn an_end_without_zero_blocks_is_an_end() {
    assert_eq!(read(b"", 1).unwrap(), []);
    assert_eq!(read(&END, 1000).unwrap(), []);
    assert_eq!(read(&plain(b"f", b'0'), 100).unwrap().len(), 1);
    // Go's writer fills the last block when it is closed, which some forget.
    let unfilled = [&header(b"f", b'0', 5, |_| {})[..], b"12345"].concat();
    for (padding, piece) in [(0, 1), (0, 1000), (1, 1), (506, 1000)] {
        let tar = [&unfilled[..], &vec![0; padding]].concat();
        assert_eq!(read(&tar, piece).unwrap()[0].1, b"12345", "{padding}");
    }
    assert_eq!(
        read(&[&plain(b"f", b'0')[..], &[0; 512]].concat(), 100)
            .unwrap()
            .len(),
        1
    );
}
