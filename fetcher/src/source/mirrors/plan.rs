//! From hosts files to sources: one for each host that may be asked about a registry.
//!
//! Invariant: the host that decides what the registry has comes last. A file that turned bad
//! leaves the hosts as they were, and is read again when it changes. Blocks.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::time::Instant;

use crate::Result;
use crate::source::endpoint::Endpoint;
use crate::source::hosts::dir::{self, Ready, Stamp};
use crate::source::hosts::{Capabilities, Host};
use crate::source::http::Reach;
use crate::source::http::tls::Certificates;
use crate::source::registry::{RegistrySource, Site};
use crate::types::Repository;

/// One host to ask.
#[derive(Clone)]
pub(super) struct Candidate {
    pub(super) source: RegistrySource,
    pub(super) capabilities: Capabilities,
    /// Whether it is the one that decides what the registry has.
    pub(super) decides: bool,
    /// Its name in errors, and what its standing is kept under.
    pub(super) name: Arc<str>,
}

/// The hosts of one registry, and when that was last known to be so.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) looked: Instant,
    pub(super) stamp: Arc<Stamp>,
    pub(super) candidates: Arc<[Candidate]>,
}

impl Candidate {
    /// The registry of `repository` itself.
    pub(super) fn registry(source: &RegistrySource, repository: &Repository) -> Self {
        Self {
            source: source.clone(),
            capabilities: Capabilities::ALL,
            decides: true,
            name: repository.host().into(),
        }
    }
}

/// The hosts of the registry `host`, as far as something has changed since `before`. Blocks.
pub(super) fn look(
    registry: &RegistrySource,
    dirs: &[PathBuf],
    host: &str,
    before: Option<Plan>,
) -> Result<Plan> {
    let looked = Instant::now();
    if let Some(before) = &before
        && before.stamp.holds()
    {
        let before = before.clone();
        return Ok(Plan { looked, ..before });
    }
    let mut stamp = Stamp::default();
    let is_plain = Endpoint::of(host, registry.config()).is_plain();
    let found = dir::load(&mut stamp, dirs, host, is_plain);
    let candidates = found.and_then(|found| candidates(registry, host, found));
    let stamp = Arc::new(stamp);
    match (candidates, before) {
        (Ok(candidates), _) => Ok(Plan {
            looked,
            stamp,
            candidates,
        }),
        (Err(error), Some(before)) => {
            tracing::warn!(%host, %error, "the hosts of a registry stay as they were");
            let candidates = before.candidates;
            Ok(Plan {
                looked,
                stamp,
                candidates,
            })
        }
        (Err(error), None) => Err(error),
    }
}

/// A source for each host, the one that decides last.
fn candidates(
    registry: &RegistrySource,
    host: &str,
    found: Option<Vec<Ready>>,
) -> Result<Arc<[Candidate]>> {
    let found = found.unwrap_or_else(|| {
        let host = Host::upstream();
        let certificates = Certificates::default();
        vec![Ready { host, certificates }]
    });
    let last = found.len().saturating_sub(1);
    let each = found.into_iter().enumerate().map(|(at, ready)| {
        let Ready {
            host: named,
            certificates,
        } = ready;
        let decides = at == last;
        let name = match &named.endpoint {
            Some(endpoint) => endpoint.host().into(),
            None => host.into(),
        };
        let site = Site {
            endpoint: named.endpoint,
            headers: named.headers,
            reach: Reach {
                certificates,
                dial_timeout: named.dial_timeout,
            },
        };
        Ok(Candidate {
            source: registry.at(site)?,
            capabilities: named.capabilities,
            decides,
            name,
        })
    });
    each.collect()
}
