//! Having the kernel read what a start is known to read, as it comes, before the container does.
//!
//! Who knows what is read, what is present and what is mounted says so in any order, and never
//! waits.
//!
//! Invariant: a layer is warmed once it is mounted and it is known what of it is read, and of that
//! only what is present. Nothing of a layer is kept or open in between. What fails is logged;
//! readers then read for themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lazarette_fetcher::prefetch::OnPresent;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::ByteRange;
use lazarette_snapshotter::tree::Tree;
use lazarette_snapshotter::warm::Warmer;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::profiles::Places;

/// Comes up with a layer's tree, unless the layer is gone.
type MakeTree = Box<dyn FnOnce() -> Option<Arc<Tree>> + Send>;

enum News {
    /// Of all layers.
    Wanted(BTreeMap<usize, Vec<ByteRange>>),
    /// Where a layer is mounted.
    Mounted(usize, PathBuf, MakeTree),
    /// What of a layer's data file.
    Present(usize, Vec<ByteRange>),
    Over,
}

/// Who says what.
#[derive(Clone)]
pub(super) struct WarmingNews {
    /// Holds a message for each layer, and one for each batch of a prefetch, at most.
    news: UnboundedSender<News>,
}

impl WarmingNews {
    /// These places will be read.
    pub(super) fn wanted(&self, places: &Places) {
        let ranges = places.iter().map(|(layer, places)| {
            let ranges = places.iter().flat_map(|(_, place)| place.ranges());
            (*layer, ranges.collect())
        });
        self.say(News::Wanted(ranges.collect()));
    }

    /// Layer `layer` is mounted at `path`.
    pub(super) fn mounted(
        &self,
        layer: usize,
        path: &Path,
        tree: impl FnOnce() -> Option<Arc<Tree>> + Send + 'static,
    ) {
        self.say(News::Mounted(layer, path.to_path_buf(), Box::new(tree)));
    }

    /// What a prefetch is to tell.
    pub(super) fn on_present(&self) -> OnPresent {
        let this = self.clone();
        Box::new(move |layer, ranges| this.say(News::Present(layer, ranges)))
    }

    fn say(&self, news: News) {
        // Nobody listens any more once it is over.
        drop(self.news.send(news));
    }
}

/// What warms the layers of one start. Dropping it has it end soon.
pub(super) struct Warming {
    news: WarmingNews,
    is_over: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Warming {
    /// Begins. Must run inside a tokio runtime.
    pub(super) fn begin() -> Self {
        let (news, inbox) = unbounded_channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(work(inbox, Arc::clone(&is_over)));
        Self {
            news: WarmingNews { news },
            is_over,
            task,
        }
    }

    /// Who says what.
    pub(super) fn news(&self) -> &WarmingNews {
        &self.news
    }

    /// Ends it, and waits for that: for milliseconds. No layer is open here after it.
    pub(super) async fn stop(mut self) {
        self.end();
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }

    /// Has it end soon.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.news.say(News::Over);
    }
}

impl Drop for Warming {
    fn drop(&mut self) {
        self.end();
    }
}

/// What is known of a layer.
#[derive(Default)]
struct Known {
    wanted: Option<Vec<ByteRange>>,
    mounted: Option<(PathBuf, MakeTree)>,
    warmer: Option<Warmer>,
    /// Present, and not warmed.
    present: Vec<ByteRange>,
}

/// Warms until it is over, or nobody is left to say what.
async fn work(mut inbox: UnboundedReceiver<News>, is_over: Arc<AtomicBool>) {
    let mut layers: BTreeMap<usize, Known> = BTreeMap::new();
    while let Some(news) = inbox.recv().await {
        let touched: Vec<usize> = match news {
            News::Wanted(all) => {
                let numbers = all.keys().copied().collect();
                for (layer, ranges) in all {
                    layers.entry(layer).or_default().wanted = Some(ranges);
                }
                numbers
            }
            News::Mounted(layer, path, tree) => {
                layers.entry(layer).or_default().mounted = Some((path, tree));
                vec![layer]
            }
            News::Present(layer, ranges) => {
                layers.entry(layer).or_default().present.extend(ranges);
                vec![layer]
            }
            News::Over => return,
        };
        for number in touched {
            if let Some(known) = layers.remove(&number) {
                let over = Arc::clone(&is_over);
                layers.insert(number, blocking(move || known.warm(&over)).await);
            }
        }
    }
}

impl Known {
    /// Warms what can be. Blocks for milliseconds.
    fn warm(mut self, is_over: &AtomicBool) -> Self {
        if self.warmer.is_none() {
            if self.wanted.is_none() || self.mounted.is_none() {
                return self;
            }
            let tree = self.mounted.take().map(|(path, tree)| (path, tree()));
            if let (Some((path, Some(tree))), Some(wanted)) = (tree, self.wanted.take()) {
                self.warmer = Some(Warmer::new(&path, &tree, wanted));
            }
        }
        if let Some(warmer) = &self.warmer {
            let present = std::mem::take(&mut self.present);
            warmer.warm(&present, || !is_over.load(Ordering::Relaxed));
        }
        self
    }
}

#[cfg(test)]
mod tests;
