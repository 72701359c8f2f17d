//! Details of an index that came without them: fetched once, when a chunk of their span is.
//!
//! Invariant: details are kept only after they were compared with the SHA-256 that the
//! signed core has for them; what is not right is asked for once more, then it is an error
//! of the chunks that need it. However many chunks want the details of a span, one fetch
//! brings them.
//!
//! They are asked for at the same time as the chunk's own bytes, for they are needed only
//! to decode and verify those. So they do not go through the gate: what holds a pass waits
//! for them, never the other way round. Instead few requests for them are under way at
//! once, each of which holds the details of one span and a piece of the body.
//!
//! Where the index is gone from its registry, the layer has to say what was in it
//! ([`remake`]).
//!
//! Where nobody waits for a chunk yet, in the background and for a profile on a node that had
//! layers before, its details come first: with its digest known, another layer may have it.

mod remake;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;

use self::remake::Remaking;
pub(super) use self::remake::TURNS as REMAKES;
use super::counters::add;
use super::fetch::joined;
use super::inflight::{self, Inflight, Mine, Wait};
use super::window::{Short, Window};
use super::{Priority, Shared, closed};
use crate::index::{ChunkId, Encoding};
use crate::plan::{self, Member, Request};
use crate::source::BlobRef;
use crate::task::blocking;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Requests of one claim under way at once.
const REQUESTS_MAX: usize = 3;
/// Requests under way at once for readers, and as many for all others, of all layers that
/// share an engine.
pub(super) const TURNS: usize = 4;
/// Longest details of one span that are fetched by themselves. Usual ones have 32 KiB at
/// most; an index with longer ones is fetched whole.
pub(super) const LEN_MAX: u64 = 1 << 20;

/// Where the details of a layer are, and which of them are being fetched.
pub(super) struct Remote {
    blob: BlobRef,
    /// Where those of the first span begin in it.
    start: u64,
    inflight: Inflight,
    remaking: Remaking,
}

impl Remote {
    pub(super) fn new(blob: BlobRef, start: u64) -> Self {
        Self {
            blob,
            start,
            inflight: Inflight::default(),
            remaking: Remaking::default(),
        }
    }

    /// Whether they are being made again, which takes longer than a request.
    pub(super) fn is_remaking(&self) -> bool {
        self.remaking.is_under_way()
    }
}

/// Starts to fetch the details that reading `ids` takes and that are neither here nor on
/// their way; what to wait for.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    ids: &[ChunkId],
    priority: Priority,
) -> Result<Vec<Wait>> {
    let Some(remote) = &shared.remote else {
        return Ok(Vec::new());
    };
    let numbers = spans_of(shared, ids);
    if numbers.is_empty() {
        return Ok(Vec::new());
    }
    // Another process may have fetched them, or this one before it was started again.
    let absent = absent(shared, numbers).await?;
    let is_here = |number| shared.file.has_details(number);
    let nothing = |_: &[u32], _: &dyn Fn(u32) -> bool| Vec::new();
    let claim = remote.inflight.claim(&absent, priority, is_here, nothing);
    if !claim.mine.is_empty() {
        shared.tasks.spawn(run(Arc::clone(shared), claim.mine));
    }
    Ok(claim.waits)
}

/// Those of the spans `numbers` whose details are not here.
async fn absent(shared: &Shared, numbers: Vec<u32>) -> Result<Vec<u32>> {
    let file = Arc::clone(&shared.file);
    blocking(move || file.absent_details(&numbers)).await
}

/// Returns once the details that reading `ids` takes are here.
pub(super) async fn ready(shared: &Arc<Shared>, ids: &[ChunkId], priority: Priority) -> Result<()> {
    inflight::wait(begin(shared, ids, priority).await?).await
}

/// The spans of `ids` whose details are not known to be here, ascending.
fn spans_of(shared: &Shared, ids: &[ChunkId]) -> Vec<u32> {
    let mut numbers = BTreeSet::new();
    for id in ids {
        let chunk = plan::chunk(shared.file.index(), *id);
        if let Ok(
            Encoding::GzipSpan { span, .. }
            | Encoding::WholeSpan { span, .. }
            | Encoding::WholeMember { span, .. },
        ) = chunk.map(|chunk| chunk.encoding)
        {
            numbers.insert(span);
        }
    }
    let is_absent = |number: &u32| !shared.file.has_details(*number);
    numbers.into_iter().filter(is_absent).collect()
}

/// Fetches the claimed details; every claim has a result afterwards.
async fn run(shared: Arc<Shared>, mine: Mine) {
    let cancel = shared.cancel.clone();
    tokio::select! {
        biased;
        () = cancel.cancelled() => mine.fail_rest(closed(&shared.blob)),
        () = fetch(&shared, &mine) => {}
    }
}

async fn fetch(shared: &Arc<Shared>, mine: &Mine) {
    let Some(remote) = &shared.remote else {
        return;
    };
    let requests = match requests(shared, remote, mine) {
        Ok(requests) => requests,
        Err(error) => return mine.fail_rest(error),
    };
    let fetch = |request: Request| async move {
        if let Err(error) = get(shared, remote, mine, &request).await {
            let numbers: Vec<u32> = request.chunks().collect();
            mine.finish(&numbers, &Err(Arc::new(error)));
        }
    };
    let requests = futures_util::stream::iter(requests).map(fetch);
    requests.buffer_unordered(REQUESTS_MAX).collect().await
}

