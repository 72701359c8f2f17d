//! Layers that the mount server shows, which stay when this process ends.
//!
//! Invariant: every layer that is held with the server is answered for by the connection
//! that is current, or none is and another one is being made, from the beginning on. Meanwhile
//! nothing is mounted. What cannot be answered for is held no longer, and kept for who tries
//! again. Ending this ends no mount.
//!
//! Locks: `current`, shared while a layer is mounted or unmounted, alone while the
//! connection is replaced; within it the layers that are held, for a moment; within those the
//! ones that are not answered for.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::mountd;
use lazarette_snapshotter::overlay::Snapshots;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as Turn, RwLock, watch};
use tokio::task::JoinHandle;

use super::choose::{Facts, Without, choose};
use super::held::{By, Held, HeldLayers};
use super::restore::named;
use super::session::{Places, Session};
use crate::engine::Engine;
use crate::{Error, Result, sys};

/// Attempts to reach the server when this process starts: half a second. Another daemon
/// that is being stopped has it until then.
const FIRST_ATTEMPTS_MAX: u32 = 5;
/// Longest that these go on: a server that hangs is given up after half a minute each time.
const FIRST_WAIT_MAX: Duration = Duration::from_secs(5);
/// Attempts before a server is started where one was: a good second, as systemd starts it
/// again within a tenth of one.
const WAITS_FOR_OTHERS: u32 = 6;
/// First pause between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long one who wants a layer mounted waits for a server that went away. Then it is
/// refused.
const RENEWAL_WAIT: Duration = Duration::from_secs(10);
/// Servers that may go away while one layer is being mounted.
const RENEWALS_MAX: usize = 3;

/// What the mount server does for us.
pub(super) struct Served {
    places: Arc<Places>,
    held: Arc<HeldLayers>,
    snapshots: Arc<Snapshots>,
    handle: Handle,
    /// `None` before there is a server, and once it is closed.
    current: RwLock<Option<Arc<Session>>>,
    /// Counts connections.
    renewed: watch::Sender<u64>,
    keeper: Mutex<Option<JoinHandle<()>>>,
    /// What was held, and could not be answered for with the server that is current.
    unanswered: Mutex<Vec<Held>>,
    /// Held while a layer is read to see whether it is whole.
    reading: Turn<()>,
}

impl Served {
    /// Connects to the server, or starts it; `None` where layers have to be mounted without
    /// one, and the log says why.
    ///
    /// # Errors
    /// Where the config asks for a backend that cannot be had.
    pub(super) async fn open(
        engine: &Arc<Engine>,
        program: &Path,
        held: &Arc<HeldLayers>,
    ) -> Result<Option<Arc<Self>>> {
        let places = match Self::places(engine, program).await? {
            Ok(places) => places,
            Err(Without::Refused(why)) => return Err(refused(&why)),
            Err(Without::MountsItself(why)) => {
                tracing::warn!(
                    why,
                    "lazd mounts layers itself, without the mount server: containers that use \
                     them fail when lazd ends or is upgraded"
                );
                return Ok(None);
            }
        };
        let handle = Handle::current();
        let session = first(&places, &handle).await;
        if let Err(error) = &session {
            let error = error.report();
            tracing::warn!(
                error,
                "no mount server yet: until there is one no layer is mounted"
            );
        }
        let session = session.ok();
        let served = Arc::new(Self {
            places,
            held: Arc::clone(held),
            snapshots: Arc::clone(&engine.snapshots),
            handle,
            current: RwLock::new(session.clone()),
            renewed: watch::channel(0).0,
            keeper: Mutex::default(),
            unanswered: Mutex::default(),
            reading: Turn::default(),
        });
        let keeper = tokio::spawn(Arc::clone(&served).keep_connected(session));
        *served.keeper.lock() = Some(keeper);
        Ok(Some(served))
    }

    /// Where everything of the server's lies, if it is to mount layers.
    async fn places(engine: &Arc<Engine>, program: &Path) -> Result<Result<Arc<Places>, Without>> {
        let (root, state) = (engine.root.clone(), engine.state.clone());
        let (backend, program) = (engine.mounting.backend, program.to_path_buf());
        let shows_whole = engine.shows_whole;
        blocking(move || {
            let mut facts = Facts {
                is_root: sys::process::is_root(),
                backend,
                has_program: program.is_file(),
                refused: None,
            };
            if let Err(without) = choose(&facts) {
                return Ok(Err(without));
            }
            let places = Places::make(&root, &state, &program)?;
            let way = match mountd::select(places.meta(), backend) {
                Ok(way) if way.through().is_none() => Err(way.reason),
                Ok(way) => Ok(way),
                Err(error) => Err(Error::from(error).report()),
            };
            facts.refused = way.as_ref().err().cloned();
            Ok(match (choose(&facts), way) {
                (Ok(()), Ok(way)) => Ok(Arc::new(places.through(&way, shows_whole))),
                (Ok(()), Err(why)) => Err(Without::Refused(why)),
                (Err(without), _) => Err(without),
            })
        })
        .await
    }

    /// Changes whenever there is another server.
    pub(super) fn renewals(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }

