//! Answers with several ranges of a blob: `multipart/byteranges` of RFC 9110, 15.3.7.2.
//!
//! Invariant: what comes out are bytes of the blob with their true offsets as the server
//! states them, ascending; anything that cannot be followed is an error that says why.
//! Every length is bounded. Pure: takes pieces of a body as they come, copies none of the
//! blob's bytes. Never judges whether the ranges are those that were asked for.
//!
//! ```text
//! [CRLF] --boundary CRLF header* CRLF bytes  CRLF --boundary … CRLF --boundary-- …
//! ```

use bytes::{Buf as _, Bytes};

use crate::types::ByteRange;

/// RFC 2046, 5.1.1.
const BOUNDARY_BYTES_MAX: usize = 70;
/// Most bytes between two parts. Servers send two short headers.
const HEAD_BYTES_MAX: usize = 4 << 10;

/// The boundary that a `Content-Type` of `multipart/byteranges` names.
pub(crate) fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/byteranges") {
        return None;
    }
    let value = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let is_boundary = name.trim().eq_ignore_ascii_case("boundary");
        is_boundary.then(|| value.trim().trim_matches('"'))
    })?;
    (!value.is_empty() && value.len() <= BOUNDARY_BYTES_MAX).then_some(value)
}

/// `bytes a-b/size` or `bytes a-b/*`: the range, if it lies in a blob of `size` bytes and
/// the stated size is that one.
pub(super) fn content_range(stated: &str, size: u64) -> Option<ByteRange> {
    let (span, stated_size) = stated.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.trim().split_once('-')?;
    let end = last.parse::<u64>().ok()?.checked_add(1)?;
    let range = ByteRange::new(first.parse().ok()?, end)?;
    let fits = stated_size == "*" || stated_size.parse() == Ok(size);
    (fits && !range.is_empty() && range.end() <= size).then_some(range)
}

/// A body of several parts, as far as it has come.
#[derive(Debug)]
pub(crate) struct Multipart {
    /// `CRLF --boundary`.
    delimiter: Vec<u8>,
    size: u64,
    state: State,
    /// Where the last part ended.
    reached: u64,
}

#[derive(Debug)]
enum State {
    /// Between parts: what has come of the delimiter and the part's headers.
    Head(Vec<u8>),
    /// In a part: its bytes still to come.
    Part(ByteRange),
    /// Behind the last part.
    End,
}

impl Multipart {
    /// A body whose parts are separated by `boundary`, of a blob of `size` bytes.
    pub(crate) fn new(boundary: &str, size: u64) -> Self {
        Self {
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            size,
            // The first delimiter may come without its CRLF.
            state: State::Head(Vec::new()),
            reached: 0,
        }
    }

    /// Whether the last part has ended.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::End)
    }

    /// The next bytes of the blob in `piece` and where they begin; none of them at or
    /// behind `end` unless they begin there. What comes out is taken from `piece`; `None`
    /// when all of it has been taken. The error says what is wrong.
    pub(crate) fn next(
        &mut self,
        piece: &mut Bytes,
        end: u64,
    ) -> Result<Option<(u64, Bytes)>, String> {
        while !piece.is_empty() {
            match &mut self.state {
                State::End => piece.clear(),
                State::Head(head) => {
                    let Some(part) = read_head(head, &self.delimiter, piece)? else {
                        continue;
                    };
                    self.state = self.begin(part)?;
                }
                State::Part(left) => {
                    let at = left.start();
                    let len = match end.min(left.end()).checked_sub(at) {
                        Some(len) if len > 0 => len,
                        _ => left.len(),
                    };
                    let len = usize::try_from(len).map_or(piece.len(), |n| n.min(piece.len()));
                    let bytes = piece.split_to(len);
                    self.reached = at.saturating_add(len as u64);
                    self.state = match ByteRange::new(self.reached, left.end()) {
                        Some(left) if !left.is_empty() => State::Part(left),
                        _ => State::Head(Vec::new()),
                    };
                    return Ok(Some((at, bytes)));
                }
            }
        }
        Ok(None)
    }

    fn begin(&self, head: Head) -> Result<State, String> {
        let stated = match head {
            Head::Last => return Ok(State::End),
            Head::Part(stated) => stated,
        };
        let Some(range) = content_range(&stated, self.size) else {
            return Err(format!("a part with Content-Range {stated:?}"));
        };
        if range.start() < self.reached {
            let reached = self.reached;
            return Err(format!("a part at {range} after bytes up to {reached}"));
        }
        Ok(State::Part(range))
    }
}

/// What stands between two parts.
enum Head {
    /// The `Content-Range` of the part that follows.
    Part(String),
    /// There are no more.
    Last,
}

/// Moves bytes from `piece` to `head` until it is whole.
fn read_head(
    head: &mut Vec<u8>,
    delimiter: &[u8],
    piece: &mut Bytes,
) -> Result<Option<Head>, String> {
    let before = head.len();
    let room = HEAD_BYTES_MAX.saturating_sub(before).min(piece.len());
    head.extend_from_slice(piece.get(..room).unwrap_or_default());
    let line = after_delimiter(head, delimiter)?;
    if line.is_some_and(|line| line.starts_with(b"--")) {
        piece.clear();
        return Ok(Some(Head::Last));
    }
    let ends = |at: &usize| {
        head.get(*at..)
            .is_some_and(|rest| rest.starts_with(b"\r\n\r\n"))
    };
    let Some(end) = (0..head.len()).find(ends) else {
        if head.len() >= HEAD_BYTES_MAX {
            return Err(format!(
                "more than {HEAD_BYTES_MAX} bytes between two parts"
            ));
        }
        piece.clear();
        return Ok(None);
    };
    let used = end.saturating_add(4).saturating_sub(before);
    piece.advance(used.min(piece.len()));
    let text = String::from_utf8_lossy(head.get(..end).unwrap_or_default());
    let stated = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_range = name.trim().eq_ignore_ascii_case("content-range");
        is_range.then(|| value.trim().to_owned())
    });
    match stated {
        Some(stated) => Ok(Some(Head::Part(stated))),
        None => Err("a part without Content-Range".to_owned()),
    }
}

/// What follows the delimiter, once it and two bytes more are here.
fn after_delimiter<'a>(head: &'a [u8], delimiter: &[u8]) -> Result<Option<&'a [u8]>, String> {
    let bare = delimiter.get(2..).unwrap_or_default();
    let expected = if head.first() == Some(&b'-') {
        bare
    } else {
        delimiter
    };
    let common = head.len().min(expected.len());
    if head.get(..common) != expected.get(..common) {
        return Err("something else than the boundary between two parts".to_owned());
    }
    Ok(head.get(expected.len()..).filter(|rest| rest.len() >= 2))
}

#[cfg(test)]
mod tests;
