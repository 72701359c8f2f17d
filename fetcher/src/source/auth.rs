//! Authorization of requests to registries: anonymous, Basic, Bearer tokens.
//!
//! What a pull of the repository came with goes before docker's config, and that is asked
//! where the registry refuses what the pull came with.
//!
//! Invariant: one token request per repository however many readers wait; a token is
//! replaced before it expires, and once when the registry says 401 all the same. What
//! this module hands out is only ever put on requests to the registry's own origin.

pub(crate) mod challenge;
pub(crate) mod credentials;
pub(crate) mod keyring;
mod token;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::Full;
use tokio::time::Instant;

use self::challenge::{Bearer, Challenge};
use self::credentials::{Credential, Credentials, Found, Origin};
use self::token::Token;
use super::endpoint::Endpoint;
use super::http::Transport;
use super::registry::answer;
use super::retry::{Fault, Subject};
use super::single_flight::SingleFlight;
use super::stats::Counters;
use crate::{Error, Result};

/// Registries whose challenge is remembered, and repositories whose token is.
const HOSTS_MAX: usize = 256;
const TOKENS_MAX: usize = 1024;
/// Credentials tried for one token: what a few pulls came with, and the config's.
const CREDENTIALS_TRIED_MAX: u32 = 5;
/// Credentials are looked up again after this long: helpers hand out ones that expire.
const CREDENTIALS_FRESH: Duration = Duration::from_secs(300);
/// And after this long where they could not be read.
const TROUBLE_FRESH: Duration = Duration::from_secs(5);

/// Whom a request speaks to, and about what.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    /// The host as it stands in the reference; names the credentials.
    pub(crate) host: String,
    /// Where its API is.
    pub(crate) endpoint: Endpoint,
    /// The repository's path, which the token's scope names.
    pub(crate) repository: String,
    /// What is done there.
    pub(crate) action: Action,
    /// Headers that it wants, at its own origin.
    pub(crate) headers: HeaderMap,
}

/// What a token has to be good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Reading the repository.
    Pull,
    /// Writing to it, with blobs of another repository if one is named.
    Push {
        /// That repository's path.
        from: Option<String>,
    },
}

impl Access {
    /// What a token is asked for, in the words of the token specification.
    fn scopes(&self) -> Vec<String> {
        let scope = |repository: &str, actions| format!("repository:{repository}:{actions}");
        match &self.action {
            Action::Pull => {
                // Such a host has the repository below its own name for it.
                let below = |prefix| scope(&format!("{prefix}/{}", self.repository), "pull");
                let there = self.endpoint.prefix().map(below);
                let own = scope(&self.repository, "pull");
                std::iter::once(own).chain(there).collect()
            }
            Action::Push { from } => {
                let from = from.as_ref().map(|from| scope(from, "pull"));
                let own = scope(&self.repository, "pull,push");
                std::iter::once(own).chain(from).collect()
            }
        }
    }

    fn key(&self) -> TokenKey {
        let api = self.endpoint.origin() + &self.endpoint.api("");
        (api, self.repository.clone(), self.action.clone())
    }
}

type TokenKey = (String, String, Action);

/// The authorization state of one source.
pub(crate) struct Auth {
    transport: Arc<Transport>,
    counters: Arc<Counters>,
    credentials: Arc<Credentials>,
    found: SingleFlight<String, (Instant, Arc<Found>)>,
    challenges: SingleFlight<String, Challenge>,
    tokens: SingleFlight<TokenKey, Token>,
}

