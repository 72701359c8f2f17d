//! Profiles in a start, and what users ask of them.
//!
//! A node that has no profile of an image it pulls asks the image's registry for one, while
//! layers are being opened; what comes is kept like one that was imported.
//!
//! Invariant: a [`Session`] never fails a start and never holds it up: what goes wrong with
//! a profile is logged. It ends with [`Session::finish`]; dropped earlier, its prefetch
//! ends and nothing is remembered. A container that goes on is remembered as soon as it is
//! ready, one that ends when it has ended, each once.

mod claimed;
mod early;
mod files;
mod known;
mod registry;
mod shape;

pub(super) use self::claimed::OwnStart;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::plan::whole::{self, Share, Why};
use lazarette_fetcher::prefetch::{Place, chunks_of};
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{Digest, Reference};
use lazarette_snapshotter::data::LayerData;
use lazarette_snapshotter::fuse::ReadAhead;
use lazarette_snapshotter::tree::Tree;
use tokio::task::JoinHandle;

use self::early::Early;
use super::warming::Warming;
use super::{Engine, RunRequest, now_s};
use crate::Result;
use crate::image::Image;
use crate::image::pull::{Landmarks, PullMode};
use crate::profile::ready::{ReadyLimits, Seen, decide};
use crate::profile::{
    Command, CommandProfile, ImageProfiles, ProfileUse, ReadyBy, Recorded, Recorder, Touch, merge,
    watch,
};
use crate::spec;
use crate::trace::{LayerShare, Trace};

/// Starts with a profile of which one is not warmed.
const UNWARMED_ONE_IN: u32 = 8;

/// Recording and prefetching of one start; nothing of both with `--no-profile`.
pub(super) struct Session {
    active: Option<Active>,
}

struct Active {
    command: Command,
    /// Whether the image was not here before: nobody shaped its layers yet.
    is_new: bool,
    recorder: Arc<Recorder>,
    prefetch: Option<Early>,
    /// What this command is known to read, by layer, if anything is known; evicted last
    /// from now on.
    reads: Option<Places>,
    /// Brings what it reads into the page cache.
    warming: Option<Warming>,
    ready: Option<ReadyBy>,
    saving: Option<JoinHandle<()>>,
}

/// Places by layer, each with its rank.
pub(super) type Places = BTreeMap<usize, Vec<(u32, Place)>>;

/// What a session has to tell.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) used: Option<ProfileUse>,
    pub(super) recorded: Option<Recorded>,
    pub(super) ready_by: Option<ReadyBy>,
}

impl Session {
    /// Looks for a profile and begins to use it. The registry is asked only for images
    /// that are `new` here.
    pub(super) async fn begin(
        engine: &Arc<Engine>,
        image: &Image,
        request: &RunRequest,
        new: bool,
    ) -> Self {
        let words = spec::command_line(&request.options, &image.config.config);
        let (true, Ok(words)) = (request.profile, words) else {
            return Self { active: None };
        };
        let command = Command::new(&words);
        let known = engine.known(image.manifest.digest).await;
        let reads = match known.as_ref().and_then(|known| known.choose(&command)) {
            Some((profile, false)) => Some(places_of(profile)),
            Some((_, true)) | None => None,
        };
        let warming = (request.mode == PullMode::Lazy && is_warmed()).then(Warming::begin);
        let news = warming.as_ref().map(Warming::news);
        let prefetch = match request.mode {
            PullMode::Lazy => Early::begin(engine, (image, new), known.as_ref(), &command, news),
            // Everything is fetched before anything could be fetched early.
            PullMode::Full => None,
        };
        // Nobody will say what is read where nothing is fetched early.
        let warming = warming.filter(|_| prefetch.is_some());
        Self {
            active: Some(Active {
                command,
                is_new: new,
                recorder: Recorder::new(),
                prefetch,
                reads,
                warming,
                ready: None,
                saving: None,
            }),
        }
    }

    /// Whether landmarks of eStargz say anything that a profile does not say better.
    pub(super) fn landmarks(&self) -> Landmarks {
        match self.has_profile() {
            true => Landmarks::Ignore,
            false => Landmarks::Honour,
        }
    }

    /// Whether what this command reads is known already.
    pub(super) fn knows_reads(&self) -> bool {
        self.active.as_ref().is_some_and(|a| a.reads.is_some())
    }

    /// Whether there is one to prefetch by, by now.
    fn has_profile(&self) -> bool {
        let early = self.active.as_ref().and_then(|a| a.prefetch.as_ref());
        early.is_some_and(Early::has_profile)
    }

