//! `hosts.toml`, from text to [`Hosts`].
//!
//! Invariant: pure and bounded. Keys that nobody knows are passed over, as containerd does;
//! a known key with a value that it cannot have is an error that names file and key, and so
//! is a wish that is not granted here: TLS without verification, and a proxy of a host's own.
//! The order is that of the file, whatever order a TOML table keeps.

use std::path::{Path, PathBuf};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::Scheme;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Capabilities, Capability, ClientFiles, Host, Hosts, duration};
use crate::source::endpoint::Endpoint;
use crate::{Error, Result};

/// Largest file: room for all of the below with long names.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 10;
/// Hosts with copies in one file. Every one of them may be asked for every request.
const HOSTS_MAX: usize = 16;
/// Headers for one host, and files of certificates.
const HEADERS_MAX: usize = 32;
const FILES_MAX: usize = 16;
/// Headers that say what is asked, or how a connection is used: a file cannot set them.
const HEADERS_KEPT: [&str; 8] = [
    "accept-encoding",
    "connection",
    "content-length",
    "host",
    "range",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Where a text comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    /// The file; paths in it are relative to its directory.
    pub(crate) file: &'a Path,
    /// Whether the registry itself, which the file is about, is spoken to without TLS.
    pub(crate) is_plain: bool,
}

/// The hosts that `text` names.
pub(crate) fn parse(text: &str, origin: Origin<'_>) -> Result<Hosts> {
    let what = origin.file.display().to_string();
    if text.len() as u64 > FILE_BYTES_MAX {
        let detail = format!("it is larger than {FILE_BYTES_MAX} bytes");
        return Err(Error::limit(what, detail));
    }
    let fault = |detail: String| Error::malformed(what.as_str(), detail);
    let document = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let before = text.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        fault(format!("line {line}: {}", error.message()))
    })?;
    let mut mirrors = Vec::new();
    for (name, table) in named_hosts(document.get_ref()).map_err(fault)? {
        let section = Section {
            table,
            key: format!("host.\"{name}\""),
            origin,
        };
        let host = section.host(Some(name)).map_err(fault)?;
        mirrors.push(host);
    }
    let root = Section {
        table: document.get_ref(),
        key: String::new(),
        origin,
    };
    let server = root.server().map_err(fault)?;
    Ok(Hosts { mirrors, server })
}

/// The tables `host."name"` in the file's order.
fn named_hosts<'a>(root: &'a DeTable<'_>) -> Result<Vec<(&'a str, &'a DeTable<'a>)>, String> {
    let Some(hosts) = root.get("host") else {
        return Ok(Vec::new());
    };
    let hosts = hosts.get_ref().as_table().ok_or("host: it is no table")?;
    if hosts.len() > HOSTS_MAX {
        return Err(format!("host: there are more than {HOSTS_MAX}"));
    }
    let mut found = Vec::with_capacity(hosts.len());
    for (name, value) in hosts {
        let (at, name) = (name.span().start, name.get_ref().as_ref());
        let table = value.get_ref().as_table();
        let table = table.ok_or_else(|| format!("host.\"{name}\": it is no table"))?;
        // A table that is opened after one of its own is named where that is.
        let inner = table.keys().map(|key| key.span().start);
        found.push((inner.fold(at, usize::min), name, table));
    }
    found.sort_by_key(|(at, ..)| *at);
    let tables = found.into_iter().map(|(_, name, table)| (name, table));
    Ok(tables.collect())
}

/// A table of settings for one host. Errors are details that begin with the key.
struct Section<'a> {
    table: &'a DeTable<'a>,
    /// Empty for the file's top.
    key: String,
    origin: Origin<'a>,
}

