//! What an answer must be to carry the wanted bytes.
//!
//! Invariant: pure. An answer that is not to the letter what was asked for is an error, or
//! tells that the server serves one part at a time; never bytes of another place.

use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderMap};

use super::super::multipart::{self, Multipart};
use super::Want;
use crate::source::BlobRef;
use crate::source::retry::Subject;
use crate::types::ByteRange;
use crate::{Error, Result};

/// How the wanted bytes are in the answer's body.
#[derive(Debug)]
pub(super) enum Form {
    /// After so many others.
    Plain { skip: u64 },
    /// In parts, of which this piece of the body has come.
    Parts { parts: Multipart, piece: Bytes },
}

/// What an answer is checked against.
pub(super) struct Facts<'a> {
    pub(super) blob: &'a BlobRef,
    pub(super) subject: &'a Subject,
    pub(super) want: Want,
}

impl Facts<'_> {
    /// Whether these parts are the blob, asked for without ranges.
    pub(super) fn is_whole(&self, parts: &[ByteRange]) -> bool {
        let len: u64 = parts.iter().map(ByteRange::len).sum();
        self.want == Want::Whole && len == self.blob.size
    }

    /// Holds a successful answer to the letter. `None` if several parts were asked for and
    /// the answer is about something else: the server can do one at a time. Pure.
    pub(super) fn check(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        parts: &[ByteRange],
    ) -> Result<Option<Form>> {
        let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
        if let Some(coding) = text(header::CONTENT_ENCODING).filter(|c| *c != "identity") {
            return Err(self.wrong(format!(
                "with Content-Encoding {coding}, which nobody asked for"
            )));
        }
        let [range] = parts else {
            let boundary = text(header::CONTENT_TYPE).and_then(multipart::boundary);
            let boundary = boundary.filter(|_| status == StatusCode::PARTIAL_CONTENT);
            return Ok(boundary.map(|boundary| Form::Parts {
                parts: Multipart::new(boundary, self.blob.size),
                piece: Bytes::new(),
            }));
        };
        let (expected, skip) = match (status, self.want) {
            (StatusCode::PARTIAL_CONTENT, _) if self.is_whole(parts) => {
                return Err(
                    self.wrong("with part of the blob (206), though all of it was asked for")
                );
            }
            (StatusCode::PARTIAL_CONTENT, _) => {
                let stated = text(header::CONTENT_RANGE).unwrap_or("no Content-Range");
                if multipart::content_range(stated, self.blob.size) != Some(*range) {
                    let (start, last, size) = (range.start(), range.end() - 1, self.blob.size);
                    let asked = format!("bytes {start}-{last}/{size}");
                    return Err(self.wrong(format!("with {stated:?} instead of {asked:?}")));
                }
                (range.len(), 0)
            }
            (_, Want::Whole) => (self.blob.size, range.start()),
            (_, Want::Parts) => return Err(self.no_ranges()),
        };
        let length = text(header::CONTENT_LENGTH).and_then(|t| t.trim().parse::<u64>().ok());
        match length {
            Some(length) if length != expected => {
                Err(self.wrong(format!("with {length} bytes instead of {expected}")))
            }
            Some(_) | None => Ok(Some(Form::Plain { skip })),
        }
    }

    fn wrong(&self, detail: impl std::fmt::Display) -> Error {
        let Subject { what, host } = self.subject.clone();
        Error::malformed(what, format!("{host} answered {detail}"))
    }

    fn no_ranges(&self) -> Error {
        let Subject { what, host } = self.subject.clone();
        Error::Unsupported {
            what: format!("a range of {what}"),
            detail: format!("{host} ignores Range requests; the layer has to be pulled in full"),
        }
    }
}