    /// Layer `number` can be read; what its mount is to read it through. What is fetched of
    /// it meanwhile is behind readers, so a start never waits for it.
    pub(super) fn opened(
        &self,
        number: usize,
        layer: &Arc<Layer>,
        trace: &Trace,
    ) -> Arc<dyn LayerData> {
        let active = self.active.as_ref();
        let reads = active.and_then(|active| active.chunks(number, layer));
        share(number, layer, reads.as_deref(), trace);
        let (Some(active), Ok(position)) = (active, u32::try_from(number)) else {
            return Arc::clone(layer) as _;
        };
        if let Some(early) = &active.prefetch {
            early.opened(number, layer);
        }
        if let Some(ids) = reads.filter(|ids| !ids.is_empty()) {
            layer.pin(ids);
        }
        active.recorder.tap(position, Arc::clone(layer))
    }

    /// Layer `number` is mounted at `path`: what the start is known to read of it is read
    /// as soon as it is present.
    pub(super) fn mounted(&self, number: usize, path: &Path, tree: &Arc<Tree>) {
        if let Some(warming) = self.active.as_ref().and_then(|a| a.warming.as_ref()) {
            let tree = Arc::clone(tree);
            warming.news().mounted(number, path, || Some(tree));
        }
    }

    /// Reads nothing more ahead of the container, of which nobody reads any more.
    pub(super) async fn stop_warming(&mut self) {
        let warming = self
            .active
            .as_mut()
            .and_then(|active| active.warming.take());
        if let Some(warming) = warming {
            warming.stop().await;
        }
    }

    /// How far the kernel is to read ahead in a layer until the container is ready. What is
    /// recorded here, or was, is fetched again by every later start: no page too many. Who
    /// knows nothing and waits for each miss is better off with more, but where a miss brings
    /// megabytes anyway.
    pub(super) fn read_ahead(&self, layer: &Layer) -> ReadAhead {
        let brings_more = || layer.file().is_complete() || layer.index().has_whole_members();
        let is_recorded = self.active.is_some() && brings_more();
        match is_recorded || self.has_profile() {
            true => ReadAhead::Narrow,
            false => ReadAhead::Wide,
        }
    }

    /// Follows the container whose init is `pid` until `following` ends, and notes when it
    /// is ready, and then calls `on_ready`. `output` becomes true with its first byte.
    pub(super) async fn beside<T>(
        &mut self,
        (engine, image): (&Arc<Engine>, &Image),
        (pid, output): (u32, &AtomicBool),
        on_ready: impl FnOnce(),
        following: impl Future<Output = T>,
    ) -> T {
        let Some(active) = &mut self.active else {
            return following.await;
        };
        let limits = ReadyLimits::default();
        let recorder = Arc::clone(&active.recorder);
        tokio::pin!(following);
        let by = tokio::select! {
            biased;
            done = &mut following => {
                let seen = Seen {
                    has_exited: true,
                    has_output: output.load(Ordering::Relaxed),
                    ..Seen::default()
                };
                active.ready = decide(&seen, &limits);
                active.recorder.close();
                return done;
            }
            by = watch::until_ready(&recorder, pid, output, &limits) => by,
        };
        if let Some(warming) = &active.warming {
            warming.end();
        }
        active.ready = Some(by);
        active.recorder.close();
        on_ready();
        let (engine, image) = (Arc::clone(engine), image.clone());
        let (command, touches) = (active.command.clone(), active.recorder.touches());
        let is_new = active.is_new;
        active.saving = Some(tokio::spawn(async move {
            engine.learn((&image, is_new), command, touches).await;
            // The container may go on for days.
            engine.release_db();
        }));
        following.await
    }

    /// Ends the prefetch and, unless it `failed`, remembers what the start read.
    pub(super) async fn finish(
        self,
        engine: &Arc<Engine>,
        image: &Image,
        trace: &Trace,
        failed: bool,
    ) -> Report {
        let Some(active) = self.active else {
            return Report::default();
        };
        active.recorder.close();
        let mut report = Report {
            ready_by: active.ready,
            ..Report::default()
        };
        if let Some(early) = active.prefetch {
            report.used = early.finish(trace).await;
        }
        let was_saved = active.saving.is_some();
        if let Some(saving) = active.saving
            && let Err(error) = saving.await
        {
            tracing::warn!(%error, "what this start read could not be remembered");
        }
        if failed {
            return report;
        }
        let touches = active.recorder.touches();
        report.recorded = Some(Recorded {
            blocks: touches.len() as u64,
            bytes: touches.iter().map(|touch| touch.place.bytes()).sum(),
        });
        if !was_saved {
            engine
                .learn((image, active.is_new), active.command, touches)
                .await;
        }
        report
    }
}

impl Active {
    /// What the command is known to read of a layer; none if nothing is known of it at all.
    fn chunks(&self, number: usize, layer: &Layer) -> Option<Vec<ChunkId>> {
        let places = self.reads.as_ref()?.get(&number);
        let places = places.into_iter().flatten().copied();
        let wanted = chunks_of(layer.index(), places).wanted;
        Some(wanted.iter().map(|wanted| wanted.id).collect())
    }
}

