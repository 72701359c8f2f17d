//! Keeping the store within its bounds.
//!
//! Invariant: without bounds nothing is ever evicted by itself. Only what can be fetched
//! again goes, in extents of a MiB; indexes, manifests and configs stay. What to take is
//! [`policy`]'s decision, how it is taken `file::evict`'s.
//!
//! What was read is known from [`super::LayerFile::read_at`]: a bit per extent, which
//! flushes write into the layer's `touched` file as a hint. A process builds the queues
//! when it first has to evict, the layer used longest ago first, and keeps them while it
//! lives. So a process that only evicts once decides by the hints, and one that runs long
//! by what it saw. What start-ups read is known from the layers' `pinned` files, which every
//! process writes and honours; it goes when nothing else is left.
//!
//! One process evicts at a time: it holds `evict.lock`. Who finds it held after a flush
//! lets the other do the work; who cannot go on without room waits, and tries again before
//! it evicts itself.
//!
//! Lock order: `evict.lock` and `policy`, both held while one thread evicts, then a layer's
//! locks, or `bounds`. Nobody who holds a lock of a layer comes here.

mod extents;
pub(super) mod policy;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

pub(super) use self::extents::extent_of;
use self::policy::Policy;
use super::file::{DATA, TOUCHED};
use super::{LOCK_WAIT, LayerFile, Store, sys};
use crate::lock::{LockFile, is_held, lock_within};
use crate::types::Digest;
use crate::{Error, Result};

/// Held by whoever evicts.
const EVICT_LOCK: &str = "evict.lock";
/// Part of the budget that is freed beyond the excess, so that not every flush evicts.
const SLACK: u64 = 16;
/// Freed at least when a disk turns out to be full.
const ROOM_BYTES: u64 = 64 << 20;
/// How often extents are chosen again because less was freed than they were thought to hold, and
/// how often a thread that evicts looks whether others left it more to do.
const ROUNDS_MAX: u32 = 4;
/// The free floor unless told otherwise, as part of the file system and at most. Enough
/// for a start to write its logs; little enough not to matter on a small disk.
const FREE_FLOOR_PART: u64 = 20;
const FREE_FLOOR_MAX: u64 = 1 << 30;

/// Makes what evictors lock: on a full disk there may be no room for another name.
pub(super) fn prepare(root: &Path) -> Result<()> {
    open_lock(root).map(drop)
}

fn open_lock(root: &Path) -> Result<LockFile> {
    let path = root.join(EVICT_LOCK);
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map(LockFile::from)
        .map_err(|e| Error::io("lock", path, e))
}

/// What the store may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Most bytes of the device that data files may occupy; `None` for no such bound.
    pub budget: Option<u64>,
    /// Bytes of the file system that must stay free; `None` for the usual: a twentieth of
    /// it, a GiB at most.
    pub free_floor: Option<u64>,
}

impl Bounds {
    /// What must stay free of a file system of `total` bytes. A floor above its size would
    /// only ever evict everything.
    fn floor(&self, total: u64) -> u64 {
        let usual = FREE_FLOOR_MAX.min(total / FREE_FLOOR_PART);
        self.free_floor.unwrap_or(usual).min(total)
    }
}

/// What an eviction took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Chunks that were present.
    pub chunks: u64,
    /// Their decoded bytes.
    pub bytes: u64,
}

impl Evicted {
    fn add(&mut self, other: Self) {
        self.chunks += other.chunks;
        self.bytes += other.bytes;
    }
}

/// What an eviction over several layers did.
#[derive(Debug, Default)]
pub struct Trim {
    /// What was taken.
    pub evicted: Evicted,
    /// Bytes of the device that data files take less than before, whoever else wrote or
    /// evicted meanwhile. 0 where nothing was trimmed to a size.
    pub freed_bytes: u64,
    /// Layers of which nothing, or not all that was meant, could be taken, and why.
    pub kept: Vec<(Digest, Error)>,
}

impl Trim {
    fn took_something(&self) -> bool {
        self.evicted.chunks > 0 || self.freed_bytes > 0
    }
}

