//! What the mount server knows and decides. Pure: no descriptor, no clock, no thread.
//!
//! Invariant: a byte is served only if a daemon granted it and it cannot have been punched
//! out of the data file before it was read. That rests on two facts about the store, each
//! of which is true of every process:
//!
//! ```text
//! A  the store's number of evictions changes before the first hole of an eviction is made
//! B  whoever evicts from a layer holds a write lock of its data file meanwhile
//! ```
//!
//! What is granted stands on one of two grounds:
//!
//! ```text
//! number n  the daemon verified the bytes, and the number was n then. The reader reads the
//!           bytes, then the number: if it is n, no hole was begun before (A). If not, all
//!           that was granted is forgotten, and the daemon asked again.
//! lock      we hold a read lock of the data file, and after we had it the number was n
//!           still. So nobody evicts from this layer, whatever the number does (B).
//! kept      the same lock, held from before the mount until after it. When we had it the
//!           number was n; what was verified at n or later is there to stay (B).
//! ```
//!
//! A mount through fanotify is kept: once a read is allowed the kernel reads the data file
//! itself, at its own time, and nobody looks at a number after it. Of the others, a layer that
//! a daemon is attached to stands on the number: anybody may evict from it. A
//! layer without one stands on the lock as soon as it can be had: what is there stays, and
//! local data goes on being served until a daemon comes. When one attaches, the ground
//! changes first and the lock is released after, so a reader who finds the ground unchanged
//! after it read its bytes read them under the lock. Never does it matter which process
//! lived how long, what it promised, or which message was lost.
//!
//! A read that cannot be served waits, without a thread, until it is granted, refused,
//! interrupted, or its time is over.

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::ranges::{Ranges, Span};
use crate::wire::{Basis, Handed, Listed};

/// Most mounts at a time. Twice what is promised.
pub const MOUNTS_MAX: usize = 1000;
/// Most reads that wait at a time; further ones fail. Each takes about 150 bytes.
pub const WAITING_MAX: usize = 16_384;

/// Most interruptions kept that came before their reads. Each is of the microseconds between a
/// request's being taken by one thread and its being known to all.
const EARLY_MAX: usize = 64;

const EIO: i32 = 5;
const EEXIST: i32 = 17;
const EMFILE: i32 = 24;

/// A read of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Which mount.
    pub mount: u64,
    /// The kernel's number of the request.
    pub unique: u64,
    /// The bytes of the data file, inside it.
    pub span: Span,
    /// How many zeros follow them in the answer: the file that is shown is whole blocks.
    pub zeros: u32,
    /// When it came.
    pub since: Instant,
    /// The thread that waits for it, of a read that a signal may interrupt without anybody
    /// giving up; `None` where who is interrupted does.
    pub thread: Option<u32>,
}

/// On what a read is served. Means something to [`State::holds`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(Ground);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ground {
    Number(u64),
    /// Each time that a lock is taken is another one.
    Lock {
        turn: u64,
    },
    /// A lock that is given back with the mount. When it was taken the number was this.
    Kept {
        since: u64,
    },
}

/// What becomes of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Read the bytes, ask [`State::holds`], send them.
    Serve(Ticket),
    /// It waits; somebody else will answer it.
    Waits,
    /// The same, and its reader got a signal before this was known of it.
    WaitsInterrupted,
    /// Answer with this errno.
    Refuse(i32),
}

/// A question to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Its number.
    pub want: u64,
    /// Which mount.
    pub mount: u64,
    /// The bytes.
    pub span: Span,
}

/// What a grant leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// Reads that wait no longer: decide about them again.
    pub again: Vec<Read>,
    /// The read that the grant was to be for, if it was not: answer it with `EIO`.
    pub refused: Option<Read>,
}

struct Layer {
    listed: Listed,
    granted: Ranges,
    ground: Ground,
    attached: bool,
    /// By their wants.
    waiting: BTreeMap<u64, Read>,
}

