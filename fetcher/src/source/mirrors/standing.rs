//! Which hosts are asked later than their turn: those that were in trouble lately, and for a
//! blob those that do not have it, or sent other bytes.
//!
//! Other bytes are laid to a host whose body of that blob is being read at that moment:
//! whoever is distrusted already before others, so that what it still sends of requests that
//! went out earlier does not cost a good host its place.
//!
//! Invariant: nobody is left out, only put back, for the others may fail too; and nobody for
//! ever: a host that was in trouble is tried again after a while, by one question at a time, one
//! that had no such blob is asked again after a while, and where all of a blob's hosts are
//! distrusted, whoever was so last is asked last. Both tables are bounded, and a full one is
//! emptied: what is lost is learned again. Locks are never nested.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Candidate;
use crate::types::Digest;

/// How long a host that was in trouble is put back. Long against its time-out, which the
/// question that tries it again pays; short against how long people wait for a host that
/// has come back.
pub(super) const OFF: Duration = Duration::from_secs(30);
/// The same, at most, for one that asks for longer: it may be wrong about itself.
const OFF_MAX: Duration = Duration::from_secs(300);
const HOSTS_MAX: usize = 256;
/// Blobs for which it is known who sent them last.
const BLOBS_MAX: usize = 4096;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Standing {
    off: Mutex<HashMap<Arc<str>, Instant>>,
    blobs: Mutex<HashMap<Digest, Senders>>,
}

/// Who sent a blob.
#[derive(Default)]
struct Senders {
    last: Option<Arc<str>>,
    /// Those with a body that is being read, once for each, in the order of their beginning.
    live: Vec<Arc<str>>,
    /// Those whose bytes were not the blob's; who was found so last is last.
    bad: Vec<Arc<str>>,
    /// Those that do not have it, as is taken to be so until then.
    lacking: Vec<(Arc<str>, Instant)>,
}

impl Standing {
    /// Puts back who has to be `now`.
    pub(super) fn order(&self, candidates: &mut [Candidate], blob: Option<&Digest>, now: Instant) {
        if candidates.len() < 2 {
            return;
        }
        let known = blob.and_then(|digest| {
            let mut blobs = self.blobs.lock();
            let senders = blobs.get_mut(digest)?;
            senders.lacking.retain(|(_, until)| *until > now);
            Some((senders.bad.clone(), senders.lacking.clone()))
        });
        let (bad, lacking) = known.unwrap_or_default();
        let lacks = |name: &str| lacking.iter().any(|(lacking, _)| **lacking == *name);
        candidates.sort_by_cached_key(|candidate| {
            let bad = bad.iter().position(|name| *name == candidate.name);
            let lacks = lacks(&candidate.name);
            (
                bad,
                lacks,
                bad.is_none() && !lacks && self.is_off(candidate, now),
            )
        });
    }

    /// Whether a host is still put back. Whoever is told that it is not any more tries it for
    /// all: to others it stays so until that has worked.
    fn is_off(&self, candidate: &Candidate, now: Instant) -> bool {
        match self.off.lock().get_mut(&candidate.name) {
            None => false,
            Some(until) if *until > now => true,
            Some(until) => {
                *until = now + OFF;
                false
            }
        }
    }

    /// It could not answer, as is known `now`, and may have asked to be left alone for so long.
    pub(super) fn troubled(
        &self,
        candidate: &Candidate,
        retry_after: Option<Duration>,
        now: Instant,
    ) {
        let off = retry_after.map_or(OFF, |asked| asked.clamp(OFF, OFF_MAX));
        let mut hosts = self.off.lock();
        if hosts.len() >= HOSTS_MAX && !hosts.contains_key(&candidate.name) {
            hosts.clear();
        }
        hosts.insert(candidate.name.clone(), now + off);
    }

    /// It has no such blob, or none that can be read, as is known `now`.
    pub(super) fn lacks(&self, candidate: &Candidate, blob: &Digest, now: Instant) {
        let mut blobs = self.blobs.lock();
        let lacking = &mut senders(&mut blobs, blob).lacking;
        lacking.retain(|(name, _)| *name != candidate.name);
        lacking.push((candidate.name.clone(), now + OFF));
    }

    /// It answered.
    pub(super) fn worked(&self, candidate: &Candidate) {
        self.off.lock().remove(&candidate.name);
    }

    /// It sends a blob, until [`Self::sent`] is told so.
    pub(super) fn sends(&self, candidate: &Candidate, blob: &Digest) {
        let mut blobs = self.blobs.lock();
        let senders = senders(&mut blobs, blob);
        senders.last = Some(candidate.name.clone());
        senders.live.push(candidate.name.clone());
    }

    /// Nobody reads any more what a host of that name began to send of a blob.
    pub(super) fn sent(&self, name: &str, blob: &Digest) {
        let mut blobs = self.blobs.lock();
        if let Some(senders) = blobs.get_mut(blob)
            && let Some(at) = senders.live.iter().position(|live| **live == *name)
        {
            senders.live.remove(at);
        }
    }

    /// Somebody who sends that blob, or who sent it last, sent something else.
    pub(super) fn distrust(&self, blob: &Digest) {
        let mut blobs = self.blobs.lock();
        let Some(senders) = blobs.get_mut(blob) else {
            return;
        };
        let Some(name) = senders.suspect() else {
            return;
        };
        match senders.bad.iter().position(|bad| *bad == name) {
            Some(at) => {
                senders.bad.remove(at);
            }
            None => {
                tracing::warn!(host = %name, digest = %blob, "other hosts are asked before this one");
            }
        }
        senders.bad.push(name);
    }
}

fn senders<'a>(blobs: &'a mut HashMap<Digest, Senders>, blob: &Digest) -> &'a mut Senders {
    if blobs.len() >= BLOBS_MAX && !blobs.contains_key(blob) {
        blobs.clear();
    }
    blobs.entry(*blob).or_default()
}

impl Senders {
    /// Whose bytes were most likely wrong.
    fn suspect(&mut self) -> Option<Arc<str>> {
        let mut live = self.live.iter();
        let known = live.find(|name| self.bad.contains(name));
        match known.or(self.live.first()) {
            Some(name) => Some(name.clone()),
            None => self.last.take(),
        }
    }
}
