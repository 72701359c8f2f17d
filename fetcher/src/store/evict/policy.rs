//! What to evict next: S3-FIFO, as a pure state machine.
//!
//! New entries wait in a small queue; what was touched there again moves to the main
//! queue, what was not leaves first, so that things read once never push out what is read
//! often. Keys that left the small queue are remembered for a while: one that comes back
//! goes to the main queue at once. In the main queue an entry goes round once for each
//! touch, at most [`TOUCHES_MAX`].
//!
//! Invariant: between calls an entry is in exactly one queue; the weights of the queues are the
//! sums of their entries' weights; at most [`Limits::entries`] entries and as many remembered keys
//! are held. Pinned entries leave only when no other is left. Knows nothing of files.
//!
//! Written after "FIFO queues are all you need for cache eviction" (SOSP 2023).

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// The small queue holds this part of the weight.
const SMALL_PART: u64 = 10;
/// Touches that count.
const TOUCHES_MAX: u8 = 3;

/// Bounds of what is remembered.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Limits {
    /// Entries; the oldest small one is forgotten, not evicted, beyond that.
    pub(in crate::store) entries: usize,
}

impl Default for Limits {
    /// A quarter of a TiB in extents of a MiB, in under 100 MiB of memory; the 50 GiB of
    /// a usual node take 20.
    fn default() -> Self {
        Self { entries: 1 << 18 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    weight: u64,
    touches: u8,
    queue: Queue,
}

/// The queues. Keys are what is evicted together.
#[derive(Debug)]
pub(in crate::store) struct Policy<K> {
    limits: Limits,
    entries: HashMap<K, Entry>,
    small: VecDeque<K>,
    main: VecDeque<K>,
    small_weight: u64,
    main_weight: u64,
    /// Keys that left the small queue, oldest first, each with the turn it left in.
    ghosts: VecDeque<(K, u64)>,
    ghost_turns: HashMap<K, u64>,
    turn: u64,
}

impl<K> Default for Policy<K> {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl<K> Policy<K> {
    /// Empty queues.
    pub(in crate::store) fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: HashMap::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            small_weight: 0,
            main_weight: 0,
            ghosts: VecDeque::new(),
            ghost_turns: HashMap::new(),
            turn: 0,
        }
    }
}

impl<K: Copy + Eq + Hash> Policy<K> {
    /// Tells that `key` is there and takes `weight` bytes. Known already, it only gets the
    /// new weight.
    pub(in crate::store) fn insert(&mut self, key: K, weight: u64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            let total = match entry.queue {
                Queue::Small => &mut self.small_weight,
                Queue::Main => &mut self.main_weight,
            };
            *total = *total - entry.weight + weight;
            entry.weight = weight;
            return;
        }
        let queue = match self.ghost_turns.remove(&key) {
            Some(_) => Queue::Main,
            None => Queue::Small,
        };
        self.push(
            key,
            Entry {
                weight,
                touches: 0,
                queue,
            },
        );
        if self.entries.len() > self.limits.entries {
            self.forget_oldest();
        }
    }