/// All mounts.
pub struct State {
    layers: BTreeMap<u64, Layer>,
    /// Wants to be sent; of attached layers only.
    outbox: VecDeque<(u64, u64)>,
    next_mount: u64,
    next_want: u64,
    next_turn: u64,
    waiting: usize,
    wait_max: Duration,
    /// Requests, with their mounts, that were interrupted and did not wait: answered meanwhile,
    /// or not here yet. The kernel gives no two requests one number.
    early: VecDeque<(u64, u64)>,
}

impl State {
    /// Nothing mounted. A read waits `wait_max` at most.
    pub fn new(wait_max: Duration) -> Self {
        Self {
            layers: BTreeMap::new(),
            outbox: VecDeque::new(),
            next_mount: 1,
            next_want: 1,
            next_turn: 1,
            waiting: 0,
            wait_max,
            early: VecDeque::new(),
        }
    }

    /// Makes room for a mount by the daemon that is connected, whatever its number; it gets
    /// one, or an errno comes back. `kept` is the store's number after the lock of the data
    /// file was taken, for a mount through fanotify and for no other.
    pub fn mount(&mut self, mut listed: Listed, kept: Option<u64>) -> Result<u64, i32> {
        if self.layers.len() >= MOUNTS_MAX {
            return Err(EMFILE);
        }
        // Not by its name: a layer that was removed and fetched again is mounted beside the
        // old one, which somebody may still use.
        if self
            .layers
            .values()
            .any(|layer| layer.listed.path == listed.path)
        {
            return Err(EEXIST);
        }
        let mount = self.next_mount;
        self.next_mount += 1;
        listed.mount = mount;
        let ground = kept.map_or(Ground::Number(0), |since| Ground::Kept { since });
        let layer = Layer {
            listed,
            granted: Ranges::default(),
            ground,
            attached: true,
            waiting: BTreeMap::new(),
        };
        self.layers.insert(mount, layer);
        Ok(mount)
    }

    /// Forgets a mount; the reads that waited are to be answered with `EIO`.
    pub fn unmount(&mut self, mount: u64) -> Vec<Read> {
        let waiting = self.take_waiting(mount);
        self.layers.remove(&mount);
        waiting
    }

    /// Decides about a read.
    pub fn read(&mut self, read: Read) -> Decision {
        let Some(layer) = self.layers.get_mut(&read.mount) else {
            return Decision::Refuse(EIO);
        };
        if layer.granted.covers(&read.span) {
            return Decision::Serve(Ticket(layer.ground));
        }
        if self.waiting >= WAITING_MAX {
            return Decision::Refuse(EIO);
        }
        let want = self.next_want;
        self.next_want += 1;
        self.waiting += 1;
        layer.waiting.insert(want, read);
        if layer.attached {
            self.outbox.push_back((read.mount, want));
        }
        match self.early.contains(&(read.mount, read.unique)) {
            true => Decision::WaitsInterrupted,
            false => Decision::Waits,
        }
    }

    /// Whether bytes that were read on `ticket` may be sent. `number` is the store's number,
    /// read after them. If not, decide about the read again.
    pub fn holds(&mut self, mount: u64, ticket: Ticket, number: u64) -> bool {
        let Some(layer) = self.layers.get_mut(&mount) else {
            return false;
        };
        let Ticket(ground) = ticket;
        let holds = match ground {
            Ground::Number(granted) => granted == number,
            Ground::Lock { .. } | Ground::Kept { .. } => layer.ground == ground,
        };
        if !holds && layer.ground == ground {
            layer.granted.clear();
        }
        holds
    }

