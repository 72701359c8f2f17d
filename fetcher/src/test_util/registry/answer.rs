//! How the fake registry answers one request.

use std::convert::Infallible;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};

use super::{Asked, Auth, Endpoint, Fault, Paging, Shared, upload};
use crate::types::Digest;

pub(super) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub(super) type Answer = Response<Body>;

/// Pieces a body is sent in.
const PIECE_BYTES: usize = 8 << 10;

/// Answers one request on the registry's or the CDN's listener.
pub(super) async fn handle(
    shared: Arc<Shared>,
    cdn: bool,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let endpoint = match path.rsplit('/').nth(1) {
        _ if cdn => Endpoint::Cdn,
        _ if path == "/token" => Endpoint::Token,
        Some("manifests") => Endpoint::Manifest,
        Some("blobs") => Endpoint::Blob,
        Some("uploads") => Endpoint::Upload,
        Some("referrers") => Endpoint::Referrers,
        Some(_) | None => Endpoint::Other,
    };
    let asked = Asked {
        endpoint,
        target: request
            .uri()
            .path_and_query()
            .map_or(path.clone(), ToString::to_string),
        headers: request.headers().clone(),
    };
    shared.count(asked, request.version() == Version::HTTP_2);
    if endpoint == Endpoint::Token {
        let fault = shared.fault(endpoint);
        return Ok(match fault {
            Some(fault) => misbehave(fault, b"{}".to_vec().into()).await,
            None => token(&shared, request).await,
        });
    }
    if cdn && request.headers().contains_key(header::AUTHORIZATION) {
        shared.state.lock().requests.credentials_at_cdn += 1;
    }
    if !cdn && !authorized(&shared, &request) {
        let has_some = request.headers().contains_key(header::AUTHORIZATION);
        return Ok(match shared.setup.forbids && has_some {
            true => complaint(403, "DENIED", "your token has expired"),
            false => challenge(&shared),
        });
    }
    let fault = shared.fault(endpoint);
    Ok(match endpoint {
        Endpoint::Upload => match fault.filter(|_| request.method() == Method::PUT) {
            Some(fault) => misbehave(fault, Bytes::new()).await,
            None => upload::blob(&shared, request).await,
        },
        Endpoint::Manifest if request.method() == Method::PUT => {
            upload::manifest(&shared, request).await
        }
        Endpoint::Manifest => manifest(&shared, &path, fault).await,
        Endpoint::Blob | Endpoint::Cdn => blob(&shared, &request, endpoint, fault).await,
        Endpoint::Referrers => referrers(&shared, request.uri()),
        Endpoint::Other if path == "/v2/" => reply(200, b"{}".to_vec().into()),
        Endpoint::Token | Endpoint::Other => complaint(404, "NAME_UNKNOWN", "nothing here"),
    })
}

fn authorized(shared: &Shared, request: &Request<Incoming>) -> bool {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok());
    let is_of = |private: &String| {
        let path = request.uri().path().strip_prefix("/v2/");
        path.is_some_and(|path| path.starts_with(private))
    };
    if !shared.setup.private.as_ref().is_none_or(is_of) {
        return true;
    }
    match &shared.setup.auth {
        Auth::Open => true,
        Auth::Basic(user, password) => given == Some(basic(user, password).as_str()),
        Auth::Bearer(_) | Auth::Identity(_) => given
            .and_then(|text| text.strip_prefix("Bearer token-"))
            .and_then(|number| number.parse::<u32>().ok())
            .is_some_and(|number| {
                let state = shared.state.lock();
                let scopes = state.scopes.get(&number).map_or("", String::as_str);
                number > state.tokens_revoked && upload::may(request, scopes)
            }),
    }
}

fn challenge(shared: &Shared) -> Answer {
    let scheme = if shared.setup.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let wants = match shared.setup.auth {
        Auth::Basic(..) => "Basic realm=\"fake\"".to_owned(),
        Auth::Open | Auth::Bearer(_) | Auth::Identity(_) => format!(
            "Bearer realm=\"{scheme}://{}/token\",service=\"fake\"",
            shared.address
        ),
    };
    let mut answer = complaint(401, "UNAUTHORIZED", "authentication required");
    if let Ok(wants) = wants.parse() {
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, wants);
    }
    answer
}

