//! Images and layers that are being made readable, ahead of those who ask.
//!
//! Containerd asks for one layer after the other and waits for each. So the first question
//! begins the work for all layers of the image, and the next ones find it done.
//!
//! Invariant: one piece of work per image and per layer, in a task of its own that ends by
//! itself. Who is asked for stands in no line, and is told of no trouble but that of its own
//! image. Results that nobody fetches are dropped after [`Keep`], whether or not anybody asks
//! again; until then they stand, so that the layers of an image that cannot be had do not wait
//! for the network one after the other. Of layers that are dropped so somebody is told, who
//! removes what is stored of them if nobody has it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::layer::open::{Asker, LayerRequest, Lines, Said};
use lazarette_fetcher::prefetch::Prefetch;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::remote::Wanted;
use lazarette_snapshotter::tree::Tree;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::super::Engine;
use super::super::warming::Warming;
use super::start::FirstStart;
use crate::image::Image;
use crate::image::pull::{LAYERS_AT_ONCE, PullMode, Puller};
use crate::trace::Trace;
use crate::{Error, Result};

/// Plain layers that are streamed before anybody asks for them: with the one that is asked for
/// as many as containerd would download at once. More only take from the one somebody waits for.
const STREAMS_AHEAD: usize = 2;
/// How long a plain layer may be streamed while containerd waits, which lets nobody prepare a snapshot
/// then once it wants to collect garbage: half of what kubelet gives a request.
const STREAM_WITHIN: Duration = Duration::from_secs(60);

/// An image, and what opens its layers.
pub(super) struct Resolved {
    pub(super) image: Image,
    puller: Puller,
    /// What its starts read; goes on until this is dropped.
    early: Prefetch,
    /// Brings that into the page cache, as long.
    warming: Warming,
    start: FirstStart,
    /// Said once a layer took too long to stream: containerd brings those that are to be.
    too_long: Said,
}

/// Something under way or done. The error is shared, so it is a text.
type Work<T> = Shared<BoxFuture<'static, Result<Arc<T>, Arc<str>>>>;

struct Entry<T, N = ()> {
    /// When there was a result.
    done: Arc<OnceLock<Instant>>,
    work: Work<T>,
    note: N,
}

type Entries<K, T, N = ()> = Arc<Mutex<HashMap<K, Entry<T, N>>>>;

/// What is known of a layer that is being opened.
#[derive(Clone)]
struct Opening {
    /// The image whose registry is asked, of all that have the layer.
    by: Weak<Resolved>,
    asked: Said,
}

/// The image as it was named, and its manifest if that is known.
type ImageKey = (String, Option<Digest>);

pub(super) struct Ahead {
    engine: Arc<Engine>,
    images: Entries<ImageKey, Resolved>,
    layers: Entries<Digest, Layer, Opening>,
    lines: Lines,
    keep: Keep,
    /// Told of layers that nobody came for.
    unclaimed: mpsc::UnboundedSender<Digest>,
}

impl Ahead {
    /// Results stand for as long as `keep` says; `unclaimed` is told of layers that went so.
    pub(super) fn new(
        engine: Arc<Engine>,
        keep: Keep,
        unclaimed: mpsc::UnboundedSender<Digest>,
    ) -> Arc<Self> {
        Arc::new(Self {
            engine,
            images: Arc::default(),
            layers: Arc::default(),
            lines: Lines::new(LAYERS_AT_ONCE, STREAMS_AHEAD),
            keep,
            unclaimed,
        })
    }

    /// The image that a layer is of.
    pub(super) async fn resolve(&self, wanted: &Wanted) -> Result<Arc<Resolved>> {
        let key = key(wanted);
        let (engine, reference) = (Arc::clone(&self.engine), wanted.reference.clone());
        let manifest = wanted.manifest_digest;
        let resolve = || ((), resolve(engine, reference, manifest));
        let (work, ()) = join(self.keep, &self.images, key, resolve, || {});
        let failed = |detail: Arc<str>| unavailable("image", &wanted.reference, &detail);
        work.await.map_err(failed)
    }

    /// The image is resolved anew for the next who wants it.
    pub(super) fn forget_image(&self, wanted: &Wanted) {
        self.images.lock().remove(&key(wanted));
    }

