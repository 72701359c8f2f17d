//! Fetching claimed chunks: requests, streams, verification, storing.
//!
//! Invariant: a chunk's claim ends with success only after its verified bytes are in the
//! data file. Corrupt pieces are dropped and fetched once more, alone; then it is an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::SemaphorePermit;

use super::inflight::Mine;
use super::window::{Short, Window};
use super::{Shared, closed};
use crate::codec::{self, gzip};
use crate::index::{ChunkId, Encoding};
use crate::plan::{self, Member, Request};
use crate::store::LayerFile;
use crate::types::{ByteRange, Digest};
use crate::{Error, Result};

/// Memory permits are counted in this many bytes, for a semaphore counts to 2^29 only.
const PERMIT_BYTES: u64 = 4096;
/// Longest run of decoded bytes that neighbouring chunks of a member are decoded in
/// together, instead of each from the member's start.
const RUN_BYTES_MAX: u64 = 8 << 20;
/// One piece of a body, as the permits count it.
const PIECE_BYTES: u64 = 64 << 10;

/// Permits in a budget of `bytes`.
pub(super) fn permits_total(bytes: u64) -> usize {
    let permits = usize::try_from(bytes / PERMIT_BYTES).unwrap_or(usize::MAX);
    permits.clamp(
        1,
        tokio::sync::Semaphore::MAX_PERMITS.min(u32::MAX as usize),
    )
}

/// Fetches everything in `mine` and ends every claim.
pub(super) async fn run(shared: &Arc<Shared>, mine: &Mine) {
    let mut wanted = mine.ids().to_vec();
    while !wanted.is_empty() {
        let plan = match plan::plan(shared.file.index(), &wanted, shared.config.plan) {
            Ok(plan) => plan,
            Err(error) => return mine.fail_rest(error),
        };
        let mut requests: FuturesUnordered<_> = plan
            .requests
            .into_iter()
            .map(|request| fetch_request(shared, mine, request))
            .collect();
        while requests.next().await.is_some() {}
        wanted = plan.rest;
    }
}

/// One request; every chunk of it has a result afterwards.
async fn fetch_request(shared: &Arc<Shared>, mine: &Mine, request: Request) {
    let ids: Vec<ChunkId> = request.chunks().collect();
    if let Err(error) = try_request(shared, mine, &request).await {
        mine.finish(&ids, Err(Arc::new(error)));
    }
}

async fn try_request(shared: &Arc<Shared>, mine: &Mine, request: &Request) -> Result<()> {
    let _permits = permits(shared, request).await?;
    let mut window = open(shared, request.blob).await?;
    let mut corrupt = Vec::new();
    for member in &request.members {
        let encoded = take(shared, &mut window, request.blob, member.blob).await?;
        match store(shared, encoded, member).await {
            Ok(()) => mine.finish(&member.chunks, Ok(())),
            Err(error) if is_corruption(&error) => {
                note_corrupt(shared, member, &error);
                corrupt.push(keep_good(shared, mine, member));
            }
            Err(error) => return Err(error),
        }
    }
    drop(window);
    for member in corrupt {
        let result = refetch(shared, &member).await;
        let bad = keep_good(shared, mine, &member);
        mine.finish(&bad.chunks, result.map_err(Arc::new));
    }
    Ok(())
}

/// Ends the claims of the member's chunks that did verify; what is left of it.
fn keep_good(shared: &Shared, mine: &Mine, member: &Member) -> Member {
    let ids = member.chunks.iter().copied();
    let (good, bad) = ids.partition::<Vec<_>, _>(|id| shared.file.is_present(*id));
    mine.finish(&good, Ok(()));
    Member {
        blob: member.blob,
        chunks: bad,
    }
}

/// The one more time.
async fn refetch(shared: &Arc<Shared>, member: &Member) -> Result<()> {
    let mut window = open(shared, member.blob).await?;
    let encoded = take(shared, &mut window, member.blob, member.blob).await?;
    let stored = store(shared, encoded, member).await;
    if let Err(error) = &stored
        && is_corruption(error)
    {
        note_corrupt(shared, member, error);
    }
    stored
}

/// Waits for a place among the requests and for the memory of the largest member.
async fn permits<'a>(
    shared: &'a Shared,
    request: &Request,
) -> Result<(SemaphorePermit<'a>, SemaphorePermit<'a>)> {
    let gone = |_| closed(&shared.blob);
    let place = shared.requests.acquire().await.map_err(gone)?;
    let bytes = request.members.iter().map(|m| memory_of(shared, m)).max();
    let total = permits_total(shared.config.memory_bytes_max);
    let wanted = bytes.unwrap_or(0).div_ceil(PERMIT_BYTES);
    let wanted = usize::try_from(wanted).unwrap_or(total).min(total);
    let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
    let memory = shared.memory.acquire_many(wanted).await.map_err(gone)?;
    Ok((place, memory))
}

/// Bytes held while a member is decoded: encoded twice (buffer and piece), the longest
/// run decoded, that run's chunk being verified, and a piece of the body.
fn memory_of(shared: &Shared, member: &Member) -> u64 {
    let lens = member.chunks.iter();
    let longest = lens
        .filter_map(|id| plan::chunk(shared.file.index(), *id).ok())
        .map(|chunk| u64::from(chunk.len))
        .max()
        .unwrap_or(0);
    let run = if member.chunks.len() > 1 {
        longest.max(RUN_BYTES_MAX)
    } else {
        longest
    };
    let encoded = member.blob.len().saturating_mul(2);
    encoded
        .saturating_add(run)
        .saturating_add(longest)
        .saturating_add(PIECE_BYTES)
}