    /// What could not be answered for, and is not held any more; containers may have it.
    pub(super) fn take_unanswered(&self) -> Vec<Held> {
        std::mem::take(&mut *self.unanswered.lock())
    }

    /// Has one of them tried once more, later.
    pub(super) fn leave_unanswered(&self, held: Held) {
        self.unanswered.lock().push(held);
    }

    /// Has the server show a layer, and holds it. Nobody else does the same for this layer
    /// meanwhile.
    pub(super) async fn hold(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let mut renewed = self.renewed.subscribe();
        for _ in 0..RENEWALS_MAX {
            let lost = match self.try_hold(layer).await {
                Ok(path) => return Ok(path),
                Err((error, false)) => return Err(error),
                Err((error, true)) => error,
            };
            let waited = tokio::time::timeout(RENEWAL_WAIT, renewed.changed()).await;
            if waited.is_err() {
                return Err(lost);
            }
        }
        Err(gone())
    }

    /// The error comes with whether the server went away.
    async fn try_hold(&self, layer: &Arc<Layer>) -> Result<PathBuf, (Error, bool)> {
        let current = self.current.read().await;
        let session = current.as_ref().ok_or_else(|| (gone(), false))?;
        let (asked, wanted) = (Arc::clone(session), Arc::clone(layer));
        let mounted = blocking(move || asked.hold(&wanted)).await;
        let path = mounted.map_err(|error| (error, session.is_closed()))?;
        let held = Held {
            layer: Arc::clone(layer),
            by: By::Server(path.clone()),
        };
        let digest = layer.index().blob_digest;
        self.held.lock().insert(digest, held);
        Ok(path)
    }

    /// Whether a layer is the kernel's alone already: the daemon before this one saw that it was
    /// whole, and nobody can have evicted from it since.
    pub(super) async fn is_shown_whole(&self, layer: &Layer) -> bool {
        let digest = layer.index().blob_digest;
        let shown = self.with_session(move |session| session.is_shown_whole(&digest));
        shown.await.unwrap_or(false)
    }

    /// Whether all of a layer is present and right. Reads what this process has not seen, one
    /// layer at a time: readers have the disk, too.
    pub(super) async fn is_whole(&self, layer: &Arc<Layer>) -> Result<bool> {
        if layer.file().is_known_whole() {
            return Ok(true);
        }
        let _turn = self.reading.lock().await;
        let layer = Arc::clone(layer);
        blocking(move || Ok(layer.file().is_whole()?)).await
    }

    /// Has the kernel ask no more about a layer that is whole, and show it by itself if it
    /// may. The caller has its turn.
    pub(super) async fn complete(&self, layer: &Arc<Layer>) {
        let layer = Arc::clone(layer);
        self.with_session(move |session| session.complete(&layer))
            .await;
    }

    /// Has a layer seen through the server again, unless another one is being connected to.
    /// Blocks; the caller has its turn.
    pub(super) fn hide_whole(&self, digest: &Digest) {
        let current = self.current.try_read();
        if let Some(session) = current.as_ref().ok().and_then(|current| current.as_ref()) {
            session.hide_whole(digest);
        }
    }

    /// Whether that is of any use.
    pub(super) fn wants_complete(&self) -> bool {
        self.places.wants_complete()
    }

    /// Unmounts what is at `path`; what is in use is to end later. The caller has its turn.
    pub(super) async fn unmount(&self, path: PathBuf) {
        self.with_session(move |session| session.unmount(&path))
            .await;
    }

    /// Waits until something was in use that was to end.
    pub(super) async fn has_left(&self) {
        self.places.has_left().await;
    }

    /// What is to end, and of which layer it is.
    pub(super) async fn left(&self) -> Vec<(PathBuf, Option<Digest>)> {
        let left = self.with_session(Session::ending).await;
        left.unwrap_or_default()
    }

    /// Unmounts what is at `path` if it is still to end. The caller has its turn.
    pub(super) async fn end_left(&self, path: PathBuf) {
        self.with_session(move |session| session.end_left(&path))
            .await;
    }

    /// Unmounts all layers that are none of these, and removes their images.
    pub(super) async fn keep(&self, layers: HashSet<Digest>) -> Result<()> {
        let places = Arc::clone(&self.places);
        let kept = self.with_session(move |session| {
            session.keep(&layers);
            places.keep_metadata(&layers)
        });
        kept.await.unwrap_or(Ok(()))
    }

    /// Removes the image of a layer that is mounted no more, or never again.
    pub(super) async fn forget(&self, digest: &Digest) {
        let path = self.places.metadata(digest);
        let removed = blocking(move || std::fs::remove_file(path)).await;
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%digest, %error, "image of a layer stays");
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// Lets the server go on by itself: what it has to ask it asks the next daemon.
    pub(super) async fn close(&self) {
        let keeper = self.keeper.lock().take();
        if let Some(keeper) = keeper {
            keeper.abort();
            // Aborted, or ended before.
            let _ = keeper.await;
        }
        drop(self.current.write().await.take());
    }