    /// Which layers above `number` are in `ahead`.
    pub(super) fn above(resolved: &Resolved, number: usize, ahead: &[Digest]) -> Vec<usize> {
        let layers = resolved.image.layers.iter().enumerate().skip(number + 1);
        let named = layers.filter(|(_, layer)| ahead.contains(&layer.descriptor.digest));
        named.map(|(above, _)| above).collect()
    }

    /// Begins to make layers readable.
    pub(super) fn begin(&self, resolved: &Arc<Resolved>, numbers: &[usize]) {
        for number in numbers {
            // It goes on by itself.
            drop(self.opening(resolved, *number));
        }
    }

    /// Layer `number`, readable. What another image's registry fails at is begun anew with its own.
    pub(super) async fn open(&self, resolved: &Arc<Resolved>, number: usize) -> Result<Arc<Layer>> {
        let failed =
            |detail: Arc<str>| unavailable("a layer of image", &resolved.image.reference, &detail);
        // Ends: of the others each is begun by somebody who asks, once.
        while let Some((work, opening)) = self.opening(resolved, number) {
            opening.asked.say();
            let is_own = Weak::ptr_eq(&opening.by, &Arc::downgrade(resolved));
            match work.await {
                Ok(layer) => {
                    if !is_own {
                        resolved.has(number, &layer);
                    }
                    return Ok(layer);
                }
                Err(detail) if is_own => return Err(failed(detail)),
                Err(error) => {
                    tracing::debug!(%error, "a layer cannot be had for another image");
                    self.forget_failure(&opening);
                }
            }
        }
        Err(failed("it has no such layer".into()))
    }

    /// Who asks next begins anew, unless somebody has.
    fn forget_failure(&self, of: &Opening) {
        let is_it = |opening: &Opening| opening.asked.is(&of.asked);
        self.layers.lock().retain(|_, entry| !is_it(&entry.note));
    }

    /// What was opened is held by somebody else now.
    pub(super) fn forget(&self, digest: &Digest) {
        self.layers.lock().remove(digest);
    }

    /// Whether a layer is being opened, or was and nobody has come for it yet.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.layers.lock().contains_key(digest)
    }

    /// Whether a layer is being opened: what the store has of it may be yet to come.
    pub(super) fn is_opening(&self, digest: &Digest) -> bool {
        let layers = self.layers.lock();
        layers
            .get(digest)
            .is_some_and(|entry| entry.work.peek().is_none())
    }

    fn opening(&self, resolved: &Arc<Resolved>, number: usize) -> Option<(Work<Layer>, Opening)> {
        let digest = resolved.image.layers.get(number)?.descriptor.digest;
        let unclaimed = self.unclaimed.clone();
        // Who would hear of it may have ended.
        let told = move || {
            let _ = unclaimed.send(digest);
        };
        let open = || {
            let opening = Opening {
                by: Arc::downgrade(resolved),
                asked: Said::default(),
            };
            let (resolved, lines) = (Arc::clone(resolved), self.lines.clone());
            let asker = Asker {
                within: STREAM_WITHIN,
                asked: opening.asked.clone(),
                too_long: resolved.too_long.clone(),
                lines,
            };
            (opening, async move { resolved.open(number, asker).await })
        };
        Some(join(self.keep, &self.layers, digest, open, told))
    }
}

impl Resolved {
    async fn open(&self, number: usize, asker: Asker) -> Result<Arc<Layer>> {
        let (image, puller) = (&self.image, &self.puller);
        let Some(layer) = image.layers.get(number) else {
            return Err(missing(number));
        };
        let request = LayerRequest {
            asker: Some(asker),
            ..puller.request(image, layer, self.start.landmarks())?
        };
        let layer = puller.open(number, request).await?;
        self.has(number, &layer);
        Ok(layer)
    }

    /// Layer `number` was opened, and is read by nobody yet.
    fn has(&self, number: usize, layer: &Arc<Layer>) {
        self.early.opened(number, layer);
        self.start.begin(layer);
        self.opened(layer);
    }

    /// A layer of the image can be read, wherever it was opened.
    pub(super) fn opened(&self, layer: &Arc<Layer>) {
        let digest = layer.index().blob_digest;
        let layers = self.image.layers.iter().enumerate();
        let its = layers.filter(|(_, layer)| layer.descriptor.digest == digest);
        self.start
            .opened(its.map(|(number, _)| number).collect(), layer);
    }

