//! Requests as the kernel sends them, and as it never would.

use super::answer::{self, Reaction, react};
use super::*;

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER_BYTES + body.len()).unwrap();
    let mut out = [len, opcode].map(u32::to_ne_bytes).concat();
    out.extend([77, node].map(u64::to_ne_bytes).concat());
    out.extend([0, 0, 4711, 0].map(u32::to_ne_bytes).concat());
    out.extend(body);
    out
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn read_body(offset: u64, size: u32) -> Vec<u8> {
    let head = [0, offset].map(u64::to_ne_bytes).concat();
    [head, words(&[size, 0, 0, 0, 0, 0])].concat()
}

#[test]
fn requests_are_understood() {
    let init = Init {
        major: 7,
        minor: 45,
        max_readahead: 131_072,
        flags: 1 << 39 | 1 << 30 | 1,
    };
    let low = Init { flags: 1, ..init };
    let init_body = |first, second| words(&[7, 45, 131_072, first, second]);
    let table: [(u32, Vec<u8>, Op<'_>); 15] = [
        (1, b"data\0".to_vec(), Op::Lookup(b"data")),
        (1, b"data".to_vec(), Op::Lookup(b"data")),
        (1, Vec::new(), Op::Lookup(b"")),
        (2, vec![0; 8], Op::Forget),
        (42, vec![0; 8], Op::Forget),
        (3, Vec::new(), Op::GetAttr),
        (14, words(&[0o100_000, 0]), Op::Open { write: false }),
        (14, words(&[0o100_001, 0]), Op::Open { write: true }),
        (15, read_body(5, 6), Op::Read { offset: 5, size: 6 }),
        (18, vec![0; 24], Op::Fine),
        (
            36,
            9_u64.to_ne_bytes().to_vec(),
            Op::Interrupt { unique: 9 },
        ),
        (26, init_body(1 << 30 | 1, 1 << 7), Op::Init(init)),
        (26, init_body(1, 1 << 7), Op::Init(low)),
        (26, words(&[7, 45, 131_072, 1]), Op::Init(low)),
        (4711, vec![1], Op::Other(4711)),
    ];
    for (opcode, body, op) in table {
        let bytes = request(opcode, 2, &body);
        let expected = Request {
            unique: 77,
            node: 2,
            thread: 4711,
            op,
        };
        assert_eq!(parse(&bytes), Ok(expected), "{opcode}");
    }
}

#[test]
fn what_is_cut_short_or_too_long_is_refused() {
    for (opcode, body) in [(15, read_body(1, 1)), (36, vec![0; 8]), (26, vec![0; 16])] {
        let whole = request(opcode, 1, &body);
        for len in 0..whole.len() {
            let cut = whole.get(..len).unwrap();
            assert_eq!(parse(cut), Err(Malformed::Short(len)), "{opcode}");
        }
    }
    // Right about its length, and too short for what it asks.
    let read = request(15, 2, &[0; 19]);
    assert_eq!(parse(&read), Err(Malformed::Short(read.len())));
    let mut long = request(3, 1, &[]);
    long.push(0);
    assert_eq!(parse(&long), Err(Malformed::Long(long.len())));
}

#[test]
fn every_request_has_its_reaction() {
    let size = 10_000;
    let errno = |errno: i32| Reaction::Send(answer::error(77, errno));
    let read = |offset, len| Reaction::Read { offset, len };
    let empty = || Reaction::Send(answer::ok(77, &[]));
    let table: [(u64, Op<'_>, Reaction); 19] = [
        (1, Op::Lookup(b"Data"), errno(2)),
        (2, Op::Lookup(b"data"), errno(20)),
        (3, Op::Lookup(b"small"), errno(20)),
        (4, Op::GetAttr, errno(116)),
        (3, Op::Open { write: true }, errno(30)),
        (
            3,
            Op::Read {
                offset: 8192,
                size: 4096,
            },
            read(8192, 1808),
        ),
        (2, Op::Open { write: true }, errno(30)),
        (1, Op::Open { write: false }, errno(21)),
        (
            2,
            Op::Read {
                offset: 0,
                size: 4096,
            },
            read(0, 4096),
        ),
        (
            2,
            Op::Read {
                offset: 8192,
                size: 4096,
            },
            read(8192, 1808),
        ),
        (
            2,
            Op::Read {
                offset: 10_000,
                size: 1,
            },
            empty(),
        ),
        (
            2,
            Op::Read {
                offset: u64::MAX,
                size: u32::MAX,
            },
            empty(),
        ),
        (2, Op::Read { offset: 1, size: 0 }, empty()),
        (1, Op::Read { offset: 0, size: 1 }, errno(21)),
        (9, Op::Read { offset: 0, size: 1 }, errno(116)),
        (0, Op::Interrupt { unique: 5 }, Reaction::Interrupt(5)),
        (0, Op::Forget, Reaction::Nothing),
        (2, Op::Fine, empty()),
        (2, Op::Other(16), errno(38)),
    ];
    for (node, op, expected) in table {
        let request = Request {
            unique: 77,
            node,
            thread: 0,
            op,
        };
        assert_eq!(react(&request, size), expected, "{request:?}");
    }
}

#[test]
fn bodies_have_the_sizes_of_the_kernels_structures() {
    let init = Init {
        major: 7,
        minor: 45,
        max_readahead: 1,
        flags: u64::MAX,
    };
    let table = [
        (Op::Init(init), 64),
        (Op::Lookup(b"data"), 128),
        (Op::GetAttr, 104),
        (Op::StatFs, 80),
    ];
    for (op, len) in table {
        let request = Request {
            unique: 77,
            node: 1,
            thread: 0,
            op,
        };
        let Reaction::Send(bytes) = react(&request, 5) else {
            panic!("{op:?} is answered at once");
        };
        assert_eq!(bytes.len(), 16 + len, "{op:?}");
        assert_eq!(bytes[..4], u32::try_from(16 + len).unwrap().to_ne_bytes());
    }
    let other = Init { major: 8, ..init };
    let request = Request {
        unique: 77,
        node: 1,
        thread: 0,
        op: Op::Init(other),
    };
    let refused = Reaction::Send(answer::error(77, 71));
    assert_eq!(react(&request, 5), refused, "a kernel of another age");
    assert_eq!(answer::resend(), *[words(&[16, 7]), vec![0; 8]].concat());
}

#[test]
fn one_file_is_cached_and_the_other_is_not() {
    let react_to = |node, op| {
        let request = Request {
            unique: 77,
            node,
            thread: 0,
            op,
        };
        match react(&request, 10_000) {
            Reaction::Send(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    };
    for (name, node, flags) in [(FILE_NAME, FILE, 1), (SMALL_NAME, SMALL, 2)] {
        let entry = react_to(ROOT, Op::Lookup(name));
        assert_eq!(entry[16..24], node.to_ne_bytes(), "its node");
        assert_eq!(entry[16 + 40..16 + 48], node.to_ne_bytes(), "its number");
        assert_eq!(entry[16 + 48..16 + 56], 10_000_u64.to_ne_bytes());
        let opened = react_to(node, Op::Open { write: false });
        assert_eq!(opened[16 + 8..16 + 12], u32::to_ne_bytes(flags));
    }
    let init = Init {
        major: 7,
        minor: 45,
        max_readahead: 131_072,
        flags: u64::MAX,
    };
    let agreed = react_to(0, Op::Init(init));
    assert_eq!(agreed[16 + 8..16 + 12], 4096_u32.to_ne_bytes(), "a page");
}
