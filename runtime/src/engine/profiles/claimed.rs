//! Fetching early for containerd, whose starts this node does not see.
//!
//! Invariant: a profile is a guess here, as nobody says what will be run: the image's own
//! command, else what was started last. So it is fetched behind readers, before the rest of
//! the layers, and nothing ever waits for it. Ends when it is dropped.

use std::sync::Arc;

use lazarette_fetcher::prefetch::{Prefetch, PrefetchOptions};

use super::places_of;
use crate::engine::Engine;
use crate::engine::warming::WarmingNews;
use crate::image::Image;
use crate::profile::{Command, CommandProfile, ImageProfiles};
use crate::spec::{self, ContainerOptions, Named};

/// What this node knows of a start that nobody has described: that of the image's own command.
pub(in crate::engine) struct OwnStart {
    /// What its words name.
    pub(in crate::engine) named: Named,
    /// Whether what it reads is known here.
    pub(in crate::engine) is_known: bool,
}

impl Engine {
    /// Looks for what is known of the image's own command.
    pub(in crate::engine) async fn own_start(&self, image: &Image) -> OwnStart {
        let known = self.known(image.manifest.digest).await;
        let command = own_command(image);
        let chosen = known.as_ref().zip(command.as_ref());
        let chosen = chosen.and_then(|(known, command)| known.choose(command));
        OwnStart {
            named: spec::named(&ContainerOptions::default(), &image.config.config),
            is_known: matches!(chosen, Some((_, false))),
        }
    }

    /// Begins to fetch what starts of `image` read, of those layers that it is told of. A
    /// node that knows no profile of it asks the registry.
    /// `news` is told what that is, and what of it is present.
    pub(in crate::engine) fn fetch_early(
        self: &Arc<Self>,
        image: &Image,
        news: &WarmingNews,
    ) -> Prefetch {
        let (engine, image) = (Arc::clone(self), image.clone());
        let (news, on_present) = (news.clone(), news.on_present());
        let wanted = async move {
            let known = match engine.known(image.manifest.digest).await {
                Some(known) => known,
                None => engine.ask_for_profiles(&image).await?,
            };
            let profile = likely(&known, own_command(&image).as_ref())?;
            tracing::info!(image = %image.reference, blocks = profile.blocks.len(), "fetching what starts read");
            let places = places_of(profile);
            news.wanted(&places);
            Some((places, PrefetchOptions::default()))
        };
        Prefetch::start(wanted, Some(on_present))
    }
}

/// The image's own command, if it has one.
fn own_command(image: &Image) -> Option<Command> {
    let words = spec::command_line(&ContainerOptions::default(), &image.config.config);
    words.ok().map(|words| Command::new(&words))
}

/// What most likely is started: `command`, the same program with other arguments, or what
/// was started last.
fn likely<'a>(known: &'a ImageProfiles, command: Option<&Command>) -> Option<&'a CommandProfile> {
    let chosen = command.and_then(|command| known.choose(command));
    let last = || known.commands.iter().max_by_key(|one| one.updated_at);
    chosen.map(|(profile, _)| profile).or_else(last)
}

#[cfg(test)]
mod tests {
    use lazarette_fetcher::types::Digest;

    use super::*;

    fn command(words: &[&str]) -> Command {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        Command::new(&words)
    }

    #[test]
    fn the_images_command_goes_before_its_program_and_that_before_the_last() {
        let profile = |words: &[&str], updated_at| CommandProfile {
            updated_at,
            ..CommandProfile::empty(&command(words))
        };
        let mut known = ImageProfiles::empty(Digest::sha256(b"m"), Vec::new());
        let at = |known: &ImageProfiles, words: Option<&[&str]>| {
            let wanted = words.map(command);
            likely(known, wanted.as_ref()).map(|profile| profile.updated_at)
        };
        assert_eq!(at(&known, None), None);
        known.put(profile(&["java", "-jar", "a"], 1));
        known.put(profile(&["java", "-version"], 2));
        known.put(profile(&["sh"], 3));
        let table: [(Option<&[&str]>, u64); 4] = [
            (Some(&["java", "-jar", "a"]), 1),
            (Some(&["java", "-jar", "b"]), 2),
            (Some(&["python3"]), 3),
            (None, 3),
        ];
        for (words, expected) in table {
            assert_eq!(at(&known, words), Some(expected), "{words:?}");
        }
    }
}
