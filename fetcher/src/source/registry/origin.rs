//! One question to a registry: with authorization, and through redirects.
//!
//! Invariant: `Authorization` and a site's own headers are only on requests that
//! [`Endpoint::owns`] covers; a 401, or a 403 to credentials, leads to at most two more tries:
//! with a new token, and with another credential if there is one.
//!
//! [`Endpoint::owns`]: crate::source::endpoint::Endpoint::owns

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Full;

use super::{Core, answer};
use crate::source::auth::{Access, authorize};
use crate::source::http::Answer;
use crate::source::retry::{Fault, Subject};
use crate::source::stats::Count;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Redirects followed in a row. Registries use one or two.
const HOPS_MAX: usize = 5;

/// What is asked, apart from where.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// GET or HEAD.
    pub(super) method: Method,
    /// Value of `Accept`.
    pub(super) accept: Option<HeaderValue>,
    /// Parts wanted, ascending, none of them empty; everything if there are none.
    pub(super) ranges: Vec<ByteRange>,
}

impl Question {
    /// A GET for all bytes of anything.
    pub(super) fn get() -> Self {
        Self {
            method: Method::GET,
            accept: None,
            ranges: Vec::new(),
        }
    }

    fn request(&self, uri: Uri, authorization: Option<&HeaderValue>) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        authorize(headers, authorization);
        if let Some(accept) = &self.accept {
            headers.insert(header::ACCEPT, accept.clone());
        }
        if !self.ranges.is_empty() {
            let last = |range: &ByteRange| range.end().saturating_sub(1);
            let part = |range: &ByteRange| format!("{}-{}", range.start(), last(range));
            let parts: Vec<String> = self.ranges.iter().map(part).collect();
            let value = HeaderValue::try_from(format!("bytes={}", parts.join(",")))
                .expect("digits are valid in a header");
            headers.insert(header::RANGE, value);
        }
        request
    }
}

/// Whom to ask and how failures are called.
pub(super) struct Asker<'a> {
    pub(super) core: &'a Core,
    pub(super) access: &'a Access,
    pub(super) subject: &'a Subject,
}

impl Asker<'_> {
    /// Asks the registry itself; a redirect is returned as it is, a 401 is not.
    pub(super) async fn origin(&self, path: &str, question: &Question) -> Result<Answer, Fault> {
        let uri = self.access.endpoint.uri(path)?;
        self.authorized(uri, question).await
    }

    /// Asks the registry and follows where it sends us.
    pub(super) async fn anywhere(&self, path: &str, question: &Question) -> Result<Answer, Fault> {
        let answer = self.origin(path, question).await?;
        let target = answer::redirect(self.subject, &answer)?;
        self.follow(answer, target, question).await
    }

    /// Asks the registry, and follows where it sends us within itself; elsewhere is nothing.
    pub(super) async fn nearby(&self, path: &str, question: &Question) -> Result<Answer, Fault> {
        let answer = self.origin(path, question).await?;
        let target = answer::redirect(self.subject, &answer)?;
        let is_near = |target: &Uri| self.access.endpoint.owns(target);
        if !target.as_ref().is_none_or(is_near) {
            let Subject { what, host } = self.subject.clone();
            return Err(Error::NotFound { what, host }.into());
        }
        self.follow(answer, target, question).await
    }

    /// The answer, or what is at `target` where it is a redirect to there.
    async fn follow(
        &self,
        answer: Answer,
        target: Option<Uri>,
        question: &Question,
    ) -> Result<Answer, Fault> {
        let Some(target) = target else {
            return Ok(answer);
        };
        self.core.counters.add(Count::Redirects, 1);
        drop(answer);
        self.elsewhere(target, question).await
    }

    /// Asks a redirect's target, and its targets in turn.
    pub(super) async fn elsewhere(&self, uri: Uri, question: &Question) -> Result<Answer, Fault> {
        let mut uri = uri;
        for _ in 0..HOPS_MAX {
            let answer = if self.access.endpoint.owns(&uri) {
                self.authorized(uri, question).await?
            } else {
                self.core
                    .transport
                    .send(question.request(uri, None))
                    .await?
            };
            match answer::redirect(self.subject, &answer)? {
                None => return Ok(answer),
                Some(target) => uri = target,
            }
        }
        let what = format!("{} at {}", self.subject.what, self.subject.host);
        Err(Error::limit(what, format!("more than {HOPS_MAX} redirects in a row")).into())
    }

    /// A request to the registry itself, with the headers it wants; what the question needs
    /// goes before them.
    fn own_request(
        &self,
        question: &Question,
        uri: Uri,
        authorization: Option<&HeaderValue>,
    ) -> Request<Full<Bytes>> {
        let mut request = question.request(uri, authorization);
        let needed = request.headers().clone();
        let wanted = self.core.site.headers.iter();
        for (name, value) in wanted.filter(|(name, _)| !needed.contains_key(*name)) {
            request.headers_mut().append(name, value.clone());
        }
        request
    }

    async fn send(
        &self,
        uri: &Uri,
        question: &Question,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, Fault> {
        let request = self.own_request(question, uri.clone(), authorization);
        self.core.transport.send(request).await
    }

    async fn authorized(&self, uri: Uri, question: &Question) -> Result<Answer, Fault> {
        let auth = &self.core.auth;
        let mut used = auth.header(self.access, self.subject).await?;
        let mut answer = self.send(&uri, question, used.as_ref()).await?;
        if !is_refused(&answer, used.as_ref()) {
            return Ok(answer);
        }
        auth.refused(self.access, used.as_ref(), &answer.headers)
            .await?;
        // What is asked next may need it.
        answer.give_up_slot();
        for try_other in [false, true] {
            if try_other && !auth.disown(self.access, used.as_ref()).await {
                break;
            }
            let renewed = auth.header(self.access, self.subject).await?;
            if renewed != used {
                answer = self.send(&uri, question, renewed.as_ref()).await?;
                if !is_refused(&answer, renewed.as_ref()) {
                    return Ok(answer);
                }
                answer.give_up_slot();
            }
            used = renewed;
        }
        if answer.status == StatusCode::FORBIDDEN {
            return Ok(answer);
        }
        let words = answer::registry_words(&mut answer).await;
        let denied = auth.denied(self.access, self.subject, words.as_deref());
        Err(denied.await.into())
    }
}

/// Whether other credentials may be answered otherwise. Some registries say 403 to ones that
/// have expired (ECR does) or that may not read this, where others could.
fn is_refused(answer: &Answer, used: Option<&HeaderValue>) -> bool {
    match answer.status {
        StatusCode::UNAUTHORIZED => true,
        StatusCode::FORBIDDEN => used.is_some(),
        _ => false,
    }
}
