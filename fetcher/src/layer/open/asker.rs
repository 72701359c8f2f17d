//! Who a layer is streamed for that can be had otherwise, and from when they wait for it.
//!
//! Invariant: who is asked for stands in no line. What nobody has asked for yet is opened and
//! streamed only when it is its turn in [`Lines`], as somebody who waits misses what it takes of
//! the link. Once a layer of an image took too long no stream of that image is begun. Never
//! looks at rates: streams do.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::source::BlobRef;
use crate::{Error, Result};

/// Something that is said once, and stays said. Clones are one.
#[derive(Debug, Clone)]
pub struct Said(Arc<watch::Sender<bool>>);

/// For whom a layer is streamed, and when.
#[derive(Debug, Clone)]
pub struct Asker {
    /// How long they wait for a stream, counted from when they ask: one that will take longer is
    /// given up early.
    pub within: Duration,
    /// Said when somebody waits for this layer.
    pub asked: Said,
    /// Said when a layer of the same image took too long: the others would, too.
    pub too_long: Said,
    /// Where this one stands until then.
    pub lines: Lines,
}

/// The lines of layers that nobody waits for. Clones are one.
#[derive(Debug, Clone)]
pub struct Lines {
    /// How many are looked for in the store, or have their tables read.
    opening: Arc<Semaphore>,
    /// How many are streamed.
    streaming: Arc<Semaphore>,
}

impl Default for Said {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Said {
    /// Says it, to those who wait and all who come.
    pub fn say(&self) {
        self.0.send_replace(true);
    }

    /// Whether `other` is a clone of this.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether it has been said.
    pub fn is_said(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once it has been said.
    pub async fn wait(&self) {
        // Cannot fail: the sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|said| *said).await;
    }

    /// A turn in `line`, or at once none when this is said.
    async fn or_turn(&self, line: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            biased;
            () = self.wait() => None,
            turn = Arc::clone(line).acquire_owned() => turn.ok(),
        }
    }
}

impl Lines {
    /// Lines of which so many at once are `opening` and `streaming`.
    pub fn new(opening: usize, streaming: usize) -> Self {
        let [opening, streaming] = [opening, streaming].map(|many| Arc::new(Semaphore::new(many)));
        Self { opening, streaming }
    }
}

impl Asker {
    /// Waits until the layer may be looked for, which it may for as long as the answer is kept.
    pub(super) async fn opens(&self) -> Option<OwnedSemaphorePermit> {
        self.asked.or_turn(&self.lines.opening).await
    }

    /// Waits until the layer may be streamed, which it may for as long as the answer is kept.
    ///
    /// # Errors
    /// `Unsupported` where another layer of the image took too long.
    pub(super) async fn streams(&self, blob: &BlobRef) -> Result<Option<OwnedSemaphorePermit>> {
        let turn = tokio::select! {
            biased;
            () = self.too_long.wait() => return Err(others_took_too_long(blob)),
            turn = self.asked.or_turn(&self.lines.streaming) => turn,
        };
        Ok(turn)
    }
}

/// Why a layer is not streamed.
pub(in crate::layer) fn others_took_too_long(blob: &BlobRef) -> Error {
    Error::Unsupported {
        what: format!("layer {}", blob.digest),
        detail: "it has no index here, and another layer of its image took too long to stream"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_asked_for_passes_a_line_that_does_not_move() {
        let (asked, line) = (Said::default(), Arc::new(Semaphore::new(0)));
        let say = async {
            tokio::task::yield_now().await;
            assert!(!asked.is_said());
            asked.say();
        };
        let (turn, ()) = tokio::join!(asked.or_turn(&line), say);
        assert!(turn.is_none());
        asked.clone().wait().await;
    }

    #[tokio::test]
    async fn what_nobody_has_asked_for_takes_its_turn() {
        let (asked, line) = (Said::default(), Arc::new(Semaphore::new(1)));
        let turn = asked.or_turn(&line).await;
        assert!(turn.is_some());
        assert_eq!(line.available_permits(), 0);
        drop(turn);
        assert_eq!(line.available_permits(), 1);
    }
}
