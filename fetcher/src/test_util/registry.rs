//! A registry on loopback that misbehaves on request.
//!
//! A real HTTP server (1.1 and 2, plain or TLS) with manifests, blobs, uploads, referrers,
//! Bearer tokens, and a second listener as CDN for redirected blobs. Invariant: it is gone, with
//! all its connections, when dropped; every request is counted before it is answered.

mod answer;
mod upload;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::memory::Content;
use crate::types::{Digest, MediaType};

/// Requests that are remembered.
const ASKED_MAX: usize = 1024;

/// Where a request was counted, and where a fault applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v2/<name>/manifests/…`
    Manifest,
    /// `/v2/<name>/blobs/…`
    Blob,
    /// `/v2/<name>/referrers/…`
    Referrers,
    /// `/v2/<name>/blobs/uploads/…`
    Upload,
    /// The token endpoint.
    Token,
    /// The CDN that blobs are redirected to.
    Cdn,
    /// Anything else.
    Other,
}

/// One way to misbehave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answers with this status, and `Retry-After` if given.
    Status(u16, Option<String>),
    /// Closes the connection after this many bytes of the body.
    CloseAfter(usize),
    /// Sends nothing more after this many bytes of the body.
    HangAfter(usize),
    /// Never answers.
    Hang,
    /// Answers a range with 200 and everything.
    IgnoreRange,
    /// States a `Content-Range` one byte off, in each part of several.
    WrongContentRange,
    /// Answers a question for several parts with the first.
    FirstPartOnly,
    /// Sends several parts the last first.
    PartsBackwards,
    /// Sends several parts as one, with what is between them.
    PartsJoined,
    /// Inverts the first byte of the body.
    CorruptBytes,
    /// Sends one byte too many, without a `Content-Length`.
    TooLong,
    /// Serves only the first half, as if that were all.
    Half,
}

/// What a list of referrers says of the page after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paging {
    /// It is that page itself.
    Loop,
    /// It is another one, on every page.
    Endless,
}

/// Requests counted by endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    /// Manifest requests, refused ones included.
    pub manifests: u32,
    /// Blob requests at the registry.
    pub blobs: u32,
    /// Referrers requests.
    pub referrers: u32,
    /// Requests of uploads and mounts of blobs.
    pub uploads: u32,
    /// Token requests.
    pub tokens: u32,
    /// Blob requests at the CDN.
    pub cdn: u32,
    /// Requests at the CDN that carried an `Authorization`: must stay zero.
    pub credentials_at_cdn: u32,
    /// Anything else.
    pub other: u32,
    /// Requests that came by HTTP/2.
    pub http2: u32,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What it was counted as.
    pub endpoint: Endpoint,
    /// Path and query.
    pub target: String,
    /// All headers.
    pub headers: http::HeaderMap,
}

/// How a registry is set up before it starts.
#[derive(Default)]
pub struct FakeRegistryBuilder {
    auth: Auth,
    redirect: bool,
    no_referrers: bool,
    referrers_elsewhere: bool,
    forbids: bool,
    private: Option<String>,
    token_life_s: Option<u64>,
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// Who may read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Auth {
    #[default]
    Open,
    /// Anyone with a token; a token costs user and password if they are set.
    Bearer(Option<(String, String)>),
    /// Tokens are granted for this refresh token.
    Identity(String),
    Basic(String, String),
}

impl FakeRegistryBuilder {
    /// Wants a token, which anyone gets.
    #[must_use]
    pub fn bearer(mut self) -> Self {
        self.auth = Auth::Bearer(None);
        self
    }

    /// Wants a token, which costs user and password.
    #[must_use]
    pub fn bearer_for(mut self, user: &str, password: &str) -> Self {
        self.auth = Auth::Bearer(Some((user.to_owned(), password.to_owned())));
        self
    }

    /// Wants a token, which costs an identity token.
    #[must_use]
    pub fn identity(mut self, refresh_token: &str) -> Self {
        self.auth = Auth::Identity(refresh_token.to_owned());
        self
    }

    /// Wants user and password on every request.
    #[must_use]
    pub fn basic(mut self, user: &str, password: &str) -> Self {
        self.auth = Auth::Basic(user.to_owned(), password.to_owned());
        self
    }

