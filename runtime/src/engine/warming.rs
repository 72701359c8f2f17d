//! Having the kernel read what a start is known to read, as it comes, before the container does.
//!
//! Invariant: nothing waits for it but [`Warming::stop`], which takes as long as one file's
//! read-ahead: after it no file of a layer is open here. What fails is logged; readers then read
//! for themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use lazarette_fetcher::prefetch::OnPresent;
use lazarette_fetcher::types::ByteRange;
use lazarette_snapshotter::tree::Tree;
use lazarette_snapshotter::warm::Warmer;
use tokio::task::JoinHandle;

/// A layer that has been mounted.
struct Mounted {
    layer: usize,
    path: PathBuf,
    tree: Arc<Tree>,
    /// What the start reads of its data file.
    wanted: Vec<ByteRange>,
}

enum Message {
    Mounted(Mounted),
    /// What is present of a layer's data file.
    Present(usize, Vec<ByteRange>),
    End,
}

/// What warms the layers of one start. Dropping it has it end soon.
pub(super) struct Warming {
    /// Holds a message for each layer and each batch of a prefetch at most.
    messages: mpsc::Sender<Message>,
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Warming {
    /// Begins. Must run inside a tokio runtime.
    pub(super) fn begin() -> Self {
        let (messages, inbox) = mpsc::channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let thread = tokio::task::spawn_blocking(move || work(&inbox, &over));
        Self {
            messages,
            is_over,
            thread,
        }
    }

    /// What is to be told which bytes are present.
    pub(super) fn on_present(&self) -> OnPresent {
        let messages = self.messages.clone();
        // Nobody listens any more once it is over.
        Box::new(move |layer, ranges| drop(messages.send(Message::Present(layer, ranges))))
    }

    /// Layer `layer` is mounted at `path`, and these bytes of its data file will be read.
    pub(super) fn mounted(
        &self,
        layer: usize,
        path: &Path,
        tree: &Arc<Tree>,
        wanted: Vec<ByteRange>,
    ) {
        let mounted = Mounted {
            layer,
            path: path.to_path_buf(),
            tree: Arc::clone(tree),
            wanted,
        };
        drop(self.messages.send(Message::Mounted(mounted)));
    }

    /// Has it end soon.
    fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        // It may have ended.
        drop(self.messages.send(Message::End));
    }

    /// Ends it, and waits for that.
    pub(super) async fn stop(mut self) {
        self.end();
        if let Err(error) = (&mut self.thread).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

impl Drop for Warming {
    fn drop(&mut self) {
        self.end();
    }
}

/// Warms until it is over, or nobody is left to say what.
fn work(inbox: &mpsc::Receiver<Message>, is_over: &AtomicBool) {
    let mut warmers = BTreeMap::new();
    let mut early: BTreeMap<usize, Vec<ByteRange>> = BTreeMap::new();
    let warm = |warmer: &mut Warmer, ranges: Vec<ByteRange>| {
        for range in ranges {
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            warmer.warm(range);
        }
        warmer.rest();
    };
    while let Ok(message) = inbox.recv() {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        match message {
            Message::Mounted(mounted) => {
                let layer = mounted.layer;
                match Warmer::new(&mounted.path, &mounted.tree, mounted.wanted) {
                    Ok(mut warmer) => {
                        warm(&mut warmer, early.remove(&layer).unwrap_or_default());
                        warmers.insert(layer, warmer);
                    }
                    Err(error) => tracing::debug!(layer, %error, "layer is not warmed"),
                }
            }
            Message::Present(layer, ranges) => match warmers.get_mut(&layer) {
                Some(warmer) => warm(warmer, ranges),
                None => early.entry(layer).or_default().extend(ranges),
            },
            Message::End => return,
        }
    }
}
