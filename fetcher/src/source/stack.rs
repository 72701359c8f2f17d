//! The source a node reads from: the wrappers, outermost first, with the reason for the
//! order.
//!
//! 1. [`Exact`] is outermost, so that no wrapper below, present or to come, can break the
//!    promise about shape that stores and indexes rely on.
//! 2. [`RegistrySource`] is innermost and retries, limits and resumes by itself, because
//!    only it sees what these need: status codes, `Retry-After`, where a body broke.
//!
//! Mirrors and peers will stand between the two: each of them is a registry to read from,
//! and the choice among them needs errors that are final.

use std::sync::Arc;

use super::exact::Exact;
use super::registry::RegistrySource;
use super::{BlobSource, SourceConfig};
use crate::Result;

/// A node's source, and the registry source inside for its counters.
pub fn build(config: SourceConfig) -> Result<(Arc<dyn BlobSource>, RegistrySource)> {
    let registry = RegistrySource::new(config)?;
    Ok((Arc::new(Exact::new(registry.clone())), registry))
}