/// What the store takes and may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Occupied by data files.
    pub used: u64,
    /// The bound on that.
    pub budget: Option<u64>,
    /// Free on the file system.
    pub free: u64,
    /// The bound on that.
    pub free_floor: u64,
}

impl Space {
    /// Bytes to free, slack included; 0 while within bounds.
    fn excess(&self) -> u64 {
        let over = self.budget.map_or(0, |budget| {
            let over = self.used.saturating_sub(budget);
            if over > 0 { over + budget / SLACK } else { 0 }
        });
        let short = self.free_floor.saturating_sub(self.free);
        let short = if short > 0 {
            short + self.free_floor / SLACK
        } else {
            0
        };
        over.max(short)
    }
}

/// An extent: which layer's, and its number.
type Extent = (Digest, u32);

/// What one store knows about evicting.
#[derive(Default)]
pub(super) struct Keeper {
    bounds: Mutex<Option<Bounds>>,
    /// Held while one thread evicts; another that wants to finds it held and leaves.
    policy: Mutex<Policy<Extent>>,
    /// Who can have the kernel no more read a layer by itself.
    hides: Mutex<Option<Arc<Hides>>>,
}

/// Has nobody who comes from now on read the data file of a layer by the kernel alone, unless
/// somebody needs that; see [`super::Whole`]. Told in a thread that evicts, and waits for nobody.
pub type Hides = dyn Fn(&Digest) + Send + Sync;

impl Store {
    /// Has `hides` told of complete layers when nothing else is left to be evicted, the one that
    /// was used longest ago first.
    pub fn hide_by(&self, hides: Arc<Hides>) {
        *self.keeper.hides.lock() = Some(hides);
    }

    /// Bounds the store from now on: after each flush, and when a write finds the disk
    /// full, chunks are evicted.
    pub fn keep_within_bounds(&self, bounds: Bounds) {
        *self.keeper.bounds.lock() = Some(bounds);
    }

    /// What the store takes and may take.
    pub fn space(&self) -> Result<Space> {
        let err = |e| Error::io("inspect", &self.root, e);
        let (total, free) = sys::capacity(&self.root).map_err(err)?;
        let unbounded = Bounds {
            budget: None,
            free_floor: Some(0),
        };
        let bounds = self.keeper.bounds.lock().unwrap_or(unbounded);
        Ok(Space {
            used: self.used()?,
            budget: bounds.budget,
            free,
            free_floor: bounds.floor(total),
        })
    }

    /// Evicts until data files occupy at most `bytes`, as far as that is possible.
    pub fn trim(&self, bytes: u64) -> Result<Trim> {
        let turn = open_lock(&self.root)?;
        if !lock_within(&turn, LOCK_WAIT).map_err(|e| self.evict_lock_error(e))? {
            let busy = "another process evicts, and has for 30 s; see which one with lslocks";
            let busy = io::Error::new(io::ErrorKind::TimedOut, busy);
            return Err(self.evict_lock_error(busy));
        }
        self.trim_now(bytes)
    }

    /// [`Self::trim`] for whoever holds `evict.lock`.
    fn trim_now(&self, bytes: u64) -> Result<Trim> {
        let mut trim = Trim::default();
        let mut policy = self.keeper.policy.lock();
        let began = self.used()?;
        for _ in 0..ROUNDS_MAX {
            let used = self.used()?;
            let excess = used.saturating_sub(bytes);
            if excess == 0 {
                break;
            }
            let files = self.learn(&mut policy)?;
            let before = trim.evicted.chunks;
            trim.kept.clear();
            self.evict_chosen(&mut policy, &files, excess, &mut trim);
            // What a process that died left is given back without being any chunk's.
            let freed = trim.evicted.chunks > before || self.used()? < used;
            if !freed && !self.hide_shown(excess)? {
                break;
            }
        }
        trim.freed_bytes = began.saturating_sub(self.used()?);
        Ok(trim)
    }