    /// Tells that `key` was read; nothing if it is unknown.
    pub(in crate::store) fn touch(&mut self, key: &K) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.touches = entry.touches.saturating_add(1).min(TOUCHES_MAX);
        }
    }

    /// Forgets every entry that `keep` does not want: it went without being evicted here.
    pub(in crate::store) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        let (mut small, mut main) = (0, 0);
        self.entries.retain(|key, entry| {
            let kept = keep(key);
            match entry.queue {
                Queue::Small if kept => small += entry.weight,
                Queue::Main if kept => main += entry.weight,
                Queue::Small | Queue::Main => {}
            }
            kept
        });
        (self.small_weight, self.main_weight) = (small, main);
        let entries = &self.entries;
        self.small.retain(|key| entries.contains_key(key));
        self.main.retain(|key| entries.contains_key(key));
    }

    /// Takes out the entries that should go next, with their weights, until they weigh `weight` or
    /// none is left. Pinned ones go only when nothing else is left.
    ///
    /// Looks at each pinned entry at most once, however many there are: one that comes up is set
    /// aside, and all are back behind their queues before this returns. It still weighs there
    /// meanwhile, so that what is pinned changes nothing about whose turn it is.
    pub(in crate::store) fn evict(
        &mut self,
        weight: u64,
        is_pinned: impl Fn(&K) -> bool,
    ) -> Vec<(K, u64)> {
        let (mut victims, mut taken) = (Vec::new(), 0_u64);
        for spares in [true, false] {
            let mut aside = Vec::new();
            while taken < weight
                && let Some(key) = self.next()
            {
                if spares && is_pinned(&key) {
                    aside.push(key);
                } else if let Some(victim) = self.take(key) {
                    taken = taken.saturating_add(victim.1);
                    victims.push(victim);
                }
            }
            for key in aside {
                self.queue(key);
            }
        }
        victims
    }

    /// Takes the next victim out of its queue, but leaves its entry and weight, and moves those
    /// that were touched.
    fn next(&mut self) -> Option<K> {
        loop {
            let share = (self.small_weight + self.main_weight) / SMALL_PART;
            let from_small = self.main.is_empty() || self.small_weight > share;
            let queue = match (from_small, self.small.is_empty()) {
                (true, false) => &mut self.small,
                (false, _) | (true, true) => &mut self.main,
            };
            let key = queue.pop_front()?;
            let Some(mut entry) = self.entries.get(&key).copied() else {
                continue;
            };
            if entry.touches == 0 {
                return Some(key);
            }
            self.unweigh(entry);
            match entry.queue {
                // Its touches brought it here; it earns its rounds anew.
                Queue::Small => (entry.queue, entry.touches) = (Queue::Main, 0),
                Queue::Main => entry.touches -= 1,
            }
            self.push(key, entry);
        }
    }

    /// Forgets an entry that is in no queue any more; its key is remembered.
    fn take(&mut self, key: K) -> Option<(K, u64)> {
        let entry = self.entries.remove(&key)?;
        self.unweigh(entry);
        Some(self.left(key, entry))
    }

    /// Puts an entry that still weighs in its queue back there, behind the others.
    fn queue(&mut self, key: K) {
        match self.entries.get(&key).map(|entry| entry.queue) {
            Some(Queue::Small) => self.small.push_back(key),
            Some(Queue::Main) => self.main.push_back(key),
            None => {}
        }
    }

    fn push(&mut self, key: K, entry: Entry) {
        let (queue, weight) = match entry.queue {
            Queue::Small => (&mut self.small, &mut self.small_weight),
            Queue::Main => (&mut self.main, &mut self.main_weight),
        };
        queue.push_back(key);
        *weight += entry.weight;
        self.entries.insert(key, entry);
    }

    fn unweigh(&mut self, entry: Entry) {
        match entry.queue {
            Queue::Small => self.small_weight -= entry.weight,
            Queue::Main => self.main_weight -= entry.weight,
        }
    }

    /// Remembers a key that left the small queue, as many as there are entries.
    fn left(&mut self, key: K, entry: Entry) -> (K, u64) {
        if entry.queue == Queue::Small {
            self.turn += 1;
            self.ghosts.push_back((key, self.turn));
            self.ghost_turns.insert(key, self.turn);
        }
        let max = self.entries.len().max(1).min(self.limits.entries);
        while self.ghosts.len() > max {
            let Some((key, turn)) = self.ghosts.pop_front() else {
                break;
            };
            if self.ghost_turns.get(&key) == Some(&turn) {
                self.ghost_turns.remove(&key);
            }
        }
        (key, entry.weight)
    }

    fn forget_oldest(&mut self) {
        let oldest = self.small.pop_front().or_else(|| self.main.pop_front());
        if let Some(entry) = oldest.and_then(|key| self.entries.remove(&key)) {
            self.unweigh(entry);
        }
    }
}

#[cfg(test)]
mod tests;
