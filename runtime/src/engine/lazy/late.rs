//! Layers that containers have, and that could not be mounted or answered for; mounts that nobody
//! has, and that could not be ended.
//!
//! Invariant: each is tried again, after pauses that double and whenever there is another mount
//! server, until it is answered for or no snapshot names it: what containers read of it waits
//! for that. What was held is tried with what it was held with, and is opened by nobody twice.
//! Nothing is unmounted but what no snapshot names: what of it is in use is tried again until it is
//! not, as the kernel takes a container's file system down some time after the container has gone.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::remote::LazyLayers as _;
use tokio::sync::watch;
use tokio::time::timeout;

use super::NodeLayers;
use super::held::Held;
use super::served::Served;
use crate::Result;

/// First pause: what passes, as a want of descriptors does, passes soon.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Pauses between tries to end a mount that is in use, shortest and longest.
const LEFT_PAUSE_MIN: Duration = Duration::from_millis(50);
const LEFT_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Tries with one mount server: a quarter of an hour, longer than a read waits.
const TRIES_MAX: u32 = 10;

/// Tries `unmounted`, and what is not answered for, until there are no layers any more.
pub(super) async fn keep_trying(
    layers: Weak<NodeLayers>,
    mut renewed: watch::Receiver<u64>,
    mut unmounted: Vec<Digest>,
) {
    let (mut tries, mut is_due) = (0, !unmounted.is_empty());
    loop {
        let renewal = match pause(tries).filter(|_| is_due) {
            Some(pause) => timeout(pause, renewed.changed()).await,
            None => Ok(renewed.changed().await),
        };
        tries = match renewal {
            Ok(Ok(())) => 0,
            Ok(Err(_)) => return,
            Err(_) => tries + 1,
        };
        let Some(layers) = layers.upgrade() else {
            return;
        };
        let are_answered = layers.answer_late().await;
        unmounted = layers.mount_late(unmounted).await;
        is_due = !are_answered || !unmounted.is_empty();
    }
}

/// Ends mounts that were in use when they were to end, once they are not.
pub(super) async fn keep_ending(layers: Weak<NodeLayers>, served: Arc<Served>) {
    loop {
        served.has_left().await;
        let mut pause = LEFT_PAUSE_MIN;
        loop {
            let Some(layers) = layers.upgrade() else {
                return;
            };
            if layers.end_left().await {
                break;
            }
            drop(layers);
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2).min(LEFT_PAUSE_MAX);
        }
    }
}

/// How long to wait after so many tries; `None` where it is another server's turn.
fn pause(tries: u32) -> Option<Duration> {
    (tries < TRIES_MAX).then(|| PAUSE_MIN.saturating_mul(1 << tries))
}

impl NodeLayers {
    /// Mounts those of the layers that a snapshot still names; which are left.
    async fn mount_late(&self, layers: Vec<Digest>) -> Vec<Digest> {
        let mut left = Vec::new();
        for digest in layers {
            if !self.is_named(&digest).await {
                continue;
            }
            match self.try_mount(&digest).await {
                true => self.release_unnamed(&digest).await,
                false => left.push(digest),
            }
        }
        left
    }

    pub(super) async fn try_mount(&self, digest: &Digest) -> bool {
        match self.mount(digest).await {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%digest, error = error.report(), "layer cannot be mounted now");
                false
            }
        }
    }

    /// Tries to end what is to end; whether nothing is left.
    async fn end_left(&self) -> bool {
        let Some(served) = &self.served else {
            return true;
        };
        for (path, digest) in served.left().await {
            let _turn = match &digest {
                Some(digest) => Some(self.turns.of(digest).await),
                None => None,
            };
            served.end_left(path).await;
        }
        served.left().await.is_empty()
    }

    /// Answers for what was held and could not be answered for; whether nothing is left.
    async fn answer_late(&self) -> bool {
        let Some(served) = &self.served else {
            return true;
        };
        let mut are_all = true;
        for held in served.take_unanswered() {
            if let Some(held) = self.answer_for(held).await {
                are_all = false;
                served.leave_unanswered(held);
            }
        }
        are_all
    }

    /// What is to be tried once more.
    async fn answer_for(&self, held: Held) -> Option<Held> {
        let digest = held.layer.index().blob_digest;
        if !self.is_named(&digest).await {
            let _turn = self.turns.of(&digest).await;
            // Else somebody wants it again.
            if self.path(&digest).is_none()
                && let Err(error) = self.put_down(held).await
            {
                tracing::warn!(%digest, error = error.report(), "layer could not be released");
            }
            return None;
        }
        match self.hold_again(&held.layer).await {
            Ok(_) => {
                tracing::info!(%digest, "layer is answered for again");
                self.release_unnamed(&digest).await;
                None
            }
            Err(error) => {
                let error = error.report();
                tracing::warn!(%digest, error, "layer is not answered for yet");
                Some(held)
            }
        }
    }

    /// Holds what was held before, and is being filled since then.
    async fn hold_again(&self, layer: &Arc<Layer>) -> Result<PathBuf> {
        let digest = layer.index().blob_digest;
        let _turn = self.turns.of(&digest).await;
        match self.path(&digest) {
            Some(path) => Ok(path),
            None => self.show(layer).await,
        }
    }

    /// Releases what was removed while it was being mounted.
    async fn release_unnamed(&self, digest: &Digest) {
        if !self.is_named(digest).await
            && let Err(error) = self.release(digest).await
        {
            tracing::warn!(%digest, %error, "layer could not be released");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_tried_for_longer_than_a_read_waits() {
        let pauses: Vec<_> = (0..).map_while(pause).collect();
        assert!(pauses.windows(2).all(|pair| pair[0] < pair[1]));
        let all: Duration = pauses.iter().sum();
        assert!(all > Duration::from_secs(600));
        assert_eq!(pause(u32::MAX), None);
    }
}