/// Decides whether all of layer `number` is fetched, tells `trace`, and begins with it.
/// `reads` is what the start is known to read of it, if anything is known.
fn share(number: usize, layer: &Arc<Layer>, reads: Option<&[ChunkId]>, trace: &Trace) {
    let facts = layer.facts(reads);
    let (share, why) = whole::decide(&facts);
    trace.shared(LayerShare {
        layer: number,
        share,
        why,
        missing_bytes: facts.missing_bytes,
        covered_bytes: facts.covered_bytes,
    });
    match (share, why) {
        // A request or two, at once.
        (Share::Full, Why::Small) => layer.fetch_rest(true),
        // What the profile names goes first, in its own order.
        (Share::Full, Why::Covered) => layer.fetch_rest(false),
        (Share::Full | Share::Lazy, _) => {}
    }
}

/// Whether this start is warmed, if anything is known of it. What the container then reads by itself
/// nobody sees, so now and then one is not: a profile has to forget what is read no more.
fn is_warmed() -> bool {
    !rand::random_ratio(1, UNWARMED_ONE_IN)
}

/// What the profile names, by layer.
fn places_of(profile: &CommandProfile) -> Places {
    let mut places = Places::new();
    for (rank, block) in (0_u32..).zip(&profile.blocks) {
        if let Ok(layer) = usize::try_from(block.layer) {
            places.entry(layer).or_default().push((rank, block.place));
        }
    }
    places
}

impl Engine {
    /// The profiles of a pulled image.
    pub async fn profiles(&self, reference: &Reference) -> Result<ImageProfiles> {
        let image = self.local(reference).await?;
        let found = match &image {
            Some(image) => self.known(image.manifest.digest).await,
            None => None,
        };
        found.ok_or_else(|| {
            let what = format!("a profile of {reference}");
            let host = "this node; `laz run` records one".to_owned();
            lazarette_fetcher::Error::NotFound { what, host }.into()
        })
    }

    /// The image `reference` names, asking its registry only if it is not here.
    async fn image(&self, reference: &Reference) -> Result<Image> {
        match self.local(reference).await? {
            Some(image) => Ok(image),
            None => self.resolve(reference, &Trace::new(Instant::now())).await,
        }
    }

    /// Adds `theirs` to what is known of the image.
    async fn learn_from(&self, image: &Image, theirs: ImageProfiles) -> Result<ImageProfiles> {
        let all = self.add(image, theirs).await?;
        self.shape(image).await;
        Ok(all)
    }

    /// Remembers what one start read of an image that may have been new here. A failure
    /// costs the next start some time.
    pub(super) async fn learn(
        &self,
        (image, is_new): (&Image, bool),
        command: Command,
        touches: Vec<Touch>,
    ) {
        let profiles = self.known_or_empty(image).await;
        let empty = CommandProfile::empty(&command);
        let old = profiles.of(&command).unwrap_or(&empty);
        if touches.is_empty() || !merge::teaches(old, &touches) {
            if is_new {
                self.shape(image).await;
            }
            return;
        }
        let (of, before) = (command.clone(), old.clone());
        let add = move |mut all: ImageProfiles| {
            let old = all.of(&command).unwrap_or(&empty);
            let learnt = merge::merge(old, &touches, now_s());
            all.put(learnt);
            all
        };
        let all = match self.change(image, add).await {
            Ok(all) => all,
            Err(error) => {
                return tracing::warn!(%error, "what this start read could not be remembered");
            }
        };
        let Some(learnt) = all.of(&of) else { return };
        self.pin(image, places_of(learnt)).await;
        // Else nothing is read that indexes were not shaped for before.
        if is_new || !merge::names_the_same(&before, learnt) {
            self.shape(image).await;
        }
    }

    /// Pins what a start reads, for as long as it takes to be started again.
    async fn pin(&self, image: &Image, reads: Places) {
        let (store, layers) = (Arc::clone(&self.store), layers_of(image));
        blocking(move || {
            for (number, places) in reads {
                let digest = layers.get(number);
                // One that cannot be opened has nothing to keep.
                if let Some(Ok(Some(file))) = digest.map(|digest| store.open_layer(digest)) {
                    let wanted = chunks_of(file.index(), places).wanted;
                    file.pin(wanted.iter().map(|wanted| wanted.id), SystemTime::now());
                }
            }
        })
        .await;
    }
}

fn is_of(profiles: &ImageProfiles, image: &Image) -> bool {
    profiles.manifest == image.manifest.digest && profiles.layers == layers_of(image)
}

fn layers_of(image: &Image) -> Vec<Digest> {
    let layers = image.layers.iter();
    layers.map(|layer| layer.descriptor.digest).collect()
}
