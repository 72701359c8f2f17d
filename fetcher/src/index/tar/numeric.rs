//! Numbers of tar headers and PAX records.
//!
//! Invariant: what does not fit its type is `None`, never a wrapped value.
#![warn(clippy::indexing_slicing)]

use crate::index::Timestamp;

/// A header field: octal digits between spaces and NULs, or GNU's base 256 where the
/// first bit is set. An empty field is 0.
pub(super) fn field(bytes: &[u8]) -> Option<i64> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base256(bytes),
        _ => octal(bytes),
    }
}

fn octal(bytes: &[u8]) -> Option<i64> {
    let padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = bytes
        .iter()
        .position(|byte| !padding(byte))
        .unwrap_or(bytes.len());
    let digits = bytes.get(start..)?;
    let len = digits.iter().position(padding).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at_checked(len)?;
    if !rest.iter().all(padding) {
        return None;
    }
    digits.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// Two's complement, big endian, with the first bit only a mark.
fn base256(bytes: &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first()?;
    let sign: i64 = if first & 0x40 != 0 { -1 } else { 0 };
    let top = (sign << 6) | i64::from(first & 0x3f);
    rest.iter().try_fold(top, |value, byte| {
        value.checked_mul(256)?.checked_add(i64::from(*byte))
    })
}

/// A decimal number of a PAX record.
pub(super) fn decimal<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// A time of a PAX record: `[-]seconds[.fraction]`; digits past nanoseconds are dropped.
pub(super) fn time(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty()
        || !whole
            .bytes()
            .chain(fraction.bytes())
            .all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    let secs: i64 = whole.parse().ok()?;
    let mut digits = fraction.bytes();
    let nanos = (0..9).fold(0_u32, |nanos, _| {
        nanos * 10 + digits.next().map_or(0, |digit| u32::from(digit - b'0'))
    });
    Some(match (negative, nanos) {
        (false, nanos) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos },
        // A quarter of a second before 0 is second -1 and three quarters.
        (true, nanos) => Timestamp {
            secs: -secs - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields() {
        for (bytes, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"", Some(0)),
            (b"77777777777", Some(0o77_777_777_777)),
            (b"0000648\0", None),
            (b"12 34\0", None),
            (b"-1\0", None),
            (b"\x80\0\0\0\0\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe",
                Some(-2),
            ),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(field(bytes), value, "{bytes:?}");
        }
    }

    #[test]
    fn pax_numbers() {
        assert_eq!(decimal::<u32>(b"4294967295"), Some(u32::MAX));
        for bad in [&b"4294967296"[..], b"", b"-1", b"+1", b" 1", b"\xff"] {
            assert_eq!(decimal::<u32>(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn pax_times() {
        for (text, secs, nanos) in [
            ("0", 0, 0),
            ("1700000000.5", 1_700_000_000, 500_000_000),
            ("1.0000000019", 1, 1),
            ("-1", -1, 0),
            ("-0.25", -1, 750_000_000),
            ("-1.5", -2, 500_000_000),
            ("9223372036854775807", i64::MAX, 0),
        ] {
            assert_eq!(
                time(text.as_bytes()),
                Some(Timestamp { secs, nanos }),
                "{text}"
            );
        }
        for bad in ["", "-", ".5", "1.x", "+1", "1e3", "9223372036854775808"] {
            assert_eq!(time(bad.as_bytes()), None, "{bad}");
        }
    }
}
