//! Sizes as people write them.
//!
//! Invariant: `k`, `m`, `g` and `t` are powers of 1024, as docker has them, on the command
//! line and in the config file alike.

use serde::{Deserialize as _, Deserializer, de};

/// `512m` is 512 MiB, as docker has it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (digits, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        Some(b't') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected a size such as 512m or 2g".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(0) | None => Err("the size must be above 0 and below 16 EiB".to_owned()),
        Some(bytes) => Ok(bytes),
    }
}

/// A size in a config file: text like `"50g"`, or `"0"`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(input)?;
    if text == "0" {
        return Ok(Some(0));
    }
    let bad = |why| de::Error::custom(format!("{text:?}: {why}"));
    parse_size(&text).map(Some).map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_dockers() {
        let table = [
            ("1", 1),
            ("4k", 4096),
            ("512m", 512 << 20),
            ("2GB", 2 << 30),
            ("1t", 1 << 40),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for bad in ["", "m", "-1", "1.5g", "0", "99999999999t", "1q"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
