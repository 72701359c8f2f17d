//! Which requests go through which proxy.
//!
//! Invariant: loopback is never proxied. Only `http://` proxies are spoken to: CONNECT
//! for https, absolute-form for http; one of another kind is an error of those requests alone
//! that would go through it, never a reason to go past it. Pure, apart from
//! [`ProxySettings::from_env`].

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Uri;
use http::header::HeaderValue;
use http::uri::Scheme;
use serde::{Deserialize, Serialize};

use crate::source::endpoint::{bare_host, is_loopback};

/// Proxies as the environment or the config names them. URLs may carry credentials, so
/// `Debug` hides them.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxySettings {
    /// Proxy for http, `http://[user:password@]host[:port]`.
    pub http: Option<String>,
    /// Proxy for https, same form.
    pub https: Option<String>,
    /// Hosts reached directly: `*`, `name` (and everything below it), `.name`, an
    /// address, `address/prefix`, each optionally with `:port`.
    pub no_proxy: Vec<String>,
}

impl std::fmt::Debug for ProxySettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |url: &Option<String>| url.as_ref().map(|_| "<set>");
        f.debug_struct("ProxySettings")
            .field("http", &shown(&self.http))
            .field("https", &shown(&self.https))
            .field("no_proxy", &self.no_proxy)
            .finish()
    }
}

impl ProxySettings {
    /// What `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` say, in lower or upper case;
    /// lower case wins, as in curl. Reads the environment: for `main` to call.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            var(name)
                .or_else(|| var(&name.to_uppercase()))
                .filter(|value| !value.trim().is_empty())
        };
        Self {
            http: either("http_proxy"),
            https: either("https_proxy"),
            no_proxy: either("no_proxy")
                .map(|list| {
                    list.split([',', ' '])
                        .filter(|entry| !entry.is_empty())
                        .map(str::to_owned)
                        .collect()
                })
                .unwrap_or_default(),
        }
    }
}

/// One proxy, parsed.
#[derive(Clone)]
pub(crate) struct Proxy {
    /// Where it listens; always with scheme http.
    pub(crate) uri: Uri,
    /// What to authenticate with, if its URL had credentials.
    pub(crate) authorization: Option<HeaderValue>,
}

/// The settings, parsed; what is wrong with one is told to who would go through it.
pub(crate) struct Proxies {
    http: Option<Result<Proxy, String>>,
    https: Option<Result<Proxy, String>>,
    direct: Vec<Direct>,
}

impl Proxies {
    /// Reads the settings.
    pub(crate) fn new(settings: &ProxySettings) -> Self {
        let parse = |url: &Option<String>, name: &str| {
            let parsed = url.as_deref().map(parse_proxy);
            parsed.map(|parsed| parsed.map_err(|detail| format!("{name} is unusable: {detail}")))
        };
        Self {
            http: parse(&settings.http, "HTTP_PROXY"),
            https: parse(&settings.https, "HTTPS_PROXY"),
            direct: settings.no_proxy.iter().map(|e| Direct::parse(e)).collect(),
        }
    }

    /// The proxy that `uri` goes through; an error if that cannot be spoken to.
    pub(crate) fn for_uri(&self, uri: &Uri) -> Result<Option<&Proxy>, &str> {
        let Some(authority) = uri.authority() else {
            return Ok(None);
        };
        if is_loopback(authority.as_str()) {
            return Ok(None);
        }
        let (proxy, default_port) = if uri.scheme() == Some(&Scheme::HTTPS) {
            (&self.https, 443)
        } else {
            (&self.http, 80)
        };
        let port = authority.port_u16().unwrap_or(default_port);
        let host = bare_host(authority.as_str()).to_ascii_lowercase();
        match proxy {
            Some(proxy) if !self.direct.iter().any(|rule| rule.covers(&host, port)) => {
                proxy.as_ref().map(Some).map_err(String::as_str)
            }
            _ => Ok(None),
        }
    }

    /// The header that a plain http request to `uri` carries for its proxy. An https
    /// request carries none: its proxy was told at CONNECT.
    pub(crate) fn authorization_in_request(&self, uri: &Uri) -> Option<HeaderValue> {
        if uri.scheme() == Some(&Scheme::HTTPS) {
            return None;
        }
        self.for_uri(uri).ok()??.authorization.clone()
    }
}

