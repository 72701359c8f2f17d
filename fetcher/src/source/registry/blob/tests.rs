//! Answers to ranges, held to the letter.

use http::header::{HeaderMap, HeaderValue};

use super::*;
use crate::types::Reference;

/// What a body begins with: bytes to skip, or parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Skip(u64),
    InParts,
    OneAtATime,
}

fn check(
    want: Want,
    parts: &[ByteRange],
    status: u16,
    headers: &[(&'static str, &str)],
) -> Result<Begins> {
    let blob = BlobRef {
        repository: Reference::parse("r.io/a").unwrap().repository().clone(),
        digest: Digest::sha256(b""),
        size: 100,
    };
    let subject = Subject {
        what: "blob b".into(),
        host: "r.io".into(),
    };
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.insert(*name, HeaderValue::from_str(value).unwrap());
    }
    let facts = Facts {
        blob: &blob,
        subject: &subject,
        want,
    };
    let form = facts.check(StatusCode::from_u16(status).unwrap(), &map, parts)?;
    Ok(match form {
        Some(Form::Plain { skip }) => Begins::Skip(skip),
        Some(Form::Parts { .. }) => Begins::InParts,
        None => Begins::OneAtATime,
    })
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

#[test]
fn accepts_only_what_was_asked_for() {
    use Begins::Skip;
    let right = ("content-range", "bytes 10-19/100");
    type Headers<'a> = &'a [(&'static str, &'a str)];
    let parts: [(u16, Headers<'_>, Option<Begins>); 12] = [
        (206, &[right, ("content-length", "10")], Some(Skip(0))),
        (206, &[right], Some(Skip(0))),
        (206, &[("content-range", "bytes 10-19/*")], Some(Skip(0))),
        (206, &[right, ("content-length", "11")], None),
        (206, &[("content-range", "bytes 10-20/100")], None),
        (206, &[("content-range", "bytes 9-19/100")], None),
        (206, &[("content-range", "bytes 10-19/99")], None),
        (
            206,
            &[("content-range", "bytes 10-18446744073709551615/*")],
            None,
        ),
        (206, &[("content-range", "10-19/100")], None),
        (206, &[], None),
        (206, &[right, ("content-encoding", "gzip")], None),
        (200, &[("content-length", "100")], None),
    ];
    for (status, headers, expected) in parts {
        let got = check(Want::Parts, &[range(10, 20)], status, headers);
        assert_eq!(got.ok(), expected, "{status} {headers:?}");
    }
    let whole: [(u64, u16, Headers<'_>, Option<Begins>); 5] = [
        (0, 200, &[("content-length", "100")], Some(Skip(0))),
        (0, 200, &[("content-length", "99")], None),
        (0, 206, &[("content-range", "bytes 0-99/100")], None),
        (
            40,
            206,
            &[("content-range", "bytes 40-99/100")],
            Some(Skip(0)),
        ),
        (40, 200, &[("content-length", "100")], Some(Skip(40))),
    ];
    for (start, status, headers, expected) in whole {
        let got = check(Want::Whole, &[range(start, 100)], status, headers);
        assert_eq!(got.ok(), expected, "{start} {status} {headers:?}");
    }
}

#[test]
fn several_parts_come_as_such_or_one_at_a_time() {
    let parts = [range(10, 20), range(30, 40)];
    let right = ("content-type", "multipart/byteranges; boundary=b");
    type Headers<'a> = &'a [(&'static str, &'a str)];
    let table: [(u16, Headers<'_>, Begins); 5] = [
        (206, &[right, ("content-length", "412")], Begins::InParts),
        (
            206,
            &[("content-type", "multipart/byteranges")],
            Begins::OneAtATime,
        ),
        (
            206,
            &[("content-range", "bytes 10-19/100")],
            Begins::OneAtATime,
        ),
        (200, &[("content-length", "100")], Begins::OneAtATime),
        (200, &[right], Begins::OneAtATime),
    ];
    for (status, headers, expected) in table {
        let got = check(Want::Parts, &parts, status, headers);
        assert_eq!(got.ok(), Some(expected), "{status} {headers:?}");
    }
}

#[test]
fn ignored_ranges_are_unsupported_not_malformed() {
    let error = check(Want::Parts, &[range(10, 20)], 200, &[]).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
}

#[test]
fn expired_ways_are_told_from_errors() {
    let cdn = Route::Elsewhere("https://cdn.io/x".parse().unwrap());
    let table = [
        (&cdn, 403, true),
        (&cdn, 404, true),
        (&cdn, 429, false),
        (&cdn, 416, false),
        (&cdn, 503, false),
        (&Route::Origin, 307, true),
        (&Route::Origin, 404, false),
    ];
    for (route, code, stale) in table {
        assert_eq!(
            is_stale(route, StatusCode::from_u16(code).unwrap()),
            stale,
            "{code}"
        );
    }
}
