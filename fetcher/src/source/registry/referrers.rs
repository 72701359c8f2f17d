//! Manifests that refer to another: the referrers API, and its tag scheme as fallback.
//!
//! Invariant: pages, entries and bytes are bounded; the artifact type is filtered here
//! too, because registries may ignore the query.

use http::header;
use oci_client::manifest::OciImageIndex;

use super::origin::{Asker, Question};
use super::{RegistrySource, document};
use crate::source::http::Answer;
use crate::types::{Descriptor, Digest, MediaType, Repository};
use crate::{Error, Result};

/// Pages followed; each may be 4 MiB.
const PAGES_MAX: usize = 8;
/// Referrers of one manifest. Signatures and indexes make a handful.
const ENTRIES_MAX: usize = 4096;

/// Where a list is looked for.
#[derive(Debug, Clone, Copy)]
enum Way<'a> {
    /// The API.
    Api,
    /// The tag that stands in for it, for manifests that refer to this one.
    Tag(&'a Digest),
}

/// Descriptors of manifests whose subject is `digest`; [`Error::NotFound`] where the
/// registry knows neither the API nor the tag.
pub(super) async fn list(
    source: &RegistrySource,
    repository: &Repository,
    digest: &Digest,
    artifact_type: Option<&str>,
) -> Result<Vec<Descriptor>> {
    let core = &source.core;
    let query = artifact_type.map_or(String::new(), |kind| {
        let value: String = url::form_urlencoded::byte_serialize(kind.as_bytes()).collect();
        format!("?artifactType={value}")
    });
    let api = core.api(repository, &format!("/referrers/{digest}{query}"));
    let found = match pages(source, repository, api, Way::Api).await {
        Err(Error::NotFound { .. }) => {
            // Registries without the API keep the same index under a tag.
            let tag = core.api(repository, &format!("/manifests/{}", digest.file_name()));
            pages(source, repository, tag, Way::Tag(digest)).await?
        }
        other => other?,
    };
    convert(&format!("referrers of {digest}"), found, artifact_type)
}

async fn pages(
    source: &RegistrySource,
    repository: &Repository,
    first: String,
    way: Way<'_>,
) -> Result<Vec<OciImageIndex>> {
    let core = &*source.core;
    let access = core.access(repository);
    let what = format!("referrers list {}{first}", core.host(repository));
    let mut attempts = source.attempts(what, repository);
    let subject = attempts.subject().clone();
    let asker = Asker {
        core,
        access: &access,
        subject: &subject,
    };
    let question = Question {
        accept: Some(header::HeaderValue::from_static(
            "application/vnd.oci.image.index.v1+json",
        )),
        ..Question::get()
    };
    let (mut pages, mut asked) = (Vec::new(), Vec::new());
    let mut next = Some(first);
    while let Some(path) = next {
        if asked.contains(&path) {
            let detail = "the page after one of its pages is one before it";
            return Err(Error::malformed(subject.what, detail));
        }
        if pages.len() == PAGES_MAX {
            return Err(Error::limit(
                subject.what,
                format!("more than {PAGES_MAX} pages"),
            ));
        }
        let (body, link) = attempts
            .run(|| async {
                let mut answer = match way {
                    // Some registries that lack it send whoever asks to their web site.
                    Way::Api => asker.nearby(&path, &question).await?,
                    Way::Tag(_) => asker.anywhere(&path, &question).await?,
                };
                let body = document::read(&subject, &mut answer).await?;
                Ok((body, next_page(&answer)))
            })
            .await?;
        if let Way::Tag(subject) = way
            && Digest::sha256(&body) == *subject
        {
            // Some registries take such a tag for the digest. Then nobody has made the list.
            return Ok(pages);
        }
        let page: OciImageIndex = serde_json::from_slice(&body)
            .map_err(|error| Error::malformed(subject.what.as_str(), error.to_string()))?;
        pages.push(page);
        attempts.progress();
        asked.push(path);
        next = link.map(|path| core.named(repository, path));
    }
    Ok(pages)
}

/// Path and query of `Link: <…>; rel="next"`. Host and scheme are dropped: the next page
/// is asked from the same registry.
fn next_page(answer: &Answer) -> Option<String> {
    link_path(&answer.uri.to_string(), answer.text(header::LINK)?)
}

fn link_path(base: &str, link: &str) -> Option<String> {
    let (target, parameters) = link.strip_prefix('<')?.split_once('>')?;
    let compact: String = parameters.split(['"', ' ']).collect();
    if !compact.contains("rel=next") {
        return None;
    }
    let url = url::Url::parse(base).ok()?.join(target).ok()?;
    let query = url
        .query()
        .map_or(String::new(), |query| format!("?{query}"));
    Some(format!("{}{query}", url.path()))
}

fn convert(
    what: &str,
    pages: Vec<OciImageIndex>,
    artifact_type: Option<&str>,
) -> Result<Vec<Descriptor>> {
    let mut out = Vec::new();
    for entry in pages.into_iter().flat_map(|page| page.manifests) {
        if artifact_type.is_some_and(|wanted| entry.artifact_type.as_deref() != Some(wanted)) {
            continue;
        }
        if out.len() == ENTRIES_MAX {
            return Err(Error::limit(
                what,
                format!("more than {ENTRIES_MAX} entries"),
            ));
        }
        let size = u64::try_from(entry.size).map_err(|_| {
            Error::malformed(what, format!("size {} of {}", entry.size, entry.digest))
        })?;
        let digest = Digest::parse(&entry.digest)
            .map_err(|error| Error::malformed(what, error.to_string()))?;
        let mut descriptor = Descriptor::new(MediaType::from(entry.media_type), digest, size);
        descriptor.annotations = entry.annotations.unwrap_or_default();
        out.push(descriptor);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_links_on_the_same_registry_only() {
        let base = "https://r.io/v2/a/referrers/x";
        let table = [
            (
                r#"</v2/a/referrers/x?n=2>; rel="next""#,
                Some("/v2/a/referrers/x?n=2"),
            ),
            ("<https://evil.io/p?q>;rel=next", Some("/p?q")),
            (r#"</p>; rel="prev""#, None),
            ("garbage", None),
        ];
        for (link, expected) in table {
            assert_eq!(link_path(base, link).as_deref(), expected, "{link}");
        }
    }

    #[test]
    fn filters_and_checks_entries() {
        let digest = Digest::sha256(b"x");
        let page = |size: i64| -> Vec<OciImageIndex> {
            let json = format!(
                r#"{{"schemaVersion":2,"manifests":[
                    {{"mediaType":"m","digest":"{digest}","size":{size},"artifactType":"a/b"}},
                    {{"mediaType":"m","digest":"{digest}","size":1}}]}}"#
            );
            vec![serde_json::from_str(&json).unwrap()]
        };
        assert_eq!(convert("w", page(5), None).unwrap().len(), 2);
        let one = convert("w", page(5), Some("a/b")).unwrap();
        assert_eq!((one.len(), one[0].size), (1, 5));
        assert!(convert("w", page(-1), None).is_err());
    }
}
