//! Manifests and indexes, byte for byte.
//!
//! Invariant: at most 4 MiB; the digest a reference pins is checked, and so is the one
//! the registry states. A document is never re-serialised.

use http::header::{self, HeaderName, HeaderValue};
use serde::Deserialize;

use super::origin::{Asker, Question};
use super::{RegistrySource, answer};
use crate::source::Document;
use crate::source::http::Answer;
use crate::source::retry::{Fault, Subject};
use crate::types::{Algorithm, Digest, MediaType, Reference};
use crate::{Error, Result};

/// The limit the distribution specification asks registries to accept.
pub(super) const DOCUMENT_BYTES_MAX: usize = 4 << 20;
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// Everything we can read, and `*/*` last: registries answer 404 to a client that does
/// not list the stored type.
const ACCEPT: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1",
);

/// The document `reference` names.
pub(super) async fn resolve(source: &RegistrySource, reference: &Reference) -> Result<Document> {
    let core = &*source.core;
    let repository = reference.repository();
    let path = core.api(repository, &format!("/manifests/{}", reference.target()));
    let access = core.access(repository);
    let mut attempts = source.attempts(reference.to_string(), repository);
    let subject = attempts.subject().clone();
    let asker = Asker {
        core,
        access: &access,
        subject: &subject,
    };
    let question = Question {
        accept: Some(ACCEPT),
        ..Question::get()
    };
    attempts
        .run(|| async {
            let mut answer = asker.anywhere(&path, &question).await?;
            let bytes = read(&subject, &mut answer).await?;
            let stated = Stated {
                pinned: reference.digest().copied(),
                told: answer
                    .text(CONTENT_DIGEST)
                    .and_then(|text| Digest::parse(text).ok()),
                content_type: answer.text(header::CONTENT_TYPE).unwrap_or_default(),
            };
            Ok(check(&subject, &stated, bytes)?)
        })
        .await
}

/// The body of a successful answer.
pub(super) async fn read(subject: &Subject, answer: &mut Answer) -> Result<bytes::Bytes, Fault> {
    if answer.status != http::StatusCode::OK {
        return Err(answer::fault(subject, answer).await);
    }
    let body = answer.read_at_most(DOCUMENT_BYTES_MAX).await?;
    body.ok_or_else(|| {
        let what = format!("manifest of {}", subject.what);
        Error::limit(
            what,
            format!("it is larger than {DOCUMENT_BYTES_MAX} bytes"),
        )
        .into()
    })
}

/// What reference and headers say about a document.
struct Stated<'a> {
    pinned: Option<Digest>,
    told: Option<Digest>,
    content_type: &'a str,
}

/// Checks digests and type. Pure.
fn check(subject: &Subject, stated: &Stated<'_>, bytes: bytes::Bytes) -> Result<Document> {
    let what = format!("manifest of {}", subject.what);
    for expected in [stated.pinned, stated.told].into_iter().flatten() {
        let actual = Digest::of(expected.algorithm(), &bytes);
        if actual != expected {
            return Err(Error::Corrupt {
                what,
                expected,
                actual,
            });
        }
    }
    let media_type = media_type(stated.content_type, &bytes).map_err(|detail| {
        Error::malformed(what.as_str(), format!("{} answered {detail}", subject.host))
    })?;
    if media_type
        .as_str()
        .starts_with("application/vnd.docker.distribution.manifest.v1")
    {
        return Err(Error::Unsupported {
            what,
            detail: "it is of Docker's schema 1, gone since 2019; push the image again".to_owned(),
        });
    }
    let digest = stated
        .pinned
        .unwrap_or_else(|| Digest::of(Algorithm::Sha256, &bytes));
    Ok(Document::new(media_type, digest, bytes))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// The type by header; where the header says nothing useful, by the document itself.
fn media_type(content_type: &str, bytes: &[u8]) -> Result<MediaType, String> {
    let header = content_type.split(';').next().unwrap_or_default().trim();
    let named = MediaType::from(header);
    if named.is_index() || named.is_manifest() || header.contains("manifest.v1") {
        return Ok(named);
    }
    let outline: Outline = serde_json::from_slice(bytes).map_err(|_| {
        format!("with {header:?} that is no JSON; check that it is an OCI registry")
    })?;
    match (outline.media_type, outline.manifests, outline.layers) {
        (Some(name), _, _) => Ok(MediaType::from(name)),
        (None, Some(_), _) => Ok(MediaType::OciIndex),
        (None, None, Some(_)) => Ok(MediaType::OciManifest),
        (None, None, None) => Err("with JSON that is neither an index nor a manifest".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_media_type() {
        let manifest = "application/vnd.docker.distribution.manifest.v2+json";
        let own = format!(r#"{{"mediaType":"{manifest}"}}"#);
        let table = [
            (manifest, "{}", Some(MediaType::DockerManifest)),
            (
                "application/vnd.oci.image.index.v1+json; charset=utf-8",
                "{}",
                Some(MediaType::OciIndex),
            ),
            (
                "application/json",
                own.as_str(),
                Some(MediaType::DockerManifest),
            ),
            ("", r#"{"manifests":[]}"#, Some(MediaType::OciIndex)),
            (
                "text/plain",
                r#"{"layers":[]}"#,
                Some(MediaType::OciManifest),
            ),
            ("application/json", "{}", None),
            ("text/html", "<html>", None),
        ];
        for (header, body, expected) in table {
            assert_eq!(
                media_type(header, body.as_bytes()).ok(),
                expected,
                "{header} {body}"
            );
        }
    }

    #[test]
    fn checks_the_pinned_and_the_stated_digest() {
        let body = br#"{"layers":[]}"#;
        let good = Digest::of(Algorithm::Sha512, body);
        let bad = Digest::sha256(b"other");
        let subject = Subject {
            what: "r/x:t".into(),
            host: "r".into(),
        };
        for (pinned, told, fine) in [
            (None, None, true),
            (Some(good), None, true),
            (Some(bad), None, false),
            (Some(good), Some(bad), false),
            (None, Some(bad), false),
        ] {
            let stated = Stated {
                pinned,
                told,
                content_type: "",
            };
            let got = check(&subject, &stated, bytes::Bytes::from_static(body));
            match got {
                Ok(document) => {
                    assert!(fine);
                    let expected = pinned.unwrap_or(Digest::sha256(body));
                    assert_eq!(document.descriptor.digest, expected);
                }
                Err(error) => {
                    assert!(!fine);
                    assert!(
                        error
                            .to_string()
                            .starts_with("manifest of r/x:t is corrupt"),
                        "{error}"
                    );
                }
            }
        }
    }
}