impl Auth {
    /// No state yet.
    pub(crate) fn new(
        transport: Arc<Transport>,
        credentials: Arc<Credentials>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            transport,
            counters,
            credentials,
            found: SingleFlight::new(HOSTS_MAX),
            challenges: SingleFlight::new(HOSTS_MAX),
            tokens: SingleFlight::new(TOKENS_MAX),
        }
    }

    /// The `Authorization` a request needs, as far as the registry has told yet.
    pub(crate) async fn header(
        &self,
        access: &Access,
        subject: &Subject,
    ) -> Result<Option<HeaderValue>, Fault> {
        match self.challenges.peek(&access.endpoint.origin()) {
            None => Ok(None),
            Some(Challenge::Basic) => {
                let found = self.found(access).await;
                match &found.credential {
                    Credential::Basic { user, password } => Ok(Some(basic(user, password)?)),
                    // Another repository may have wanted them, and this one may be for everybody.
                    Credential::Anonymous | Credential::Identity(_) | Credential::Registry(_) => {
                        Ok(None)
                    }
                }
            }
            Some(Challenge::Bearer(bearer)) => {
                let fetch = || self.new_token(access, subject, &bearer);
                let token = self
                    .tokens
                    .get(access.key(), Token::is_fresh, fetch)
                    .await?;
                Ok(Some(token.header))
            }
        }
    }

    /// A token, by the first credential for which there is one.
    async fn new_token(
        &self,
        access: &Access,
        subject: &Subject,
        bearer: &Bearer,
    ) -> Result<Token, Fault> {
        let mut tries = 0;
        loop {
            tries += 1;
            let found = self.found(access).await;
            let order = token::Order {
                access,
                subject,
                bearer,
                found: &found,
            };
            match order.fetch(&self.transport, &self.counters).await {
                Err(Fault::Fatal(Error::Denied { .. }))
                    if tries < CREDENTIALS_TRIED_MAX
                        && self.has_another(access, &found.credential).await => {}
                outcome => return outcome,
            }
        }
    }

    /// Notes that `refused` was; whether there is another to try.
    async fn has_another(&self, access: &Access, refused: &Credential) -> bool {
        let keyring = self.credentials.keyring();
        keyring.refused(&access.host, &access.repository, refused)
            && self.found(access).await.credential != *refused
    }

    /// Gives up on what is behind `used`, which was refused although it is as new as can be.
    /// Whether there is something else to try.
    pub(crate) async fn disown(&self, access: &Access, used: Option<&HeaderValue>) -> bool {
        let token = self.tokens.peek(&access.key());
        let spent = match token.filter(|token| Some(&token.header) == used) {
            Some(token) => Some(token.of),
            None => {
                let credential = self.found(access).await.credential.clone();
                (used.is_some() && basic_of(&credential).as_ref() == used).then_some(credential)
            }
        };
        let has_another = match spent {
            Some(credential) => self.has_another(access, &credential).await,
            // Somebody else has given up on it meanwhile.
            None => used.is_some(),
        };
        if has_another {
            self.tokens
                .forget(&access.key(), |token| Some(&token.header) == used);
        }
        has_another
    }

    /// The token that requests of somebody else's client need, without the word before it;
    /// `None` if the registry wants none. Asks the registry's root where it has not told
    /// yet what it wants.
    pub(crate) async fn token(
        &self,
        access: &Access,
        subject: &Subject,
    ) -> Result<Option<String>, Fault> {
        if self.challenges.peek(&access.endpoint.origin()).is_none() {
            let mut request = Request::new(Full::default());
            *request.uri_mut() = access.endpoint.uri("/v2/")?;
            let mut answer = self.transport.send(request).await?;
            match answer.status {
                StatusCode::OK => return Ok(None),
                StatusCode::UNAUTHORIZED => self.refused(access, None, &answer.headers).await?,
                _ => return Err(answer::fault(subject, &mut answer).await),
            }
        }
        let header = self.header(access, subject).await?;
        let text = header.as_ref().and_then(|header| header.to_str().ok());
        match text.and_then(|text| text.strip_prefix("Bearer ")) {
            Some(token) => Ok(Some(token.to_owned())),
            None => Err(self.denied(access, subject, None).await.into()),
        }
    }

    /// Learns from a 401 that came although `used` was sent. `Ok` means that another try
    /// has a chance.
    pub(crate) async fn refused(
        &self,
        access: &Access,
        used: Option<&HeaderValue>,
        headers: &HeaderMap,
    ) -> Result<(), Fault> {
        if let Some(challenge) = Challenge::best(headers) {
            let origin = access.endpoint.origin();
            let known = self.challenges.peek(&origin);
            if known.as_ref() != Some(&challenge) {
                self.challenges.forget(&origin, |_| true);
                self.challenges
                    .get(origin, |_| true, || async { Ok::<_, Fault>(challenge) })
                    .await?;
            }
        }
        self.tokens
            .forget(&access.key(), |token| Some(&token.header) == used);
        if used.is_some() {
            self.found.forget(&access.host, |_| true);
        }
        Ok(())
    }

    /// The error for a 401 that stays, with the registry's words if it had some.
    pub(crate) async fn denied(
        &self,
        access: &Access,
        subject: &Subject,
        said: Option<&str>,
    ) -> Error {
        let found = self.found(access).await;
        denied(subject, &found, said)
    }

    /// What to use for `access`: what a pull came with, unless it was refused and the config
    /// has something.
    async fn found(&self, access: &Access) -> Arc<Found> {
        let (keyring, host) = (self.credentials.keyring(), access.host.as_str());
        if let Some(given) = keyring.find(host, &access.repository) {
            return Arc::new(Found::given(given));
        }
        let mut found = self.configured(host).await;
        let narrower = found.of(&access.repository);
        if *narrower != found.credential {
            found = Arc::new(Found {
                credential: narrower.clone(),
                trouble: None,
                origin: Origin::Config,
                narrower: Vec::new(),
            });
        }
        if found.credential != Credential::Anonymous {
            return found;
        }
        match keyring.find_refused(host, &access.repository) {
            Some(given) => Arc::new(Found::given(given)),
            None => found,
        }
    }

    async fn configured(&self, host: &str) -> Arc<Found> {
        let fresh = |(at, found): &(Instant, Arc<Found>)| {
            let max = match found.trouble {
                None => CREDENTIALS_FRESH,
                Some(_) => TROUBLE_FRESH,
            };
            at.elapsed() < max
        };
        let lookup = || async {
            let found = self.credentials.find(host).await;
            Ok::<_, std::convert::Infallible>((Instant::now(), Arc::new(found)))
        };
        match self.found.get(host.to_owned(), fresh, lookup).await {
            Ok((_, found)) => found,
            Err(never) => match never {},
        }
    }
}

