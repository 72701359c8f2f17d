//! Credentials that came with pulls, for the repositories that were pulled.
//!
//! Whoever orders a pull may have credentials that this node's config has not: kubelet hands
//! over those of a pod's secrets. Layers are read long after the pull, so they are kept.
//!
//! Invariant: they are in memory only, never printed, and are found under the registry and
//! the repository of the pull and under no other name: a mirror is another registry. What a
//! pull came with counts from its beginning. If the pull succeeds it takes the place of what
//! earlier pulls of the repository came with; if not, those stay and it goes. Bounded: at
//! most [`REPOSITORIES_MAX`] repositories, the one that went unused longest goes first, each
//! with at most [`HELD_MAX`] credentials, and what was not used for [`KEEP`] is forgotten.

mod pull;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

pub use self::pull::PullAuth;
use super::credentials::Credential;
use crate::types::Repository;

/// More repositories than images fit onto a node.
const REPOSITORIES_MAX: usize = 1024;
/// More pulls of one repository than have other credentials at the same moment.
const HELD_MAX: usize = 4;
/// A layer that nobody read from its registry for a week is here, or nobody misses the rest.
const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a refused credential comes last: registries err, too.
const REFUSED: Duration = Duration::from_secs(60);

/// See the module's documentation.
#[derive(Default)]
pub struct Keyring {
    slots: Mutex<HashMap<String, Slot>>,
}

/// What is held for one repository.
struct Slot {
    used: Instant,
    /// The one given last is first.
    held: Vec<Held>,
}

struct Held {
    credential: Credential,
    /// Pulls under way that came with it.
    pulls: u32,
    /// Whether a pull with it has succeeded.
    proven: bool,
    refused: Option<Instant>,
}

/// A pull under way, and the credential it came with. Dropped without
/// [`Self::succeeded`], the pull has failed.
#[must_use]
pub struct Given {
    keyring: Arc<Keyring>,
    key: String,
    credential: Credential,
    succeeded: bool,
}

impl Keyring {
    /// Keeps the credential that a pull of `repository` came with.
    pub fn give(self: &Arc<Self>, repository: &Repository, credential: Credential) -> Given {
        self.give_at(Instant::now(), repository, credential)
    }

    fn give_at(
        self: &Arc<Self>,
        now: Instant,
        repository: &Repository,
        credential: Credential,
    ) -> Given {
        let key = key(repository.host(), repository.path());
        let mut slots = self.slots.lock();
        make_room(&mut slots, &key, now);
        let slot = slots.entry(key.clone()).or_insert_with(|| Slot {
            used: now,
            held: Vec::new(),
        });
        slot.used = now;
        slot.begin(&credential);
        Given {
            keyring: Arc::clone(self),
            key,
            credential,
            succeeded: false,
        }
    }

    /// Whether there is something for `repository`.
    pub fn has(&self, repository: &Repository) -> bool {
        self.find_refused(repository.host(), repository.path())
            .is_some()
    }

    /// The best credential for a repository of `host` that was not refused lately.
    pub(super) fn find(&self, host: &str, path: &str) -> Option<Credential> {
        self.find_at(Instant::now(), host, path)
    }

    /// The same, refused or not: better than none.
    pub(super) fn find_refused(&self, host: &str, path: &str) -> Option<Credential> {
        let now = Instant::now();
        self.first(now, key(host, path), |_| true)
    }

    /// The registry does not accept this one. Whether it is from here.
    pub(super) fn refused(&self, host: &str, path: &str, credential: &Credential) -> bool {
        self.refused_at(Instant::now(), host, path, credential)
    }

    fn find_at(&self, now: Instant, host: &str, path: &str) -> Option<Credential> {
        self.first(now, key(host, path), |held| !held.is_refused(now))
    }

    fn refused_at(&self, now: Instant, host: &str, path: &str, credential: &Credential) -> bool {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(&key(host, path));
        let held = slot.and_then(|slot| slot.of(credential));
        let is_ours = held.is_some();
        if let Some(held) = held {
            held.refused = Some(now);
        }
        is_ours
    }

    fn first(&self, now: Instant, key: String, good: impl Fn(&Held) -> bool) -> Option<Credential> {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(&key)?;
        if slot.is_forgotten(now) {
            slots.remove(&key);
            return None;
        }
        let found = slot.held.iter().find(|held| good(held))?;
        let found = found.credential.clone();
        slot.used = now;
        Some(found)
    }

    fn ended(&self, key: &str, credential: &Credential, succeeded: bool) {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(key) else {
            return;
        };
        slot.end(credential, succeeded);
        if slot.held.is_empty() {
            slots.remove(key);
        }
    }
}

impl Slot {
    fn is_forgotten(&self, now: Instant) -> bool {
        now.duration_since(self.used) >= KEEP
    }

    fn of(&mut self, credential: &Credential) -> Option<&mut Held> {
        self.held
            .iter_mut()
            .find(|held| held.credential == *credential)
    }

    /// A pull with this one begins: it goes first.
    fn begin(&mut self, credential: &Credential) {
        let known = self
            .held
            .iter()
            .position(|held| held.credential == *credential);
        let mut held = match known {
            Some(at) => self.held.remove(at),
            None => Held {
                credential: credential.clone(),
                pulls: 0,
                proven: false,
                refused: None,
            },
        };
        held.pulls = held.pulls.saturating_add(1);
        held.refused = None;
        self.held.insert(0, held);
        self.held.truncate(HELD_MAX);
    }

    /// A pull with this one has ended.
    fn end(&mut self, credential: &Credential, succeeded: bool) {
        let Some(held) = self.of(credential) else {
            return;
        };
        held.pulls = held.pulls.saturating_sub(1);
        held.proven |= succeeded;
        if succeeded {
            held.refused = None;
            // Later ones are of pulls that have not ended.
            let keep = |held: &Held| held.pulls > 0 || held.credential == *credential;
            self.held.retain(keep);
        } else {
            self.held.retain(|held| held.proven || held.pulls > 0);
        }
    }
}

impl Held {
    fn is_refused(&self, now: Instant) -> bool {
        let is_recent = |at| now.duration_since(at) < REFUSED;
        self.refused.is_some_and(is_recent)
    }
}

impl Given {
    /// The pull has succeeded: other credentials of the repository are not needed any more.
    pub fn succeeded(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        self.keyring
            .ended(&self.key, &self.credential, self.succeeded);
    }
}

fn make_room(slots: &mut HashMap<String, Slot>, key: &str, now: Instant) {
    slots.retain(|_, slot| !slot.is_forgotten(now));
    if slots.len() < REPOSITORIES_MAX || slots.contains_key(key) {
        return;
    }
    let oldest = slots.iter().min_by_key(|(_, slot)| slot.used);
    if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
        slots.remove(&oldest);
    }
}

/// Docker Hub has several names, and one set of repositories.
fn key(host: &str, path: &str) -> String {
    format!("{}/{path}", pull::canonical(host))
}

#[cfg(test)]
mod tests;