async fn token(shared: &Shared, request: Request<Incoming>) -> Answer {
    let given = request.headers().get(header::AUTHORIZATION).cloned();
    let post = request.method() == Method::POST;
    let query = request.uri().query().unwrap_or_default().to_owned();
    let form = match Limited::new(request.into_body(), 64 << 10).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::new(),
    };
    let asked = if post { &form[..] } else { query.as_bytes() };
    let value = |wanted: &str| {
        let pairs = url::form_urlencoded::parse(asked);
        let values: Vec<_> = pairs
            .filter(|(name, _)| name == wanted)
            .map(|(_, value)| value.into_owned())
            .collect();
        values.join(" ")
    };
    let allowed = match &shared.setup.auth {
        Auth::Open | Auth::Bearer(None) => true,
        Auth::Bearer(Some((user, password))) => {
            given.is_some_and(|given| given == basic(user, password))
        }
        Auth::Identity(expected) => {
            let is_grant = post && value("grant_type") == "refresh_token";
            let is_named = value("service") == "fake" && !value("client_id").is_empty();
            is_grant && is_named && value("refresh_token") == *expected
        }
        Auth::Basic(..) => false,
    };
    if !allowed {
        return complaint(401, "UNAUTHORIZED", "incorrect username or password");
    }
    let number = {
        let mut state = shared.state.lock();
        let number = state.requests.tokens;
        state.scopes.insert(number, value("scope"));
        number
    };
    let mut grant = serde_json::json!({ "token": format!("token-{number}") });
    if let Some(life) = shared.setup.token_life_s {
        grant["expires_in"] = life.into();
    }
    reply(200, grant.to_string().into())
}

async fn manifest(shared: &Shared, path: &str, fault: Option<Fault>) -> Answer {
    let found = split(path, "manifests").and_then(|(repository, target)| {
        let key = (repository.to_owned(), target.to_owned());
        shared.state.lock().content.manifests.get(&key).cloned()
    });
    let Some((media_type, bytes)) = found else {
        return complaint(404, "MANIFEST_UNKNOWN", "manifest unknown");
    };
    let mut answer = match fault {
        Some(fault) => misbehave(fault, bytes).await,
        None => reply(200, bytes),
    };
    if let Ok(name) = media_type.as_str().parse() {
        answer.headers_mut().insert(header::CONTENT_TYPE, name);
    }
    answer
}

async fn blob(
    shared: &Shared,
    request: &Request<Incoming>,
    endpoint: Endpoint,
    fault: Option<Fault>,
) -> Answer {
    let text = request.uri().path().rsplit('/').next().unwrap_or_default();
    let found = Digest::parse(text)
        .ok()
        .and_then(|digest| shared.state.lock().content.blobs.get(&digest).cloned());
    let Some(bytes) = found else {
        return complaint(404, "BLOB_UNKNOWN", "blob unknown to registry");
    };
    if endpoint == Endpoint::Cdn {
        let expected = format!("sig={}", shared.state.lock().signature);
        if request.uri().query() != Some(expected.as_str()) {
            return reply(
                403,
                Bytes::from_static(b"<Error>Request has expired</Error>"),
            );
        }
    } else if shared.setup.redirect && !matches!(fault, Some(Fault::Status(..) | Fault::Hang)) {
        let scheme = if shared.setup.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let signature = shared.state.lock().signature;
        let to = format!(
            "{scheme}://{}/blob/{text}?sig={signature}",
            shared.cdn_address
        );
        let mut answer = reply(307, Bytes::new());
        if let Ok(to) = to.parse() {
            answer.headers_mut().insert(header::LOCATION, to);
        }
        return answer;
    }
    let asked = request
        .headers()
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok());
    shared
        .state
        .lock()
        .ranges
        .push(asked.unwrap_or_default().to_owned());
    if request.method() == Method::HEAD {
        let mut answer = reply(200, Bytes::new());
        answer
            .headers_mut()
            .insert(header::CONTENT_LENGTH, bytes.len().into());
        return answer;
    }
    ranged(bytes, asked, fault).await
}

