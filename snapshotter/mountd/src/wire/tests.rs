//! Every message there and back, and everything that is none.

use proptest::prelude::*;

use super::encode::{Writer, checksum};
use super::*;

fn listed(through: Through) -> Listed {
    Listed {
        mount: 3,
        through,
        size: 8192,
        name: b"sha256:ab".to_vec(),
        path: b"/run/x".to_vec(),
    }
}

fn every_message() -> Vec<Message> {
    let span = Span::new(4096, 8192).unwrap();
    let Listed {
        through,
        size,
        name,
        path,
        ..
    } = listed(Through::Fanotify);
    let mut all = every_message_of_a_hand_over();
    all.extend([
        Message::Hello(Role::Daemon),
        Message::Hello(Role::Successor),
        Message::Hello(Role::Guest),
        Message::Mount {
            request: 9,
            through,
            size,
            name,
            path,
        },
        Message::Attach {
            request: 1,
            mount: 2,
            file: FileId { dev: 3, ino: 4 },
        },
        Message::Unmount {
            request: 1,
            mount: 2,
        },
        Message::Grant {
            want: 1,
            mount: 2,
            number: 3,
            span,
        },
        Message::Failed {
            want: 1,
            mount: 2,
            errno: 5,
        },
        Message::Taken,
        Message::Welcome { mounts: 4 },
        Message::Listed(listed(Through::Fuse)),
        Message::Listed(listed(Through::Fanotify)),
        Message::Done {
            request: 1,
            mount: 2,
            errno: 0,
        },
        Message::Want {
            want: 1,
            mount: 2,
            span,
        },
        Message::Mark {
            request: 1,
            mount: 2,
        },
    ]);
    all
}

fn every_message_of_a_hand_over() -> Vec<Message> {
    let span = Span::new(4096, 8192).unwrap();
    let handed = |through, basis| Handed {
        listed: listed(through),
        basis,
        mark: u64::from(through == Through::Fanotify),
        granted: vec![span, Span::new(1 << 40, 1 << 41).unwrap()],
    };
    vec![
        Message::Handed(handed(Through::Fuse, Basis::Lock)),
        Message::Handed(handed(Through::Fuse, Basis::Number(7))),
        Message::Handed(handed(Through::Fanotify, Basis::Kept(7))),
        Message::HandedAll {
            next_mount: 5,
            guarded: true,
        },
        Message::HandedAll {
            next_mount: 5,
            guarded: false,
        },
        Message::Dropped { mount: 5 },
        Message::HandedByGuard { next_mount: 5 },
        Message::HandedGroup,
        Message::HandedRead {
            mount: 1,
            number: 77,
            waited_ms: 1500,
            span,
        },
    ]
}

#[test]
fn messages_come_back_as_they_went() {
    for message in every_message() {
        assert_eq!(decode(&encode(&message)), Ok(message));
    }
}

#[test]
fn a_message_is_golden() {
    let bytes = encode(&Message::Done {
        request: 1,
        mount: 2,
        errno: 5,
    });
    let golden = [
        b"LZMD".as_slice(),
        &[2, 0, 34, 0, 20, 0, 0, 0],
        &bytes[12..16],
        &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0],
    ];
    assert_eq!(bytes, golden.concat());
}

#[test]
fn any_cut_or_flipped_byte_is_noticed() {
    for message in every_message() {
        let bytes = encode(&message);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{message:?} cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "{message:?} flipped at {at}");
        }
    }
}

/// A datagram that is right about everything but its body.
fn sealed(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Writer(MAGIC.to_vec());
    out.0.extend_from_slice(&VERSION.to_le_bytes());
    out.0.extend_from_slice(&kind.to_le_bytes());
    out.u32(u32::try_from(body.len()).unwrap());
    let sum = checksum(&out.0, body);
    out.u32(sum);
    [out.0, body.to_vec()].concat()
}

#[test]
fn limits_hold_behind_a_right_checksum() {
    let mut empty_span = Writer(Vec::new());
    empty_span.u64s(&[1, 2, 5, 5]);
    let mut huge = Writer([[1; 8].as_slice(), &[0]].concat());
    huge.u64s(&[SIZE_MAX + 1]);
    huge.text(b"a");
    huge.text(b"/");
    let mut relative = Writer([[1; 8].as_slice(), &[0]].concat());
    relative.u64s(&[1]);
    relative.text(b"a");
    relative.text(b"run/x");
    // Whatever a mount stands on belongs to what it is made of.
    let handed = |through: u8, basis: u8, mark: u64, spans: u32| {
        let mut out = Writer([[1; 8].as_slice(), &[through]].concat());
        out.u64s(&[1]);
        out.text(b"a");
        out.text(b"/");
        out.0.push(basis);
        out.u64s(&[0, mark]);
        out.u32(spans);
        out.0
    };
    assert!(decode(&sealed(64, &handed(0, 1, 0, 0))).is_ok());
    assert!(decode(&sealed(64, &handed(1, 2, 9, 0))).is_ok());
    let mut elsewhere = Writer([[1; 8].as_slice(), &[2]].concat());
    elsewhere.u64s(&[1]);
    elsewhere.text(b"a");
    elsewhere.text(b"/");
    let table = [
        (1, vec![3], "a role there is not"),
        (7, vec![0], "more than there should be"),
        (35, empty_span.0, "an empty span"),
        (2, huge.0, "a file that cannot be"),
        (2, relative.0, "a path that is not absolute"),
        (2, elsewhere.0, "what a mount cannot be made of"),
        (64, handed(0, 1, 0, u32::MAX), "more spans than there are"),
        (64, handed(0, 2, 0, 0), "a fuse mount that is kept"),
        (64, handed(0, 1, 9, 0), "a fuse mount that is marked"),
        (
            64,
            handed(1, 0, 0, 0),
            "a mount through fanotify that is not",
        ),
        (999, vec![], "a kind there is not"),
    ];
    for (kind, body, what) in table {
        assert_eq!(
            decode(&sealed(kind, &body)),
            Err(Malformed::Body(kind)),
            "{what}"
        );
    }
    let mut later = encode(&Message::Taken);
    later[4] = 3;
    assert_eq!(decode(&later), Err(Malformed::Foreign), "another version");
}

proptest! {
    #[test]
    fn what_decodes_encodes_the_same(kind in 0..70_u16, body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = sealed(kind, &body);
        if let Ok(message) = decode(&bytes) {
            prop_assert_eq!(encode(&message), bytes);
        }
    }
}
