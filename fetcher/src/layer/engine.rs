//! What all layers of a node share when they fetch: slots, memory, and who goes first.
//!
//! Invariant: one engine bounds every request of all layers that were joined with it,
//! whatever their number and size, and its order of priorities holds across them. A node
//! has one; tests may give each layer its own. What it learns of a host's link is shared
//! in the same way. Locks are held for look-ups only, one at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::details;
use super::first::{self, SecondTries};
use super::gate::Gate;
use super::local::Room;
use super::stream;
use crate::link::{Link, LinkEstimator};

/// Hosts that are remembered without a layer that fetches from them.
const HOSTS_MAX: usize = 256;

/// See [`EngineConfig::quiet`]. Layers become whole at some hundred KiB/s then.
pub(super) const QUIET_WAITS: u32 = 5;

/// Bounds of what all layers of an engine do at once.
///
/// The three limits on requests come to 16 together, which is what a source sends to one
/// host at once by default: so a reader's request never waits in the source for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Requests under way at once to one host for readers, at least 1. More than a handful
    /// only splits the link.
    pub on_demand_max: u32,
    /// The same for what a profile expects, readers' requests counted with them. Enough
    /// small ones to fill a gigabit at 10 ms, so that none has to be made larger by bytes
    /// that nobody wants.
    pub profile_max: u32,
    /// The same for what nobody waits for.
    pub background_max: u32,
    /// Bytes held in memory by all requests. A chunk that needs more alone is refused.
    /// Copies from other layers of the node may hold as much again.
    pub memory_bytes_max: u64,
    /// How long a background request under way keeps its connection, without reading from
    /// it, while others go ahead. Then it gives it up and asks again later.
    pub pause_max: Duration,
    /// How long nobody may have waited for anything before what has time is asked for: longer
    /// than a start does something else between two reads. Where somebody always waits, it is
    /// asked for after five times as long.
    pub quiet: Duration,
    /// How long a reader's request waits at least for its first byte before it is sent
    /// once more. The usual time of the host makes it longer.
    pub late_after_min: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            on_demand_max: 5,
            profile_max: 8,
            background_max: 3,
            // Five times what the usual chunks of 4 MiB need alone.
            memory_bytes_max: 64 << 20,
            // A burst of misses is over by then; no server gives a reader up as early.
            pause_max: Duration::from_secs(2),
            quiet: Duration::from_secs(2),
            // A busy node takes tens of milliseconds to look at an answer that is there.
            late_after_min: Duration::from_millis(100),
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FetchEngine {
    pub(super) config: EngineConfig,
    pub(super) gate: Arc<Gate>,
    hosts: Mutex<HashMap<Arc<str>, Arc<Host>>>,
    /// Turns of fetching details; see `layer::details`.
    pub(super) details_for_readers: Semaphore,
    pub(super) details_for_others: Semaphore,
    /// Turns of streaming a layer for its details.
    pub(super) remakes: Semaphore,
    /// For what is copied from other layers.
    pub(super) copies: Room,
    /// Bytes of streams that may wait for their decoders; see `layer::stream`.
    pub(super) waiting: Arc<Semaphore>,
}

impl FetchEngine {
    /// An engine with these bounds.
    pub fn new(config: EngineConfig) -> Arc<Self> {
        let config = EngineConfig {
            on_demand_max: config.on_demand_max.max(1),
            profile_max: config.profile_max.max(1),
            background_max: config.background_max.max(1),
            ..config
        };
        Arc::new(Self {
            config,
            gate: Gate::new(config),
            hosts: Mutex::default(),
            details_for_readers: Semaphore::new(details::TURNS),
            details_for_others: Semaphore::new(details::TURNS),
            remakes: Semaphore::new(details::REMAKES),
            copies: Room::new(config.memory_bytes_max),
            waiting: Arc::new(Semaphore::new(stream::WAITING_BYTES_MAX)),
        })
    }

    /// What is known of a host, by the name that images have for it.
    pub(super) fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = self.hosts.lock();
        if hosts.len() >= HOSTS_MAX {
            hosts.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let name: Arc<str> = name.into();
        let host = hosts.entry(Arc::clone(&name));
        Arc::clone(host.or_insert_with(|| Host::new(name)))
    }

    /// What the link to a registry host can do, as far as has been learned.
    pub fn link(&self, host: &str) -> Link {
        let known = self.hosts.lock().get(host).map(Arc::clone);
        known.map_or(Link::GUESS, |host| host.link())
    }

    /// Bytes that requests under way hold now.
    pub fn memory_bytes(&self) -> u64 {
        self.gate.memory()
    }
}

/// A host and the link to it.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) name: Arc<str>,
    estimator: Mutex<LinkEstimator>,
    second_tries: Mutex<SecondTries>,
}

impl Host {
    fn new(name: Arc<str>) -> Arc<Self> {
        Arc::new(Self {
            name,
            estimator: Mutex::default(),
            second_tries: Mutex::default(),
        })
    }

    /// A reader's request is sent; after how long it is late, `shortest` at least.
    pub(super) fn sends(&self, shortest: Duration) -> Duration {
        self.second_tries.lock().earn();
        let median = self.estimator.lock().first_byte_median();
        first::late_after(median, shortest)
    }

    /// Whether a late request may be sent once more; if so, that is counted.
    pub(super) fn may_try_again(&self) -> bool {
        self.second_tries.lock().spend()
    }

    pub(super) fn link(&self) -> Link {
        self.estimator.lock().link()
    }

    /// A body began to arrive, its first byte `took` after the request was sent.
    pub(super) fn arrives(self: &Arc<Self>, took: Duration) -> Arrival {
        self.estimator.lock().begin(took, Instant::now());
        Arrival {
            host: Arc::clone(self),
        }
    }
}

/// A body that arrives. Dropped when it has ended or nobody reads it any more.
#[derive(Debug)]
pub(super) struct Arrival {
    host: Arc<Host>,
}

impl Arrival {
    /// Bytes of it came.
    pub(super) fn piece(&self, bytes: u64) {
        self.host.estimator.lock().piece(bytes, Instant::now());
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.host.estimator.lock().end();
    }
}
