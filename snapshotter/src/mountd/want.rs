//! One want of the server, from the layer.
//!
//! Invariant: answered exactly once: with a grant that covers it, or with an errno.

use std::sync::Arc;

use lazarette_fetcher::Result;
use lazarette_fetcher::store::Vouched;
use lazarette_fetcher::types::ByteRange;
use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::Message;

use super::LentData;
use super::link::Link;
use crate::fuse::errno_of;

/// Fills of one want before it fails. Bytes may be evicted between a fill and the look after
/// it; three times in a row means the budget cannot hold a single read.
const FILLS_MAX: usize = 3;

const EIO: u32 = 5;

pub(super) async fn answer(link: Arc<Link>, want: u64, mount: u64, span: Span) {
    let outcome = match link.layer(mount) {
        Some(data) => vouch(data, span).await,
        // Unmounted meanwhile, or not attached: whoever waits need not wait for us.
        None => Ok(None),
    };
    let failed = |errno| Message::Failed { want, mount, errno };
    let message = match outcome {
        Ok(Some((span, number))) => Message::Grant {
            want,
            mount,
            number,
            span,
        },
        Ok(None) => failed(EIO),
        Err(error) => {
            tracing::warn!(%error, "read failed");
            failed(errno_of(&error))
        }
    };
    // The server may be slow, and no worker of the runtime waits for it. If it is gone, so
    // is what it wanted.
    let told = tokio::task::spawn_blocking(move || link.tell(&message));
    if let Ok(Err(error)) = told.await {
        tracing::debug!(%error, "the mount server is gone before its answer");
    }
}

/// Bytes around `span` that are present and right, fetched if need be, and the number that
/// goes with them.
async fn vouch(data: Arc<dyn LentData>, span: Span) -> Result<Option<(Span, u64)>> {
    let Some(range) = ByteRange::new(span.start(), span.end()) else {
        return Ok(None);
    };
    let mut vouched = look(Arc::clone(&data), range).await?;
    for _ in 0..FILLS_MAX {
        if vouched.is_some() {
            break;
        }
        data.fill(range).await?;
        vouched = look(Arc::clone(&data), range).await?;
    }
    Ok(vouched.and_then(|vouched| {
        let span = Span::new(vouched.range.start(), vouched.range.end());
        Some((span?, vouched.evictions))
    }))
}

async fn look(data: Arc<dyn LentData>, range: ByteRange) -> Result<Option<Vouched>> {
    let looked = tokio::task::spawn_blocking(move || data.vouch(range));
    match looked.await {
        Ok(vouched) => vouched,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime goes away, and we with it.
        Err(_) => Ok(None),
    }
}
