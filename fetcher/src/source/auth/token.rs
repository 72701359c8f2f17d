//! One token request: GET with Basic or nothing, or OAuth2's POST for identity tokens.
//!
//! Invariant: credentials go to the realm over https, or to loopback and registries that
//! are themselves on plain http; a registry on https cannot point them at plain http.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Full;
use serde::Deserialize;
use tokio::time::Instant;

use super::challenge::Bearer;
use super::credentials::{Credential, Found};
use super::{Access, authorize, basic, denied, sensitive};
use crate::source::endpoint::is_loopback;
use crate::source::http::Transport;
use crate::source::registry::answer;
use crate::source::retry::{Fault, Subject};
use crate::source::stats::{Count, Counters};
use crate::{Error, Result};

/// Largest token answer; tokens of big organisations run to tens of KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// What a token without `expires_in` is good for, as the token specification says.
const LIFE_DEFAULT: Duration = Duration::from_secs(60);
/// A token that says it lasts longer is asked for again all the same.
const LIFE_MAX: Duration = Duration::from_secs(3600);

/// A Bearer token, ready to send.
#[derive(Clone)]
pub(super) struct Token {
    /// `Bearer …`.
    pub(super) header: HeaderValue,
    refresh_at: Instant,
    /// What it was granted for.
    pub(super) of: Credential,
}

impl Token {
    /// Whether there is no need to replace it yet.
    pub(super) fn is_fresh(&self) -> bool {
        Instant::now() < self.refresh_at
    }
}

/// Everything one token request needs.
pub(super) struct Order<'a> {
    pub(super) access: &'a Access,
    pub(super) subject: &'a Subject,
    pub(super) bearer: &'a Bearer,
    pub(super) found: &'a Found,
}

#[derive(Deserialize)]
struct Grant {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Order<'_> {
    /// Asks the realm, unless the token is known already.
    pub(super) async fn fetch(
        &self,
        transport: &Transport,
        counters: &Arc<Counters>,
    ) -> Result<Token, Fault> {
        if let Credential::Registry(token) = &self.found.credential {
            return Ok(Token {
                header: sensitive(&format!("Bearer {token}"))?,
                refresh_at: Instant::now() + life(None),
                of: self.found.credential.clone(),
            });
        }
        let request = self.request()?;
        counters.add(Count::Tokens, 1);
        let asked_at = Instant::now();
        let mut reply = transport.send(request).await?;
        let asked = format!("token for {}", self.subject.what);
        match reply.status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                let said = answer::registry_words(&mut reply).await;
                return Err(denied(self.subject, self.found, said.as_deref()).into());
            }
            _ => {
                let host = self.realm_host();
                return Err(answer::fault(&Subject { what: asked, host }, &mut reply).await);
            }
        }
        let body = reply
            .read_at_most(ANSWER_BYTES_MAX)
            .await?
            .ok_or_else(|| Error::limit(asked.as_str(), "the answer is longer than 1 MiB"))?;
        let grant: Grant = serde_json::from_slice(&body)
            .map_err(|error| Error::malformed(asked.as_str(), error.to_string()))?;
        let text = grant
            .token
            .or(grant.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| Error::malformed(asked, "the answer holds no token"))?;
        Ok(Token {
            header: sensitive(&format!("Bearer {text}"))?,
            refresh_at: asked_at + life(grant.expires_in),
            of: self.found.credential.clone(),
        })
    }

    /// The request, with the headers that the host wants if it is the host's own.
    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let mut request = self.bare_request()?;
        if self.access.endpoint.owns(request.uri()) {
            let needed = request.headers().clone();
            let is_free =
                |name: &HeaderName| *name != header::AUTHORIZATION && !needed.contains_key(name);
            for (name, value) in self.access.headers.iter().filter(|(name, _)| is_free(name)) {
                request.headers_mut().append(name, value.clone());
            }
        }
        Ok(request)
    }

    fn bare_request(&self) -> Result<Request<Full<Bytes>>> {
        let mut url = self.realm()?;
        let scopes = self.access.scopes();
        let service = self.bearer.service.as_deref();
        if let Credential::Identity(token) = &self.found.credential {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token")
                .append_pair("service", service.unwrap_or(&self.access.host))
                .append_pair("scope", &scopes.join(" "))
                .append_pair("client_id", "lazarette")
                .append_pair("refresh_token", token);
            let mut request = build(Method::POST, url.as_str(), form.finish().into())?;
            let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
            request
                .headers_mut()
                .insert(header::CONTENT_TYPE, form_type);
            return Ok(request);
        }
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        for scope in &scopes {
            url.query_pairs_mut().append_pair("scope", scope);
        }
        let mut request = build(Method::GET, url.as_str(), Bytes::new())?;
        if let Credential::Basic { user, password } = &self.found.credential {
            authorize(request.headers_mut(), Some(&basic(user, password)?));
        }
        Ok(request)
    }

    /// The realm as a URL, unless credentials must not go there.
    fn realm(&self) -> Result<url::Url> {
        let what = || format!("token endpoint of {}", self.access.host);
        let url = url::Url::parse(&self.bearer.realm)
            .map_err(|error| Error::malformed(what(), error.to_string()))?;
        let host = url.host_str().unwrap_or_default();
        let registry_plain = self.access.endpoint.is_plain();
        match url.scheme() {
            "https" => Ok(url),
            "http" if registry_plain || is_loopback(host) => Ok(url),
            _ => Err(Error::Unsupported {
                what: what(),
                detail: format!("{} is not https, and credentials would be readable", url),
            }),
        }
    }

    fn realm_host(&self) -> String {
        let uri = self.bearer.realm.parse::<Uri>().ok();
        uri.and_then(|uri| Some(uri.authority()?.to_string()))
            .unwrap_or_else(|| self.access.host.clone())
    }
}

