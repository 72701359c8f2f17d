//! Quoted text with Go's escapes.
//!
//! Pure. Invariant: what is returned is UTF-8; an escape that makes it something else is
//! refused, as labels and names are UTF-8 and it could match none of them.

/// Reads a text that begins and ends with `quote` from the start of `input`. Returns it
/// without quotes and escapes, and what follows; `None` if it is malformed.
pub(super) fn unquote(input: &str, quote: char) -> Option<(String, &str)> {
    let mut rest = input.strip_prefix(quote)?;
    let mut bytes = Vec::new();
    loop {
        let mut chars = rest.chars();
        let c = chars.next()?;
        rest = chars.as_str();
        match c {
            '\n' => return None,
            '\\' => rest = escape(rest, quote, &mut bytes)?,
            c if c == quote => return Some((String::from_utf8(bytes).ok()?, rest)),
            c => push(&mut bytes, c),
        }
    }
}

/// What stands after a backslash: appends what it means, returns what follows.
fn escape<'a>(input: &'a str, quote: char, bytes: &mut Vec<u8>) -> Option<&'a str> {
    let mut chars = input.chars();
    let c = chars.next()?;
    let rest = chars.as_str();
    match c {
        'a' => bytes.push(7),
        'b' => bytes.push(8),
        't' => bytes.push(b'\t'),
        'n' => bytes.push(b'\n'),
        'v' => bytes.push(11),
        'f' => bytes.push(12),
        'r' => bytes.push(b'\r'),
        '\\' => bytes.push(b'\\'),
        'x' => {
            let (value, rest) = digits(rest, 16, 2)?;
            bytes.push(u8::try_from(value).ok()?);
            return Some(rest);
        }
        'u' | 'U' => {
            let (value, rest) = digits(rest, 16, if c == 'u' { 4 } else { 8 })?;
            push(bytes, char::from_u32(value)?);
            return Some(rest);
        }
        '0'..='7' => {
            let (value, rest) = digits(input, 8, 3)?;
            bytes.push(u8::try_from(value).ok()?);
            return Some(rest);
        }
        c if c == quote => push(bytes, c),
        _ => return None,
    }
    Some(rest)
}

fn digits(input: &str, radix: u32, count: usize) -> Option<(u32, &str)> {
    let (text, rest) = input.split_at_checked(count)?;
    // A sign would be taken for part of the number.
    let plain = text.chars().all(|c| c.is_digit(radix));
    Some((
        u32::from_str_radix(text, radix).ok().filter(|_| plain)?,
        rest,
    ))
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}
