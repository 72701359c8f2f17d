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
use crate::data::{blocking, fill_and};
use crate::fuse::errno_of;

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
    let look = move |data: &(dyn LentData + 'static)| data.vouch(range);
    let there = blocking(Arc::clone(&data), range, look).await?;
    let Vouched { range, evictions } = match there {
        Some(vouched) => vouched,
        None => fill_and(&data, range, look).await?,
    };
    Ok(Span::new(range.start(), range.end()).map(|span| (span, evictions)))
}
