//! How the fake registry takes what is pushed, and who may push.
//!
//! Invariant: a blob is kept only with the digest that its upload names.

use std::collections::HashMap;

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;

use super::Shared;
use super::answer::{Answer, complaint, reply, split};
use crate::types::{Digest, MediaType};

/// Longest body that is taken.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Whether a token that was asked for with these scopes is good for the request.
pub(super) fn may(request: &Request<Incoming>, scopes: &str) -> bool {
    let path = request.uri().path();
    if [Method::GET, Method::HEAD].contains(request.method()) {
        let kinds = ["blobs", "manifests", "referrers"];
        let mut named = kinds.iter().filter_map(|kind| split(path, kind));
        return named.all(|(repository, _)| {
            let wanted = format!("repository:{repository}:pull");
            scopes.split(' ').any(|scope| scope.starts_with(&wanted))
        });
    }
    let has = |repository: &str, actions: &str| {
        let scope = format!("repository:{repository}:{actions}");
        scopes.split(' ').any(|own| own == scope)
    };
    let own = split(path, "blobs/uploads").or_else(|| split(path, "manifests"));
    own.is_some_and(|(repository, _)| has(repository, "pull,push"))
        && query(request)
            .get("from")
            .is_none_or(|from| has(from, "pull"))
}

/// Begins an upload, mounts a blob, or takes one.
pub(super) async fn blob(shared: &Shared, request: Request<Incoming>) -> Answer {
    let Some((repository, _)) = split(request.uri().path(), "blobs/uploads") else {
        return complaint(404, "NAME_UNKNOWN", "nothing here");
    };
    let repository = repository.to_owned();
    let query = query(&request);
    let named = |name: &str| query.get(name).and_then(|text| Digest::parse(text).ok());
    let there = |digest: &Digest| located(201, format!("/v2/{repository}/blobs/{digest}"));
    if request.method() == Method::POST {
        let mounted =
            named("mount").filter(|digest| shared.state.lock().content.blobs.contains_key(digest));
        return match mounted {
            Some(digest) => there(&digest),
            None => located(202, format!("/v2/{repository}/blobs/uploads/1")),
        };
    }
    let Some(digest) = named("digest").filter(|_| request.method() == Method::PUT) else {
        return complaint(400, "DIGEST_INVALID", "no digest");
    };
    match body(request).await {
        Some(bytes) if Digest::of(digest.algorithm(), &bytes) == digest => {
            shared.state.lock().content.blobs.insert(digest, bytes);
            there(&digest)
        }
        _ => complaint(400, "DIGEST_INVALID", "other bytes than promised"),
    }
}

/// Takes a manifest.
pub(super) async fn manifest(shared: &Shared, request: Request<Incoming>) -> Answer {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind
        .and_then(|kind| kind.to_str().ok())
        .map(MediaType::from);
    let path = request.uri().path().to_owned();
    let (Some((repository, target)), Some(kind)) = (split(&path, "manifests"), kind) else {
        return complaint(400, "MANIFEST_INVALID", "no type or no name");
    };
    let Some(bytes) = body(request).await else {
        return complaint(400, "SIZE_INVALID", "cut off or too long");
    };
    let tag = if target.contains(':') { "" } else { target };
    let mut state = shared.state.lock();
    let digest = state.content.add_manifest(repository, tag, kind, bytes);
    located(201, format!("/v2/{repository}/manifests/{digest}"))
}

fn query(request: &Request<Incoming>) -> HashMap<String, String> {
    let text = request.uri().query().unwrap_or_default();
    let pairs = url::form_urlencoded::parse(text.as_bytes());
    pairs.into_owned().collect()
}

async fn body(request: Request<Incoming>) -> Option<Bytes> {
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX);
    Some(body.collect().await.ok()?.to_bytes())
}

fn located(code: u16, place: String) -> Answer {
    let mut answer = reply(code, Bytes::new());
    if let Ok(place) = place.parse() {
        answer.headers_mut().insert(header::LOCATION, place);
    }
    answer
}
