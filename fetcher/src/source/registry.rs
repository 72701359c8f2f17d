//! The registry source: an OCI distribution API read over our own HTTP client.
//!
//! Blobs, manifests, indexes and referrers all go through this reader, not through
//! `oci-client`, because that library cannot give the errors and bounds this module
//! promises: it swallows failed authorization and asks anonymously, drops `Retry-After`,
//! has no deadline and no limit on a document's size, re-serialises what must stay byte
//! exact, and asks for a token per reader. What it does well is used: [`super::push`]
//! writes with it, and its document types parse referrers.
//!
//! Invariant: nothing read here is trusted, except that a document has the digest its
//! reference pins and a body has the promised shape. Credentials go to the registry's own
//! origin and its token endpoint, never to a redirect's target. One source reads from the
//! registry that a repository names, or always from one other, its [`Site`].

pub(crate) mod answer;
mod blob;
mod document;
pub(crate) mod multipart;
mod origin;
mod referrers;

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use http::{HeaderMap, Uri};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Semaphore;

pub(crate) use self::blob::{Want, take_off};
use super::auth::credentials::Credentials;
use super::auth::keyring::Keyring;
use super::auth::{Access, Action, Auth};
use super::endpoint::Endpoint;
use super::exact::{check_parts, check_range};
use super::http::{Reach, Transport};
use super::retry::{Attempts, Jitter, Manner, Patience, Subject, Trouble};
use super::single_flight::SingleFlight;
use super::stats::{Counters, SourceStats};
use super::{BlobRef, BlobSource, Body, Document, SourceConfig};
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// Blobs whose redirect target is remembered: more than the layers of any set of images
/// that start together.
const ROUTES_MAX: usize = 4096;

/// Openings that ask at once where their blob is: what the profile of a start has under way.
/// More would only be more redirects to answer for a registry.
const ASKERS_MAX: usize = 8;

/// Parts of a blob asked for at once: a header of under 2 KiB, and at most a quarter of
/// what servers that count them allow.
const PARTS_MAX: usize = 48;
/// Hosts that are remembered to serve one part at a time.
const SINGLE_MAX: usize = 1024;

/// Where a blob's bytes come from, once the registry has said.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    /// The registry serves them itself.
    Origin,
    /// It redirects there; such addresses are signed and expire.
    Elsewhere(Uri),
}

/// Whom a source asks, where that is not simply the registry that a repository names.
#[derive(Debug, Clone, Default)]
pub(crate) struct Site {
    /// Where it is; `None` for the registry that the repository names.
    pub(crate) endpoint: Option<Endpoint>,
    /// Headers that it wants. They go nowhere else.
    pub(crate) headers: HeaderMap,
    /// How it is reached.
    pub(crate) reach: Reach,
}

/// Reads from registries. Cheap to clone; clones share pool, tokens and counters.
#[derive(Clone)]
pub struct RegistrySource {
    core: Arc<Core>,
    manner: Manner,
}

/// What all operations of one source share.
struct Core {
    config: SourceConfig,
    site: Site,
    transport: Arc<Transport>,
    credentials: Arc<Credentials>,
    auth: Arc<Auth>,
    routes: SingleFlight<(Repository, Digest), Route>,
    /// Turns of those who ask for a route that somebody else may be asking for.
    askers: Semaphore,
    /// Hosts that answered a question for several parts with something else.
    single: Mutex<HashSet<String>>,
    jitter: Jitter,
    counters: Arc<Counters>,
}

impl RegistrySource {
    /// A source with the settings of `config`. Reads the CA file; connects to nothing.
    pub fn new(config: SourceConfig) -> Result<Self> {
        Self::with_rng(config, StdRng::from_os_rng())
    }

    /// The same with given randomness for backoff.
    pub fn with_rng(config: SourceConfig, rng: StdRng) -> Result<Self> {
        let counters = Arc::<Counters>::default();
        let transport = Arc::new(Transport::new(&config, counters.clone())?);
        let credentials = Arc::new(Credentials::new(config.docker_config.clone()));
        let auth = Auth::new(transport.clone(), credentials.clone(), counters.clone());
        Ok(Self {
            core: Arc::new(Core {
                config,
                site: Site::default(),
                transport,
                credentials,
                auth: Arc::new(auth),
                routes: SingleFlight::new(ROUTES_MAX),
                askers: Semaphore::new(ASKERS_MAX),
                single: Mutex::default(),
                jitter: Jitter::new(rng),
                counters,
            }),
            manner: Manner::default(),
        })
    }

    /// A source with the same settings that asks `site`, and shares what can be shared:
    /// counters, credentials, and connections if the site is reached as all are. Connects
    /// to nothing.
    pub(crate) fn at(&self, site: Site) -> Result<Self> {
        let core = &self.core;
        let (mut transport, mut auth) = (core.transport.clone(), core.auth.clone());
        if !site.reach.is_usual() {
            let counters = core.counters.clone();
            let own = Transport::reaching(&core.config, counters.clone(), &site.reach)?;
            transport = Arc::new(own);
            let credentials = core.credentials.clone();
            auth = Arc::new(Auth::new(transport.clone(), credentials, counters));
        }
        Ok(Self {
            core: Arc::new(Core {
                config: core.config.clone(),
                site,
                transport,
                credentials: core.credentials.clone(),
                auth,
                routes: SingleFlight::new(ROUTES_MAX),
                askers: Semaphore::new(ASKERS_MAX),
                single: Mutex::default(),
                jitter: core.jitter.clone(),
                counters: core.counters.clone(),
            }),
            manner: Manner::default(),
        })
    }