/// What to ask for: requests whose chunks are numbers of spans.
fn requests(shared: &Shared, remote: &Remote, mine: &Mine) -> Result<Vec<Request>> {
    let mut members = Vec::with_capacity(mine.ids().len());
    for number in mine.ids() {
        let details = shared.file.span(*number)?.details;
        let start = remote.start.checked_add(details.start());
        let blob = start.and_then(|start| ByteRange::at(start, details.len()));
        let blob = blob.ok_or_else(|| Error::malformed("layer index", "it ends nowhere"))?;
        let chunks = vec![*number];
        members.push(Member { blob, chunks });
    }
    let parts_max = shared.source.parts_max(&remote.blob);
    let limits = &shared.config.plan;
    let mut limits = limits.on(shared.host.link(), parts_max, mine.priority());
    limits.total_bytes_max = u64::MAX;
    Ok(plan::of_members(members, limits).requests)
}

/// Gets all details of a request: from where they are, else from the layer.
async fn get(shared: &Arc<Shared>, remote: &Remote, mine: &Mine, request: &Request) -> Result<()> {
    let host = match fetch_request(shared, remote, mine, request).await {
        Err(Error::NotFound { host, .. }) => host,
        other => return other,
    };
    let numbers: Vec<u32> = request.chunks().collect();
    let absent = remake::remake(shared, remote, &numbers).await?;
    let error = gone(shared, remote, host);
    mine.finish(&absent, &Err(Arc::new(error)));
    mine.finish(&numbers, &Ok(()));
    Ok(())
}

/// Fetches and keeps all of a request; what is not right comes once more, alone, and fails
/// alone.
async fn fetch_request(
    shared: &Arc<Shared>,
    remote: &Remote,
    mine: &Mine,
    request: &Request,
) -> Result<()> {
    let turns = match mine.priority() {
        Priority::OnDemand => &shared.engine.details_for_readers,
        Priority::Profile | Priority::Background => &shared.engine.details_for_others,
    };
    let _turn = turns.acquire().await.map_err(|_| closed(&shared.blob))?;
    for member in read(shared, remote, mine, request).await? {
        let again = Request::of(member);
        for member in read(shared, remote, mine, &again).await? {
            let what = format!("details of spans {:?}", member.chunks);
            let detail = format!("index {} has other bytes for them", remote.blob.digest);
            let error = Error::malformed(what, detail);
            mine.finish(&member.chunks, &Err(Arc::new(error)));
        }
    }
    Ok(())
}

/// Sends the request and keeps what is right; returns what is not.
async fn read(
    shared: &Arc<Shared>,
    remote: &Remote,
    mine: &Mine,
    request: &Request,
) -> Result<Vec<Member>> {
    let body = shared.source.read_parts(&remote.blob, &request.parts);
    let mut window = Window::new(Bytes::new(), body.await?, 0);
    let counters = &shared.counters;
    let mut wrong = Vec::new();
    let mut left = &request.members[..];
    while !left.is_empty() {
        let received = |bytes| add(&counters.details_fetched, bytes);
        let batch = window.batch(request, &mut left, received).await;
        let batch = batch.map_err(|short| broken(remote, short))?;
        for (member, is_right) in keep(shared, batch).await? {
            if is_right {
                mine.finish(&member.chunks, &Ok(()));
            } else {
                add(&counters.chunks_corrupt, 1);
                shared.source.distrust(&remote.blob);
                wrong.push(member);
            }
        }
    }
    Ok(wrong)
}

/// Keeps what is right; says of each whether it was.
async fn keep(shared: &Arc<Shared>, batch: Vec<(Member, Bytes)>) -> Result<Vec<(Member, bool)>> {
    let held = Arc::clone(shared);
    // Tracked on its own: closing the layer waits for it.
    let kept = shared.tasks.spawn_blocking(move || {
        let mut kept = Vec::with_capacity(batch.len());
        for (member, bytes) in batch {
            let number = member.chunks.first().copied().unwrap_or(u32::MAX);
            let is_right = match held.file.put_details(number, bytes) {
                Ok(()) => true,
                Err(error @ Error::Corrupt { .. }) => {
                    let digest = &held.blob.digest;
                    tracing::warn!(%digest, span = number, %error, "dropped corrupt details");
                    false
                }
                Err(error) => return Err(error),
            };
            kept.push((member, is_right));
        }
        Ok(kept)
    });
    joined(kept).await
}

/// What it means that the host has no such index any more.
fn gone(shared: &Shared, remote: &Remote, host: String) -> Error {
    let (index, layer) = (&remote.blob.digest, &shared.blob.digest);
    Error::NotFound {
        what: format!(
            "index {index}, which says how to read layer {layer} in part (start or pull the \
             image again to get the layer whole),"
        ),
        host,
    }
}

fn broken(remote: &Remote, short: Short) -> Error {
    match short {
        Short::Failed(error) => error,
        Short::Ended(at) => Error::Unavailable {
            what: format!("details in index {}", remote.blob.digest),
            host: remote.blob.repository.host().to_owned(),
            detail: format!("the body ended after {at} bytes"),
        },
    }
}
