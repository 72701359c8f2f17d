//! A blob from its first byte to its last, over as many connections as its link needs.
//!
//! One connection carries what its window allows in a round trip. Where the link carries
//! more, parts of the blob that are not wanted yet are asked for meanwhile ([`lines`]), and
//! kept until it is their turn. What is wanted next never waits for leave: it is asked for at
//! once, as the one request would be without this. What is ahead is sent behind everybody
//! else's requests, holds its bytes within the engine's budget, and takes a slot, so a blob
//! of any length takes the memory of [`LINES_MAX`] parts.
//!
//! A blob of one or two parts is one request. So is the rest of any blob as soon as one
//! connection is enough. A host that serves no ranges is asked for everything.
//!
//! Invariant: bytes come in order, each once, all of them or an error. They are untrusted.
//! Tasks end with the stream.

mod ingest;
mod patience;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

pub(super) use self::ingest::{Pieces, WAITING_BYTES_MAX};
use super::engine::{Arrival, Host};
use super::gate::{Ask, Entering, Pass};
use super::open::Asker;
use super::{FetchEngine, Priority};
use crate::link::Link;
use crate::source::{BlobRef, BlobSource, Body};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes of a part. Shorter ones cost the registry more requests, longer ones memory.
const PART_BYTES: u64 = 8 << 20;
/// Of the engine's budget, the share of one part at most: all lines of a stream that run
/// ahead come to the half of it that background requests may take.
const BUDGET_SHARE: u64 = 8;
/// Shortest part, whatever the budget.
const PART_BYTES_MIN: u64 = 64 << 10;
/// Bytes that one connection keeps under way once its window has grown: half of what Linux
/// lets it grow to by default.
const LINE_BYTES: u64 = 2 << 20;
/// Connections of one stream at most.
const LINES_MAX: u64 = 4;

/// How many connections keep `link` busy. Pure.
pub(super) fn lines(link: Link) -> usize {
    let lines = link.round_trip_bytes().div_ceil(LINE_BYTES);
    usize::try_from(lines.clamp(1, LINES_MAX)).unwrap_or(1)
}

/// What a stream reads, and with what.
#[derive(Clone)]
struct From {
    source: Arc<dyn BlobSource>,
    blob: BlobRef,
    host: Arc<Host>,
}

/// A blob being read.
pub(super) struct Stream {
    from: From,
    engine: Arc<FetchEngine>,
    part_bytes: u64,
    /// How many connections a link needs; [`lines`].
    lines: fn(Link) -> usize,
    /// Bytes handed on.
    at: u64,
    /// Where the first part begins that nobody has asked for.
    asked: u64,
    /// What the next bytes come from.
    front: Option<Front>,
    /// Parts after that, in order, one behind the other.
    ahead: VecDeque<Ahead>,
    tasks: JoinSet<()>,
    /// Shortest time to the first byte of a body.
    first_byte: Option<Duration>,
    /// Where it was when all of the blob was asked for last.
    whole_from: Option<u64>,
    /// Who may have it otherwise.
    asker: Option<Asker>,
}

enum Front {
    Read(Reading),
    Ahead(Ahead),
}

/// A part that is read before it is wanted.
struct Ahead {
    pieces: mpsc::UnboundedReceiver<Result<Piece>>,
    /// Told when it is wanted.
    hurry: Option<oneshot::Sender<()>>,
}

/// Bytes that are kept, and the leave to keep them, which ends with the last of a part.
struct Piece {
    bytes: Bytes,
    _pass: Option<Arc<Pass>>,
}

impl Stream {
    /// A stream of `blob`, of which nothing has been asked yet.
    pub(super) fn new(
        source: Arc<dyn BlobSource>,
        blob: BlobRef,
        engine: Arc<FetchEngine>,
    ) -> Self {
        let share = engine.config.memory_bytes_max / BUDGET_SHARE;
        Self {
            from: From {
                source,
                host: engine.host(blob.repository.host()),
                blob,
            },
            part_bytes: PART_BYTES.min(share).max(PART_BYTES_MIN),
            lines,
            engine,
            at: 0,
            asked: 0,
            front: None,
            ahead: VecDeque::new(),
            tasks: JoinSet::new(),
            first_byte: None,
            whole_from: None,
            asker: None,
        }
    }

    /// The same, that gives up once it is plain that `asker` will wait too long; see
    /// [`Patience`](patience::Patience).
    #[must_use]
    pub(super) fn of(self, asker: Option<Asker>) -> Self {
        Self { asker, ..self }
    }