    /// The daemon says that it verified `span` while the store's number was `number`, as an
    /// answer to `want` or of its own accord.
    pub fn grant(&mut self, mount: u64, want: u64, number: u64, span: Span) -> Granted {
        let mut granted = Granted::default();
        let Some(layer) = self.layers.get_mut(&mount).filter(|layer| layer.attached) else {
            return granted;
        };
        match layer.ground {
            Ground::Kept { since } if since <= number => layer.granted.insert(span),
            // Verified before the lock was taken: who knows what became of it.
            Ground::Kept { .. } => {}
            ground => {
                if ground != Ground::Number(number) {
                    layer.granted.clear();
                    layer.ground = Ground::Number(number);
                }
                layer.granted.insert(span);
            }
        }
        let covered = |read: &Read| layer.granted.covers(&read.span);
        let ready = layer.waiting.iter().filter(|(_, read)| covered(read));
        let ready: Vec<u64> = ready.map(|(want, _)| *want).collect();
        granted.again = ready
            .iter()
            .filter_map(|want| layer.waiting.remove(want))
            .collect();
        granted.refused = layer.waiting.remove(&want);
        self.waiting -= granted.again.len() + usize::from(granted.refused.is_some());
        granted
    }

    /// Whether all of a kept mount is granted, so that nobody needs to ask any more.
    pub fn is_complete(&self, mount: u64) -> bool {
        self.layers.get(&mount).is_some_and(|layer| {
            let all = Span::new(0, layer.listed.size);
            let is_kept = matches!(layer.ground, Ground::Kept { .. });
            is_kept && all.is_some_and(|all| layer.granted.covers(&all))
        })
    }

    /// The daemon cannot answer this want: the read is to be refused.
    pub fn fail(&mut self, mount: u64, want: u64) -> Option<Read> {
        let layer = self.layers.get_mut(&mount).filter(|layer| layer.attached)?;
        let read = layer.waiting.remove(&want);
        self.waiting -= usize::from(read.is_some());
        read
    }

    /// A reader got a signal: its read, if it waits. If not it is told when it comes to.
    pub fn interrupted(&mut self, mount: u64, unique: u64) -> Option<Read> {
        let layer = self.layers.get(&mount)?;
        let mut waiting = layer.waiting.values();
        let read = waiting.find(|read| read.unique == unique).copied();
        if read.is_none() {
            self.early.truncate(EARLY_MAX - 1);
            self.early.push_front((mount, unique));
        }
        read
    }

    /// Nobody waits for this request any more; the read if it waited.
    pub fn interrupt(&mut self, mount: u64, unique: u64) -> Option<Read> {
        let layer = self.layers.get_mut(&mount)?;
        let is_it = |(_, read): &(&u64, &Read)| read.unique == unique;
        let want = *layer.waiting.iter().find(is_it)?.0;
        self.waiting -= 1;
        layer.waiting.remove(&want)
    }

    /// All reads of a mount that wait; the caller answers them.
    pub fn take_waiting(&mut self, mount: u64) -> Vec<Read> {
        let layer = self.layers.get_mut(&mount);
        let waiting = layer.map(|layer| std::mem::take(&mut layer.waiting));
        let waiting: Vec<Read> = waiting
            .into_iter()
            .flatten()
            .map(|(_, read)| read)
            .collect();
        self.waiting -= waiting.len();
        waiting
    }

    /// The reads of a mount that wait; they wait on.
    pub fn waiting(&self, mount: u64) -> Vec<Read> {
        let layer = self.layers.get(&mount).into_iter();
        let waiting = layer.flat_map(|layer| layer.waiting.values().copied());
        waiting.collect()
    }

    /// Reads whose time is over; to be answered with `EIO`.
    pub fn expire(&mut self, now: Instant) -> Vec<Read> {
        let mut expired = Vec::new();
        for layer in self.layers.values_mut() {
            let over = |read: &Read| now.saturating_duration_since(read.since) >= self.wait_max;
            let wants = layer.waiting.iter().filter(|(_, read)| over(read));
            let wants: Vec<u64> = wants.map(|(want, _)| *want).collect();
            expired.extend(wants.iter().filter_map(|want| layer.waiting.remove(want)));
        }
        self.waiting -= expired.len();
        expired
    }

    /// When the first of the reads that wait expires.
    pub fn next_expiry(&self) -> Option<Instant> {
        let waiting = self
            .layers
            .values()
            .flat_map(|layer| layer.waiting.values());
        waiting
            .map(|read| read.since)
            .min()?
            .checked_add(self.wait_max)
    }