impl Section<'_> {
    /// The host that the top of the file is about.
    fn server(&self) -> Result<Host, String> {
        let name = match self.value("server") {
            None => None,
            Some(value) => Some(value.as_str().ok_or("server: it is no text")?),
        };
        self.host(name.filter(|name| !name.is_empty()))
    }

    fn host(&self, name: Option<&str>) -> Result<Host, String> {
        let place = if self.key.is_empty() {
            "server"
        } else {
            &self.key
        };
        let override_path = self.flag("override_path")?;
        let endpoint = name
            .map(|name| endpoint(name, override_path))
            .transpose()
            .map_err(|detail| format!("{place}: {detail}"))?;
        let is_plain = endpoint
            .as_ref()
            .map_or(self.origin.is_plain, Endpoint::is_plain);
        if self.flag("skip_verify")? && !is_plain {
            return Err(self.at(
                "skip_verify",
                "certificates are always verified here; name the authority of the \
                 host's certificate with ca instead",
            ));
        }
        if self.value("proxy").is_some() {
            return Err(self.at(
                "proxy",
                "a host has no proxy of its own here; set HTTPS_PROXY and NO_PROXY",
            ));
        }
        Ok(Host {
            endpoint,
            capabilities: self.capabilities()?,
            ca: self.ca()?,
            client: self.client()?,
            headers: self.headers()?,
            dial_timeout: self.dial_timeout()?,
        })
    }

    fn capabilities(&self) -> Result<Capabilities, String> {
        let Some(value) = self.value("capabilities") else {
            return Ok(Capabilities::ALL);
        };
        let names = value
            .as_array()
            .ok_or_else(|| self.at("capabilities", "it is no list"))?;
        let mut all = Capabilities::default();
        for name in names {
            let name = name.get_ref().as_str().unwrap_or_default();
            let one = match name.to_ascii_lowercase().as_str() {
                "pull" => Capability::Pull,
                "resolve" => Capability::Resolve,
                "push" => Capability::Push,
                "referrers" => Capability::Referrers,
                _ => {
                    let detail = "pull, resolve, push and referrers are what there is";
                    return Err(self.at("capabilities", detail));
                }
            };
            all = all.with(one);
        }
        Ok(if names.is_empty() {
            Capabilities::ALL
        } else {
            all
        })
    }

    fn ca(&self) -> Result<Vec<PathBuf>, String> {
        let wrong = || self.at("ca", "it is neither a path nor a list of paths");
        match self.value("ca") {
            None => Ok(Vec::new()),
            Some(value) => self.few("ca", texts(value).ok_or_else(wrong)?),
        }
    }

    fn client(&self) -> Result<Vec<ClientFiles>, String> {
        let wrong = || {
            self.at(
                "client",
                "it is neither a path nor a list of paths or pairs",
            )
        };
        let pair = |value: &DeValue<'_>| {
            let (certificate, key) = match value {
                DeValue::Array(pair) => match &**pair {
                    [first, second] => (first.get_ref().as_str()?, second.get_ref().as_str()?),
                    _ => return None,
                },
                one => (one.as_str()?, ""),
            };
            Some(ClientFiles {
                certificate: self.path(certificate),
                key: (!key.is_empty()).then(|| self.path(key)),
            })
        };
        let pairs: Option<Vec<ClientFiles>> = match self.value("client") {
            None => return Ok(Vec::new()),
            Some(DeValue::Array(list)) => list.iter().map(|one| pair(one.get_ref())).collect(),
            Some(one) => pair(one).map(|one| vec![one]),
        };
        let pairs = pairs.ok_or_else(wrong)?;
        if pairs.len() > FILES_MAX {
            return Err(self.at("client", &format!("there are more than {FILES_MAX}")));
        }
        Ok(pairs)
    }

    fn headers(&self) -> Result<HeaderMap, String> {
        let mut headers = HeaderMap::new();
        let Some(value) = self.value("header") else {
            return Ok(headers);
        };
        let table = value
            .as_table()
            .ok_or_else(|| self.at("header", "it is no table"))?;
        for (name, value) in table {
            let key = format!("header.{}", name.get_ref());
            let wrong = |detail: &str| self.at(&key, detail);
            let name = HeaderName::from_bytes(name.get_ref().as_bytes())
                .map_err(|_| wrong("no header can have this name"))?;
            let values = texts(value.get_ref())
                .ok_or_else(|| wrong("it is neither a text nor a list of texts"))?;
            for text in values {
                let mut value = HeaderValue::from_str(text)
                    .map_err(|_| wrong("it has characters that a header cannot carry"))?;
                value.set_sensitive(true);
                if !HEADERS_KEPT.contains(&name.as_str()) {
                    headers.append(name.clone(), value);
                }
                if headers.len() > HEADERS_MAX {
                    return Err(self.at("header", &format!("there are more than {HEADERS_MAX}")));
                }
            }
        }
        Ok(headers)
    }

    fn dial_timeout(&self) -> Result<Option<std::time::Duration>, String> {
        let wrong = || {
            let detail = "it is not a duration up to an hour like \"200ms\" or \"3s\"";
            self.at("dial_timeout", detail)
        };
        let Some(value) = self.value("dial_timeout") else {
            return Ok(None);
        };
        let text = value.as_str().ok_or_else(wrong)?;
        if text.is_empty() {
            return Ok(None);
        }
        let limit = duration::parse(text).ok_or_else(wrong)?;
        Ok(Some(limit).filter(|limit| !limit.is_zero()))
    }

    fn flag(&self, name: &str) -> Result<bool, String> {
        match self.value(name) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.at(name, "it is neither true nor false")),
        }
    }

    fn few(&self, name: &str, paths: Vec<&str>) -> Result<Vec<PathBuf>, String> {
        if paths.len() > FILES_MAX {
            return Err(self.at(name, &format!("there are more than {FILES_MAX}")));
        }
        Ok(paths.into_iter().map(|path| self.path(path)).collect())
    }

    fn path(&self, text: &str) -> PathBuf {
        let dir = self.origin.file.parent().unwrap_or(Path::new(""));
        dir.join(text)
    }

    fn value(&self, name: &str) -> Option<&DeValue<'_>> {
        self.table.get(name).map(Spanned::get_ref)
    }

    /// `detail` about the key `name` of this table.
    fn at(&self, name: &str, detail: &str) -> String {
        let dot = if self.key.is_empty() { "" } else { "." };
        format!("{}{dot}{name}: {detail}", self.key)
    }
}

