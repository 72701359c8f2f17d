//! The ranged blob reader.
//!
//! Invariant: a body yields exactly the bytes asked for, in order, or one error and then
//! nothing. A connection that breaks is resumed where it broke; the deadline and the
//! count of failures start over with every byte that arrives. An answer to a range is
//! held to the letter: status, `Content-Range`, length.

use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, stream};
use http::header::{self, HeaderMap};
use http::{Method, StatusCode};

use super::origin::{Asker, Question};
use super::{Core, Route, answer};
use crate::source::http::Answer;
use crate::source::retry::{Attempts, Fault, Subject};
use crate::source::stats::Count;
use crate::source::{BlobRef, Body};
use crate::types::{ByteRange, Digest, Repository};
use crate::{Error, Result};

/// A remembered redirect is given up once per attempt, then the registry is asked again.
const ROUTE_TRIES: usize = 2;

/// Which bytes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// A part; a source without ranges is an error.
    Range(ByteRange),
    /// Everything, by ranges only when resuming.
    Whole,
}

/// Opens a body: the answer's headers have arrived and are right.
pub(super) async fn open(core: &Arc<Core>, blob: &BlobRef, want: Want) -> Result<Body> {
    let range = match want {
        Want::Range(range) => range,
        Want::Whole => whole(blob),
    };
    let attempts = core.attempts(format!("blob {}", blob.digest), &blob.repository);
    let mut reader = Reader {
        core: core.clone(),
        blob: blob.clone(),
        want,
        next: range.start(),
        end: range.end(),
        live: None,
        attempts,
    };
    if !range.is_empty() {
        reader.connect().await?;
    }
    Ok(stream::try_unfold(reader, |mut reader| async move {
        Ok(reader.next_piece().await?.map(|piece| (piece, reader)))
    })
    .boxed())
}

/// Size of a blob by the registry's word.
pub(super) async fn stat(core: &Core, repository: &Repository, digest: &Digest) -> Result<u64> {
    let access = core.access(repository);
    let mut attempts = core.attempts(format!("blob {digest}"), repository);
    let subject = attempts.subject().clone();
    let asker = Asker {
        core,
        access: &access,
        subject: &subject,
    };
    let path = blob_path(repository, digest);
    let head = Question {
        method: Method::HEAD,
        ..Question::get()
    };
    let first_byte = Question {
        range: ByteRange::at(0, 1),
        ..Question::get()
    };
    attempts
        .run(|| async {
            let mut answer = asker.origin(&path, &head).await?;
            if answer.status == StatusCode::OK
                && let Some(size) = answer.content_length()
            {
                return Ok(size);
            }
            if !answer.status.is_redirection() && answer.status != StatusCode::OK {
                return Err(answer::fault(&subject, &mut answer).await);
            }
            drop(answer);
            // A signed redirect is often good for GET only, so the size is taken from a
            // ranged GET's answer.
            let mut answer = asker.anywhere(&path, &first_byte).await?;
            match stated_size(&answer) {
                Some(size) => Ok(size),
                None => Err(answer::fault(&subject, &mut answer).await),
            }
        })
        .await
}

/// Size by `Content-Range` of a 206, `Content-Length` of a 200, or 416's `*/0`.
fn stated_size(answer: &Answer) -> Option<u64> {
    let content_range = answer.text(header::CONTENT_RANGE);
    match answer.status.as_u16() {
        200 => answer.content_length(),
        206 => content_range?.rsplit_once('/')?.1.parse().ok(),
        416 => (content_range?.trim() == "bytes */0").then_some(0),
        _ => None,
    }
}

fn whole(blob: &BlobRef) -> ByteRange {
    ByteRange::at(0, blob.size).expect("0 + size cannot pass u64::MAX")
}

fn blob_path(repository: &Repository, digest: &Digest) -> String {
    format!("/v2/{}/blobs/{digest}", repository.path())
}

/// An answer that carries the wanted bytes after `skip` others.
struct Live {
    answer: Answer,
    skip: u64,
}

