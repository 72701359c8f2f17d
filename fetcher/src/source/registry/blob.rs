//! The ranged blob reader.
//!
//! Invariant: a body yields exactly the bytes asked for, in order, or one error and then
//! nothing. A connection that breaks is resumed where it broke; the deadline and the
//! count of failures start over with every byte that arrives. An answer to a range is
//! held to the letter: status, `Content-Range`, length.
//!
//! Several parts of a blob are asked for in one request: a registry's work for a request
//! is mostly the same however little it is for. Many servers can do that and some cannot;
//! they answer with everything, or with the first part. A host that does is asked for one
//! part at a time from then on, as is one that refuses, and the body goes on as if nothing had
//! happened.

mod facts;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, stream};
use http::{Method, StatusCode, header};

use self::facts::{Facts, Form};
use super::multipart::Multipart;
use super::origin::{Asker, Question};
use super::{Core, RegistrySource, Route, answer};
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
pub(crate) enum Want {
    /// Parts; a source without ranges is an error.
    Parts,
    /// Everything, by ranges only when resuming.
    Whole,
}

/// Opens a body of `parts`, which ascend: the answer's headers have arrived and are right.
pub(super) async fn open(
    source: &RegistrySource,
    blob: &BlobRef,
    want: Want,
    parts: &[ByteRange],
) -> Result<Body> {
    let attempts = source.attempts(format!("blob {}", blob.digest), &blob.repository);
    // Who asks for it has read the manifest that names it.
    let attempts = attempts.lasting();
    let is_some = |part: &ByteRange| !part.is_empty();
    let mut reader = Reader {
        core: source.core.clone(),
        blob: blob.clone(),
        want,
        left: parts.iter().copied().filter(is_some).collect(),
        live: None,
        attempts,
    };
    if !reader.left.is_empty() {
        reader.connect().await?;
    }
    Ok(stream::try_unfold(reader, |mut reader| async move {
        Ok(reader.next_piece().await?.map(|piece| (piece, reader)))
    })
    .boxed())
}