    /// A layer of the image is mounted at `path`.
    pub(super) fn mounted(&self, number: usize, layer: &Arc<Layer>, path: &Path) {
        let layer = Arc::downgrade(layer);
        let tree = move || {
            let built = Tree::build(layer.upgrade()?.index());
            built.map(Arc::new).ok()
        };
        self.warming.news().mounted(number, path, tree);
    }

    /// Layers below `number` that nobody has said to be readable.
    pub(super) fn below(&self, number: usize) -> Vec<Digest> {
        let layers = self.image.layers.iter().enumerate().take(number);
        let unsaid = layers.filter(|(below, _)| self.start.lacks(*below));
        unsaid.map(|(_, layer)| layer.descriptor.digest).collect()
    }
}

fn key(wanted: &Wanted) -> ImageKey {
    (wanted.reference.to_string(), wanted.manifest_digest)
}

fn missing(number: usize) -> Error {
    lazarette_fetcher::Error::NotFound {
        what: format!("layer {number}"),
        host: String::new(),
    }
    .into()
}

async fn resolve(
    engine: Arc<Engine>,
    reference: Reference,
    manifest: Option<Digest>,
) -> Result<Arc<Resolved>> {
    let named = match manifest {
        Some(digest) => reference.repository().with_digest(digest),
        None => reference.clone(),
    };
    let manifest = engine.resolver.manifest(&named).await?;
    let puller = engine.puller(PullMode::Lazy, Trace::new(std::time::Instant::now()));
    puller.look_ahead(&reference, &manifest).await;
    let image = engine.resolver.image(&reference, manifest).await?;
    let own = engine.own_start(&image).await;
    engine.look_for_indexes(&image, &puller).await;
    let warming = Warming::begin();
    Ok(Arc::new(Resolved {
        start: FirstStart::new(image.layers.len(), own),
        early: engine.fetch_early(&image, warming.news()),
        warming,
        image,
        puller,
        too_long: Said::default(),
    }))
}

/// How long results stand once there are any.
#[derive(Clone, Copy)]
pub struct Keep {
    /// What was opened waits so long for who wants it.
    pub done: Duration,
    /// A failure stands so long.
    pub failed: Duration,
}

impl Default for Keep {
    fn default() -> Self {
        Self {
            // Containerd pulls an image within minutes.
            done: Duration::from_secs(600),
            failed: Duration::from_secs(10),
        }
    }
}

/// Joins the work for `key`, or begins it, and what was noted then. `gone` is
/// called once its result has stood long enough.
fn join<K, T, N, F>(
    keep: Keep,
    entries: &Entries<K, T, N>,
    key: K,
    begin: impl FnOnce() -> (N, F),
    gone: impl FnOnce() + Send + 'static,
) -> (Work<T>, N)
where
    N: Clone + Send + 'static,
    K: std::hash::Hash + Eq + Send + 'static,
    T: Send + Sync + 'static,
    F: Future<Output = Result<Arc<T>>> + Send + 'static,
{
    let mut all = entries.lock();
    all.retain(|_, entry| is_fresh(entry, keep));
    let entry = all.entry(key).or_insert_with(|| {
        let (note, work) = begin();
        let (work, done) = (spawn(work), Arc::default());
        drop_later(keep, entries, (work.clone(), Arc::clone(&done)), gone);
        Entry { done, work, note }
    });
    (entry.work.clone(), entry.note.clone())
}

/// Drops the result of `work` when it has stood long enough, and says in `done` since when.
fn drop_later<K, T, N>(
    keep: Keep,
    entries: &Entries<K, T, N>,
    (work, done): (Work<T>, Arc<OnceLock<Instant>>),
    gone: impl FnOnce() + Send + 'static,
) where
    K: std::hash::Hash + Eq + Send + 'static,
    T: Send + Sync + 'static,
    N: Send + 'static,
{
    let entries = Arc::downgrade(entries);
    // Ends by itself: the work is bounded by deadlines, and what comes after by `keep`.
    tokio::spawn(async move {
        let wait = match work.await {
            Ok(_) => keep.done,
            Err(_) => keep.failed,
        };
        let since = *done.get_or_init(Instant::now);
        tokio::time::sleep_until(since + wait).await;
        if let Some(entries) = entries.upgrade() {
            entries.lock().retain(|_, entry| is_fresh(entry, keep));
            gone();
        }
    });
}