    /// Has layers evicted from again that the kernel reads by itself, as many as hold `excess`
    /// bytes; `false` if there are none that can.
    fn hide_shown(&self, excess: u64) -> Result<bool> {
        let hides = self.keeper.hides.lock().clone();
        let Some(hides) = hides else {
            return Ok(false);
        };
        let mut shown = Vec::new();
        for digest in self.digests_in("layers")? {
            if let Ok(Some(file)) = self.open_layer(&digest)
                && file.is_shown_whole().unwrap_or(false)
            {
                shown.push((self.last_read(&digest), file));
            }
        }
        shown.sort_by_key(|(last_read, file)| (*last_read, *file.digest()));
        let mut bytes = 0_u64;
        for (_, file) in shown {
            if bytes >= excess {
                break;
            }
            hides(file.digest());
            if !file.is_shown_whole().unwrap_or(true) {
                bytes = bytes.saturating_add(file.present_bytes());
            }
        }
        Ok(bytes > 0)
    }

    /// Evicts every chunk that can be fetched again of these layers, or of all.
    pub fn evict_layers(&self, only: Option<&[Digest]>) -> Result<Trim> {
        let mut trim = Trim::default();
        for digest in self.digests_in("layers")? {
            if only.is_some_and(|only| !only.contains(&digest)) {
                continue;
            }
            let outcome = match self.open_layer(&digest) {
                Ok(Some(file)) => file.evict_all().and_then(|evicted| {
                    trim.evicted.add(evicted);
                    whole_only(&file)
                }),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                trim.kept.push((digest, error));
            }
        }
        Ok(trim)
    }

    /// Runs `write`; if it finds the disk full, makes room and runs it once more. Where
    /// another process or thread is making room, that may be enough.
    pub(super) fn with_room<T>(&self, write: impl Fn() -> Result<T>) -> Result<T> {
        let full = match write() {
            Err(error @ Error::NoSpace { .. }) => error,
            outcome => return outcome,
        };
        if self.keeper.bounds.lock().is_none() {
            return Err(full);
        }
        let turn = open_lock(&self.root)?;
        if is_held(&turn).map_err(|e| self.evict_lock_error(e))? {
            if !lock_within(&turn, LOCK_WAIT).map_err(|e| self.evict_lock_error(e))? {
                return Err(full);
            }
            match write() {
                Err(Error::NoSpace { .. }) => {}
                outcome => return outcome,
            }
        }
        let room = self.trim_now(self.used()?.saturating_sub(ROOM_BYTES))?;
        if !room.took_something() {
            return Err(full);
        }
        drop(turn);
        write()
    }

    /// Evicts if the store is out of its bounds and nobody else is evicting. What fails is
    /// logged: who calls has done what it came for. Whoever records what came does this; a
    /// daemon has to once when it starts, as the one before may have been killed in between.
    pub fn keep_within(&self) {
        if self.keeper.bounds.lock().is_none() {
            return;
        }
        match self.trim_to_bounds() {
            Ok(Evicted { chunks: 0, .. }) => {}
            Ok(Evicted { chunks, bytes }) => {
                tracing::info!(
                    bytes,
                    chunks,
                    "evicted, to keep the store within its bounds"
                );
            }
            Err(error) => tracing::warn!(%error, "cannot keep the store within its bounds"),
        }
    }

    /// Evicts until the store is within its bounds, nothing can be taken any more, or somebody
    /// else does it. Whoever came meanwhile has left what it wrote to this, so it looks once more
    /// when it could have been left to nobody.
    fn trim_to_bounds(&self) -> Result<Evicted> {
        let mut evicted = Evicted::default();
        for _ in 0..ROUNDS_MAX {
            if self.space()?.excess() == 0 {
                break;
            }
            let turn = open_lock(&self.root)?;
            if is_held(&turn).map_err(|e| self.evict_lock_error(e))? {
                break;
            }
            // Whoever had the lock until now may have done it.
            let space = self.space()?;
            let trim = self.trim_now(space.used.saturating_sub(space.excess()))?;
            evicted.add(trim.evicted);
            if !trim.took_something() {
                break;
            }
        }
        Ok(evicted)
    }

