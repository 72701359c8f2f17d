//! Answers to ranges, held to the letter.

use http::HeaderValue;

use super::*;
use crate::types::Reference;

fn check(want: Want, start: u64, status: u16, headers: &[(&'static str, &str)]) -> Result<u64> {
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
    let range = match want {
        Want::Range(range) => range,
        Want::Whole => ByteRange::new(start, 100).unwrap(),
    };
    let facts = Facts {
        blob: &blob,
        subject: &subject,
        want,
    };
    facts.check(StatusCode::from_u16(status).unwrap(), &map, range)
}

#[test]
fn accepts_only_what_was_asked_for() {
    let part = Want::Range(ByteRange::new(10, 20).unwrap());
    let right = ("content-range", "bytes 10-19/100");
    type Headers<'a> = &'a [(&'static str, &'a str)];
    let table: [(Want, u64, u16, Headers<'_>, Option<u64>); 17] = [
        (part, 0, 206, &[right, ("content-length", "10")], Some(0)),
        (part, 0, 206, &[right], Some(0)),
        (part, 0, 206, &[("content-range", "bytes 10-19/*")], Some(0)),
        (part, 0, 206, &[right, ("content-length", "11")], None),
        (part, 0, 206, &[("content-range", "bytes 10-20/100")], None),
        (part, 0, 206, &[("content-range", "bytes 9-19/100")], None),
        (part, 0, 206, &[("content-range", "bytes 10-19/99")], None),
        (
            part,
            0,
            206,
            &[("content-range", "bytes 10-18446744073709551615/*")],
            None,
        ),
        (part, 0, 206, &[("content-range", "10-19/100")], None),
        (part, 0, 206, &[], None),
        (part, 0, 206, &[right, ("content-encoding", "gzip")], None),
        (part, 0, 200, &[("content-length", "100")], None),
        (Want::Whole, 0, 200, &[("content-length", "100")], Some(0)),
        (Want::Whole, 0, 200, &[("content-length", "99")], None),
        (
            Want::Whole,
            0,
            206,
            &[("content-range", "bytes 0-99/100")],
            None,
        ),
        (
            Want::Whole,
            40,
            206,
            &[("content-range", "bytes 40-99/100")],
            Some(0),
        ),
        (Want::Whole, 40, 200, &[("content-length", "100")], Some(40)),
    ];
    for (want, start, status, headers, expected) in table {
        let got = check(want, start, status, headers);
        assert_eq!(got.ok(), expected, "{want:?} {start} {status} {headers:?}");
    }
}

#[test]
fn ignored_ranges_are_unsupported_not_malformed() {
    let part = Want::Range(ByteRange::new(10, 20).unwrap());
    let error = check(part, 0, 200, &[]).unwrap_err();
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