    /// Answers credentials that are not the right ones with 403, and says no more.
    #[must_use]
    pub fn forbidding(mut self) -> Self {
        self.forbids = true;
        self
    }

    /// Wants what it wants for repositories alone whose names begin like this.
    #[must_use]
    pub fn private(mut self, prefix: &str) -> Self {
        self.private = Some(prefix.to_owned());
        self
    }

    /// Tokens say that they expire after this many seconds.
    #[must_use]
    pub fn token_life_s(mut self, seconds: u64) -> Self {
        self.token_life_s = Some(seconds);
        self
    }

    /// Redirects blobs to the CDN.
    #[must_use]
    pub fn redirect(mut self) -> Self {
        self.redirect = true;
        self
    }

    /// Has no referrers API; the tag scheme still works.
    #[must_use]
    pub fn without_referrers(mut self) -> Self {
        self.no_referrers = true;
        self
    }

    /// Has no referrers API, and sends who asks for it to another host.
    #[must_use]
    pub fn referrers_elsewhere(mut self) -> Self {
        self.referrers_elsewhere = true;
        self
    }

    /// Speaks TLS (the CDN too).
    #[must_use]
    pub fn tls(mut self, config: Arc<rustls::ServerConfig>) -> Self {
        self.tls = Some(config);
        self
    }

    /// Starts listening on two free loopback ports.
    pub async fn start(self) -> std::io::Result<FakeRegistry> {
        let registry = TcpListener::bind("127.0.0.1:0").await?;
        let cdn = TcpListener::bind("127.0.0.1:0").await?;
        let address = registry.local_addr()?;
        let shared = Arc::new(Shared {
            address,
            cdn_address: cdn.local_addr()?,
            setup: self,
            state: Mutex::default(),
        });
        let tasks = [
            tokio::spawn(serve(registry, shared.clone(), false)),
            tokio::spawn(serve(cdn, shared.clone(), true)),
        ];
        Ok(FakeRegistry { shared, tasks })
    }
}

/// What the handlers share.
struct Shared {
    address: SocketAddr,
    cdn_address: SocketAddr,
    setup: FakeRegistryBuilder,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    content: Content,
    script: VecDeque<(Option<Endpoint>, Fault)>,
    always: HashMap<Endpoint, Fault>,
    requests: Requests,
    paging: Option<Paging>,
    /// The latest requests.
    asked: VecDeque<Asked>,
    ranges: Vec<String>,
    /// Tokens up to this number are no longer good.
    tokens_revoked: u32,
    /// What each token is good for, as it was asked for.
    scopes: HashMap<u32, String>,
    /// Signature that the CDN accepts.
    signature: u32,
}

/// A running registry.
pub struct FakeRegistry {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl FakeRegistry {
    /// An open registry without redirects, on plain http.
    pub async fn start() -> Self {
        Self::builder()
            .start()
            .await
            .expect("loopback has a free port")
    }

    /// Sets up another kind.
    pub fn builder() -> FakeRegistryBuilder {
        FakeRegistryBuilder::default()
    }

    /// Ends all connections and refuses new ones. What is at the CDN can be had still.
    pub async fn close(&mut self) {
        let [registry, _] = &mut self.tasks;
        registry.abort();
        // Its port is free once it has ended.
        let _ = registry.await;
    }

    /// Takes connections again, after [`Self::close`].
    pub async fn reopen(&mut self) -> std::io::Result<()> {
        let registry = TcpListener::bind(self.shared.address).await?;
        let [task, _] = &mut self.tasks;
        *task = tokio::spawn(serve(registry, self.shared.clone(), false));
        Ok(())
    }

    /// `127.0.0.1:PORT`.
    pub fn url_host(&self) -> String {
        self.shared.address.to_string()
    }

    /// Adds a blob to every repository.
    pub fn add_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        self.shared.state.lock().content.add_blob(bytes.into())
    }

