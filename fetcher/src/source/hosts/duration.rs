//! Durations as Go writes them: `200ms`, `1.5s`, `1m30s`.
//!
//! Invariant: pure; an hour at most, which is longer than anyone waits for a connection.

use std::time::Duration;

const MAX: Duration = Duration::from_secs(3600);

/// The duration, or `None` if `text` is not one, is negative, or is too long.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut total = Duration::ZERO;
    loop {
        let (number, tail) = rest.split_at_checked(rest.find(|c| !is_number(c))?)?;
        let end = tail.find(is_number).unwrap_or(tail.len());
        let (unit, next) = tail.split_at_checked(end)?;
        let seconds = number.parse::<f64>().ok()? * seconds_of(unit)?;
        total = total.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        if next.is_empty() {
            return (total <= MAX).then_some(total);
        }
        rest = next;
    }
}

fn seconds_of(unit: &str) -> Option<f64> {
    match unit {
        "ns" => Some(1e-9),
        "us" | "\u{b5}s" | "\u{3bc}s" => Some(1e-6),
        "ms" => Some(1e-3),
        "s" => Some(1.0),
        "m" => Some(60.0),
        "h" => Some(3600.0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        let table = [
            ("200ms", Some(200)),
            ("3s", Some(3000)),
            ("1.5s", Some(1500)),
            (".5s", Some(500)),
            ("1m30s", Some(90_000)),
            ("+1s", Some(1000)),
            ("2000000ns", Some(2)),
            ("3000\u{b5}s", Some(3)),
            ("1h", Some(3_600_000)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("1h1s", None),
            ("-1s", None),
            ("", None),
            ("+", None),
            ("1", None),
            ("s", None),
            (".s", None),
            ("1.2.3s", None),
            ("1 s", None),
            ("1d", None),
            ("99999999999999999999h", None),
        ];
        for (text, ms) in table {
            assert_eq!(parse(text), ms.map(Duration::from_millis), "{text}");
        }
    }
}
