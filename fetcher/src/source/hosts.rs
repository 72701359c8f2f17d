//! What a node's administrator wrote about the hosts of a registry: `hosts.toml`, and the
//! directories it is in, as containerd reads them.
//!
//! Invariant: what is here is the administrator's word, in its order: hosts that have the
//! registry's content, and last the registry itself or the one named in its place. Nothing
//! in it can switch the verification of TLS off. Never asks a host anything.

pub(crate) mod dir;
mod duration;
pub(crate) mod parse;

use std::path::PathBuf;
use std::time::Duration;

use http::HeaderMap;

use super::endpoint::Endpoint;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Manifests by digest, and blobs.
    Pull,
    /// What a tag names: a matter of trust, since nothing proves it.
    Resolve,
    /// Writing.
    Push,
    /// What refers to a manifest.
    Referrers,
}

/// A set of [`Capability`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Capabilities(u8);

impl Capabilities {
    /// All of them, which a host has if nothing is said.
    pub(crate) const ALL: Self = Self(0b1111);

    /// Whether it has this one.
    pub(crate) fn has(self, one: Capability) -> bool {
        self.0 & Self::bit(one) != 0
    }

    /// The set with one more.
    pub(crate) fn with(self, one: Capability) -> Self {
        Self(self.0 | Self::bit(one))
    }

    fn bit(one: Capability) -> u8 {
        match one {
            Capability::Pull => 1,
            Capability::Resolve => 2,
            Capability::Push => 4,
            Capability::Referrers => 8,
        }
    }
}

/// Files of a certificate that this node shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientFiles {
    /// The certificate and its chain.
    pub(crate) certificate: PathBuf,
    /// Its key; `None` if that is in the same file.
    pub(crate) key: Option<PathBuf>,
}

/// A host, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// Where its API is; `None` for the registry itself, which only the last host can be.
    pub(crate) endpoint: Option<Endpoint>,
    /// What it may be asked for.
    pub(crate) capabilities: Capabilities,
    /// Files of authorities that are trusted there besides others.
    pub(crate) ca: Vec<PathBuf>,
    /// Certificates of this node.
    pub(crate) client: Vec<ClientFiles>,
    /// Headers that go with each request; hidden where they would be printed.
    pub(crate) headers: HeaderMap,
    /// Longest time for TCP's set-up.
    pub(crate) dial_timeout: Option<Duration>,
}

impl Host {
    /// The registry itself, spoken to as any.
    pub(crate) fn upstream() -> Self {
        Self {
            endpoint: None,
            capabilities: Capabilities::ALL,
            ca: Vec::new(),
            client: Vec::new(),
            headers: HeaderMap::new(),
            dial_timeout: None,
        }
    }
}

/// The hosts of a registry, in the order in which they are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// Hosts with copies.
    pub(crate) mirrors: Vec<Host>,
    /// Who is asked last: the registry, or the one named in its place.
    pub(crate) server: Host,
}

#[cfg(test)]
mod tests;