    /// Adds a manifest to `repository` (its path) under its digest and `tag`.
    pub fn add_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: MediaType,
        bytes: impl Into<Bytes>,
    ) -> Digest {
        let bytes = bytes.into();
        self.shared
            .state
            .lock()
            .content
            .add_manifest(repository, tag, media_type, bytes)
    }

    /// The next request for a manifest, a blob or the CDN misbehaves like this.
    pub fn script(&self, fault: Fault) {
        self.shared.state.lock().script.push_back((None, fault));
    }

    /// The next request to `endpoint` misbehaves like this.
    pub fn script_on(&self, endpoint: Endpoint, fault: Fault) {
        self.shared
            .state
            .lock()
            .script
            .push_back((Some(endpoint), fault));
    }

    /// Every request to `endpoint` misbehaves like this, once the script is used up.
    pub fn always(&self, endpoint: Endpoint, fault: Fault) {
        self.shared.state.lock().always.insert(endpoint, fault);
    }

    /// No request misbehaves any more.
    pub fn behave(&self) {
        let mut state = self.shared.state.lock();
        state.always.clear();
        state.script.clear();
    }

    /// From now on lists of referrers say that there is more.
    pub fn page_referrers(&self, paging: Paging) {
        self.shared.state.lock().paging = Some(paging);
    }

    /// No token handed out so far is good any more.
    pub fn revoke_tokens(&self) {
        let mut state = self.shared.state.lock();
        state.tokens_revoked = state.requests.tokens;
    }

    /// No redirect handed out so far is good any more.
    pub fn expire_redirects(&self) {
        self.shared.state.lock().signature += 1;
    }

    /// What has been asked so far.
    pub fn requests(&self) -> Requests {
        self.shared.state.lock().requests
    }

    /// The latest requests, at most 1024, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.state.lock().asked.iter().cloned().collect()
    }

    /// The `Range` headers of blob requests that were served, in order; empty text for
    /// a request without one.
    pub fn ranges(&self) -> Vec<String> {
        self.shared.state.lock().ranges.clone()
    }
}

impl Shared {
    /// Counts a request.
    fn count(&self, asked: Asked, http2: bool) {
        let mut state = self.state.lock();
        let endpoint = asked.endpoint;
        if state.asked.len() == ASKED_MAX {
            state.asked.pop_front();
        }
        state.asked.push_back(asked);
        state.requests.http2 += u32::from(http2);
        let requests = &mut state.requests;
        *match endpoint {
            Endpoint::Manifest => &mut requests.manifests,
            Endpoint::Blob => &mut requests.blobs,
            Endpoint::Referrers => &mut requests.referrers,
            Endpoint::Upload => &mut requests.uploads,
            Endpoint::Token => &mut requests.tokens,
            Endpoint::Cdn => &mut requests.cdn,
            Endpoint::Other => &mut requests.other,
        } += 1;
    }

    /// The fault for a request that passed authorization.
    fn fault(&self, endpoint: Endpoint) -> Option<Fault> {
        let mut state = self.state.lock();
        // Where blobs are redirected, what can go wrong with their bytes is at the CDN.
        let data = match endpoint {
            Endpoint::Manifest | Endpoint::Cdn => true,
            Endpoint::Blob => !self.setup.redirect,
            Endpoint::Referrers | Endpoint::Upload | Endpoint::Token | Endpoint::Other => false,
        };
        let applies = |on: &Option<Endpoint>| on.map_or(data, |on| on == endpoint);
        match state.script.iter().position(|(on, _)| applies(on)) {
            Some(at) => state.script.remove(at).map(|(_, fault)| fault),
            None => state.always.get(&endpoint).cloned(),
        }
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, cdn: bool) {
    // Owned by this task, so that aborting it ends every connection.
    let mut connections = JoinSet::new();
    let acceptor = shared.setup.tls.clone().map(TlsAcceptor::from);
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let (shared, acceptor) = (shared.clone(), acceptor.clone());
        connections.spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                answer::handle(shared.clone(), cdn, request)
            });
            let server = auto::Builder::new(TokioExecutor::new());
            // A broken connection is the client's affair, and often the test's purpose.
            let _ = match acceptor {
                None => server.serve_connection(TokioIo::new(stream), service).await,
                Some(acceptor) => match acceptor.accept(stream).await {
                    Ok(stream) => server.serve_connection(TokioIo::new(stream), service).await,
                    Err(_) => Ok(()),
                },
            };
        });
    }
}
