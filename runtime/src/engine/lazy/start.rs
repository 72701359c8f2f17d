//! What is expected of the first start of an image that containerd pulls.
//!
//! Nobody says when a container is started, or what is run in it: mostly the image's own command,
//! and soon. So its program, and the libraries that are found for it over all layers, come while
//! containerd still asks for the next layer; and where this node knows what that command reads,
//! nothing is guessed beside that.
//!
//! Invariant: holds no layer. What it changes of a layer ends after [`LASTS`], and what it keeps
//! of an image that long after its last layer was opened, or with the image; nobody waits for it,
//! and nothing fails by it.

use std::sync::Arc;
use std::time::Duration;

use lazarette_fetcher::layer::Layer;

use crate::engine::companions::Companions;
use crate::engine::profiles::OwnStart;
use crate::engine::stage::tree_of;
use crate::image::pull::Landmarks;

/// How long after a layer was opened a start is taken for the first one. Trees of all layers
/// are in memory for as long.
const LASTS: Duration = Duration::from_secs(60);

/// What is known of it.
pub(super) struct FirstStart {
    /// `None` where what it reads is known.
    companions: Option<Arc<Companions>>,
}

impl FirstStart {
    /// Of an image of `layers` whose own command is `own`.
    pub(super) fn new(layers: usize, own: OwnStart) -> Self {
        let guessed = !own.is_known;
        Self {
            companions: guessed.then(|| Arc::new(Companions::new(layers, own.named))),
        }
    }

    /// Whether landmarks of eStargz say anything that is not known better.
    pub(super) fn landmarks(&self) -> Landmarks {
        match self.companions {
            None => Landmarks::Ignore,
            Some(_) => Landmarks::Honour,
        }
    }

    /// A layer was opened for this image, and is read by nobody yet.
    pub(super) fn begin(&self, layer: &Arc<Layer>) {
        if self.companions.is_some() {
            return;
        }
        layer.set_foresight(false);
        let layer = Arc::downgrade(layer);
        tokio::spawn(async move {
            tokio::time::sleep(LASTS).await;
            if let Some(layer) = layer.upgrade() {
                layer.set_foresight(true);
            }
        });
    }

    /// Whether nobody has said that layer `number` can be read, and somebody should.
    pub(super) fn lacks(&self, number: usize) -> bool {
        let companions = self.companions.as_ref();
        companions.is_some_and(|companions| companions.lacks(number))
    }

    /// The layers with these numbers, which are one blob, can be read. Returns at once.
    pub(super) fn opened(&self, numbers: Vec<usize>, layer: &Arc<Layer>) {
        let Some(companions) = self.companions.as_ref().map(Arc::clone) else {
            return;
        };
        let layer = Arc::clone(layer);
        tokio::spawn(async move {
            let tree = match tree_of(&layer).await {
                Ok(tree) => tree,
                Err(error) => return tracing::debug!(%error, "nothing is expected of an image"),
            };
            let tell = |number| companions.opened(number, &layer, &tree);
            let is_last = numbers
                .into_iter()
                .fold(false, |last, number| last | tell(number));
            drop((layer, tree));
            if is_last {
                tokio::time::sleep(LASTS).await;
                companions.close();
            }
        });
    }
}