fn parse_proxy(text: &str) -> Result<Proxy, String> {
    let bad = |detail: &str| format!("{detail}; expected http://[user:password@]host[:port]");
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    let url = url::Url::parse(&full).map_err(|error| bad(&error.to_string()))?;
    if url.scheme() != "http" {
        return Err(bad(&format!(
            "proxies of kind {}:// are not supported",
            url.scheme()
        )));
    }
    let host = url.host_str().ok_or_else(|| bad("no host"))?;
    let port = url.port_or_known_default().unwrap_or(80);
    let uri = format!("http://{host}:{port}/")
        .parse()
        .map_err(|_| bad("not a usable address"))?;
    let authorization = match (url.username(), url.password()) {
        ("", None) => None,
        (user, password) => {
            let plain = [
                unescape(user),
                b":".to_vec(),
                unescape(password.unwrap_or("")),
            ]
            .concat();
            let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(plain)))
                .map_err(|_| bad("unusable credentials"))?;
            value.set_sensitive(true);
            Some(value)
        }
    };
    Ok(Proxy { uri, authorization })
}

/// Undoes percent-encoding of credentials in a URL.
fn unescape(text: &str) -> Vec<u8> {
    // A form pair decodes percent escapes; '+' must survive, since in a URL's user part
    // it means itself.
    let pair = format!("k={}", text.replace('+', "%2B").replace('&', "%26"));
    url::form_urlencoded::parse(pair.as_bytes())
        .next()
        .map(|(_, value)| value.into_owned().into_bytes())
        .unwrap_or_default()
}

/// One entry of `NO_PROXY`.
enum Direct {
    Everything,
    Name {
        name: String,
        port: Option<u16>,
    },
    Net {
        base: IpAddr,
        prefix: u8,
        port: Option<u16>,
    },
}

impl Direct {
    fn parse(entry: &str) -> Self {
        let entry = entry.trim().to_ascii_lowercase();
        if entry == "*" {
            return Self::Everything;
        }
        if let Some(net) = Self::parse_net(&entry) {
            return net;
        }
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) => match port.parse() {
                Ok(port) => (name, Some(port)),
                Err(_) => (entry.as_str(), None),
            },
            None => (entry.as_str(), None),
        };
        let name = name
            .trim_start_matches("*.")
            .trim_start_matches('.')
            .to_owned();
        Self::Name { name, port }
    }

    /// `10.0.0.0/8`, `10.1.2.3`, `10.1.2.3:80`, `::1`, `[::1]:80`.
    fn parse_net(entry: &str) -> Option<Self> {
        if let Some((base, prefix)) = entry.split_once('/') {
            let base: IpAddr = base.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            return Some(Self::Net {
                base,
                prefix,
                port: None,
            });
        }
        let (base, port): (IpAddr, _) = match entry.parse::<std::net::SocketAddr>() {
            Ok(address) => (address.ip(), Some(address.port())),
            Err(_) => (bare_brackets(entry).parse().ok()?, None),
        };
        let prefix = if base.is_ipv4() { 32 } else { 128 };
        Some(Self::Net { base, prefix, port })
    }

    fn covers(&self, host: &str, port: u16) -> bool {
        let port_fits = |wanted: &Option<u16>| wanted.is_none_or(|wanted| wanted == port);
        match self {
            Self::Everything => true,
            Self::Name { name, port } => {
                let below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
                !name.is_empty() && below && port_fits(port)
            }
            Self::Net { base, prefix, port } => {
                host.parse().is_ok_and(|host| in_net(*base, *prefix, host)) && port_fits(port)
            }
        }
    }
}

fn bare_brackets(entry: &str) -> &str {
    entry
        .strip_prefix('[')
        .and_then(|e| e.strip_suffix(']'))
        .unwrap_or(entry)
}

