//! The source a node reads from: the wrappers, outermost first, with the reason for the
//! order.
//!
//! 1. [`Exact`] is outermost, so that no wrapper below, present or to come, can break the
//!    promise about shape that stores and indexes rely on.
//! 2. `AtHome` reads a blob from another repository where its own refuses it
//!    ([`Homes`](super::Homes)). That is known once no host of the repository has it.
//! 3. [`Mirrors`] chooses among the hosts that have a registry's content. Each of them is a
//!    registry to read from, and the choice among them needs errors that are final.
//! 4. [`RegistrySource`] is innermost, one for each host, and retries, limits and resumes by
//!    itself, because only it sees what these need: status codes, `Retry-After`, where a
//!    body broke.
//!
//! Peers will be chosen where mirrors are.

use std::sync::Arc;

use super::exact::Exact;
use super::homes::AtHome;
use super::mirrors::Mirrors;
use super::registry::RegistrySource;
use super::{BlobSource, SourceConfig};
use crate::Result;

/// A node's source, and the choice of hosts inside for its counters.
pub fn build(config: SourceConfig) -> Result<(Arc<dyn BlobSource>, Mirrors)> {
    let mirrors = Mirrors::new(RegistrySource::new(config)?);
    let at_home = AtHome::new(mirrors.clone(), Arc::clone(mirrors.homes()));
    Ok((Arc::new(Exact::new(at_home)), mirrors))
}