    /// Opens a body of `parts`, which ascend.
    pub(crate) async fn open(
        &self,
        blob: &BlobRef,
        want: Want,
        parts: &[ByteRange],
    ) -> Result<Body> {
        blob::open(self, blob, want, parts).await
    }

    /// The same as [`BlobSource::referrers`], but an error if the registry knows neither
    /// the referrers API nor a tag that stands in for it.
    pub(crate) async fn known_referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        referrers::list(self, repository, digest, artifact_type).await
    }

    /// The same, asking with `patience`; [`Self::gave_up`] is of what this one is asked.
    pub(crate) fn asking(&self, patience: Patience) -> Self {
        Self {
            core: self.core.clone(),
            manner: Manner::new(patience),
        }
    }

    /// Why an operation gave up the host, if one did.
    pub(crate) fn gave_up(&self) -> Option<Trouble> {
        self.manner.gave_up()
    }

    /// Attempts at `what`, in the manner of this source.
    pub(crate) fn attempts(&self, what: String, repository: &Repository) -> Attempts {
        let host = self.core.host(repository).to_owned();
        let attempts = Attempts::new(
            Subject { what, host },
            self.core.config.deadline,
            self.core.jitter.clone(),
            self.core.counters.clone(),
        );
        attempts.asking(self.manner.clone())
    }

    /// The settings it was made with.
    pub(crate) fn config(&self) -> &SourceConfig {
        &self.core.config
    }

    /// Begins connections to the registry of `repository`, which is soon asked for
    /// something. Costs the registry no request; a failure shows with the first one.
    pub fn connect_ahead(&self, repository: &Repository) {
        let endpoint = self.core.endpoint(repository);
        if let Ok(uri) = endpoint.uri("/v2/") {
            self.core.transport.connect_ahead(&uri);
        }
    }

    /// Credentials that came with pulls, which go before those of the config.
    pub fn keyring(&self) -> &Arc<Keyring> {
        self.core.credentials.keyring()
    }

    /// What this source has done so far.
    pub fn stats(&self) -> SourceStats {
        self.core.counters.snapshot()
    }
}

impl Core {
    /// Where to ask about `repository`.
    fn endpoint(&self, repository: &Repository) -> Endpoint {
        match &self.site.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => Endpoint::of(repository.host(), &self.config),
        }
    }

    /// The host that is asked about `repository`, as it would stand in a reference.
    fn host<'a>(&'a self, repository: &'a Repository) -> &'a str {
        match &self.site.endpoint {
            Some(endpoint) => endpoint.host(),
            None => repository.host(),
        }
    }

    /// Path and query of a question about `repository`; `tail` is what follows its name.
    fn api(&self, repository: &Repository, tail: &str) -> String {
        let endpoint = self.endpoint(repository);
        let path = endpoint.api(&format!("/{}{tail}", repository.path()));
        self.named(repository, path)
    }

    /// Adds to a path which registry is meant, for a host that may stand in for several.
    fn named(&self, repository: &Repository, mut path: String) -> String {
        if self.host(repository) == repository.host() {
            return path;
        }
        let query = path.split_once('?').map_or("", |(_, query)| query);
        if query.split('&').any(|pair| pair.starts_with("ns=")) {
            return path;
        }
        let separator = if query.is_empty() { '?' } else { '&' };
        path.push(separator);
        let host = repository.host().as_bytes();
        path.push_str("ns=");
        path.extend(url::form_urlencoded::byte_serialize(host));
        path
    }

    fn access(&self, repository: &Repository) -> Access {
        Access {
            host: self.host(repository).to_owned(),
            endpoint: self.endpoint(repository),
            repository: repository.path().to_owned(),
            action: Action::Pull,
            headers: self.site.headers.clone(),
        }
    }

    /// How many parts of a blob to ask the host of `repository` for at once.
    fn parts_max(&self, repository: &Repository) -> usize {
        let is_single = self.single.lock().contains(repository.host());
        if is_single { 1 } else { PARTS_MAX }
    }

    fn ask_one_part_of(&self, repository: &Repository) {
        let mut single = self.single.lock();
        if single.len() >= SINGLE_MAX {
            single.clear();
        }
        single.insert(repository.host().to_owned());
    }
}

#[async_trait]
impl BlobSource for RegistrySource {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        document::resolve(self, reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        blob::stat(self, repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        check_range(blob, range)?;
        self.open(blob, Want::Parts, &[range]).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.core.parts_max(&blob.repository)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        check_parts(blob, parts)?;
        self.open(blob, Want::Parts, parts).await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        let whole: Vec<ByteRange> = ByteRange::at(0, blob.size).into_iter().collect();
        self.open(blob, Want::Whole, &whole).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        let known = self.known_referrers(repository, digest, artifact_type);
        match known.await {
            Err(Error::NotFound { .. }) => Ok(Vec::new()),
            other => other,
        }
    }
}
