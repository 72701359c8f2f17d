//! The part of a body that is needed now.
//!
//! Invariant: holds one wanted part of the blob, in a buffer of exactly its length, plus
//! one piece of the body as it came, longer by what two parts have in common. Bytes are
//! handed out in order, without gaps, and only if all of them came. What came together is
//! handed out together ([`Window::batch`]), so that its reader hops threads once for it.

use bytes::{Buf, Bytes};
use futures_util::StreamExt;

use crate::plan::{Member, Request};
use crate::source::Body;
use crate::types::ByteRange;
use crate::{Error, Result};

/// A body that starts at `at` of the blob.
pub(super) struct Window {
    body: Body,
    /// Blob offset of the first byte in `piece`.
    at: u64,
    /// What is left of the last piece that came.
    piece: Bytes,
}

impl Window {
    /// The rest of a body of which `piece` came already.
    pub(super) fn new(piece: Bytes, body: Body, at: u64) -> Self {
        Self { body, at, piece }
    }

    /// The first of `left`, members of `request`, with its bytes, and those behind it that
    /// came in the same piece of the body; takes them off `left`. None only if none are left.
    /// The body has to be the answer to `request`, from its first byte on.
    pub(super) async fn batch(
        &mut self,
        request: &Request,
        left: &mut &[Member],
        mut received: impl FnMut(u64),
    ) -> Result<Vec<(Member, Bytes)>, Short> {
        let mut batch = Vec::new();
        while let [member, rest @ ..] = *left {
            let range = place(request, member)?;
            let next = rest.first().map(|next| place(request, next)).transpose()?;
            let next = next.map(|next| next.start());
            let bytes = if batch.is_empty() {
                self.take(range, next, &mut received).await?
            } else {
                match self.ready(range, next) {
                    Some(bytes) => bytes,
                    None => break,
                }
            };
            batch.push((member.clone(), bytes));
            *left = rest;
        }
        Ok(batch)
    }

    /// Bytes `range` of the blob, and where the `next` ones begin, if that is known. Ranges
    /// must come in order; what lies before `range` is dropped, and so is what lies before
    /// `next` when `range` was taken. `received` hears of every piece of the body.
    async fn take(
        &mut self,
        range: ByteRange,
        next: Option<u64>,
        mut received: impl FnMut(u64),
    ) -> Result<Bytes, Short> {
        let mut taken = Vec::new();
        loop {
            self.skip_to(range.start());
            if taken.is_empty()
                && let Some(whole) = self.ready(range, next)
            {
                return Ok(whole);
            }
            let wanted = usize::try_from(range.len()).map_err(|_| Short::Ended(self.at))?;
            if self.at >= range.start() {
                taken.reserve_exact(wanted - taken.len());
                let part = self.piece.len().min(wanted - taken.len());
                taken.extend_from_slice(&self.piece.split_to(part));
                self.at = self.at.saturating_add(part as u64);
                if taken.len() == wanted {
                    self.put_back(range, &taken, next);
                    return Ok(taken.into());
                }
            }
            match self.body.next().await {
                Some(Ok(piece)) => {
                    received(piece.len() as u64);
                    self.piece = piece;
                }
                Some(Err(error)) => return Err(Short::Failed(error)),
                None => return Err(Short::Ended(self.at)),
            }
        }
    }

    /// [`Window::take`] if all of `range` is here already; shares the piece's memory.
    fn ready(&mut self, range: ByteRange, next: Option<u64>) -> Option<Bytes> {
        let before = usize::try_from(range.start().checked_sub(self.at)?).ok()?;
        let len = usize::try_from(range.len()).ok()?;
        if self.piece.len() < before.checked_add(len)? {
            return None;
        }
        self.skip_to(range.start());
        let whole = self.piece.slice(..len);
        self.skip_to(
            next.unwrap_or(range.end())
                .clamp(range.start(), range.end()),
        );
        Some(whole)
    }

    /// Has what `taken`, the bytes of `range`, and the `next` ones have in common once more.
    fn put_back(&mut self, range: ByteRange, taken: &[u8], next: Option<u64>) {
        let common = next.and_then(|next| ByteRange::new(next.max(range.start()), range.end()));
        let Some(common) = common.filter(|common| !common.is_empty()) else {
            return;
        };
        let from = usize::try_from(common.start() - range.start()).unwrap_or(usize::MAX);
        let common_bytes = taken.get(from..).unwrap_or_default();
        self.piece = [common_bytes, &self.piece].concat().into();
        self.at = common.start();
    }

    /// Drops what is here before `start`.
    fn skip_to(&mut self, start: u64) {
        let before = start.saturating_sub(self.at);
        let have = self.piece.len();
        let drop = usize::try_from(before).unwrap_or(have).min(have);
        self.piece.advance(drop);
        self.at = self.at.saturating_add(drop as u64);
    }
}

/// Where a member's bytes are in the request's answer.
fn place(request: &Request, member: &Member) -> Result<ByteRange, Short> {
    request.place(member.blob).ok_or_else(|| {
        let what = format!("bytes {} of a blob", member.blob);
        let detail = "they are in no part of the request for them";
        Short::Failed(Error::malformed(what, detail))
    })
}

/// Why a part did not come.
pub(super) enum Short {
    /// The source failed.
    Failed(Error),
    /// The body ended at this offset of the blob.
    Ended(u64),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_equal_slices_however_the_body_is_cut(
            cuts in prop::collection::vec(0_usize..400, 1..40),
            parts in prop::collection::vec((-100_i64..200, 1_u64..500), 1..12),
            start in 0_u64..1000,
        ) {
            let len: usize = cuts.iter().sum();
            let blob: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let mut rest = &blob[..];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut);
                pieces.push(Ok(Bytes::copy_from_slice(piece)));
                rest = tail;
            }
            let mut window = Window::new(Bytes::new(), futures_util::stream::iter(pieces).boxed(), start);
            let mut at = 0_u64;
            let mut ranges: Vec<ByteRange> = Vec::new();
            for (gap, len) in parts {
                let before = ranges.last().map_or(start, ByteRange::start);
                let from = (start + at).saturating_add_signed(gap).max(before);
                ranges.push(ByteRange::at(from, len).unwrap());
                at = from + len - start;
            }
            for (number, range) in ranges.iter().enumerate() {
                let next = ranges.get(number + 1).map(ByteRange::start);
                let taken = window.take(*range, next, |_| {});
                let taken = futures_util::FutureExt::now_or_never(taken);
                let from = usize::try_from(range.start() - start).unwrap();
                let to = usize::try_from(range.end() - start).unwrap();
                match taken.unwrap() {
                    Ok(bytes) => prop_assert!(bytes == blob[from..to]),
                    Err(Short::Ended(end)) => {
                        prop_assert!(to > blob.len());
                        prop_assert_eq!(end, start + blob.len() as u64);
                        break;
                    }
                    Err(Short::Failed(error)) => panic!("{error}"),
                }
            }
        }
    }
}