/// A body in progress: bytes `next..end` are still to come.
struct Reader {
    core: Arc<Core>,
    blob: BlobRef,
    want: Want,
    next: u64,
    end: u64,
    live: Option<Live>,
    attempts: Attempts,
}

impl Reader {
    async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.next == self.end {
                return self.finish().await;
            }
            let Some(live) = &mut self.live else {
                self.connect().await?;
                continue;
            };
            let fault = match self.attempts.bound(live.piece()).await {
                Ok(Some(piece)) if piece.len() as u64 > self.end - self.next => {
                    return Err(self.too_long());
                }
                Ok(Some(piece)) => {
                    self.next += piece.len() as u64;
                    self.attempts.progress();
                    return Ok(Some(piece));
                }
                Ok(None) => Fault::broken(format!(
                    "the body ended {} bytes early",
                    self.end - self.next
                )),
                Err(fault) => fault,
            };
            self.live = None;
            self.attempts.after(fault).await?;
        }
    }

    /// Takes the end of the body, which puts the connection back into the pool.
    async fn finish(&mut self) -> Result<Option<Bytes>> {
        let Some(mut live) = self.live.take() else {
            return Ok(None);
        };
        match self.attempts.bound(live.piece()).await {
            Ok(Some(_)) => Err(self.too_long()),
            // All bytes are here; what happens to the connection now changes nothing.
            Ok(None) | Err(_) => Ok(None),
        }
    }

    async fn connect(&mut self) -> Result<()> {
        let range = ByteRange::new(self.next, self.end).expect("next only grows up to end");
        loop {
            let subject = self.attempts.subject().clone();
            let opening = Opening {
                core: &self.core,
                blob: &self.blob,
                subject: &subject,
                want: self.want,
                range,
            };
            match self.attempts.bound(opening.run()).await {
                Ok(live) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Err(fault) => self.attempts.after(fault).await?,
            }
        }
    }

    fn too_long(&self) -> Error {
        let Subject { what, host } = self.attempts.subject().clone();
        Error::malformed(what, format!("{host} sent more bytes than were asked for"))
    }
}

impl Live {
    /// The next wanted bytes.
    async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        while let Some(mut piece) = self.answer.piece().await? {
            let skipped = usize::try_from(self.skip)
                .unwrap_or(usize::MAX)
                .min(piece.len());
            piece.advance(skipped);
            self.skip -= skipped as u64;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

/// One attempt to get an answer that carries `range`.
struct Opening<'a> {
    core: &'a Core,
    blob: &'a BlobRef,
    subject: &'a Subject,
    want: Want,
    range: ByteRange,
}

impl Opening<'_> {
    async fn run(&self) -> Result<Live, Fault> {
        let mut stale = None;
        for _ in 0..ROUTE_TRIES {
            let (route, first) = self.route().await?;
            let mut answer = match first {
                Some(answer) => answer,
                None => self.ask(&route).await?,
            };
            if matches!(answer.status.as_u16(), 200 | 206) {
                let facts = Facts {
                    blob: self.blob,
                    subject: self.subject,
                    want: self.want,
                };
                let skip = facts.check(answer.status, &answer.headers, self.range)?;
                return Ok(Live { answer, skip });
            }
            let fault = answer::fault(self.subject, &mut answer).await;
            if !is_stale(&route, answer.status) {
                return Err(fault);
            }
            self.forget(&route);
            stale = Some(fault);
        }
        Err(stale.unwrap_or_else(|| Fault::broken("the registry keeps redirecting")))
    }

    /// Where the blob is, and the answer itself if the registry had to be asked and
    /// serves the bytes. Of many openings of one blob at once, one asks.
    async fn route(&self) -> Result<(Route, Option<Answer>), Fault> {
        let key = (self.blob.repository.clone(), self.blob.digest);
        let mut first = None;
        let route = self
            .core
            .routes
            .get(
                key,
                |_| true,
                || async {
                    let mut answer = self.ask(&Route::Origin).await?;
                    if let Some(target) = answer::redirect(self.subject, &answer)? {
                        self.core.counters.add(Count::Redirects, 1);
                        return Ok(Route::Elsewhere(target));
                    }
                    if !matches!(answer.status.as_u16(), 200 | 206) {
                        return Err(answer::fault(self.subject, &mut answer).await);
                    }
                    first = Some(answer);
                    Ok(Route::Origin)
                },
            )
            .await?;
        Ok((route, first))
    }

