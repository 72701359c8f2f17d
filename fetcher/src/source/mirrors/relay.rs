//! A body that goes on at the next host where one breaks off.
//!
//! Invariant: yields exactly the bytes asked for, in order, whoever sends them, or one error
//! that names every host. A host is asked again only by its own source, which resumes; once
//! that has given up, the next one goes on from the byte where it broke. The bytes of two
//! hosts in one body are no less trusted than those of one: whoever reads them verifies.
//! All who sent some of it count as sending until the body is dropped or at its end.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::{Candidate, Mirrors, Tried};
use crate::source::registry::{Want, take_off};
use crate::source::{BlobRef, Body};
use crate::types::ByteRange;
use crate::{Error, Result};

/// A body in progress.
pub(super) struct Relay {
    mirrors: Mirrors,
    blob: BlobRef,
    want: Want,
    /// What is still to come, ascending, none of it empty.
    left: VecDeque<ByteRange>,
    live: Option<(Candidate, Body)>,
    /// Whose bytes are in it.
    senders: Vec<Arc<str>>,
    /// Hosts that have not been asked.
    rest: VecDeque<Candidate>,
    tried: Tried,
}

impl Relay {
    /// A body of `parts`, which ascend.
    pub(super) fn new(mirrors: Mirrors, blob: BlobRef, want: Want, parts: &[ByteRange]) -> Self {
        let is_some = |part: &ByteRange| !part.is_empty();
        Self {
            mirrors,
            blob,
            want,
            left: parts.iter().copied().filter(is_some).collect(),
            live: None,
            senders: Vec::new(),
            rest: VecDeque::new(),
            tried: Tried::default(),
        }
    }

    /// Opens it at the first of `candidates` that answers.
    pub(super) async fn open(mut self, candidates: Vec<Candidate>) -> Result<Body> {
        self.rest = candidates.into();
        self.connect().await?;
        Ok(stream::try_unfold(self, |mut relay| async move {
            Ok(relay.next_piece().await?.map(|piece| (piece, relay)))
        })
        .boxed())
    }

    async fn connect(&mut self) -> Result<()> {
        while let Some(candidate) = self.rest.pop_front() {
            let parts: Vec<ByteRange> = self.left.iter().copied().collect();
            let opening = candidate.source.open(&self.blob, self.want, &parts);
            match opening.await {
                Ok(body) => {
                    let standing = &self.mirrors.shared.standing;
                    standing.worked(&candidate);
                    standing.sends(&candidate, &self.blob.digest);
                    self.senders.push(candidate.name.clone());
                    self.live = Some((candidate, body));
                    return Ok(());
                }
                Err(error) => self.mirrors.failed(&mut self.tried, &candidate, error),
            }
        }
        Err(std::mem::take(&mut self.tried).into_error())
    }

    async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some((candidate, body)) = &mut self.live else {
                self.connect().await?;
                continue;
            };
            let error = match body.next().await {
                Some(Ok(piece)) => {
                    take_off(&mut self.left, piece.len() as u64);
                    return Ok(Some(piece));
                }
                None if self.left.is_empty() => return Ok(None),
                // The bytes are all there, and more: another host mends nothing.
                Some(Err(error)) if self.left.is_empty() => return Err(error),
                Some(Err(error)) => error,
                None => Error::Unavailable {
                    what: format!("blob {}", self.blob.digest),
                    host: candidate.name.to_string(),
                    detail: "the body ended early".to_owned(),
                },
            };
            self.mirrors.failed(&mut self.tried, candidate, error);
            self.live = None;
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for name in &self.senders {
            let standing = &self.mirrors.shared.standing;
            standing.sent(name, &self.blob.digest);
        }
    }
}