/// What was refused, why, and what the user can do about it.
fn denied(subject: &Subject, found: &Found, said: Option<&str>) -> Error {
    let Subject { what, host } = subject.clone();
    let advice = match (&found.credential, &found.trouble) {
        (Credential::Anonymous, Some(trouble)) => {
            format!("no credentials could be read: {trouble}")
        }
        (Credential::Anonymous, None) => {
            format!("no credentials for it; if it exists and is private, run `docker login {host}`")
        }
        _ if found.origin == Origin::Pull => {
            "the credentials that its last pull came with are not accepted; pull it again"
                .to_owned()
        }
        _ => format!(
            "the credentials found for it are not accepted; run `docker login {host}` again"
        ),
    };
    let detail = match said {
        Some(said) => format!("{said} ({advice})"),
        None => advice,
    };
    Error::Denied { what, host, detail }
}

fn basic(user: &str, password: &str) -> Result<HeaderValue> {
    sensitive(&format!(
        "Basic {}",
        STANDARD.encode(format!("{user}:{password}"))
    ))
}

/// What a credential looks like where it is sent as it is.
fn basic_of(credential: &Credential) -> Option<HeaderValue> {
    match credential {
        Credential::Basic { user, password } => basic(user, password).ok(),
        Credential::Anonymous | Credential::Identity(_) | Credential::Registry(_) => None,
    }
}

/// A header value that is never logged.
fn sensitive(text: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| Error::malformed("credential", "it has characters a header cannot carry"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Puts `authorization` on a request.
pub(crate) fn authorize(headers: &mut HeaderMap, authorization: Option<&HeaderValue>) {
    if let Some(value) = authorization {
        headers.insert(header::AUTHORIZATION, value.clone());
    }
}