fn is_fresh<T, N>(entry: &Entry<T, N>, keep: Keep) -> bool {
    let age = entry.done.get().map(Instant::elapsed);
    match (entry.work.peek(), age) {
        (None, _) | (_, None) => true,
        (Some(Ok(_)), Some(age)) => age < keep.done,
        (Some(Err(_)), Some(age)) => age < keep.failed,
    }
}

/// Runs in a task of its own, whoever waits.
fn spawn<T: Send + Sync + 'static>(
    work: impl Future<Output = Result<Arc<T>>> + Send + 'static,
) -> Work<T> {
    let task = tokio::spawn(work);
    async move {
        match task.await {
            Ok(outcome) => outcome.map_err(|error| error.report().into()),
            Err(error) => Err(error.to_string().into()),
        }
    }
    .boxed()
    .shared()
}

fn unavailable(what: &str, reference: &Reference, detail: &str) -> Error {
    lazarette_fetcher::Error::Unavailable {
        what: format!("{what} {reference}"),
        host: reference.host().to_owned(),
        detail: detail.to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Keep = Keep {
        done: Duration::from_millis(1),
        failed: Duration::from_millis(1),
    };

    async fn until_empty(entries: &Entries<u8, u8>) {
        let emptied = async {
            while !entries.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        let bound = Duration::from_secs(60);
        tokio::time::timeout(bound, emptied).await.unwrap();
    }

    #[tokio::test]
    async fn results_go_though_nobody_asks_again() {
        let entries = Entries::<u8, u8>::default();
        let (told, mut tells) = mpsc::unbounded_channel();
        let tell = move || told.send(1).unwrap();
        let seven = || ((), async { Ok(Arc::new(7)) });
        let (work, ()) = join(SHORT, &entries, 1, seven, tell);
        let value = work.await.unwrap();
        until_empty(&entries).await;
        assert_eq!(tells.recv().await, Some(1));
        assert_eq!(Arc::strong_count(&value), 1, "nobody else has it any more");
        let fail = || ((), async { Err(missing(2)) });
        let (failed, ()) = join(SHORT, &entries, 2, fail, || {});
        failed.await.unwrap_err();
        until_empty(&entries).await;
    }

    #[tokio::test]
    async fn what_failed_after_a_while_stands_from_then_on() {
        let entries = Entries::<u8, u8>::default();
        let (fail, failing) = tokio::sync::oneshot::channel::<()>();
        let silent = async move {
            failing.await.unwrap();
            Err(missing(1))
        };
        let (work, ()) = join(Keep::default(), &entries, 1, || ((), silent), || {});
        let done = Arc::clone(&entries.lock()[&1].done);
        assert!(done.get().is_none());
        let began_to_fail = Instant::now();
        fail.send(()).unwrap();
        work.await.unwrap_err();
        let told = async {
            while done.get().is_none() {
                tokio::task::yield_now().await;
            }
        };
        let bound = Duration::from_secs(60);
        tokio::time::timeout(bound, told).await.unwrap();
        assert!(*done.get().unwrap() >= began_to_fail);
    }

    #[tokio::test]
    async fn those_who_ask_meanwhile_share_the_work() {
        let entries = Entries::<u8, u8>::default();
        let usual = Keep::default();
        let ask = |value| {
            let work = move || ((), async move { Ok(Arc::new(value)) });
            join(usual, &entries, 1, work, || {}).0
        };
        let (first, second) = tokio::join!(ask(7), ask(8));
        assert!(Arc::ptr_eq(&first.unwrap(), &second.unwrap()));
        let fail = || ((), async { Err(missing(2)) });
        let (failed, ()) = join(usual, &entries, 2, fail, || {});
        failed.await.unwrap_err();
        let work = || ((), async { Ok(Arc::new(9)) });
        let (again, ()) = join(usual, &entries, 2, work, || {});
        again.await.unwrap_err();
    }
}
