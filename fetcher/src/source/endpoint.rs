//! From the host a user wrote to the address its API is served at.
//!
//! Invariant: plain http only for loopback and for hosts that the config or a hosts file
//! names so; everything else is https. Pure: never resolves a name.

use std::net::IpAddr;

use http::Uri;
use http::uri::Scheme;

use super::SourceConfig;
use crate::{Error, Result};

/// Docker Hub in references, and the host of its API.
const HUB: &str = "docker.io";
const HUB_API: &str = "registry-1.docker.io";
/// Where the distribution specification has the API.
const ROOT: &str = "/v2";

/// Scheme, authority and root path of a registry's API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    scheme: Scheme,
    authority: String,
    /// What comes before the repository's name; no slash at the end.
    root: String,
}

impl Endpoint {
    /// The endpoint of `host` as it stands in a reference (`docker.io`, `localhost:5000`).
    pub(crate) fn of(host: &str, config: &SourceConfig) -> Self {
        let authority = api_host(host);
        let plain = is_loopback(authority)
            || config
                .plain_http
                .iter()
                .any(|entry| entry == authority || entry == bare_host(authority));
        Self {
            scheme: if plain { Scheme::HTTP } else { Scheme::HTTPS },
            authority: authority.to_owned(),
            root: ROOT.to_owned(),
        }
    }

    /// The endpoint at `host`, whose API is below `root`: empty, or a path that begins with
    /// a slash and does not end with one.
    pub(crate) fn at(scheme: Scheme, host: &str, root: &str) -> Self {
        Self {
            scheme,
            authority: api_host(host).to_owned(),
            root: root.to_owned(),
        }
    }

    /// The host as it would stand in a reference, under which its credentials are.
    pub(crate) fn host(&self) -> &str {
        match self.authority.as_str() {
            HUB_API => HUB,
            other => other,
        }
    }

    /// Scheme and authority, as one text.
    pub(crate) fn origin(&self) -> String {
        format!("{}://{}", self.scheme, self.authority)
    }

    /// The path of `tail`, which begins with a slash, below the API's root.
    pub(crate) fn api(&self, tail: &str) -> String {
        format!("{}{tail}", self.root)
    }

    /// What the host has before the names of repositories: a project that stands in for another
    /// registry, `hub` of `/v2/hub`.
    pub(crate) fn prefix(&self) -> Option<&str> {
        self.root.strip_prefix(ROOT)?.strip_prefix('/')
    }

    /// Whether it is spoken to without TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.scheme == Scheme::HTTP
    }

    /// The URI of `path_and_query`, which starts with a slash.
    pub(crate) fn uri(&self, path_and_query: &str) -> Result<Uri> {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.as_str())
            .path_and_query(path_and_query)
            .build()
            .map_err(|error| {
                Error::malformed(format!("address of {}", self.authority), error.to_string())
            })
    }

    /// Whether `uri` is served by this very endpoint, so that credentials may go there.
    pub(crate) fn owns(&self, uri: &Uri) -> bool {
        let default = if self.scheme == Scheme::HTTPS {
            443
        } else {
            80
        };
        let Some(authority) = uri.authority() else {
            return false;
        };
        let own = self.authority.parse::<http::uri::Authority>().ok();
        own.is_some_and(|own| {
            uri.scheme() == Some(&self.scheme)
                && own.host().eq_ignore_ascii_case(authority.host())
                && own.port_u16().unwrap_or(default) == authority.port_u16().unwrap_or(default)
        })
    }
}

fn api_host(host: &str) -> &str {
    match host {
        HUB | "index.docker.io" => HUB_API,
        other => other,
    }
}

/// `localhost`, `127.0.0.0/8` or `::1`, with or without a port.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = bare_host(authority);
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Host without port and without the brackets of IPv6.
pub(crate) fn bare_host(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_scheme_and_api_host() {
        let config = SourceConfig {
            plain_http: vec!["reg.lan".into(), "other.lan:5000".into()],
            ..SourceConfig::default()
        };
        let table = [
            ("docker.io", "https://registry-1.docker.io/v2/"),
            ("ghcr.io", "https://ghcr.io/v2/"),
            ("localhost:5000", "http://localhost:5000/v2/"),
            ("127.8.9.1", "http://127.8.9.1/v2/"),
            ("[::1]:5000", "http://[::1]:5000/v2/"),
            ("reg.lan:81", "http://reg.lan:81/v2/"),
            ("other.lan:5000", "http://other.lan:5000/v2/"),
            ("other.lan:5001", "https://other.lan:5001/v2/"),
            ("localhost.evil.com", "https://localhost.evil.com/v2/"),
        ];
        for (host, uri) in table {
            assert_eq!(Endpoint::of(host, &config).uri("/v2/").unwrap(), uri);
        }
    }

    #[test]
    fn keeps_a_root_of_its_own() {
        let table = [
            (
                "m.lan:5000",
                "/v2",
                "m.lan:5000",
                "https://m.lan:5000/v2/a/b",
            ),
            ("m.lan", "", "m.lan", "https://m.lan/a/b"),
            (
                "docker.io",
                "/v2",
                "docker.io",
                "https://registry-1.docker.io/v2/a/b",
            ),
            (
                "registry-1.docker.io",
                "/x/v2",
                "docker.io",
                "https://registry-1.docker.io/x/v2/a/b",
            ),
        ];
        for (authority, root, host, uri) in table {
            let endpoint = Endpoint::at(Scheme::HTTPS, authority, root);
            assert_eq!(endpoint.host(), host);
            assert_eq!(endpoint.uri(&endpoint.api("/a/b")).unwrap(), uri);
        }
    }

    #[test]
    fn credentials_stay_with_their_origin() {
        let endpoint = Endpoint::of("reg.io", &SourceConfig::default());
        let table = [
            ("https://reg.io/x", true),
            ("https://REG.io:443/x", true),
            ("https://reg.io:444/x", false),
            ("http://reg.io/x", false),
            ("https://reg.io.evil.com/x", false),
            ("/x", false),
        ];
        for (uri, owned) in table {
            assert_eq!(endpoint.owns(&uri.parse().unwrap()), owned, "{uri}");
        }
    }
}
