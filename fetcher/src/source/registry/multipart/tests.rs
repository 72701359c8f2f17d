//! Bodies as servers send them, cut anywhere, and bodies that lie.

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 1000;

fn blob() -> Vec<u8> {
    (0..SIZE)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect()
}

/// A body as Go's net/http sends it; nginx begins it with a line end.
fn body(parts: &[(u64, u64)], begin: &str) -> Vec<u8> {
    let mut out = begin.as_bytes().to_vec();
    for (number, (start, end)) in parts.iter().enumerate() {
        let line = if number == 0 { "" } else { "\r\n" };
        let last = end - 1;
        out.extend_from_slice(
            format!(
                "{line}--b0\r\nContent-Range: bytes {start}-{last}/{SIZE}\r\n\
                 Content-Type: application/octet-stream\r\n\r\n"
            )
            .as_bytes(),
        );
        let at = |n: &u64| usize::try_from(*n).unwrap();
        out.extend_from_slice(&blob()[at(start)..at(end)]);
    }
    out.extend_from_slice(b"\r\n--b0--\r\n");
    out
}

/// Everything that comes out, joined where it touches.
fn read(body: &[u8], piece: usize) -> Result<(Vec<(u64, u64)>, bool), String> {
    let mut multipart = Multipart::new("b0", SIZE);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for piece in body.chunks(piece) {
        let mut piece = Bytes::copy_from_slice(piece);
        while let Some((at, bytes)) = multipart.next(&mut piece, u64::MAX)? {
            let start = usize::try_from(at).unwrap();
            assert_eq!(bytes, blob()[start..start + bytes.len()]);
            let end = at + bytes.len() as u64;
            match ranges.last_mut() {
                Some(last) if last.1 == at => last.1 = end,
                _ => ranges.push((at, end)),
            }
        }
    }
    Ok((ranges, multipart.is_over()))
}

proptest! {
    #[test]
    fn parts_come_out_however_the_body_is_cut(
        edges in prop::collection::btree_set(0_u64..SIZE, 2..20),
        cut in 1_usize..400,
        nginx in any::<bool>(),
    ) {
        let edges: Vec<u64> = edges.into_iter().collect();
        let parts: Vec<(u64, u64)> = edges.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let body = body(&parts, if nginx { "\r\n" } else { "" });
        prop_assert_eq!(read(&body, cut), Ok((parts, true)));
    }

    #[test]
    fn nonsense_ends(body in prop::collection::vec(any::<u8>(), 0..500), cut in 1_usize..64) {
        let _ = read(&body, cut);
        let begun = [b"--b0\r\n".as_slice(), &body].concat();
        let _ = read(&begun, cut);
    }
}

#[test]
fn lies_are_named() {
    let head = |range: &str| format!("--b0\r\nContent-Range: {range}\r\n\r\nxx");
    let table = [
        ("--b1\r\n\r\n".to_owned(), "boundary"),
        ("xx--b0\r\n".to_owned(), "boundary"),
        (
            "--b0\r\nContent-Type: x\r\n\r\n".to_owned(),
            "without Content-Range",
        ),
        (format!("--b0\r\n{}", "x".repeat(5000)), "4096 bytes"),
        (head("bytes 0-1/999"), "bytes 0-1/999"),
        (head("bytes 999-1000/1000"), "999-1000"),
        (head("bytes 1-0/1000"), "1-0"),
        (
            head("bytes 0-18446744073709551615/*"),
            "18446744073709551615",
        ),
        (head("bytes */1000"), "*/1000"),
        (head("0-1/1000"), "0-1/1000"),
    ];
    for (body, word) in table {
        for cut in [1, 7, 10_000] {
            let error = read(body.as_bytes(), cut).unwrap_err();
            assert!(error.contains(word), "{body:?}: {error}");
        }
    }
    let backwards = body(&[(100, 200), (150, 160)], "");
    assert!(read(&backwards, 9).unwrap_err().contains("150..160"));
    let unended = &body(&[(100, 200)], "")[..120];
    assert!(!read(unended, 9).unwrap().1);
}

#[test]
fn boundaries_are_found_or_refused() {
    let long = format!("multipart/byteranges; boundary={}", "b".repeat(71));
    let table = [
        ("multipart/byteranges; boundary=abc", Some("abc")),
        (
            "Multipart/ByteRanges;charset=x; Boundary=\"a b\"",
            Some("a b"),
        ),
        ("multipart/byteranges", None),
        ("multipart/byteranges; boundary=", None),
        ("multipart/mixed; boundary=abc", None),
        ("application/octet-stream", None),
        (&long, None),
    ];
    for (text, expected) in table {
        assert_eq!(boundary(text), expected, "{text}");
    }
}