    /// The next bytes, none at the end. Not to be called again after an error.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            self.read_ahead();
            let came = match &mut self.front {
                None => Ok(None),
                Some(Front::Read(reading)) => reading.next().await,
                Some(Front::Ahead(ahead)) => ahead.next().await,
            };
            if let Some(Front::Read(Reading {
                took: Some(took), ..
            })) = &self.front
            {
                self.first_byte = Some(self.first_byte.map_or(*took, |least| least.min(*took)));
            }
            match came {
                Ok(Some(piece)) => {
                    self.at = self.at.saturating_add(piece.len() as u64);
                    return Ok(Some(piece));
                }
                Ok(None) if self.front.is_some() && self.at >= self.from.blob.size => {
                    return Ok(None);
                }
                Ok(None) => self.turn().await?,
                // One that is whole already is begun again only if it came further than before.
                Err(Error::Unsupported { .. }) if self.whole_from != Some(self.at) => {
                    self.whole().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Begins with the part after the one that ended.
    async fn turn(&mut self) -> Result<()> {
        if let Some(mut next) = self.ahead.pop_front() {
            // It may have its leave already.
            let _ = next.hurry.take().map(|hurry| hurry.send(()));
            self.front = Some(Front::Ahead(next));
            return Ok(());
        }
        let left = self.from.blob.size.saturating_sub(self.at);
        // Of a link that nothing is known of, the first part tells.
        let is_one = self.first_byte.is_some() && (self.lines)(self.link()) == 1;
        if self.at == 0 && left <= self.part_bytes.saturating_mul(2) {
            return self.whole().await;
        }
        let len = if is_one {
            left
        } else {
            left.min(self.part_bytes)
        };
        let Some(range) = ByteRange::at(self.at, len) else {
            return self.whole().await;
        };
        self.asked = range.end();
        match Reading::of(&self.from, range).await {
            Ok(reading) => self.front = Some(Front::Read(reading)),
            Err(Error::Unsupported { .. }) => self.whole().await?,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Asks for all of the blob, and passes over what has been handed on.
    async fn whole(&mut self) -> Result<()> {
        self.ahead.clear();
        self.tasks.abort_all();
        self.asked = self.from.blob.size;
        self.whole_from = Some(self.at);
        let began = Instant::now();
        let body = self.from.source.read_all(&self.from.blob).await?;
        let reading = Reading::new(&self.from.host, body, began);
        self.front = Some(Front::Read(Reading {
            skip: self.at,
            ..reading
        }));
        Ok(())
    }

    /// Asks for parts that are wanted later, as many as the link takes.
    fn read_ahead(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        // Until the first byte the link may be anything.
        if self.first_byte.is_none() {
            return;
        }
        let lines = (self.lines)(self.link());
        while self.ahead.len() + 1 < lines && self.asked < self.from.blob.size {
            let left = self.from.blob.size - self.asked;
            let Some(range) = ByteRange::at(self.asked, left.min(self.part_bytes)) else {
                return;
            };
            self.asked = range.end();
            let entering = self.engine.gate.enter(Ask {
                class: Priority::Background,
                host: Arc::clone(&self.from.host.name),
                bytes: range.len(),
            });
            let (hurry, hurried) = oneshot::channel();
            // Holds a part at most: the source sends no more than was asked for.
            let (sender, pieces) = mpsc::unbounded_channel();
            let from = self.from.clone();
            self.tasks.spawn(async move {
                if let Err(error) = read(&from, range, (entering, hurried), &sender).await {
                    // Nobody listens where the stream has ended.
                    let _ = sender.send(Err(error));
                }
            });
            self.ahead.push_back(Ahead {
                pieces,
                hurry: Some(hurry),
            });
        }
    }

    /// The link as far as it is known; a round trip is no longer than one that was seen.
    fn link(&self) -> Link {
        let link = self.from.host.link();
        let seen = self.first_byte.unwrap_or(link.round_trip);
        Link {
            round_trip: link.round_trip.min(seen),
            ..link
        }
    }
}

impl Ahead {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.pieces.recv().await.transpose()?;
        Ok(piece.map(|piece| piece.bytes))
    }
}

/// Reads a part into `pieces`, once there is leave to or it is wanted.
async fn read(
    from: &From,
    range: ByteRange,
    (entering, hurried): (Entering, oneshot::Receiver<()>),
    pieces: &mpsc::UnboundedSender<Result<Piece>>,
) -> Result<()> {
    let pass = tokio::select! {
        biased;
        pass = entering.pass() => pass.map(Arc::new),
        _ = hurried => None,
    };
    let mut reading = Reading::of(from, range).await?;
    while let Some(bytes) = reading.next().await? {
        let piece = Piece {
            bytes,
            _pass: pass.clone(),
        };
        if pieces.send(Ok(piece)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// A body, from which the link is learned.
struct Reading {
    host: Arc<Host>,
    body: Body,
    asked: Instant,
    /// How long its first byte took.
    took: Option<Duration>,
    arrival: Option<Arrival>,
    /// Bytes of it that are not wanted.
    skip: u64,
}

impl Reading {
    async fn of(from: &From, range: ByteRange) -> Result<Self> {
        let began = Instant::now();
        let body = from.source.read_range(&from.blob, range).await?;
        Ok(Self::new(&from.host, body, began))
    }

    fn new(host: &Arc<Host>, body: Body, asked: Instant) -> Self {
        Self {
            host: Arc::clone(host),
            body,
            asked,
            took: None,
            arrival: None,
            skip: 0,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(mut piece) = self.body.next().await.transpose()? else {
                self.arrival = None;
                return Ok(None);
            };
            let came = piece.len() as u64;
            match &self.arrival {
                Some(arrival) => arrival.piece(came),
                None => {
                    let took = self.asked.elapsed();
                    self.took = Some(took);
                    self.arrival = Some(self.host.arrives(took));
                }
            }
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX);
            let rest = piece.split_off(skipped.min(piece.len()));
            self.skip = self.skip.saturating_sub(came);
            if !rest.is_empty() {
                return Ok(Some(rest));
            }
        }
    }
}

#[cfg(test)]
mod tests;
