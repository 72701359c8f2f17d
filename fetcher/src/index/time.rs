//! RFC 3339 times as Go writes them into tables of contents.
//!
//! Invariant: accepts a full date, time and zone in years 0 to 9999 and nothing else.

use super::Timestamp;

/// `2023-11-14T22:13:20[.fraction](Z|±hh:mm)`; an empty string is an unknown time.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    if text.is_empty() {
        return Some(Timestamp::default());
    }
    let bytes = text.as_bytes();
    let field = |at: usize, len: usize| number(bytes.get(at..at + len)?);
    let mark = |at: usize, byte: u8| (bytes.get(at) == Some(&byte)).then_some(());
    mark(4, b'-')?;
    mark(7, b'-')?;
    mark(10, b'T')?;
    mark(13, b':')?;
    mark(16, b':')?;
    let (year, month, day) = (field(0, 4)?, field(5, 2)?, field(8, 2)?);
    let (hour, minute, second) = (field(11, 2)?, field(14, 2)?, field(17, 2)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let (nanos, zone) = fraction(bytes.get(19..)?)?;
    let secs = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset(zone)?;
    Some(Timestamp { secs, nanos })
}

fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0_i64, |value, byte| {
        byte.is_ascii_digit()
            .then(|| value * 10 + i64::from(byte - b'0'))
    })
}

/// Splits an optional fraction from the zone; digits past nanoseconds are dropped.
fn fraction(rest: &[u8]) -> Option<(u32, &[u8])> {
    let Some(digits) = rest.strip_prefix(b".") else {
        return Some((0, rest));
    };
    let len = digits
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    if len == 0 {
        return None;
    }
    let (digits, zone) = digits.split_at_checked(len)?;
    let nanos = (0..9).fold(0, |nanos, at| {
        nanos * 10 + digits.get(at).map_or(0, |byte| u32::from(byte - b'0'))
    });
    Some((nanos, zone))
}

/// Seconds east of UTC.
fn offset(zone: &[u8]) -> Option<i64> {
    match zone {
        b"Z" => Some(0),
        [sign @ (b'+' | b'-'), h0, h1, b':', m0, m1] => {
            let (hours, minutes) = (number(&[*h0, *h1])?, number(&[*m0, *m1])?);
            let seconds = hours * 3600 + minutes * 60;
            (hours < 24 && minutes < 60).then_some(if *sign == b'-' { -seconds } else { seconds })
        }
        _ => None,
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar. Years are counted from
/// March, so that the leap day is the last of its year.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        for (text, secs, nanos) in [
            ("", 0, 0),
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2023-11-14T22:13:20Z", 1_700_000_000, 0),
            ("2023-11-14T22:13:20.5Z", 1_700_000_000, 500_000_000),
            (
                "2023-11-14T22:13:20.1234567891Z",
                1_700_000_000,
                123_456_789,
            ),
            ("2023-11-15T00:13:20+02:00", 1_700_000_000, 0),
            ("2023-11-14T16:43:20-05:30", 1_700_000_000, 0),
            ("2024-02-29T12:00:00Z", 1_709_208_000, 0),
            ("1969-12-31T23:59:59Z", -1, 0),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
        ] {
            assert_eq!(parse(text), Some(Timestamp { secs, nanos }), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "2023",
            "2023-11-14",
            "2023-13-14T22:13:20Z",
            "2023-11-14T24:13:20Z",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20ZZ",
            "2023-11-14 22:13:20Z",
            "-023-11-14T22:13:20Z",
            "2023-11-14T22:13:20+2:00",
            "ümlaut-äöü-ümlaut-x",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
