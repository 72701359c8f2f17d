//! Images and layers that are being made readable, ahead of those who ask.
//!
//! Containerd asks for one layer after the other and waits for each. So the first question
//! begins the work for all layers of the image, and the next ones find it done.
//!
//! Invariant: one piece of work per image and per layer, in a task of its own that ends by
//! itself. Results that nobody fetches are dropped after [`Keep`], whether or not anybody asks again;
//! until then they stand, so that the layers of an image that cannot be had do not wait for the
//! network one after the other. Of layers that are dropped so somebody is told, who removes what
//! is stored of them if nobody has it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::prefetch::Prefetch;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::remote::Wanted;
use lazarette_snapshotter::tree::Tree;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::super::Engine;
use super::super::warming::Warming;
use super::start::FirstStart;
use crate::image::Image;
use crate::image::pull::{LAYERS_AT_ONCE, PullMode, Puller};
use crate::trace::Trace;
use crate::{Error, Result};

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
}

/// Something under way or done. The error is shared, so it is a text.
type Work<T> = Shared<BoxFuture<'static, Result<Arc<T>, Arc<str>>>>;

struct Entry<T> {
    /// When there was a result.
    done: Arc<OnceLock<Instant>>,
    work: Work<T>,
}

type Entries<K, T> = Arc<Mutex<HashMap<K, Entry<T>>>>;

/// The image as it was named, and its manifest if that is known.
type ImageKey = (String, Option<Digest>);

pub(super) struct Ahead {
    engine: Arc<Engine>,
    images: Entries<ImageKey, Resolved>,
    layers: Entries<Digest, Layer>,
    permits: Arc<Semaphore>,
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
            permits: Arc::new(Semaphore::new(LAYERS_AT_ONCE)),
            keep,
            unclaimed,
        })
    }

    /// The image that a layer is of.
    pub(super) async fn resolve(&self, wanted: &Wanted) -> Result<Arc<Resolved>> {
        let key = key(wanted);
        let (engine, reference) = (Arc::clone(&self.engine), wanted.reference.clone());
        let manifest = wanted.manifest_digest;
        let resolve = || resolve(engine, reference, manifest);
        let work = join(self.keep, &self.images, key, resolve, || {});
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

    /// Layer `number`, readable.
    pub(super) async fn open(&self, resolved: &Arc<Resolved>, number: usize) -> Result<Arc<Layer>> {
        let failed =
            |detail: Arc<str>| unavailable("a layer of image", &resolved.image.reference, &detail);
        match self.opening(resolved, number) {
            Some(work) => work.await.map_err(failed),
            None => Err(failed("it has no such layer".into())),
        }
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

    fn opening(&self, resolved: &Arc<Resolved>, number: usize) -> Option<Work<Layer>> {
        let digest = resolved.image.layers.get(number)?.descriptor.digest;
        let (resolved, permits) = (Arc::clone(resolved), Arc::clone(&self.permits));
        let unclaimed = self.unclaimed.clone();
        // Who would hear of it may have ended.
        let told = move || {
            let _ = unclaimed.send(digest);
        };
        let open = || async move {
            let _permit = permits.acquire_owned().await;
            let (image, puller) = (&resolved.image, &resolved.puller);
            let Some(layer) = image.layers.get(number) else {
                return Err(missing(number));
            };
            let layer = puller
                .layer(image, number, layer, resolved.start.landmarks())
                .await?;
            resolved.early.opened(number, &layer);
            resolved.start.begin(&layer);
            resolved.opened(&layer);
            Ok(layer)
        };
        Some(join(self.keep, &self.layers, digest, open, told))
    }
}

impl Resolved {
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
    let mut puller = engine.puller(PullMode::Lazy, Trace::new(std::time::Instant::now()));
    puller.stream_within = Some(STREAM_WITHIN);
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

/// Joins the work for `key`, or begins it. `gone` is called once its result has stood long enough.
fn join<K, T, F>(
    keep: Keep,
    entries: &Entries<K, T>,
    key: K,
    begin: impl FnOnce() -> F,
    gone: impl FnOnce() + Send + 'static,
) -> Work<T>
where
    K: std::hash::Hash + Eq + Send + 'static,
    T: Send + Sync + 'static,
    F: Future<Output = Result<Arc<T>>> + Send + 'static,
{
    let mut all = entries.lock();
    all.retain(|_, entry| is_fresh(entry, keep));
    let entry = all.entry(key).or_insert_with(|| {
        let work = spawn(begin());
        let done = Arc::default();
        drop_later(keep, entries, (work.clone(), Arc::clone(&done)), gone);
        Entry { done, work }
    });
    entry.work.clone()
}

/// Drops the result of `work` when it has stood long enough, and says in `done` since when.
fn drop_later<K, T>(
    keep: Keep,
    entries: &Entries<K, T>,
    (work, done): (Work<T>, Arc<OnceLock<Instant>>),
    gone: impl FnOnce() + Send + 'static,
) where
    K: std::hash::Hash + Eq + Send + 'static,
    T: Send + Sync + 'static,
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

fn is_fresh<T>(entry: &Entry<T>, keep: Keep) -> bool {
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
        let work = join(SHORT, &entries, 1, || async { Ok(Arc::new(7)) }, tell);
        let value = work.await.unwrap();
        until_empty(&entries).await;
        assert_eq!(tells.recv().await, Some(1));
        assert_eq!(Arc::strong_count(&value), 1, "nobody else has it any more");
        let failed = join(SHORT, &entries, 2, || async { Err(missing(2)) }, || {});
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
        let work = join(Keep::default(), &entries, 1, || silent, || {});
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
            let work = move || async move { Ok(Arc::new(value)) };
            join(usual, &entries, 1, work, || {})
        };
        let (first, second) = tokio::join!(ask(7), ask(8));
        assert!(Arc::ptr_eq(&first.unwrap(), &second.unwrap()));
        let failed = join(usual, &entries, 2, || async { Err(missing(2)) }, || {});
        failed.await.unwrap_err();
        let again = join(usual, &entries, 2, || async { Ok(Arc::new(9)) }, || {});
        again.await.unwrap_err();
    }
}