    fn evict_lock_error(&self, error: io::Error) -> Error {
        Error::io("lock", self.root.join(EVICT_LOCK), error)
    }

    /// Bytes of the device that data files occupy.
    fn used(&self) -> Result<u64> {
        let mut used = 0_u64;
        for dir in super::list(&self.root.join("layers"))? {
            // Gone meanwhile, or damaged: it takes nothing that eviction could free.
            if let Ok(meta) = std::fs::metadata(dir.join(DATA)) {
                used = used.saturating_add(meta.blocks() * 512);
            }
        }
        Ok(used)
    }

    /// Tells the policy what is there and what was read; returns the layers.
    fn learn(&self, policy: &mut Policy<Extent>) -> Result<HashMap<Digest, Arc<LayerFile>>> {
        let mut files = Vec::new();
        for digest in self.digests_in("layers")? {
            // One that cannot be opened has nothing that can be evicted by chunk.
            if let Ok(Some(file)) = self.open_layer(&digest) {
                files.push((self.last_read(&digest), file));
            }
        }
        files.sort_by_key(|(last_read, file)| (*last_read, *file.digest()));
        let mut occupied: HashMap<Digest, BTreeMap<u32, u64>> = HashMap::new();
        for (_, file) in &files {
            // Of one that is kept nothing can be had; to choose it would free nothing.
            let extents = match file.is_kept() {
                true => BTreeMap::new(),
                false => extents::occupied(file),
            };
            occupied.insert(*file.digest(), extents);
        }
        policy.retain(|(digest, extent)| {
            let of_layer = occupied.get(digest);
            of_layer.is_some_and(|extents| extents.contains_key(extent))
        });
        for (_, file) in &files {
            let digest = *file.digest();
            for (extent, bytes) in occupied.get(&digest).into_iter().flatten() {
                policy.insert((digest, *extent), *bytes);
            }
            for extent in file.take_touched() {
                policy.touch(&(digest, extent));
            }
        }
        Ok(files.into_iter().map(|(_, f)| (*f.digest(), f)).collect())
    }

    fn last_read(&self, digest: &Digest) -> SystemTime {
        let dir = self.layer_dir(digest);
        let of = |name| std::fs::metadata(dir.join(name)).and_then(|meta| meta.modified());
        of(TOUCHED)
            .or_else(|_| of(DATA))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn evict_chosen(
        &self,
        policy: &mut Policy<Extent>,
        files: &HashMap<Digest, Arc<LayerFile>>,
        excess: u64,
        trim: &mut Trim,
    ) {
        let mut chosen: BTreeMap<Digest, Vec<u32>> = BTreeMap::new();
        let now = SystemTime::now();
        let pins: HashMap<Digest, Vec<u32>> = files
            .iter()
            .map(|(digest, file)| (*digest, file.pinned(now)))
            .collect();
        let pinned = |(digest, extent): &Extent| {
            let pins = pins.get(digest);
            pins.is_some_and(|pins| pins.binary_search(extent).is_ok())
        };
        // Whatever fails from here on, the policy has all that was not chosen; what was chosen and
        // is there yet, it is told again before anything else is.
        for ((digest, extent), _) in policy.evict(excess, pinned) {
            chosen.entry(digest).or_default().push(extent);
        }
        for (digest, mut extents) in chosen {
            let Some(file) = files.get(&digest) else {
                continue;
            };
            extents.sort_unstable();
            match file.evict(&extents::chunks_of(file, &extents)) {
                Ok(evicted) => trim.evicted.add(evicted),
                Err(error) => trim.kept.push((digest, error)),
            }
        }
    }
}

/// An error for a layer that has bytes which can only be streamed.
fn whole_only(file: &LayerFile) -> Result<()> {
    let present = file.present_bytes();
    if present == 0 {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!(
            "evicting the last {present} bytes of layer {}",
            file.digest()
        ),
        detail: "they cannot be fetched alone; `laz rmi` removes them with the image".to_owned(),
    })
}

#[cfg(test)]
mod tests;