/// A 200, a 206 or a 416, with its fault.
async fn ranged(bytes: Bytes, asked: Option<&str>, fault: Option<Fault>) -> Answer {
    let bytes = match &fault {
        Some(Fault::Half) => bytes.slice(..bytes.len() / 2),
        _ => bytes,
    };
    let size = bytes.len();
    let asked = asked.filter(|_| fault != Some(Fault::IgnoreRange));
    let Some(asked) = asked else {
        return match fault {
            Some(fault) => misbehave(fault, bytes).await,
            None => reply(200, bytes),
        };
    };
    let spans: Option<Vec<(usize, usize)>> = asked.strip_prefix("bytes=").and_then(|spans| {
        spans
            .split(',')
            .map(|span| parse_span(span, size))
            .collect()
    });
    let spans = match (spans, &fault) {
        (Some(spans), Some(Fault::FirstPartOnly)) => spans.first().map(|span| vec![*span]),
        (spans, _) => spans,
    };
    let (first, last) = match spans.as_deref() {
        Some([span]) => *span,
        Some(spans) if !spans.is_empty() => {
            return in_parts(&bytes, spans.to_vec(), fault).await;
        }
        _ => {
            let mut answer = reply(416, Bytes::new());
            if let Ok(stated) = format!("bytes */{size}").parse() {
                answer.headers_mut().insert(header::CONTENT_RANGE, stated);
            }
            return answer;
        }
    };
    let shift = usize::from(fault == Some(Fault::WrongContentRange));
    let part = bytes.slice(first..=last);
    let mut answer = match fault {
        Some(fault) => misbehave(fault, part).await,
        None => reply(200, part),
    };
    if answer.status() == StatusCode::OK {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        if let Ok(stated) = format!("bytes {}-{}/{size}", first + shift, last + shift).parse() {
            answer.headers_mut().insert(header::CONTENT_RANGE, stated);
        }
    }
    answer
}

/// First and last byte of `a-b`, as far as a blob of `size` bytes has them.
fn parse_span(span: &str, size: usize) -> Option<(usize, usize)> {
    let (first, last) = span.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let last = last.parse::<usize>().ok()?.min(size.checked_sub(1)?);
    (first <= last).then_some((first, last))
}

