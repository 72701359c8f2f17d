//! A body that goes on at the next host where one breaks off.
//!
//! Invariant: yields exactly the bytes asked for, in order, whoever sends them, or one error
//! that names every host. Once a host's own source has given up, the next one goes on from the
//! byte where it broke. Where all are in trouble they are asked again, none of them sooner than
//! it asked for, until the deadline has passed without a byte: a mirror's restart is to be a
//! pause also where the registry cannot be reached. The bytes of two hosts in one body are no
//! less trusted than those of one: whoever reads them verifies. All who sent some of it count as
//! sending until the body is dropped or at its end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use super::{Candidate, Mirrors, Tried};
use crate::source::registry::{Want, take_off};
use crate::source::retry::{Attempts, Fault, Patience, Transient, Trouble};
use crate::source::{BlobRef, Body};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Longer than anybody waits for a host that asked to be left alone.
const ASKED_MAX: Duration = Duration::from_secs(86_400);

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
    /// Hosts that are in trouble, and may be asked again once it is so late.
    ill: Vec<(Candidate, Trouble, Instant)>,
    /// Whether the host that decides has said no.
    decided: bool,
    tried: Tried,
    rounds: Attempts,
}

impl Relay {
    /// A body of `parts`, which ascend.
    pub(super) fn new(mirrors: Mirrors, blob: BlobRef, want: Want, parts: &[ByteRange]) -> Self {
        let is_some = |part: &ByteRange| !part.is_empty();
        let what = format!("blob {}", blob.digest);
        let rounds = mirrors.shared.registry.attempts(what, &blob.repository);
        Self {
            mirrors,
            blob,
            want,
            left: parts.iter().copied().filter(is_some).collect(),
            live: None,
            senders: Vec::new(),
            rest: VecDeque::new(),
            ill: Vec::new(),
            decided: false,
            tried: Tried::default(),
            rounds: rounds.lasting(),
        }
    }

    /// Opens it at the first of `candidates` that answers.
    pub(super) async fn open(mut self, candidates: Vec<Candidate>) -> Result<Body> {
        self.rest = candidates.into();
        if let Some(last) = self.rest.back_mut() {
            last.source = last.source.asking(Patience::Brief);
        }
        self.connect().await?;
        Ok(stream::try_unfold(self, |mut relay| async move {
            Ok(relay.next_piece().await?.map(|piece| (piece, relay)))
        })
        .boxed())
    }

    async fn connect(&mut self) -> Result<()> {
        loop {
            let Some(candidate) = self.rest.pop_front() else {
                self.wait().await?;
                continue;
            };
            let parts: Vec<ByteRange> = self.left.iter().copied().collect();
            let opening = candidate.source.open(&self.blob, self.want, &parts);
            match opening.await {
                Ok(body) => {
                    let standing = &self.mirrors.shared.standing;
                    standing.sends(&candidate, &self.blob.digest);
                    self.senders.push(candidate.name.clone());
                    self.live = Some((candidate, body));
                    return Ok(());
                }
                Err(error) => self.failed(candidate, error),
            }
        }
    }

    fn failed(&mut self, candidate: Candidate, error: Error) {
        let (trouble, now) = (self.mirrors.failed(&candidate, &error), Instant::now());
        let is_without = match &error {
            Error::NotFound { .. } | Error::Denied { .. } => true,
            Error::Unsupported { .. } => self.want == Want::Parts,
            _ => false,
        };
        self.tried.add(&candidate, error);
        match trouble {
            Some(trouble) => {
                let asked = trouble.retry_after().unwrap_or_default();
                self.ill
                    .push((candidate, trouble, now + asked.min(ASKED_MAX)));
            }
            None if candidate.decides => self.decided = true,
            None if is_without => {
                let standing = &self.mirrors.shared.standing;
                standing.lacks(&candidate, &self.blob.digest, now);
            }
            None => {}
        }
    }

    /// Nobody could answer: waits until somebody may, if there is hope and time.
    async fn wait(&mut self) -> Result<()> {
        let soonest = self.ill.iter().min_by_key(|(_, _, again)| *again);
        let kind = match soonest {
            Some((_, trouble, _)) if !self.decided => *trouble,
            _ => return Err(std::mem::take(&mut self.tried).into_error()),
        };
        let detail = "none of its hosts answers".to_owned();
        let waiting = Fault::Transient(Transient { detail, kind });
        if self.rounds.after(waiting).await.is_err() {
            return Err(std::mem::take(&mut self.tried).into_error());
        }
        let now = Instant::now();
        let ready = |(_, _, again): &mut (Candidate, Trouble, Instant)| *again <= now;
        let mut ready: Vec<_> = self.ill.extract_if(.., ready).collect();
        ready.sort_by_key(|(candidate, _, _)| candidate.decides);
        for (mut candidate, _, _) in ready {
            self.tried.forget(&candidate);
            candidate.source = candidate.source.asking(Patience::Brief);
            self.rest.push_back(candidate);
        }
        Ok(())
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
                    self.rounds.progress();
                    if self.left.is_empty() {
                        self.mirrors.shared.standing.worked(candidate);
                    }
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
            if let Some((candidate, _)) = self.live.take() {
                self.failed(candidate, error);
            }
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
