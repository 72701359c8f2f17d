//! The part of a body that is needed now.
//!
//! Invariant: holds at most one wanted piece of the blob plus one piece of the body;
//! bytes are handed out in order, without gaps, and only if all of them came.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;

use crate::source::Body;
use crate::types::ByteRange;
use crate::{Error, Result};

/// A body that starts at `at` of the blob.
pub(super) struct Window {
    body: Body,
    /// Blob offset of the first byte in `buffer`.
    at: u64,
    buffer: BytesMut,
}

impl Window {
    pub(super) fn new(body: Body, at: u64) -> Self {
        Self {
            body,
            at,
            buffer: BytesMut::new(),
        }
    }

    /// Bytes `range` of the blob. Ranges must come in order of their starts; what lies
    /// before `range` is dropped. `received` hears of every piece of the body.
    pub(super) async fn take(
        &mut self,
        range: ByteRange,
        received: impl Fn(u64),
    ) -> Result<Bytes, Short> {
        loop {
            self.skip_to(range.start());
            let here = self.at == range.start();
            let wanted = usize::try_from(range.len()).map_err(|_| Short::Ended(self.at))?;
            if here && self.buffer.len() >= wanted {
                // Copied, for pieces may overlap: the next one may start inside this.
                let piece = self.buffer.get(..wanted).unwrap_or_default();
                return Ok(Bytes::copy_from_slice(piece));
            }
            let end = self.at.saturating_add(self.buffer.len() as u64);
            match self.body.next().await {
                Some(Ok(piece)) => {
                    received(piece.len() as u64);
                    self.buffer.extend_from_slice(&piece);
                }
                Some(Err(error)) => return Err(Short::Failed(error)),
                None => return Err(Short::Ended(end)),
            }
        }
    }

    fn skip_to(&mut self, start: u64) {
        let before = start.saturating_sub(self.at);
        let have = self.buffer.len();
        let drop = usize::try_from(before).unwrap_or(have).min(have);
        self.buffer.advance(drop);
        self.at = self.at.saturating_add(drop as u64);
    }
}

/// Why a piece did not come.
pub(super) enum Short {
    /// The source failed.
    Failed(Error),
    /// The body ended at this offset of the blob.
    Ended(u64),
}