/// A 206 of several parts, with its fault.
async fn in_parts(bytes: &Bytes, mut spans: Vec<(usize, usize)>, fault: Option<Fault>) -> Answer {
    let size = bytes.len();
    match fault {
        Some(Fault::PartsBackwards) => spans.reverse(),
        Some(Fault::PartsJoined) => {
            let ends = spans.first().zip(spans.last());
            spans = ends.map(|(a, b)| (a.0, b.1)).into_iter().collect();
        }
        _ => {}
    }
    let shift = usize::from(fault == Some(Fault::WrongContentRange));
    let mut body = Vec::new();
    for (first, last) in spans {
        let (stated_first, stated_last) = (first + shift, last + shift);
        let head = format!(
            "\r\n--parts\r\nContent-Range: bytes {stated_first}-{stated_last}/{size}\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(bytes.get(first..=last).unwrap_or_default());
    }
    body.extend_from_slice(b"\r\n--parts--\r\n");
    let mut answer = match fault {
        Some(fault) => misbehave(fault, body.into()).await,
        None => reply(200, body.into()),
    };
    if answer.status() == StatusCode::OK {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        let kind = header::HeaderValue::from_static("multipart/byteranges; boundary=parts");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    answer
}

fn referrers(shared: &Shared, uri: &http::Uri) -> Answer {
    let path = uri.path();
    if shared.setup.no_referrers {
        return complaint(404, "UNSUPPORTED", "no referrers here");
    }
    if shared.setup.referrers_elsewhere {
        let mut answer = reply(303, Bytes::new());
        if let Ok(to) = format!("http://{}/packages", shared.cdn_address).parse() {
            answer.headers_mut().insert(header::LOCATION, to);
        }
        return answer;
    }
    let parsed = split(path, "referrers")
        .and_then(|(repository, digest)| Some((repository, Digest::parse(digest).ok()?)));
    let Some((repository, digest)) = parsed else {
        return complaint(400, "DIGEST_INVALID", "bad digest");
    };
    let (manifests, paging) = {
        let state = shared.state.lock();
        (state.content.referrers(repository, &digest), state.paging)
    };
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    let mut answer = reply(200, index.to_string().into());
    let next = paging.map(|paging| match paging {
        Paging::Loop => uri.to_string(),
        Paging::Endless => {
            let page = uri.query().and_then(|query| query.rsplit_once("page="));
            let page = page.and_then(|(_, page)| page.parse::<u32>().ok());
            format!("{path}?page={}", page.unwrap_or_default() + 1)
        }
    });
    if let Some(Ok(link)) = next.map(|next| format!("<{next}>; rel=\"next\"").parse()) {
        answer.headers_mut().insert(header::LINK, link);
    }
    answer
}

/// A 200 with `bytes`, spoilt.
async fn misbehave(fault: Fault, bytes: Bytes) -> Answer {
    match fault {
        Fault::Status(code, retry_after) => {
            let mut answer = complaint(code, "FAULT", "scripted fault");
            if let Some(value) = retry_after.and_then(|text| text.parse().ok()) {
                answer.headers_mut().insert(header::RETRY_AFTER, value);
            }
            answer
        }
        Fault::Hang => std::future::pending().await,
        Fault::CloseAfter(len) => {
            let broken = stream::iter([Err(std::io::Error::other("closed on purpose"))]);
            streamed(&bytes, len, broken)
        }
        Fault::HangAfter(len) => streamed(&bytes, len, stream::pending()),
        Fault::CorruptBytes => {
            let mut wrong = bytes.to_vec();
            if let Some(first) = wrong.first_mut() {
                *first = !*first;
            }
            reply(200, wrong.into())
        }
        Fault::TooLong => {
            let more = stream::iter([Ok(Frame::data(Bytes::from_static(b"!")))]);
            let mut answer = streamed(&bytes, bytes.len(), more);
            answer.headers_mut().remove(header::CONTENT_LENGTH);
            answer
        }
        Fault::Half
        | Fault::IgnoreRange
        | Fault::WrongContentRange
        | Fault::FirstPartOnly
        | Fault::PartsBackwards
        | Fault::PartsJoined => reply(200, bytes),
    }
}

/// The first `len` of `bytes` in pieces, then `end`; the length of all is announced.
fn streamed(
    bytes: &Bytes,
    len: usize,
    end: impl stream::Stream<Item = std::io::Result<Frame<Bytes>>> + Send + 'static,
) -> Answer {
    let sent = bytes.slice(..len.min(bytes.len()));
    let pieces: Vec<_> = sent
        .chunks(PIECE_BYTES)
        .map(|piece| Ok(Frame::data(sent.slice_ref(piece))))
        .collect();
    // Each piece leaves before the next is made, so that what was sent does arrive.
    let paced = stream::iter(pieces).then(|piece| async {
        tokio::task::yield_now().await;
        piece
    });
    let gap = stream::once(async {
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        Ok(Frame::data(Bytes::new()))
    });
    let body = StreamBody::new(paced.chain(gap).chain(end));
    let mut answer = Response::new(body.boxed_unsync());
    answer
        .headers_mut()
        .insert(header::CONTENT_LENGTH, bytes.len().into());
    answer
}

pub(super) fn reply(code: u16, bytes: Bytes) -> Answer {
    let full = Full::new(bytes).map_err(|never: Infallible| match never {});
    let mut answer = Response::new(full.boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::IM_A_TEAPOT);
    answer
}

pub(super) fn complaint(code: u16, name: &str, message: &str) -> Answer {
    let body = serde_json::json!({ "errors": [{ "code": name, "message": message }] });
    reply(code, body.to_string().into())
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// `/v2/<repository>/<kind>/<target>`.
pub(super) fn split<'a>(path: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    let (front, target) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    Some((front.strip_suffix(kind)?.strip_suffix('/')?, target))
}
