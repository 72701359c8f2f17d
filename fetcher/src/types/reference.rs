//! Image references with Docker's defaults.
//!
//! Invariant: a `Reference` always has a host, a repository, and a tag or a digest:
//! `debian` is `docker.io/library/debian:latest`. Never touches the network.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Digest, ParseError};

/// Longest repository name (host included) that registries accept.
const NAME_CHARS_MAX: usize = 255;
/// Longest tag.
const TAG_CHARS_MAX: usize = 128;
const DEFAULT_HOST: &str = "docker.io";

/// A registry host and the name of a repository in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    host: String,
    path: String,
}

impl Repository {
    /// Host with optional port as the user wrote it: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Path below `/v2/`: `library/debian`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// This repository's reference to a manifest by digest.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference {
            repository: self.clone(),
            tag: None,
            digest: Some(digest),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

/// Names a manifest: `host/repository[:tag][@digest]`. With both, the digest decides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses a reference and fills in Docker's defaults.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let err = |reason| ParseError::new("reference", text, reason);
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        let (name, tag) = split_tag(name);
        if let Some(tag) = tag {
            check_tag(tag).map_err(err)?;
        }
        let (host, path) = split_host(name);
        check_host(host).map_err(err)?;
        let path = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_path(&path).map_err(err)?;
        if host.len() + path.len() + 1 > NAME_CHARS_MAX {
            return Err(err("the name is longer than 255 characters"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            repository: Repository {
                host: host.to_owned(),
                path,
            },
            tag,
            digest,
        })
    }

    /// Host and path.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Host with optional port.
    pub fn host(&self) -> &str {
        &self.repository.host
    }

    /// The tag, unless only a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference pins one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What goes after `/manifests/`: the digest if there is one, else the tag.
    pub fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Reference {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        Self::parse(&text)
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

/// A colon after the last slash starts a tag; one before it belongs to the port.
fn split_tag(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (name, None),
    }
}

/// The first component is a host only if it looks like one (docker's rule).
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((host, path)) if looks_like_host(host) => (canonical_host(host), path),
        _ => (DEFAULT_HOST, name),
    }
}

fn looks_like_host(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.chars().any(|c| c.is_ascii_uppercase())
}

fn canonical_host(host: &str) -> &str {
    if host == "index.docker.io" {
        DEFAULT_HOST
    } else {
        host
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (inner, port) = rest.split_once(']').ok_or("the IPv6 host has no ']'")?;
            inner
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| "the host is not an IPv6 address")?;
            ("v6", port.strip_prefix(':'))
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if !name.split('.').all(label) {
        return Err("the host name has characters that a host cannot have");
    }
    match port {
        Some(port) if port.parse::<u16>().is_err() => Err("the port is not a number up to 65535"),
        _ => Ok(()),
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the repository is empty");
    }
    if path.chars().any(|c| c.is_ascii_uppercase()) {
        return Err("the repository must be lower case");
    }
    if path.split('/').all(component) {
        Ok(())
    } else {
        Err("each part of the repository is a-z and 0-9, joined by '.', '_', '__' or '-'")
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn component(part: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let ends =
        bytes.first().copied().is_some_and(alnum) && bytes.last().copied().is_some_and(alnum);
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends && separators
        .filter(|s| !s.is_empty())
        .all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let rest = |b: u8| first(b) || b == b'.' || b == b'-';
    match tag.as_bytes() {
        [] => Err("the tag is empty"),
        [head, tail @ ..] if first(*head) && tail.iter().all(|b| rest(*b)) => {
            if tag.len() > TAG_CHARS_MAX {
                Err("the tag is longer than 128 characters")
            } else {
                Ok(())
            }
        }
        _ => Err("the tag has characters other than letters, digits, '_', '.' and '-'"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fills_in_docker_defaults() {
        let table = [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("grafana/loki", "docker.io/grafana/loki:latest"),
            ("index.docker.io/library/x", "docker.io/library/x:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("ghcr.io/o/r-x__y.z:V1", "ghcr.io/o/r-x__y.z:V1"),
        ];
        for (input, full) in table {
            assert_eq!(Reference::parse(input).unwrap().to_string(), full);
        }
    }

    #[test]
    fn a_digest_decides_and_needs_no_tag() {
        let digest = Digest::sha256(b"x");
        let pinned = Reference::parse(&format!("debian@{digest}")).unwrap();
        assert_eq!((pinned.tag(), pinned.target()), (None, digest.to_string()));
        let both = Reference::parse(&format!("debian:12@{digest}")).unwrap();
        assert_eq!(
            (both.tag(), both.target()),
            (Some("12"), digest.to_string())
        );
    }

    #[test]
    fn refuses_what_registries_refuse() {
        for bad in [
            "",
            ":",
            "/",
            "a//b",
            "Debian",
            "a/B",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a:",
            "a:!",
            "a@sha256:1",
            "host:99999/a",
            "ho st.io/a",
            "a/../b",
            "localhost:5000/",
            "[::1/a",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_round_trips(text in "\\PC{0,80}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
            }
        }
    }
}
