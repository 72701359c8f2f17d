//! Who may send a request now: the decision alone.
//!
//! Invariant, over all layers and hosts:
//! - No request begins while one of a more urgent class waits for the same host, or for
//!   memory. Background ones begin only while none of another class waits or is under way at all.
//! - Within a class it is first come, first served, by ticket, but for those whose host
//!   has no slot: they hold nobody of another host up. Nobody overtakes a request that
//!   waits for memory, so that a large one is not passed over forever.
//! - Memory counted does not exceed the budget when a request begins, and what is less
//!   urgent leaves a part of it to readers, unless it is all that goes.
//! - When nothing is under way, the first of the most urgent class may go: no set of
//!   requests can block itself.
//!
//! Pure: no I/O, no clock, no tasks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::{Ahead, Ask, Ticket};
use crate::layer::{EngineConfig, Priority};

/// Requests under way and waiting; `T` is how one that waits is told.
#[derive(Debug)]
pub(super) struct Lines<T> {
    config: EngineConfig,
    /// By class, then in the order of their tickets.
    waiting: [BTreeMap<Ticket, (Ask, T)>; 3],
    running: HashMap<Ticket, Ask>,
    /// Requests under way by host and class; hosts without any are left out.
    hosts: HashMap<Arc<str>, [u32; 3]>,
    memory: u64,
}

impl<T> Lines<T> {
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            config,
            waiting: Default::default(),
            running: HashMap::new(),
            hosts: HashMap::new(),
            memory: 0,
        }
    }

    /// Puts a request into line.
    pub(super) fn push(&mut self, ticket: Ticket, ask: Ask, tell: T) {
        self.waiting[ask.class as usize].insert(ticket, (ask, tell));
    }

    /// Takes a request out of line; one that is under way is left alone.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        for line in &mut self.waiting {
            line.remove(&ticket);
        }
    }

    /// Makes a request more urgent, whether it waits or is under way.
    pub(super) fn promote(&mut self, ticket: Ticket, class: Priority) {
        for from in Priority::ALL.into_iter().filter(|from| *from > class) {
            if let Some((ask, tell)) = self.waiting[from as usize].remove(&ticket) {
                self.push(ticket, Ask { class, ..ask }, tell);
            }
        }
        if let Some(ask) = self.running.get_mut(&ticket)
            && ask.class > class
        {
            let before = std::mem::replace(&mut ask.class, class);
            if let Some(counts) = self.hosts.get_mut(&ask.host) {
                counts[before as usize] = counts[before as usize].saturating_sub(1);
                counts[class as usize] += 1;
            }
        }
    }

    /// Takes out of line who may go now, and counts it as under way.
    pub(super) fn next(&mut self) -> Option<(Ticket, T)> {
        for class in Priority::ALL {
            if let Some((ticket, bytes)) = self.first(class) {
                if !self.fits(class, bytes) {
                    return None;
                }
                let (ask, tell) = self.waiting[class as usize].remove(&ticket)?;
                self.memory = self.memory.saturating_add(ask.bytes);
                self.hosts.entry(Arc::clone(&ask.host)).or_default()[class as usize] += 1;
                self.running.insert(ticket, ask);
                return Some((ticket, tell));
            }
        }
        None
    }

    /// A request ended.
    pub(super) fn end(&mut self, ticket: Ticket) {
        let Some(ask) = self.running.remove(&ticket) else {
            return;
        };
        self.memory = self.memory.saturating_sub(ask.bytes);
        if let Some(counts) = self.hosts.get_mut(&ask.host) {
            let count = &mut counts[ask.class as usize];
            *count = count.saturating_sub(1);
            if *counts == [0; 3] {
                self.hosts.remove(&ask.host);
            }
        }
    }

    /// Counts bytes more that a request under way turned out to hold. May exceed the
    /// budget; then nothing begins until it is back.
    pub(super) fn grow(&mut self, ticket: Ticket, bytes: u64) {
        if let Some(ask) = self.running.get_mut(&ticket) {
            ask.bytes = ask.bytes.saturating_add(bytes);
            self.memory = self.memory.saturating_add(bytes);
        }
    }

    /// The class of a request that is under way.
    pub(super) fn class(&self, ticket: Ticket) -> Option<Priority> {
        self.running.get(&ticket).map(|ask| ask.class)
    }

    /// Whether somebody goes before background requests.
    pub(super) fn ahead(&self) -> Ahead {
        let urgent = [Priority::OnDemand, Priority::Profile];
        let first = |class| self.first(class).map(|(_, bytes)| (class, bytes));
        let mut firsts = urgent.into_iter().filter_map(first);
        if firsts.any(|(class, bytes)| !self.fits(class, bytes)) {
            return Ahead::Starved;
        }
        if urgent.into_iter().any(|class| self.waits(class)) || self.is_urgent_under_way() {
            return Ahead::Somebody;
        }
        Ahead::Nobody
    }

    /// Bytes counted for requests under way.
    pub(super) fn memory(&self) -> u64 {
        self.memory
    }

    /// The first of its class for which its host has a slot, and the bytes it needs. A host
    /// for which a more urgent one waits has none: a registry that is away holds up nobody else's.
    fn first(&self, class: Priority) -> Option<(Ticket, u64)> {
        let mut line = self.waiting[class as usize].iter();
        let mut urgent = Priority::ALL.into_iter().filter(|other| *other < class);
        let awaited: HashSet<&str> = match class {
            Priority::OnDemand => HashSet::new(),
            Priority::Profile => {
                let readers = self.waiting[Priority::OnDemand as usize].values();
                readers.map(|(ask, _)| &*ask.host).collect()
            }
            Priority::Background if urgent.any(|other| self.waits(other)) => return None,
            Priority::Background => HashSet::new(),
        };
        let may = |ask: &Ask| !awaited.contains(&*ask.host) && self.has_slot(class, &ask.host);
        let (ticket, (ask, _)) = line.find(|(_, (ask, _))| may(ask))?;
        Some((*ticket, ask.bytes))
    }

    fn waits(&self, class: Priority) -> bool {
        !self.waiting[class as usize].is_empty()
    }

    fn has_slot(&self, class: Priority, host: &str) -> bool {
        let [on_demand, profile, background] = self.hosts.get(host).copied().unwrap_or_default();
        match class {
            Priority::OnDemand => on_demand < self.config.on_demand_max,
            Priority::Profile => on_demand.saturating_add(profile) < self.config.profile_max,
            Priority::Background => {
                background < self.config.background_max && !self.is_urgent_under_way()
            }
        }
    }

    fn fits(&self, class: Priority, bytes: u64) -> bool {
        let whole = self.config.memory_bytes_max;
        let share = match class {
            Priority::OnDemand => whole,
            Priority::Profile => whole / 4 * 3,
            Priority::Background => whole / 2,
        };
        self.memory == 0 || self.memory.saturating_add(bytes) <= share
    }

    fn is_urgent_under_way(&self) -> bool {
        let urgent = |[on_demand, profile, _]: &[u32; 3]| on_demand + profile > 0;
        self.hosts.values().any(urgent)
    }
}

#[cfg(test)]
mod tests;
