//! The hosts that have a registry's content, and the choice among them.
//!
//! For each question those hosts are asked that may be, in the order of the registry's hosts
//! file, and the registry last ([`super::hosts`]). What one cannot answer, with all its
//! retries, the next one is asked; what is said at the end names them all.
//!
//! Invariant: each host is asked with its own credentials, headers and certificates, and only
//! the last of them with all patience. A host that is in trouble does not cost every request its
//! time-out: for a while it comes last, as does, for a blob, one that does not have it or sent
//! other bytes than the blob's. Hosts files are read again when they change; one that turns bad
//! leaves the hosts as they were. Without a directory of hosts files this is the registry source
//! itself.

mod plan;
mod relay;
mod standing;
mod tried;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use self::plan::{Candidate, Plan, look};
use self::relay::Relay;
use self::standing::Standing;
use self::tried::Tried;
use super::auth::keyring::Keyring;
use super::exact::{check_parts, check_range};
use super::homes::Homes;
use super::hosts::Capability;
use super::registry::{RegistrySource, Want};
use super::retry::{Patience, Trouble};
use super::single_flight::SingleFlight;
use super::stats::SourceStats;
use super::{BlobRef, BlobSource, Body, Document};
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// Registries whose hosts are kept in memory.
const PLANS_MAX: usize = 256;
/// Looking whether hosts files are as they were costs a few system calls; whoever changes one
/// should not have to wait.
const FRESH: Duration = Duration::from_secs(2);

/// See the module's documentation. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Mirrors {
    shared: Arc<Shared>,
}

struct Shared {
    registry: RegistrySource,
    /// The first that says something of a registry decides.
    dirs: Arc<[PathBuf]>,
    plans: SingleFlight<String, Plan>,
    standing: Standing,
    homes: Arc<Homes>,
    /// How long hosts files are taken to be as they were.
    fresh: Duration,
}

impl Mirrors {
    /// Chooses among the hosts that the directories in `registry`'s settings name.
    pub(crate) fn new(registry: RegistrySource) -> Self {
        Self::looking_every(FRESH, registry)
    }

    fn looking_every(fresh: Duration, registry: RegistrySource) -> Self {
        Self {
            shared: Arc::new(Shared {
                dirs: registry.config().hosts_dirs().into(),
                registry,
                plans: SingleFlight::new(PLANS_MAX),
                standing: Standing::default(),
                homes: Arc::default(),
                fresh,
            }),
        }
    }

    /// Begins connections to the host that is soon asked first about `repository`. Costs it
    /// no request; a failure shows with the first one.
    pub fn connect_ahead(&self, repository: &Repository) {
        if self.shared.dirs.is_empty() {
            return self.shared.registry.connect_ahead(repository);
        }
        let (mirrors, repository) = (self.clone(), repository.clone());
        // Ends by itself: it looks at a few files at most.
        tokio::spawn(async move {
            let candidates = mirrors
                .candidates(&repository, Capability::Pull, None)
                .await;
            if let Some(first) = candidates.ok().and_then(|all| all.into_iter().next()) {
                first.source.connect_ahead(&repository);
            }
        });
    }

    /// Credentials that came with pulls; a mirror gets none of its registry's.
    pub fn keyring(&self) -> &Arc<Keyring> {
        self.shared.registry.keyring()
    }

    /// Which repositories have which blobs, for reads of a node's source.
    pub fn homes(&self) -> &Arc<Homes> {
        &self.shared.homes
    }

    /// The registry of `repository` itself, for who reads what it is about to change: a mirror may
    /// have it as it was. It is reached as its hosts file says.
    pub async fn registry_of(&self, repository: &Repository) -> Result<RegistrySource> {
        let plan = self.plan(repository.host()).await?;
        let last = plan.as_ref().and_then(|plan| plan.candidates.last());
        // The one that decides may stand in for it.
        let own = last.filter(|last| *last.name == *repository.host());
        Ok(own.map_or(&self.shared.registry, |own| &own.source).clone())
    }

    /// What has been done so far, at all hosts together.
    pub fn stats(&self) -> SourceStats {
        self.shared.registry.stats()
    }

    /// The hosts to ask about `repository`, or about one blob of it, in that order; at least
    /// one. All but the last are given up soon.
    async fn candidates(
        &self,
        repository: &Repository,
        need: Capability,
        blob: Option<&Digest>,
    ) -> Result<Vec<Candidate>> {
        let Some(plan) = self.plan(repository.host()).await? else {
            return Ok(vec![Candidate::registry(&self.shared.registry, repository)]);
        };
        let able = |need| {
            let all = plan.candidates.iter();
            let able = all.filter(move |candidate| candidate.capabilities.has(need));
            able.cloned().collect::<Vec<_>>()
        };
        let mut candidates = able(need);
        if candidates.is_empty() && need == Capability::Referrers {
            // Where nothing says who knows referrers, whoever knows tags may have them.
            candidates = able(Capability::Resolve);
        }
        if candidates.is_empty() {
            return Err(Error::Unsupported {
                what: format!("reading {repository}"),
                detail: format!(
                    "no host in its hosts file has the capability {:?}",
                    format!("{need:?}").to_lowercase()
                ),
            });
        }
        let standing = &self.shared.standing;
        standing.order(&mut candidates, blob, Instant::now());
        let last = candidates.len() - 1;
        for (at, candidate) in candidates.iter_mut().enumerate() {
            let patience = match at == last {
                true => Patience::Full,
                false => Patience::Brief,
            };
            candidate.source = candidate.source.asking(patience);
        }
        Ok(candidates)
    }

