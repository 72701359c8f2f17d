//! Fetching claimed chunks: requests, streams, verification, storing.
//!
//! Invariant: a chunk's claim ends with success only after its verified bytes are in the
//! data file, and then at once: not when its member or its request ends. Corrupt pieces
//! are dropped and fetched once more, alone; then it is an error.
//!
//! What is left of a request that others go ahead of gets into line again; its claims stay
//! where they are, so a reader who wants one of them hurries it on.
//!
//! What has arrived is decoded in one go on a blocking thread: one hop per part of a body
//! that came together, not per chunk. No blocking thread waits for the network.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::counters::add;
use super::decode::{Decoded, Decoder};
use super::gate::{Pass, Turn};
use super::inflight::Mine;
use super::window::{Short, Window};
use super::{Priority, Shared, closed, details, first};
use crate::codec;
use crate::index::{Chunk, ChunkId};
use crate::plan::{self, Member, Request};
use crate::task::blocking;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Memory of every request: one piece of the body (a larger one is counted when it
/// comes), the inflate state and its scratch buffer.
const PIECE_BYTES: u64 = 64 << 10;
const FIXED_BYTES: u64 = PIECE_BYTES + (128 << 10);

/// Requests of one claim in line or under way at once. More would only wait in line.
const REQUESTS_WAITING_MAX: usize = 32;

/// Fetches everything in `mine` and ends every claim. The first request goes on `given`.
pub(super) async fn run(shared: &Arc<Shared>, mine: &Arc<Mine>, mut given: Option<Pass>) {
    let mut wanted = refuse_large(shared, mine);
    while let Some(mut requests) = next_plan(shared, mine, &mut wanted) {
        let mut flying = FuturesUnordered::new();
        loop {
            while flying.len() < REQUESTS_WAITING_MAX
                && let Some(request) = next_request(mine, &mut requests)
            {
                flying.push(fetch_request(shared, mine, request, given.take()));
            }
            if flying.next().await.is_none() {
                break;
            }
        }
    }
}

/// Plans as much of `wanted` as goes at once and leaves the rest in it. What somebody has
/// come to wait for goes first.
fn next_plan(shared: &Shared, mine: &Mine, wanted: &mut Vec<ChunkId>) -> Option<VecDeque<Request>> {
    let ids = std::mem::take(wanted);
    if ids.is_empty() {
        return None;
    }
    let (mut first, mut later) = hurried(shared, mine, ids);
    if first.is_empty() {
        std::mem::swap(&mut first, &mut later);
    }
    match plan::plan(shared.file.index(), &first, shared.limits(mine.priority())) {
        Ok(plan) => {
            *wanted = plan.rest;
            wanted.extend(later);
            wanted.sort_unstable();
            let requests = plan.requests.into_iter();
            Some(
                requests
                    .flat_map(|one| within_budget(shared, one))
                    .collect(),
            )
        }
        Err(error) => {
            mine.fail_rest(error);
            None
        }
    }
}

/// Those of `ids` (ascending) that somebody has come to wait for, with those whose bytes
/// come with theirs anyway; and the others.
fn hurried(shared: &Shared, mine: &Mine, ids: Vec<ChunkId>) -> (Vec<ChunkId>, Vec<ChunkId>) {
    let awaited: Vec<ChunkId> = ids
        .iter()
        .copied()
        .filter(|id| mine.is_hurried([*id]))
        .collect();
    let along = plan::siblings(shared.file.index(), &awaited);
    let is_first =
        |id: &ChunkId| awaited.binary_search(id).is_ok() || along.binary_search(id).is_ok();
    ids.into_iter().partition(is_first)
}

/// The request, or one for each of its chunks where they need too much memory together.
fn within_budget(shared: &Shared, request: Request) -> Vec<Request> {
    let ids: Vec<ChunkId> = request.chunks().collect();
    if shared.check_memory(&ids).is_ok() {
        return vec![request];
    }
    let alone = |member: Member| -> Vec<Request> {
        let first = member.chunks.first().copied().unwrap_or_default();
        if shared.file.index().verified_with(first).len() > 1 {
            return vec![Request::of(member)];
        }
        let blob = member.blob;
        let of = |id| {
            let chunks = vec![id];
            Request::of(Member { blob, chunks })
        };
        member.chunks.into_iter().map(of).collect()
    };
    request.members.into_iter().flat_map(alone).collect()
}

/// The first request that somebody has come to wait for, else the first.
fn next_request(mine: &Mine, requests: &mut VecDeque<Request>) -> Option<Request> {
    let hurried = requests
        .iter()
        .position(|request| mine.is_hurried(request.chunks()));
    requests.remove(hurried.unwrap_or(0))
}

/// Ends the claims of chunks that cannot be decoded within the budget; returns the rest.
fn refuse_large(shared: &Shared, mine: &Mine) -> Vec<ChunkId> {
    let ids = mine.ids().iter().copied();
    let (fits, large) = ids.partition::<Vec<_>, _>(|id| shared.check_memory(&[*id]).is_ok());
    for id in large {
        if let Err(error) = shared.check_memory(&[id]) {
            mine.finish(&[id], &Err(Arc::new(error)));
        }
    }
    fits
}

/// One request, in parts if it has to let others go first; every chunk of it has a result
/// afterwards.
async fn fetch_request(
    shared: &Arc<Shared>,
    mine: &Arc<Mine>,
    request: Request,
    mut given: Option<Pass>,
) {
    let mut left = Some(request);
    while let Some(request) = left.take() {
        let outcome = match pass_for(shared, mine, &request, given.take()).await {
            Ok(pass) => try_request(shared, mine, &request, &pass).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(rest) => left = rest,
            Err(error) => {
                let ids: Vec<ChunkId> = request.chunks().collect();
                mine.finish(&ids, &Err(Arc::new(error)));
            }
        }
    }
}

/// Waits for leave to send the request, as urgently as anybody wants something of it.
async fn pass_for(
    shared: &Shared,
    mine: &Mine,
    request: &Request,
    given: Option<Pass>,
) -> Result<Pass> {
    let gate = &shared.engine.gate;
    let ids: Vec<ChunkId> = request.chunks().collect();
    if let Some(pass) = given {
        gate.promote(pass.ticket(), mine.comes_with(&ids, pass.ticket()));
        return Ok(pass);
    }
    let entering = gate.enter(shared.ask(mine.priority(), &ids)?);
    let ticket = entering.ticket();
    // In line first: whoever comes from now on finds it there.
    let urgency = mine.comes_with(&ids, ticket);
    if urgency < mine.priority() {
        gate.promote(ticket, urgency);
    }
    entering.pass().await.ok_or_else(|| closed(&shared.blob))
}

/// Sends the request and stores what comes; returns what was left to let others go first.
async fn try_request(
    shared: &Arc<Shared>,
    mine: &Arc<Mine>,
    request: &Request,
    pass: &Pass,
) -> Result<Option<Request>> {
    let read = read_members(shared, mine, request, pass).await?;
    let mut corrupt = read.corrupt.into_iter();
    while let Some(bad) = corrupt.next() {
        // The one more time.
        let alone = Request::of(bad.member);
        let again = match read_members(shared, mine, &alone, pass).await {
            Ok(again) => again,
            // The next of them would take as long to fail. What is left waits for its turn anyway.
            Err(error) => {
                let others = corrupt.flat_map(|bad| bad.member.chunks);
                let ids: Vec<ChunkId> = alone.chunks().chain(others).collect();
                mine.finish(&ids, &Err(Arc::new(error)));
                break;
            }
        };
        for bad in again.corrupt {
            doubt(shared, &bad.member).await;
            mine.finish(&bad.member.chunks, &Err(Arc::new(bad.error)));
        }
    }
    Ok(read.left)
}

/// Tells the layer of a member that twice was not right: it may be its own fault.
async fn doubt(shared: &Shared, member: &Member) {
    let (file, chunk) = (Arc::clone(&shared.file), member.chunks.first().copied());
    let told = blocking(move || chunk.map_or(Ok(()), |id| file.doubt(id))).await;
    if let Err(error) = told {
        tracing::warn!(digest = %shared.blob.digest, %error, "cannot go back to another index");
    }
}

/// What became of a request.
#[derive(Default)]
struct Read {
    /// What came and was dropped.
    corrupt: Vec<Bad>,
    /// What is to be asked for again, for others go first now.
    left: Option<Request>,
}

/// Sends the request and stores what comes. Between members it lets others go first.
async fn read_members(
    shared: &Arc<Shared>,
    mine: &Arc<Mine>,
    request: &Request,
    pass: &Pass,
) -> Result<Read> {
    let first = first::bytes(shared, &request.parts, pass.class()).await;
    let first = first.map_err(with_advice)?;
    let arrival = shared.host.arrives(first.took);
    let mut largest = PIECE_BYTES;
    let mut count = |bytes: u64| {
        add(&shared.counters.bytes_fetched, bytes);
        pass.grow(bytes.saturating_sub(largest));
        largest = largest.max(bytes);
    };
    count(first.piece.len() as u64);
    let mut received = |bytes: u64| {
        arrival.piece(bytes);
        count(bytes);
    };
    let mut window = Window::new(first.piece, first.body, 0);
    let mut read = Read::default();
    let mut left = &request.members[..];
    while !left.is_empty() {
        let batch = window.batch(request, &mut left, &mut received).await;
        let batch = batch.map_err(|short| broken(shared, request, short))?;
        let priority = pass.class().unwrap_or(mine.priority());
        let batch = with_details(shared, mine, batch, priority).await?;
        read.corrupt.extend(store(shared, mine, batch).await?);
        if let Some(next) = left.first()
            && pass.turn().await == Turn::Leave
        {
            read.left = request.rest(next.blob.start());
            break;
        }
    }
    Ok(read)
}

/// What of a batch can be read, once its details are here. A member whose details cannot be had
/// fails alone: others came with it that need none of them.
async fn with_details(
    shared: &Arc<Shared>,
    mine: &Mine,
    batch: Vec<(Member, Bytes)>,
    priority: Priority,
) -> Result<Vec<(Member, Bytes)>> {
    let ids: Vec<ChunkId> = batch.iter().flat_map(|(m, _)| &m.chunks).copied().collect();
    match details::ready(shared, &ids, priority).await {
        Ok(()) => return Ok(batch),
        // Asking for each of them alone would take as long again, each time.
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => {}
    }
    let mut readable = Vec::with_capacity(batch.len());
    for (member, encoded) in batch {
        match details::ready(shared, &member.chunks, priority).await {
            Ok(()) => readable.push((member, encoded)),
            Err(error) => mine.finish(&member.chunks, &Err(Arc::new(error))),
        }
    }
    Ok(readable)
}

/// Bytes held while `ids` are fetched and decoded one after another: the longest encoded
/// member, the longest chunk or member that is verified whole, the next longest while they overlap, and what every request
/// holds.
pub(super) fn memory_of(shared: &Shared, ids: &[ChunkId]) -> u64 {
    let index = shared.file.index();
    let (mut encoded, mut longest, mut second) = (0, 0, 0);
    let mut held = 0..0;
    for (id, chunk) in ids
        .iter()
        .filter_map(|id| Some((*id, plan::chunk(index, *id).ok()?)))
    {
        if held.contains(&id) {
            continue;
        }
        held = index.verified_with(id);
        let len = index.held_for(id);
        encoded = encoded.max(chunk.encoding.blob().map_or(0, |blob| blob.len()));
        second = second.max(len.min(longest));
        longest = longest.max(len);
    }
    [encoded, longest, second]
        .into_iter()
        .fold(FIXED_BYTES, u64::saturating_add)
}

/// [`memory_of`] one chunk alone.
pub(super) fn memory_of_one(chunk: &Chunk) -> u64 {
    let encoded = chunk.encoding.blob().map_or(0, |blob| blob.len());
    FIXED_BYTES
        .saturating_add(encoded)
        .saturating_add(chunk.len.into())
}

/// Laziness needs ranges; whoever cannot have them must be told the way out.
fn with_advice(error: Error) -> Error {
    match error {
        Error::Unsupported { what, detail } => Error::Unsupported {
            what,
            detail: format!(
                "{detail}; a lazy image needs ranged requests: pull it whole with --full"
            ),
        },
        other => other,
    }
}

fn broken(shared: &Shared, request: &Request, short: Short) -> Error {
    match short {
        Short::Failed(error) => with_advice(error),
        Short::Ended(at) => Error::Unavailable {
            what: format!("bytes {:?} of layer {}", request.parts, shared.blob.digest),
            host: shared.blob.repository.host().to_owned(),
            detail: format!("the body ended after {at} bytes"),
        },
    }
}

/// Chunks of a member that did not decode or verify, and the first reason.
struct Bad {
    member: Member,
    error: Error,
}

/// Decodes, verifies and writes all chunks of whole members on a blocking thread, and
/// ends the claim of each as soon as it is written.
async fn store(
    shared: &Arc<Shared>,
    mine: &Arc<Mine>,
    batch: Vec<(Member, Bytes)>,
) -> Result<Vec<Bad>> {
    let (held, mine) = (Arc::clone(shared), Arc::clone(mine));
    // Tracked on its own: it goes on when the fetch is cancelled, and closing waits for it.
    let stored = shared.tasks.spawn_blocking(move || {
        let mut corrupt = Vec::new();
        for (member, encoded) in batch {
            corrupt.extend(store_member(&held, &mine, &member, &encoded)?);
        }
        Ok(corrupt)
    });
    joined(stored).await
}

/// A chunk that does not verify does not keep its neighbours from being stored. One that
/// does not decode does: the bytes behind it cannot be found.
fn store_member(
    shared: &Shared,
    mine: &Mine,
    member: &Member,
    encoded: &[u8],
) -> Result<Option<Bad>> {
    let first = member.chunks.first().copied().unwrap_or_default();
    let put = shared.file.put_member(first, encoded, |id, is_new| {
        add(&shared.counters.chunks_filled, u64::from(is_new));
        mine.finish(&[id], &Ok(()));
    });
    match put {
        Ok(false) => {}
        Ok(true) => return Ok(None),
        Err(error @ (Error::Corrupt { .. } | Error::Malformed { .. })) => {
            note_corrupt(shared, member.blob, &error);
            let member = member.clone();
            return Ok(Some(Bad { member, error }));
        }
        Err(error) => return Err(error),
    }
    let mut decoder = match Decoder::new(&shared.file, member, encoded) {
        Ok(decoder) => decoder,
        Err(error @ Error::Corrupt { .. }) => {
            note_corrupt(shared, member.blob, &error);
            let member = member.clone();
            return Ok(Some(Bad { member, error }));
        }
        Err(error) => return Err(error),
    };
    let (mut bad, mut reason) = (Vec::new(), None);
    let mut rest = member.chunks.iter().copied();
    while let Some(id) = rest.next() {
        let chunk = plan::chunk(shared.file.index(), id)?;
        let decoded = match decoder.take(chunk.encoding.skip(), chunk.len) {
            Ok(decoded) => decoded,
            Err(error) => {
                bad.push(id);
                bad.extend(rest);
                reason.get_or_insert(error);
                break;
            }
        };
        match verify_and_put(shared, id, decoded) {
            Ok(()) => mine.finish(&[id], &Ok(())),
            Err(error @ Error::Corrupt { .. }) => {
                bad.push(id);
                reason.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    let blob = member.blob;
    Ok(reason.map(|error| {
        note_corrupt(shared, blob, &error);
        let member = Member { blob, chunks: bad };
        Bad { member, error }
    }))
}

fn verify_and_put(shared: &Shared, id: ChunkId, decoded: Decoded) -> Result<()> {
    let what = || format!("chunk {id} of layer {}", shared.blob.digest);
    let verified = match decoded {
        Decoded::Verified(bytes) => bytes,
        Decoded::Unverified(bytes) => {
            codec::verify_chunk(what, &shared.file.chunk_digest(id)?, bytes)?
        }
    };
    shared.file.put(id, &verified)?;
    add(&shared.counters.chunks_filled, 1);
    Ok(())
}

fn note_corrupt(shared: &Shared, range: ByteRange, error: &Error) {
    add(&shared.counters.chunks_corrupt, 1);
    let digest = &shared.blob.digest;
    tracing::warn!(%digest, %range, %error, "dropped corrupt bytes");
    shared.source.distrust(&shared.blob);
}

pub(super) async fn joined<T>(work: tokio::task::JoinHandle<Result<T>>) -> Result<T> {
    match work.await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Unavailable {
            what: "a layer".to_owned(),
            host: "this node".to_owned(),
            detail: "the process is shutting down".to_owned(),
        }),
    }
}
