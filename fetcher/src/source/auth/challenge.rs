//! `WWW-Authenticate`: which kind of authorization a registry wants.
//!
//! Pure. Input comes from the network: bounded by the header limit, never panics, and
//! what cannot be understood is skipped.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// What the registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password on every request.
    Basic,
    /// A token from a token endpoint.
    Bearer(Bearer),
}

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bearer {
    /// URL of the token endpoint.
    pub(crate) realm: String,
    /// Name the registry goes by at the endpoint.
    pub(crate) service: Option<String>,
}

impl Challenge {
    /// The strongest challenge among all headers: Bearer before Basic.
    pub(crate) fn best(headers: &HeaderMap) -> Option<Self> {
        let all: Vec<Self> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| Self::parse(value.to_str().ok()?))
            .collect();
        let bearer = all.iter().find(|c| matches!(c, Self::Bearer(_)));
        bearer.or(all.first()).cloned()
    }

    /// One challenge: a scheme, then `name=value` or `name="value"` separated by commas.
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut realm = None;
        let mut service = None;
        for (name, value) in parameters(rest) {
            match name.as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                _ => {}
            }
        }
        Some(Self::Bearer(Bearer {
            realm: realm?,
            service,
        }))
    }
}

/// Parameters in order, names in lower case, quoted strings unescaped.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([' ', ',', '\t']).to_ascii_lowercase();
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let (value, after) = after.split_once(',').unwrap_or((after, ""));
                (value.trim().to_owned(), after)
            }
        };
        out.push((name, value));
        rest = after;
    }
    out
}

/// The string up to the closing quote, and what follows it.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, text.get(at + 1..).unwrap_or("")),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer(Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
        }))
    }

    #[test]
    fn reads_what_registries_send() {
        let table = [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
                bearer("https://auth.docker.io/token", Some("registry.docker.io")),
            ),
            (
                r#"bearer service=s , realm="http://h/t?a=b,c""#,
                bearer("http://h/t?a=b,c", Some("s")),
            ),
            (r#"Bearer realm="a\"b""#, bearer("a\"b", None)),
            (r#"Bearer service="s""#, None),
            (r#"Basic realm="Registry""#, Some(Challenge::Basic)),
            ("Negotiate", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(Challenge::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn prefers_bearer() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Basic realm=x".parse().unwrap());
        headers.append(WWW_AUTHENTICATE, "Bearer realm=y".parse().unwrap());
        assert_eq!(Challenge::best(&headers), bearer("y", None));
    }

    proptest! {
        #[test]
        fn never_panics(text in "(Bearer )?[ -~é]{0,60}") {
            let _ = Challenge::parse(&text);
        }
    }
}