    async fn ask(&self, route: &Route) -> Result<Answer, Fault> {
        let access = self.core.access(&self.blob.repository);
        let asker = Asker {
            core: self.core,
            access: &access,
            subject: self.subject,
        };
        let ranged = self.want != Want::Whole || self.range != whole(self.blob);
        let question = Question {
            range: ranged.then_some(self.range),
            ..Question::get()
        };
        match route {
            Route::Origin => {
                let path = blob_path(&self.blob.repository, &self.blob.digest);
                asker.origin(&path, &question).await
            }
            Route::Elsewhere(target) => {
                let outcome = asker.elsewhere(target.clone(), &question).await;
                if outcome.is_err() {
                    self.forget(route);
                }
                outcome
            }
        }
    }

    fn forget(&self, failed: &Route) {
        let key = (self.blob.repository.clone(), self.blob.digest);
        self.core.routes.forget(&key, |route| route == failed);
    }
}

/// Whether an answer says that the remembered way is no longer good: a signed address
/// that expired, or a registry that serves blobs another way now.
fn is_stale(route: &Route, status: StatusCode) -> bool {
    match route {
        Route::Origin => status.is_redirection(),
        Route::Elsewhere(_) => matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410),
    }
}

/// What an answer is checked against.
struct Facts<'a> {
    blob: &'a BlobRef,
    subject: &'a Subject,
    want: Want,
}

impl Facts<'_> {
    /// Holds a successful answer to the letter. Yields how many bytes come before the
    /// wanted ones: not zero only when a whole read is resumed without ranges. Pure.
    fn check(&self, status: StatusCode, headers: &HeaderMap, range: ByteRange) -> Result<u64> {
        let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
        if let Some(coding) = text(header::CONTENT_ENCODING).filter(|c| *c != "identity") {
            return Err(self.wrong(format!(
                "with Content-Encoding {coding}, which nobody asked for"
            )));
        }
        let length = text(header::CONTENT_LENGTH).and_then(|t| t.trim().parse::<u64>().ok());
        let is_whole = self.want == Want::Whole && range == whole(self.blob);
        let (expected, skip) = match (status, self.want) {
            (StatusCode::PARTIAL_CONTENT, _) if is_whole => {
                return Err(
                    self.wrong("with part of the blob (206), though all of it was asked for")
                );
            }
            (StatusCode::PARTIAL_CONTENT, _) => {
                let stated = text(header::CONTENT_RANGE).unwrap_or("no Content-Range");
                if !self.is_range(stated, range) {
                    let asked = format!(
                        "bytes {}-{}/{}",
                        range.start(),
                        range.end() - 1,
                        self.blob.size
                    );
                    return Err(self.wrong(format!("with {stated:?} instead of {asked:?}")));
                }
                (range.len(), 0)
            }
            (_, Want::Whole) => (self.blob.size, range.start()),
            (_, Want::Range(_)) => return Err(self.no_ranges()),
        };
        match length {
            Some(length) if length != expected => {
                Err(self.wrong(format!("with {length} bytes instead of {expected}")))
            }
            Some(_) | None => Ok(skip),
        }
    }

    /// `bytes a-b/size` or `bytes a-b/*` of exactly `range`.
    fn is_range(&self, stated: &str, range: ByteRange) -> bool {
        let parse = || {
            let (span, size) = stated.strip_prefix("bytes ")?.trim().split_once('/')?;
            let (first, last) = span.split_once('-')?;
            let last: u64 = last.parse().ok()?;
            Some((first.parse::<u64>().ok()?, last.checked_add(1)?, size))
        };
        parse().is_some_and(|(start, end, size)| {
            let size_fits = size == "*" || size.parse() == Ok(self.blob.size);
            start == range.start() && end == range.end() && size_fits
        })
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

#[cfg(test)]
mod tests;