async fn open(shared: &Shared, range: ByteRange) -> Result<Window> {
    shared.counters.requests.fetch_add(1, Ordering::Relaxed);
    let body = shared.source.read_range(&shared.blob, range).await;
    body.map(|body| Window::new(body, range.start()))
        .map_err(with_advice)
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

async fn take(
    shared: &Shared,
    window: &mut Window,
    request: ByteRange,
    piece: ByteRange,
) -> Result<Bytes> {
    let count = |bytes| add(&shared.counters.bytes_fetched, bytes);
    window
        .take(piece, count)
        .await
        .map_err(|short| match short {
            Short::Failed(error) => with_advice(error),
            Short::Ended(at) => Error::Unavailable {
                what: format!("bytes {request} of layer {}", shared.blob.digest),
                host: shared.blob.repository.host().to_owned(),
                detail: format!("the body ended at byte {at}"),
            },
        })
}

/// Decodes, verifies and writes all chunks of a member on a blocking thread.
async fn store(shared: &Arc<Shared>, encoded: Bytes, member: &Member) -> Result<()> {
    let file = Arc::clone(&shared.file);
    let chunks = member.chunks.clone();
    let filled = chunks.len() as u64;
    blocking(move || store_member(&file, &encoded, &chunks)).await?;
    add(&shared.counters.chunks_filled, filled);
    Ok(())
}

/// A chunk that does not verify does not keep its neighbours from being stored; the
/// first such error is returned.
fn store_member(file: &LayerFile, encoded: &[u8], chunks: &[ChunkId]) -> Result<()> {
    let places = chunks
        .iter()
        .map(|id| Place::of(file, *id))
        .collect::<Result<Vec<_>>>()?;
    let mut outcome = Ok(());
    for run in runs(&places) {
        match store_run(file, encoded, run) {
            Err(error) if is_corruption(&error) => outcome = outcome.and(Err(error)),
            other => other?,
        }
    }
    outcome
}

/// Decodes a run at once and stores its chunks.
fn store_run(file: &LayerFile, encoded: &[u8], run: &[Place]) -> Result<()> {
    let base = run.first().map_or(0, |place| place.skip);
    let end = run.iter().map(Place::end).max().unwrap_or(base);
    let len = u32::try_from(end - base)
        .map_err(|_| Error::limit("a gzip member", "its chunks span over 4 GiB"))?;
    let decoded = gzip::decode_member(encoded, base, len)?;
    if let [only] = run {
        return verify_and_put(file, only, decoded);
    }
    let mut outcome = Ok(());
    for place in run {
        let start = usize::try_from(place.skip - base).unwrap_or(usize::MAX);
        let end = usize::try_from(place.end() - base).unwrap_or(usize::MAX);
        let bytes = decoded.get(start..end).unwrap_or_default();
        match verify_and_put(file, place, bytes.to_vec()) {
            Err(error) if is_corruption(&error) => outcome = outcome.and(Err(error)),
            other => other?,
        }
    }
    outcome
}

fn verify_and_put(file: &LayerFile, place: &Place, bytes: Vec<u8>) -> Result<()> {
    let what = || format!("chunk {} of layer {}", place.id, file.digest());
    file.put(place.id, &codec::verify(what, &place.digest, bytes)?)
}

/// Where a chunk is in its decoded member.
struct Place {
    id: ChunkId,
    skip: u64,
    len: u32,
    digest: Digest,
}

impl Place {
    fn of(file: &LayerFile, id: ChunkId) -> Result<Self> {
        let chunk = plan::chunk(file.index(), id)?;
        let skip = match chunk.encoding {
            Encoding::GzipMember { skip, .. } => skip,
            Encoding::Stream => 0,
        };
        Ok(Self {
            id,
            skip,
            len: chunk.len,
            digest: Digest::Sha256(chunk.chunk_digest),
        })
    }

    fn end(&self) -> u64 {
        self.skip.saturating_add(u64::from(self.len))
    }
}

/// Splits `places`, ascending by `skip`, into runs of at most [`RUN_BYTES_MAX`]; a longer
/// chunk is a run of its own.
fn runs(places: &[Place]) -> Vec<&[Place]> {
    let mut runs = Vec::new();
    let mut rest = places;
    while let Some(first) = rest.first() {
        let fits = |p: &Place| p.end().saturating_sub(first.skip) <= RUN_BYTES_MAX;
        let len = rest.iter().take_while(|p| fits(p)).count().max(1);
        let (run, tail) = rest.split_at(len);
        runs.push(run);
        rest = tail;
    }
    runs
}

/// Whether the bytes are to blame, not this node.
fn is_corruption(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. } | Error::Malformed { .. })
}

fn note_corrupt(shared: &Shared, member: &Member, error: &Error) {
    add(&shared.counters.chunks_corrupt, 1);
    let (digest, range) = (&shared.blob.digest, member.blob);
    tracing::warn!(%digest, %range, %error, "dropped corrupt bytes");
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Runs `work` where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Unavailable {
            what: "a layer".to_owned(),
            host: "this node".to_owned(),
            detail: "the process is shutting down".to_owned(),
        }),
    }
}
