//! The server: threads that answer the kernel, one that talks to everybody else.
//!
//! Invariant: no thread that answers the kernel ever waits for a daemon, and none holds the
//! lock of the state across a system call. A read is answered exactly once, by whoever took
//! it out of the state or was told to serve it.
//!
//! Locks: `state` and `layers` and those of `marked`, each held for a moment, never one within
//! the other.

mod adopt;
mod control;
mod layer;
mod link;
mod marked;
mod pace;
mod twice;
mod workers;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use self::adopt::Adopted;
pub(crate) use self::adopt::{Estate, Holding, listen, take};
use self::control::Control;
use self::layer::Served;
use self::marked::Marked;
use crate::fanotify::NUMBERS_MAX;
use crate::state::State;
use crate::{Error, Result, sys};

/// How long a read waits for bytes before it fails with `EIO`, unless told otherwise. Longer
/// than a daemon takes to be upgraded or a node's network to come back, short enough that a
/// program that will never be served ends.
pub const WAIT_MAX: Duration = Duration::from_secs(600);

/// How a server runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where daemons connect. The guard listens beside it.
    pub socket: PathBuf,
    /// How long a read may wait in all.
    pub wait_max: Duration,
    /// Threads that answer the kernel, at least one.
    pub workers: usize,
    /// Takes over from the server that runs, instead of refusing to be a second one.
    pub take_over: bool,
}

/// Why a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Another server was running already.
    AlreadyRunning,
    /// A successor has everything.
    HandedOver,
}

/// Where the guard of the server at `socket` listens.
pub fn guard_socket(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".guard");
    path.into()
}

/// Runs a server until a successor takes over. Never unmounts by itself.
pub fn run(config: &Config) -> Result<Ended> {
    let limited = sys::fanotify::limit_files(u64::from(NUMBERS_MAX));
    limited.map_err(|e| Error::io("limit the open files of", &config.socket, e))?;
    let Some(adopted) = adopt::begin(config)? else {
        return Ok(Ended::AlreadyRunning);
    };
    let shared = Shared::new(config.wait_max)?;
    let Adopted {
        estate,
        next_mount,
        listener,
        guard,
    } = adopted;
    shared.take_over(estate, next_mount)?;
    Control::new(shared, config, listener, guard)?.run()
}

/// What all threads share.
struct Shared {
    state: Mutex<State>,
    layers: RwLock<HashMap<u64, Arc<Served>>>,
    marked: Marked,
    /// Everything that the kernel sends requests through, and `stop`.
    epoll: sys::Epoll,
    /// Rung to have all workers end, and whether it was.
    stop: sys::Bell,
    stopping: AtomicBool,
    /// Rung when there is a want to be sent.
    poke: sys::Bell,
    /// Whether this kernel sends requests again when told to.
    resends: AtomicBool,
}

/// The id of `stop`; mounts begin at 1.
const STOP: u64 = 0;
/// The id of the group through which the kernel asks.
const QUESTIONS: u64 = u64::MAX;

impl Shared {
    fn new(wait_max: Duration) -> Result<Arc<Self>> {
        let err = |e| Error::io("make", "the server's descriptors", e);
        let shared = Self {
            state: Mutex::new(State::new(wait_max)),
            layers: RwLock::default(),
            marked: Marked::default(),
            epoll: sys::Epoll::new().map_err(err)?,
            stop: sys::Bell::new().map_err(err)?,
            stopping: AtomicBool::new(false),
            poke: sys::Bell::new().map_err(err)?,
            resends: AtomicBool::new(false),
        };
        shared.epoll.add(&shared.stop, STOP).map_err(err)?;
        Ok(Arc::new(shared))
    }

    fn layer(&self, mount: u64) -> Option<Arc<Served>> {
        self.layers.read().get(&mount).cloned()
    }

    /// Serves a mount from now on.
    fn insert(&self, served: Served) -> Result<Arc<Served>> {
        let served = Arc::new(served);
        self.layers
            .write()
            .insert(served.mount, Arc::clone(&served));
        if let Some(fuse) = served.fuse() {
            let added = self.epoll.add_once(fuse, served.mount);
            added.map_err(|e| Error::io("wait for requests of", &served.path, e))?;
        }
        Ok(served)
    }

    /// Serves it no longer, and answers the reads that wait.
    fn remove(&self, mount: u64) {
        let waiting = self.state.lock().unmount(mount);
        let Some(served) = self.layers.write().remove(&mount) else {
            return;
        };
        for read in waiting {
            served.refuse(read.unique, layer::EIO);
        }
        self.marked.remove(mount);
        // It may have been removed when the kernel let go of it.
        let _ = served.fuse().map(|fuse| self.epoll.remove(fuse));
    }
}
