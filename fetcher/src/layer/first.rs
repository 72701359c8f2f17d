//! Asking for a range, up to its first bytes.
//!
//! Invariant: what is returned has at least one byte of the body, unless the body has none.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;

use super::fetch::add;
use super::{Priority, Shared};
use crate::Result;
use crate::source::Body;
use crate::types::ByteRange;

/// A body that has begun to arrive.
pub(super) struct First {
    /// Its first bytes.
    pub(super) piece: Bytes,
    /// What is still to come.
    pub(super) body: Body,
    /// From the request to the first byte.
    pub(super) took: Duration,
}

/// Asks the source for `range`.
pub(super) async fn bytes(
    shared: &Shared,
    range: ByteRange,
    _class: Option<Priority>,
) -> Result<First> {
    ask(shared, range).await
}

async fn ask(shared: &Shared, range: ByteRange) -> Result<First> {
    add(&shared.counters.requests, 1);
    let sent = Instant::now();
    let mut body = shared.source.read_range(&shared.blob, range).await?;
    let piece = body.next().await.transpose()?.unwrap_or_default();
    Ok(First {
        piece,
        body,
        took: sent.elapsed(),
    })
}
