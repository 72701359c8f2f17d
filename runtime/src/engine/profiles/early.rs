//! Fetching early what a profile names, once there is a profile.
//!
//! Invariant: never holds a start up. Layers that open before a profile is found are
//! remembered for it.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::prefetch::{Prefetch, PrefetchOptions, WantedPlaces};

use crate::engine::Engine;
use crate::engine::warming::WarmingNews;
use crate::image::Image;
use crate::profile::{Command, ImageProfiles, ProfileUse};
use crate::trace::Trace;

/// The prefetch of one start.
pub(super) struct Early {
    prefetch: Prefetch,
    /// The profile it goes by; empty until one is found.
    by: Arc<OnceLock<ProfileUse>>,
    began: Instant,
}

impl Early {
    /// Begins with what this node knows of the image, `known`. Knowing nothing of one that is
    /// `new` here, it asks the registry meanwhile.
    pub(super) fn begin(
        engine: &Arc<Engine>,
        (image, new): (&Image, bool),
        known: Option<&ImageProfiles>,
        command: &Command,
        news: Option<&WarmingNews>,
    ) -> Option<Self> {
        let by = Arc::new(OnceLock::new());
        let began = Instant::now();
        let on_present = news.map(WarmingNews::on_present);
        let prefetch = match known {
            Some(known) => {
                let wanted = wanted(known, command, &by, news)?;
                Prefetch::start(std::future::ready(Some(wanted)), on_present)
            }
            None if new => {
                let (engine, image) = (Arc::clone(engine), image.clone());
                let (command, by, news) = (command.clone(), Arc::clone(&by), news.cloned());
                let wanted = async move {
                    let known = engine.ask_for_profiles(&image).await;
                    // Others may want the database while the container runs.
                    engine.release_db();
                    let known = known?;
                    wanted(&known, &command, &by, news.as_ref())
                };
                Prefetch::start(wanted, on_present)
            }
            None => return None,
        };
        Some(Self {
            prefetch,
            by,
            began,
        })
    }

    /// Whether a profile was found by now.
    pub(super) fn has_profile(&self) -> bool {
        self.by.get().is_some()
    }

    /// Layer `number` can be read.
    pub(super) fn opened(&self, number: usize, layer: &Arc<Layer>) {
        self.prefetch.opened(number, layer);
    }

    /// Ends it; what it did, if it had a profile.
    pub(super) async fn finish(self, trace: &Trace) -> Option<ProfileUse> {
        let done = self.prefetch.finish().await;
        let profile = *self.by.get()?;
        trace.record("prefetch", self.began, done.last.unwrap_or(self.began));
        Some(ProfileUse {
            fetched_chunks: done.chunks,
            fetched_bytes: done.bytes,
            unknown_blocks: done.unknown,
            failed: done.failed,
            ..profile
        })
    }
}

/// What to fetch for this command; `by` becomes the profile that says so. Unless it is another
/// command's, which may be wrong and would be taken for what this one read, what it says is read.
fn wanted(
    known: &ImageProfiles,
    command: &Command,
    by: &OnceLock<ProfileUse>,
    news: Option<&WarmingNews>,
) -> Option<WantedPlaces> {
    let (profile, guess) = known.choose(command)?;
    let places = super::places_of(profile);
    let used = ProfileUse {
        runs: profile.runs,
        guess,
        blocks: profile.blocks.len() as u64,
        bytes: profile.bytes(),
        fetched_chunks: 0,
        fetched_bytes: 0,
        unknown_blocks: 0,
        failed: 0,
    };
    by.set(used).ok()?;
    if let Some(news) = news.filter(|_| !guess) {
        news.wanted(&places);
    }
    Some((places, PrefetchOptions::default()))
}