fn build(method: Method, uri: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
    Request::builder()
        .method(method)
        .uri(uri)
        .body(Full::new(body))
        .map_err(|error| Error::malformed("token endpoint", error.to_string()))
}

/// How long a token is used: a fifth of its life is left when it is replaced, so that no
/// request starts with one that dies on the way.
fn life(expires_in: Option<u64>) -> Duration {
    let stated = expires_in.map_or(LIFE_DEFAULT, Duration::from_secs);
    stated.min(LIFE_MAX) * 4 / 5
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::source::SourceConfig;
    use crate::source::auth::Action;
    use crate::source::auth::credentials::Origin;
    use crate::source::endpoint::Endpoint;

    fn order(host: &str, realm: &str, credential: Credential) -> Result<Request<Full<Bytes>>> {
        order_to(Action::Pull, host, realm, credential)
    }

    fn order_to(
        action: Action,
        host: &str,
        realm: &str,
        credential: Credential,
    ) -> Result<Request<Full<Bytes>>> {
        let access = Access {
            host: host.into(),
            endpoint: Endpoint::of(host, &SourceConfig::default()),
            repository: "a/b".into(),
            action,
            headers: [(
                HeaderName::from_static("x-node"),
                HeaderValue::from_static("7"),
            )]
            .into_iter()
            .chain([(header::AUTHORIZATION, HeaderValue::from_static("mine"))])
            .collect(),
        };
        let subject = Subject {
            what: "x".into(),
            host: host.into(),
        };
        let bearer = Bearer {
            realm: realm.into(),
            service: Some("s v".into()),
        };
        let found = Found {
            credential,
            trouble: None,
            origin: Origin::Config,
            narrower: Vec::new(),
        };
        Order {
            access: &access,
            subject: &subject,
            bearer: &bearer,
            found: &found,
        }
        .request()
    }

    #[test]
    fn what_the_host_wants_is_not_told_to_others() {
        for (realm, is_told) in [
            ("https://r.io/v2/token", true),
            ("https://r.io:443/token", true),
            ("https://t.io/token", false),
            ("https://r.io:444/token", false),
        ] {
            for credential in [Credential::Anonymous, Credential::Identity("t".into())] {
                let request = order("r.io", realm, credential).unwrap();
                let headers = request.headers();
                assert_eq!(headers.contains_key("x-node"), is_told, "{realm}");
                assert!(!headers.contains_key(header::AUTHORIZATION), "{realm}");
            }
        }
    }

    #[test]
    fn builds_both_kinds_of_request() {
        let get = order("r.io", "https://t.io/token?x=1", Credential::Anonymous).unwrap();
        assert_eq!(
            get.uri(),
            "https://t.io/token?x=1&service=s+v&scope=repository%3Aa%2Fb%3Apull"
        );
        assert!(get.headers().get(header::AUTHORIZATION).is_none());
        let basic = Credential::Basic {
            user: "u".into(),
            password: "p".into(),
        };
        let get = order("r.io", "https://t.io/token", basic).unwrap();
        assert_eq!(get.headers()[header::AUTHORIZATION], "Basic dTpw");
        let post = order(
            "r.io",
            "https://t.io/token",
            Credential::Identity("r".into()),
        )
        .unwrap();
        assert_eq!((post.method(), post.uri().query()), (&Method::POST, None));
    }

    #[tokio::test]
    async fn says_what_it_is_for() {
        let push = |from: Option<&str>| Action::Push {
            from: from.map(str::to_owned),
        };
        let identity = || Credential::Identity("r&1".into());
        let form = |action| async {
            let post = order_to(action, "r.io", "https://t.io/token", identity()).unwrap();
            let body = post.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8(body.to_vec()).unwrap()
        };
        assert_eq!(
            form(push(None)).await,
            "grant_type=refresh_token&service=s+v&scope=repository%3Aa%2Fb%3Apull%2Cpush\
             &client_id=lazarette&refresh_token=r%261"
        );
        let both = "scope=repository%3Aa%2Fb%3Apull%2Cpush+repository%3Ac%3Apull&";
        assert!(form(push(Some("c"))).await.contains(both));
        let get = order_to(
            push(Some("c")),
            "r.io",
            "https://t.io/token",
            Credential::Anonymous,
        );
        let query = "service=s+v&scope=repository%3Aa%2Fb%3Apull%2Cpush\
                     &scope=repository%3Ac%3Apull";
        assert_eq!(get.unwrap().uri().query(), Some(query));
    }

    #[test]
    fn never_sends_credentials_in_the_clear() {
        for (host, realm, allowed) in [
            ("r.io", "http://t.io/token", false),
            ("r.io", "ftp://t.io/token", false),
            ("r.io", "not a url", false),
            ("r.io", "http://127.0.0.1:1/token", true),
            ("localhost:5000", "http://localhost:5001/token", true),
        ] {
            assert_eq!(
                order(host, realm, Credential::Anonymous).is_ok(),
                allowed,
                "{realm}"
            );
        }
    }

    #[test]
    fn replaces_tokens_before_they_expire() {
        assert_eq!(life(Some(300)), Duration::from_secs(240));
        assert_eq!(life(None), Duration::from_secs(48));
        assert_eq!(life(Some(u64::MAX)), Duration::from_secs(2880));
        assert_eq!(life(Some(0)), Duration::ZERO);
    }
}