    async fn with_session<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Session) -> T + Send + 'static,
    ) -> Option<T> {
        let current = self.current.read().await;
        let session = Arc::clone(current.as_ref()?);
        Some(blocking(move || work(&session)).await)
    }

    /// Goes over to the next server whenever one goes away.
    async fn keep_connected(self: Arc<Self>, mut session: Option<Arc<Session>>) {
        loop {
            if let Some(session) = &session {
                session.closed().await;
                tracing::warn!(
                    "the mount server is gone: reads of layers fail until there is another"
                );
            }
            session = Some(self.renew(session.as_deref()).await);
            self.renewed.send_modify(|count| *count += 1);
            let layers = self.held.lock().len();
            tracing::info!(layers, "the mount server is there again, with its layers");
        }
    }

    async fn renew(&self, old: Option<&Session>) -> Arc<Session> {
        let mut attempt = 0;
        loop {
            let starts = attempt >= WAITS_FOR_OTHERS;
            let renewed = match connect(&self.places, starts, &self.handle).await {
                Ok(session) => self.adopt(session, old).await,
                Err(error) => Err(error),
            };
            match renewed {
                Ok(session) => return session,
                Err(error) if starts => {
                    tracing::warn!(error = error.report(), "no mount server yet");
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    /// Answers for every layer that is held with the server through `session`, which is the
    /// current one from then on, and ends mounts of layers that nobody has: what a server was asked
    /// for and did too late. Fails only when that one is gone, too.
    async fn adopt(&self, session: Arc<Session>, old: Option<&Session>) -> Result<Arc<Session>> {
        let mut current = self.current.write().await;
        let all: Vec<Arc<Layer>> = {
            let held = self.held.lock();
            let served = held
                .values()
                .filter(|held| matches!(held.by, By::Server(_)));
            served.map(|held| Arc::clone(&held.layer)).collect()
        };
        let (new, snapshots) = (Arc::clone(&session), Arc::clone(&self.snapshots));
        let ending = old.map(Session::ending).unwrap_or_default();
        let outcomes = blocking(move || {
            let hold = |layer: Arc<Layer>| (layer.index().blob_digest, new.hold(&layer));
            let outcomes: Vec<_> = all.into_iter().map(hold).collect();
            ending.iter().for_each(|(path, _)| new.unmount(path));
            keep_named(&new, &snapshots, outcomes.iter().map(|(digest, _)| *digest));
            outcomes
        })
        .await;
        if session.is_closed() {
            return Err(gone());
        }
        let mut held = self.held.lock();
        for (digest, outcome) in outcomes {
            match outcome {
                Ok(path) => {
                    if let Some(held) = held.get_mut(&digest) {
                        held.by = By::Server(path);
                    }
                }
                // Tried again soon, or when somebody wants to mount it.
                Err(error) => {
                    tracing::warn!(%digest, error = error.report(), "layer is not answered for");
                    self.unanswered.lock().extend(held.remove(&digest));
                }
            }
        }
        *current = Some(Arc::clone(&session));
        Ok(session)
    }
}

/// Ends mounts of layers that are neither held nor named. Nobody mounts any meanwhile.
fn keep_named(session: &Session, snapshots: &Snapshots, held: impl Iterator<Item = Digest>) {
    match named(snapshots) {
        Ok(named) => session.keep(&named.into_iter().chain(held).collect()),
        Err(error) => {
            tracing::warn!(
                error = error.report(),
                "cannot tell which layers are left over"
            );
        }
    }
}

/// The first connection.
async fn first(places: &Arc<Places>, handle: &Handle) -> Result<Arc<Session>> {
    let began = Instant::now();
    for attempt in 0..FIRST_ATTEMPTS_MAX {
        match connect(places, true, handle).await {
            Ok(session) => return Ok(session),
            Err(error) if began.elapsed() > FIRST_WAIT_MAX => return Err(error),
            Err(error) => {
                tracing::debug!(error = error.report(), "no mount server yet");
                tokio::time::sleep(pause(attempt)).await;
            }
        }
    }
    connect(places, true, handle).await
}

async fn connect(places: &Arc<Places>, starts: bool, handle: &Handle) -> Result<Arc<Session>> {
    let (places, handle) = (Arc::clone(places), handle.clone());
    blocking(move || Session::open(&places, starts, handle).map(Arc::new)).await
}

fn pause(attempt: u32) -> Duration {
    PAUSE_MIN
        .saturating_mul(2_u32.saturating_pow(attempt))
        .min(PAUSE_MAX)
}

fn refused(why: &str) -> Error {
    lazarette_snapshotter::Error::Environment {
        op: "start as the config wants",
        detail: format!("{why}; `[mounts] backend = \"auto\"` takes what can be had"),
    }
    .into()
}

fn gone() -> Error {
    lazarette_snapshotter::Error::Environment {
        op: "use the mount server",
        detail: "it is gone, and there is no other yet".to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        let pauses: Vec<_> = (0..12).map(pause).collect();
        assert_eq!(pauses[0], PAUSE_MIN);
        assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(pause(u32::MAX), PAUSE_MAX);
        let waits: Duration = (0..WAITS_FOR_OTHERS).map(pause).sum();
        assert!(waits < Duration::from_secs(2), "readers fail meanwhile");
    }
}