    /// The hosts of the registry `host`; `None` if there is no directory to look into.
    async fn plan(&self, host: &str) -> Result<Option<Plan>> {
        if self.shared.dirs.is_empty() {
            return Ok(None);
        }
        let key = host.to_owned();
        let before = self.shared.plans.peek(&key);
        let is_fresh = |plan: &Plan| plan.looked.elapsed() < self.shared.fresh;
        let renew = || async {
            let registry = self.shared.registry.clone();
            let (dirs, host) = (Arc::clone(&self.shared.dirs), host.to_owned());
            let looking = move || look(&registry, &dirs, &host, before);
            match tokio::task::spawn_blocking(looking).await {
                Ok(plan) => plan,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => Err(Error::Unavailable {
                    what: "hosts files".to_owned(),
                    host: "this node".to_owned(),
                    detail: "the process is shutting down".to_owned(),
                }),
            }
        };
        self.shared.plans.get(key, is_fresh, renew).await.map(Some)
    }

    /// The first answer.
    async fn first<'a, T>(
        &self,
        candidates: &'a [Candidate],
        ask: impl Fn(&'a RegistrySource) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T> {
        let mut tried = Tried::default();
        for candidate in candidates {
            match ask(&candidate.source).await {
                Ok(answer) => {
                    self.shared.standing.worked(candidate);
                    return Ok(answer);
                }
                Err(error) => {
                    self.failed(candidate, &error);
                    tried.add(candidate, error);
                }
            }
        }
        Err(tried.into_error())
    }

    /// Remembers what that says of the host; the trouble, if it is that.
    fn failed(&self, candidate: &Candidate, error: &Error) -> Option<Trouble> {
        let host = &candidate.name;
        tracing::debug!(%host, %error, "a host of a registry failed");
        let standing = &self.shared.standing;
        let trouble = candidate.source.gave_up();
        match trouble {
            Some(trouble) => standing.troubled(candidate, trouble.retry_after(), Instant::now()),
            None => standing.worked(candidate),
        }
        trouble
    }

    async fn body(&self, blob: &BlobRef, want: Want, parts: &[ByteRange]) -> Result<Body> {
        let (repository, digest) = (&blob.repository, Some(&blob.digest));
        let candidates = self
            .candidates(repository, Capability::Pull, digest)
            .await?;
        match candidates.as_slice() {
            [only] => only.source.open(blob, want, parts).await,
            _ => {
                let relay = Relay::new(self.clone(), blob.clone(), want, parts);
                relay.open(candidates).await
            }
        }
    }
}

#[async_trait]
impl BlobSource for Mirrors {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        let need = match reference.digest() {
            Some(_) => Capability::Pull,
            None => Capability::Resolve,
        };
        let repository = reference.repository();
        let candidates = self.candidates(repository, need, None).await?;
        self.first(&candidates, |source| source.resolve(reference))
            .await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        let need = Capability::Pull;
        let candidates = self.candidates(repository, need, Some(digest)).await?;
        self.first(&candidates, |source| source.stat(repository, digest))
            .await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        check_range(blob, range)?;
        self.body(blob, Want::Parts, &[range]).await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        let plan = self.shared.plans.peek(&blob.repository.host().to_owned());
        let candidates = plan.map(|plan| plan.candidates);
        let first = candidates.as_ref().and_then(|all| {
            let mut all = all.iter();
            all.find(|candidate| candidate.capabilities.has(Capability::Pull))
        });
        let source = first.map_or(&self.shared.registry, |candidate| &candidate.source);
        source.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        check_parts(blob, parts)?;
        self.body(blob, Want::Parts, parts).await
    }

    fn distrust(&self, blob: &BlobRef) {
        self.shared.standing.distrust(&blob.digest);
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        let whole: Vec<ByteRange> = ByteRange::at(0, blob.size).into_iter().collect();
        self.body(blob, Want::Whole, &whole).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        let need = Capability::Referrers;
        let candidates = self.candidates(repository, need, None).await?;
        let found = self.first(&candidates, |source| {
            Box::pin(source.known_referrers(repository, digest, artifact_type))
        });
        match found.await {
            Err(Error::NotFound { .. }) => Ok(Vec::new()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests;