/// Size of a blob by the registry's word.
pub(super) async fn stat(
    source: &RegistrySource,
    repository: &Repository,
    digest: &Digest,
) -> Result<u64> {
    let core = &*source.core;
    let access = core.access(repository);
    let mut attempts = source.attempts(format!("blob {digest}"), repository);
    let subject = attempts.subject().clone();
    let asker = Asker {
        core,
        access: &access,
        subject: &subject,
    };
    let path = core.api(repository, &tail(digest));
    let head = Question {
        method: Method::HEAD,
        ..Question::get()
    };
    let first_byte = Question {
        ranges: ByteRange::at(0, 1).into_iter().collect(),
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

fn tail(digest: &Digest) -> String {
    format!("/blobs/{digest}")
}

/// Takes `bytes` off the front of ranges that ascend.
pub(crate) fn take_off(left: &mut VecDeque<ByteRange>, mut bytes: u64) {
    while let Some(part) = left.pop_front() {
        let taken = bytes.min(part.len());
        bytes -= taken;
        let rest = ByteRange::new(part.start() + taken, part.end());
        if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
            return left.push_front(rest);
        }
        if bytes == 0 {
            return;
        }
    }
}

/// An answer that carries the next wanted bytes.
struct Live {
    answer: Answer,
    form: Form,
    /// Wanted bytes that it is to bring yet.
    left: u64,
    /// Whether its parts turned out to be of no use.
    confusing: bool,
}

/// A body in progress.
struct Reader {
    core: Arc<Core>,
    blob: BlobRef,
    want: Want,
    /// What is still to come, ascending, none of it empty.
    left: VecDeque<ByteRange>,
    live: Option<Live>,
    attempts: Attempts,
}

impl Reader {
    async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.live.as_ref().is_some_and(|live| live.left == 0) {
                self.finish().await?;
            }
            let Some(next) = self.left.front().copied() else {
                return Ok(None);
            };
            let Some(live) = &mut self.live else {
                self.connect().await?;
                continue;
            };
            let fault = match self.attempts.bound(live.piece(next)).await {
                Ok(Some(piece)) if piece.len() as u64 > live.left => return Err(self.too_long()),
                Ok(Some(piece)) => {
                    live.left -= piece.len() as u64;
                    take_off(&mut self.left, piece.len() as u64);
                    self.attempts.progress();
                    return Ok(Some(piece));
                }
                Ok(None) => Fault::broken(format!("the body ended {} bytes early", live.left)),
                Err(fault) => fault,
            };
            if live.confusing {
                tracing::debug!(digest = %self.blob.digest, ?fault, "asking for one part at a time");
                self.core.ask_one_part_of(&self.blob.repository);
                self.live = None;
                continue;
            }
            self.live = None;
            self.attempts.after(fault).await?;
        }
    }

    /// Takes the end of the body, which puts the connection back into the pool.
    async fn finish(&mut self) -> Result<()> {
        let Some(mut live) = self.live.take() else {
            return Ok(());
        };
        match self.attempts.bound(live.end()).await {
            Ok(true) => Err(self.too_long()),
            // All bytes are here; what happens to the connection now changes nothing.
            Ok(false) | Err(_) => Ok(()),
        }
    }

    async fn connect(&mut self) -> Result<()> {
        loop {
            let subject = self.attempts.subject().clone();
            let parts_max = self.core.parts_max(&self.blob.repository);
            let opening = Opening {
                core: &self.core,
                blob: &self.blob,
                subject: &subject,
                want: self.want,
                parts: self.left.iter().copied().take(parts_max).collect(),
            };
            match self.attempts.bound(opening.run()).await {
                Ok(Some(live)) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Ok(None) => self.core.ask_one_part_of(&self.blob.repository),
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
    /// The next wanted bytes, which begin where `next` does; `None` if the body ends. Of
    /// parts, bytes behind `next` are left for later.
    async fn piece(&mut self, next: ByteRange) -> Result<Option<Bytes>, Fault> {
        loop {
            if let Form::Parts { parts, piece } = &mut self.form {
                match wanted(parts, piece, next) {
                    Ok(None) => self.confusing = parts.is_over(),
                    Ok(bytes) => return Ok(bytes),
                    Err(reason) => {
                        self.confusing = true;
                        return Err(Fault::broken(reason));
                    }
                }
            }
            let Some(mut came) = self.answer.piece().await? else {
                return Ok(None);
            };
            match &mut self.form {
                Form::Parts { piece, .. } => *piece = came,
                Form::Plain { skip } => {
                    let skipped = usize::try_from(*skip).unwrap_or(usize::MAX).min(came.len());
                    came.advance(skipped);
                    *skip -= skipped as u64;
                    if !came.is_empty() {
                        return Ok(Some(came));
                    }
                }
            }
        }
    }

    /// Whether bytes come that nobody asked for.
    async fn end(&mut self) -> Result<bool, Fault> {
        while let Some(mut came) = self.answer.piece().await? {
            match &mut self.form {
                Form::Plain { .. } => return Ok(true),
                // More than was asked for may come in parts. It ends when they do.
                Form::Parts { parts, .. } if !parts.is_over() => {
                    let mut next = || parts.next(&mut came, u64::MAX).map_err(Fault::broken);
                    while next()?.is_some() {}
                }
                Form::Parts { .. } => {}
            }
        }
        Ok(false)
    }
}

/// Bytes of `next` from its start on, as far as `piece` has them. A server may send parts
/// joined, with what is between them; that is dropped.
fn wanted(
    parts: &mut Multipart,
    piece: &mut Bytes,
    next: ByteRange,
) -> Result<Option<Bytes>, String> {
    while let Some((at, mut bytes)) = parts.next(piece, next.end())? {
        if at > next.start() {
            let start = next.start();
            return Err(format!("bytes {start} to {at} were left out"));
        }
        let before = usize::try_from(next.start() - at).unwrap_or(usize::MAX);
        bytes.advance(before.min(bytes.len()));
        if !bytes.is_empty() {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// One attempt to get an answer that carries `range`.
struct Opening<'a> {
    core: &'a Core,
    blob: &'a BlobRef,
    subject: &'a Subject,
    want: Want,
    /// What is asked for: ascending, at least one.
    parts: Vec<ByteRange>,
}

impl Opening<'_> {
    /// `None` if the host turns out to serve one part at a time.
    async fn run(&self) -> Result<Option<Live>, Fault> {
        let mut stale = None;
        for _ in 0..ROUTE_TRIES {
            let (route, first) = self.route().await?;
            let mut answer = match first {
                Some(answer) => answer,
                None => self.ask(&route).await?,
            };
            if matches!(answer.status.as_u16(), 200 | 206) {
                let form = self
                    .facts()
                    .check(answer.status, &answer.headers, &self.parts)?;
                let left = self.parts.iter().map(ByteRange::len).sum();
                return Ok(form.map(|form| Live {
                    answer,
                    form,
                    left,
                    confusing: false,
                }));
            }
            if self.refuses_several(&route, answer.status) {
                return Ok(None);
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

    fn facts(&self) -> Facts<'_> {
        Facts {
            blob: self.blob,
            subject: self.subject,
            want: self.want,
        }
    }

    /// Where the blob is, and the answer itself if the registry had to be asked and
    /// serves the bytes. While nobody knows, a few ask side by side: who waits for somebody
    /// else's answer is a round trip later.
    async fn route(&self) -> Result<(Route, Option<Answer>), Fault> {
        let key = (self.blob.repository.clone(), self.blob.digest);
        let routes = &self.core.routes;
        if let Some(route) = routes.peek(&key) {
            return Ok((route, None));
        }
        if let Ok(_turn) = self.core.askers.try_acquire() {
            let (route, answer) = self.find().await?;
            routes.keep(key, route.clone());
            return Ok((route, answer));
        }
        let mut own = None;
        let route = routes
            .get(
                key,
                |_| true,
                || async {
                    let (route, answer) = self.find().await?;
                    own = answer;
                    Ok::<_, Fault>(route)
                },
            )
            .await?;
        Ok((route, own))
    }

    /// Asks the registry where the blob is.
    async fn find(&self) -> Result<(Route, Option<Answer>), Fault> {
        let mut answer = self.ask(&Route::Origin).await?;
        if let Some(target) = answer::redirect(self.subject, &answer)? {
            self.core.counters.add(Count::Redirects, 1);
            return Ok((Route::Elsewhere(target), None));
        }
        let is_of_use = matches!(answer.status.as_u16(), 200 | 206)
            || self.refuses_several(&Route::Origin, answer.status);
        if !is_of_use {
            return Err(answer::fault(self.subject, &mut answer).await);
        }
        Ok((Route::Origin, Some(answer)))
    }

    /// Whether an answer may be to the number of parts alone: some servers know ranges of one
    /// part only, and call others wrong (zot says 416).
    fn refuses_several(&self, route: &Route, status: StatusCode) -> bool {
        self.parts.len() > 1
            && match status.as_u16() {
                416 | 501 => true,
                // Elsewhere it is the address that is too old.
                400 => *route == Route::Origin,
                _ => false,
            }
    }

    async fn ask(&self, route: &Route) -> Result<Answer, Fault> {
        let access = self.core.access(&self.blob.repository);
        let asker = Asker {
            core: self.core,
            access: &access,
            subject: self.subject,
        };
        let mut question = Question::get();
        if !self.facts().is_whole(&self.parts) {
            question.ranges.clone_from(&self.parts);
        }
        match route {
            Route::Origin => {
                let path = self
                    .core
                    .api(&self.blob.repository, &tail(&self.blob.digest));
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

#[cfg(test)]
mod tests;
