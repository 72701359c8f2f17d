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
//! origin and its token endpoint, never to a redirect's target.

pub(crate) mod answer;
mod blob;
mod document;
pub(crate) mod multipart;
mod origin;
mod referrers;

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use http::Uri;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::auth::credentials::Credentials;
use super::auth::{Access, Action, Auth};
use super::endpoint::Endpoint;
use super::exact::{check_parts, check_range};
use super::http::Transport;
use super::retry::{Attempts, Jitter, Subject};
use super::single_flight::SingleFlight;
use super::stats::{Counters, SourceStats};
use super::{BlobRef, BlobSource, Body, Document, SourceConfig};
use crate::Result;
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};

/// Blobs whose redirect target is remembered: more than the layers of any set of images
/// that start together.
const ROUTES_MAX: usize = 4096;

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

/// Reads from registries. Cheap to clone; clones share pool, tokens and counters.
#[derive(Clone)]
pub struct RegistrySource {
    core: Arc<Core>,
}

/// What all operations of one source share.
struct Core {
    config: SourceConfig,
    transport: Arc<Transport>,
    auth: Auth,
    routes: SingleFlight<(Repository, Digest), Route>,
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
        let auth = Auth::new(transport.clone(), credentials, counters.clone());
        Ok(Self {
            core: Arc::new(Core {
                config,
                transport,
                auth,
                routes: SingleFlight::new(ROUTES_MAX),
                single: Mutex::default(),
                jitter: Jitter::new(rng),
                counters,
            }),
        })
    }

    /// Begins a connection to the registry of `repository`, which is soon asked for
    /// something. Costs the registry no request; a failure shows with the first one.
    pub fn connect_ahead(&self, repository: &Repository) {
        let endpoint = Endpoint::of(repository.host(), &self.core.config);
        if let Ok(uri) = endpoint.uri("/v2/") {
            self.core.transport.connect_ahead(uri);
        }
    }

    /// What this source has done so far.
    pub fn stats(&self) -> SourceStats {
        self.core.counters.snapshot()
    }
}

impl Core {
    fn access(&self, repository: &Repository) -> Access {
        Access {
            host: repository.host().to_owned(),
            endpoint: Endpoint::of(repository.host(), &self.config),
            repository: repository.path().to_owned(),
            action: Action::Pull,
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

    fn attempts(&self, what: String, repository: &Repository) -> Attempts {
        let host = repository.host().to_owned();
        Attempts::new(
            Subject { what, host },
            self.config.deadline,
            self.jitter.clone(),
            self.counters.clone(),
        )
    }
}

#[async_trait]
impl BlobSource for RegistrySource {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        document::resolve(&self.core, reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        blob::stat(&self.core, repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        check_range(blob, range)?;
        blob::open(&self.core, blob, blob::Want::Parts, &[range]).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.core.parts_max(&blob.repository)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        check_parts(blob, parts)?;
        blob::open(&self.core, blob, blob::Want::Parts, parts).await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        let whole: Vec<ByteRange> = ByteRange::at(0, blob.size).into_iter().collect();
        blob::open(&self.core, blob, blob::Want::Whole, &whole).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        referrers::list(&self.core, repository, digest, artifact_type).await
    }
}