    /// The next want to be sent; its read waits on.
    pub fn next_want(&mut self) -> Option<Want> {
        while let Some((mount, want)) = self.outbox.pop_front() {
            let layer = self.layers.get(&mount);
            if let Some(read) = layer.and_then(|layer| layer.waiting.get(&want)) {
                let span = read.span;
                return Some(Want { want, mount, span });
            }
        }
        None
    }

    /// The connected daemon takes a mount on; `number` is the store's number now. `false` if
    /// there is none. The caller releases the lock of the data file after this, never before.
    pub fn attach(&mut self, mount: u64, number: u64) -> bool {
        let Some(layer) = self.layers.get_mut(&mount) else {
            return false;
        };
        if let Ground::Lock { .. } = layer.ground {
            layer.ground = Ground::Number(number);
        }
        if !layer.attached {
            layer.attached = true;
            let wants = layer.waiting.keys().map(|want| (mount, *want));
            self.outbox.extend(wants);
        }
        true
    }

    /// The daemon is gone.
    pub fn disconnected(&mut self) {
        self.outbox.clear();
        for layer in self.layers.values_mut() {
            layer.attached = false;
        }
    }

    /// Mounts whose data file should be locked.
    pub fn to_lock(&self) -> Vec<u64> {
        let unlocked = |layer: &Layer| matches!(layer.ground, Ground::Number(_));
        let layers = self.layers.iter();
        let layers = layers.filter(|(_, layer)| !layer.attached && unlocked(layer));
        layers.map(|(mount, _)| *mount).collect()
    }

    /// The lock of a mount's data file was taken, and after that the store's number was
    /// `number`. `false` if it is not wanted any more: the caller releases it.
    pub fn locked(&mut self, mount: u64, number: u64) -> bool {
        let Some(layer) = self.layers.get_mut(&mount).filter(|layer| !layer.attached) else {
            return false;
        };
        if layer.ground != Ground::Number(number) {
            layer.granted.clear();
        }
        layer.ground = Ground::Lock {
            turn: self.next_turn,
        };
        self.next_turn += 1;
        true
    }

    /// All mounts, for others.
    pub fn list(&self) -> Vec<Listed> {
        let layers = self.layers.values();
        layers.map(|layer| layer.listed.clone()).collect()
    }

    /// All mounts, for a successor, and the number that the next one has. Reads that wait
    /// are not among it, nor is who bears a mark.
    pub fn hand_over(&self) -> (Vec<Handed>, u64) {
        let handed = |layer: &Layer| Handed {
            listed: layer.listed.clone(),
            basis: match layer.ground {
                Ground::Number(number) => Basis::Number(number),
                Ground::Lock { .. } => Basis::Lock,
                Ground::Kept { since } => Basis::Kept(since),
            },
            mark: 0,
            granted: layer.granted.spans().to_vec(),
        };
        (self.layers.values().map(handed).collect(), self.next_mount)
    }

    /// Takes a mount over, without a daemon.
    pub fn adopt(&mut self, handed: Handed) {
        let Handed {
            listed,
            basis,
            granted,
            mark: _,
        } = handed;
        let ground = match basis {
            Basis::Number(number) => Ground::Number(number),
            Basis::Lock => Ground::Lock {
                turn: self.next_turn,
            },
            Basis::Kept(since) => Ground::Kept { since },
        };
        self.next_turn += 1;
        self.next_mount = self.next_mount.max(listed.mount.saturating_add(1));
        let mount = listed.mount;
        let layer = Layer {
            listed,
            granted: granted.into_iter().collect(),
            ground,
            attached: false,
            waiting: BTreeMap::new(),
        };
        self.layers.insert(mount, layer);
    }

    /// The next mount has at least this number.
    pub fn skip_to(&mut self, next_mount: u64) {
        self.next_mount = self.next_mount.max(next_mount);
    }
}