fn in_net(base: IpAddr, prefix: u8, host: IpAddr) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let kept = u32::from(prefix).min(width);
        // Shifting by the full width is undefined, and means that every host is inside.
        kept == 0 || (a ^ b) >> (width - kept) == 0
    };
    match (base, host) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(no_proxy: &[&str]) -> Proxies {
        Proxies::new(&ProxySettings {
            http: Some("plain.lan:3128".into()),
            https: Some("http://us%40er:p+w@secure.lan".into()),
            no_proxy: no_proxy.iter().map(|e| (*e).to_owned()).collect(),
        })
    }

    #[test]
    fn picks_by_scheme_and_never_loopback() {
        let proxies = proxies(&[]);
        let at = |uri: &str| {
            proxies
                .for_uri(&uri.parse().unwrap())
                .unwrap()
                .map(|p| p.uri.to_string())
        };
        assert_eq!(at("http://a.b/").as_deref(), Some("http://plain.lan:3128/"));
        assert_eq!(at("https://a.b/").as_deref(), Some("http://secure.lan:80/"));
        for local in [
            "http://localhost:1/",
            "https://127.0.0.9/",
            "http://[::1]:5/",
        ] {
            assert_eq!(at(local), None, "{local}");
        }
        let secure = proxies.for_uri(&"https://a.b/".parse().unwrap()).unwrap();
        let secure = secure.unwrap();
        let expected = format!("Basic {}", STANDARD.encode("us@er:p+w"));
        assert_eq!(secure.authorization.as_ref().unwrap(), &expected);
        assert!(
            proxies
                .authorization_in_request(&"https://a.b/".parse().unwrap())
                .is_none()
        );
    }

    #[test]
    fn no_proxy_by_name_port_address_and_net() {
        let table = [
            ("*", "http://a.b/", true),
            ("b.c", "http://a.b.c/", true),
            (".b.c", "http://b.c/", true),
            ("*.b.c", "http://a.b.c/", true),
            ("b.c", "http://ab.c/", false),
            ("b.c:81", "http://b.c:81/", true),
            ("b.c:81", "http://b.c/", false),
            ("B.C", "http://b.c/", true),
            ("10.0.0.0/8", "http://10.255.1.2/", true),
            ("10.0.0.0/8", "http://11.0.0.1/", false),
            ("0.0.0.0/0", "http://9.9.9.9/", true),
            ("10.1.1.1:5000", "http://10.1.1.1:5000/", true),
            ("10.1.1.1:5000", "http://10.1.1.1/", false),
            ("fd00::/8", "http://[fd12::1]:5000/", true),
            ("fd00::/8", "http://10.0.0.1/", false),
        ];
        for (rule, uri, direct) in table {
            let proxies = proxies(&[rule]);
            let proxy = proxies.for_uri(&uri.parse().unwrap()).unwrap();
            assert_eq!(proxy.is_none(), direct, "{rule} {uri}");
        }
    }

    #[test]
    fn reads_both_cases_of_the_environment() {
        let settings = ProxySettings::from_vars(|name| match name {
            "HTTP_PROXY" => Some("http://upper".into()),
            "https_proxy" => Some("http://lower".into()),
            "HTTPS_PROXY" => Some("http://shadowed".into()),
            "NO_PROXY" => Some("a.b, c.d".into()),
            _ => None,
        });
        assert_eq!(settings.http.as_deref(), Some("http://upper"));
        assert_eq!(settings.https.as_deref(), Some("http://lower"));
        assert_eq!(settings.no_proxy, ["a.b", "c.d"]);
        assert!(!format!("{settings:?}").contains("lower"));
    }

    #[test]
    fn a_proxy_it_cannot_speak_to_costs_only_those_who_would_go_through_it() {
        for bad in ["socks5://h:1", "https://h", "http://", "http://h:99999"] {
            let proxies = Proxies::new(&ProxySettings {
                http: Some(bad.into()),
                https: Some("http://good".into()),
                no_proxy: vec!["direct.lan".into()],
            });
            let at = |uri: &str| {
                let proxy = proxies.for_uri(&uri.parse().unwrap());
                proxy.map(|proxy| proxy.is_some())
            };
            let error = at("http://a.lan/").unwrap_err();
            assert!(error.starts_with("HTTP_PROXY is unusable: "), "{error}");
            assert!(error.contains("; expected http://["), "{error}");
            assert_eq!(at("https://a.lan/"), Ok(true));
            assert_eq!(at("http://direct.lan/"), Ok(false));
            assert_eq!(at("http://127.0.0.1/"), Ok(false));
        }
    }
}