/// A text, or a list of texts.
fn texts<'a>(value: &'a DeValue<'_>) -> Option<Vec<&'a str>> {
    match value {
        DeValue::Array(list) => list.iter().map(|one| one.get_ref().as_str()).collect(),
        one => Some(vec![one.as_str()?]),
    }
}

/// The endpoint at a URL, or at a host without a scheme, which means https. The API is below
/// `/v2` of the URL's path unless that ends so, or is said to be the API itself.
fn endpoint(text: &str, override_path: bool) -> Result<Endpoint, String> {
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let url = url::Url::parse(&full).map_err(|error| format!("{text:?} is no URL: {error}"))?;
    let scheme = match url.scheme() {
        "http" => Scheme::HTTP,
        "https" => Scheme::HTTPS,
        _ => return Err(format!("{text:?} begins with neither http:// nor https://")),
    };
    let host = url
        .host_str()
        .filter(|host| !host.is_empty())
        .ok_or_else(|| format!("{text:?} has no host"))?;
    // One that is the scheme's own is part of the name that credentials go by.
    let written = full.parse::<http::Uri>().ok();
    let written = written.and_then(|uri| uri.authority()?.port_u16());
    let authority = match written.or(url.port()) {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let names = url.path().split('/').filter(|name| !name.is_empty());
    let mut root: String = names.map(|name| format!("/{name}")).collect();
    if !override_path && !root.ends_with("/v2") {
        root.push_str("/v2");
    }
    let endpoint = Endpoint::at(scheme, &authority, &root);
    // What is no address fails here, where the file can be named.
    let checked = endpoint.uri(&endpoint.api("/"));
    checked.map_err(|error| format!("{text:?}: {error}"))?;
    Ok(endpoint)
}
